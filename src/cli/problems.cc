// Worked problems in arithmetic: the documents of the few-shot workload.
#include <spdlog/fmt/fmt.h>

#include <array>
#include <string_view>

#include <nlohmann/json.hpp>

#include "cli/lines.h"
#include "cli/workloads.h"
#include "text/template_guard.h"

namespace jointkv::cli {
namespace {

constexpr size_t kLineBytesMax = 1 << 20;
constexpr size_t kRowsMax = 1 << 16;

constexpr std::array<std::string_view, 10> kPeople = {"Anna",  "Ben",   "Clara", "David", "Emma",
                                                      "Felix", "Grace", "Henry", "Iris",  "Jonas"};
constexpr std::array<std::string_view, 10> kGoods = {"apples", "books",  "candles", "eggs", "flowers",
                                                     "pens",   "stamps", "tickets", "cups", "loaves"};
constexpr std::array<std::string_view, 6> kBoxes = {"boxes", "baskets", "bags", "crates", "shelves", "drawers"};

Expected<Document> ParseProblem(const std::string& line) {
  if (line.size() > kLineBytesMax) {
    return Status(StatusCode::kOutOfRange, "more than " + std::to_string(kLineBytesMax) + " bytes");
  }
  RETURN_IF_ERROR(text::CheckJsonDepth(line, "row"));
  const nlohmann::json row = nlohmann::json::parse(line, nullptr, false);
  if (!row.is_object()) return Status(StatusCode::kInvalidArgument, "not a JSON object");
  Document problem;
  for (const auto& [key, target] : {std::pair{"question", &problem.question}, {"answer", &problem.text}}) {
    const auto found = row.find(key);
    if (found == row.end() || !found->is_string()) {
      return Status(StatusCode::kInvalidArgument, std::string(key) + ": expected a string");
    }
    *target = found->get<std::string>();
  }
  if (const size_t mark = problem.text.rfind("#### "); mark != std::string::npos) {
    problem.answers = {problem.text.substr(mark + 5)};
  }
  return problem;
}

}  // namespace

Expected<std::vector<Document>> ReadProblems(const std::string& path, size_t least) {
  std::vector<Document> problems;
  Status bad;
  const Status read = ReadLines(path, kLineBytesMax, [&](int number, const std::string& line) {
    Expected<Document> problem =
        problems.size() < kRowsMax ? ParseProblem(line)
                                   : Status(StatusCode::kOutOfRange, "more than " + std::to_string(kRowsMax) + " rows");
    if (!problem.ok()) {
      const Status status = problem.status();
      bad = Status(status.code(), path + ":" + std::to_string(number) + ": " + status.message());
      return false;
    }
    problems.push_back(std::move(problem).value());
    return true;
  });
  RETURN_IF_ERROR(read);
  RETURN_IF_ERROR(bad);
  if (problems.size() < least) {
    return Status(StatusCode::kOutOfRange, "'" + path + "' has " + std::to_string(problems.size()) + " problems, " +
                                               std::to_string(least) + " are needed");
  }
  return problems;
}

std::vector<Document> MakeUpProblems(int count, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto number = [&random](int from, int to) { return from + static_cast<int>(random() % (to - from + 1)); };
  std::vector<Document> problems;
  for (int i = 0; i < count; ++i) {
    const std::string_view who = kPeople[random() % kPeople.size()];
    const std::string_view what = kGoods[random() % kGoods.size()];
    const std::string_view where = kBoxes[random() % kBoxes.size()];
    const int boxes = number(3, 20);
    const int each = number(4, 30);
    const int all = boxes * each;
    const int some = number(1, all - 1);
    Document problem;
    int result = 0;
    if (random() % 2 == 0) {
      result = all - some;
      problem.question = fmt::format(
          "{0} has {1} {2} with {3} {4} in each of them. On Monday {0} gives {5} {4} away to the neighbours. How many "
          "{4} "
          "does {0} have left?",
          who, boxes, where, each, what, some);
      problem.text = fmt::format("{0} has {1} * {2} = {3} {4} at first.\nAfter Monday {3} - {5} = {6} {4} are left.",
                                 who, boxes, each, all, what, some, result);
    } else {
      const int price = number(2, 9);
      result = (all + some) * price;
      problem.question = fmt::format(
          "{0} fills {1} {2} with {3} {4} each and finds {5} more {4} in the cellar. How many dollars does {0} get "
          "when "
          "each of the {4} is sold for ${6}?",
          who, boxes, where, each, what, some, price);
      problem.text = fmt::format(
          "{0} has {1} * {2} = {3} {4} in the {5}.\nWith those from the cellar {3} + {6} = {7} {4} are sold.\nThey "
          "bring "
          "{7} * {8} = ${9}.",
          who, boxes, each, all, what, where, some, all + some, price, result);
    }
    problem.text += fmt::format("\n#### {}", result);
    problem.answers = {std::to_string(result)};
    problems.push_back(std::move(problem));
  }
  return problems;
}

}  // namespace jointkv::cli
