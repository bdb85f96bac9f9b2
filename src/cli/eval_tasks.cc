#include "cli/eval_tasks.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>

namespace jointkv::cli {
namespace {

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

}  // namespace

const char* TaskName(Task task) { return task == Task::kGsm8k ? "gsm8k" : "nq"; }

std::optional<double> LastNumber(std::string_view text) {
  const auto last = std::find_if(text.rbegin(), text.rend(), IsDigit);
  if (last == text.rend()) return std::nullopt;
  const auto end = static_cast<size_t>(text.rend() - last);
  size_t begin = end - 1;
  const auto separates = [text](size_t at) {
    return (text[at] == ',' || text[at] == '.') && at > 0 && IsDigit(text[at - 1]);
  };
  while (begin > 0 && (IsDigit(text[begin - 1]) || separates(begin - 1))) --begin;
  std::string digits(text.substr(begin, end - begin));
  std::erase(digits, ',');
  const bool negative = begin > 0 && text[begin - 1] == '-' && (begin == 1 || !IsDigit(text[begin - 2]));
  double value = 0;
  const auto [at, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc() || at != digits.data() + digits.size()) return std::nullopt;
  return negative ? -value : value;
}

std::string NormaliseAnswer(std::string_view text) {
  std::string result;
  std::string word;
  const auto take = [&] {
    if (!word.empty() && word != "a" && word != "an" && word != "the") result += (result.empty() ? "" : " ") + word;
    word.clear();
  };
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (std::isspace(byte) != 0) {
      take();
    } else if (std::ispunct(byte) == 0) {
      word += static_cast<char>(std::tolower(byte));
    }
  }
  take();
  return result;
}

bool IsRight(Task task, std::string_view output, const std::vector<std::string>& answers) {
  const auto right = [&](const std::string& answer) {
    if (task == Task::kGsm8k) {
      const std::optional<double> given = LastNumber(output);
      return given.has_value() && given == LastNumber(answer);
    }
    const std::string wanted = NormaliseAnswer(answer);
    // Whole words: "ten" is not in "often".
    return !wanted.empty() && (" " + NormaliseAnswer(output) + " ").find(" " + wanted + " ") != std::string::npos;
  };
  return std::ranges::any_of(answers, right);
}

double BinomialError(double share, int64_t n) {
  return n > 0 ? std::sqrt(share * (1 - share) / static_cast<double>(n)) : 0;
}

}  // namespace jointkv::cli
