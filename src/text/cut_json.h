// JSON whose end is missing, as a model leaves it that ran out of tokens.
//
// Threads: free functions, any number of threads. Owns: nothing. Fails how: never; of what is no JSON from the start
// nothing is left.
#pragma once

#include <string>
#include <string_view>

namespace jointkv::text {

// The beginning of a JSON object as an object, as far as it goes: a text that was cut off ends there, what is not
// complete otherwise is left out. "{}" where nothing is.
std::string CompletedJson(std::string_view cut);

bool IsJson(const std::string& text);

}  // namespace jointkv::text
