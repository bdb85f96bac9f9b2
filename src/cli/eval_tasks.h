// Whether a generated answer is right.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace jointkv::cli {

enum class Task : uint8_t { kGsm8k, kNq };

const char* TaskName(Task task);

// The last number in a text: digits with a sign, a fraction and commas between thousands ("$1,200.50" is 1200.5).
std::optional<double> LastNumber(std::string_view text);

// Lower case, no punctuation (ASCII), no articles, single spaces.
std::string NormaliseAnswer(std::string_view text);

// gsm8k: the last number is that of an answer. nq: some answer stands in the output, both normalised.
bool IsRight(Task task, std::string_view output, const std::vector<std::string>& answers);

// Of a share of right answers among n independent ones.
double BinomialError(double share, int64_t n);

}  // namespace jointkv::cli
