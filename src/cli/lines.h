// Lines of a text file that may be hostile: no line takes more memory than its limit.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

#include "base/status.h"

namespace jointkv::cli {

// Calls take(line number, line) for each line that is not blank, until it returns false. "-" is standard input. Of a
// line above the limit only the first line_bytes_max + 1 bytes are kept: refusing it is the caller's part. Fails with
// kNotFound or kIo.
Status ReadLines(const std::string& path, size_t line_bytes_max,
                 const std::function<bool(int number, const std::string& line)>& take);

}  // namespace jointkv::cli
