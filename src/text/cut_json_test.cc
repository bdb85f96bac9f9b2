#include "text/cut_json.h"

#include <gtest/gtest.h>

namespace jointkv::text {
namespace {

TEST(CutJson, KeepsWhatIsComplete) {
  for (const auto& [cut, completed] : {std::pair(R"({"city": "Bern", "days": 3})", R"({"city": "Bern", "days": 3})"),
                                       {R"({"city": "Ber)", R"({"city": "Ber"})"},
                                       {R"({"city": "a \" b)", R"({"city": "a \" b"})"},
                                       {R"({"city": "a\)", R"({"city": "a"})"},
                                       {R"({"city": "a\u00)", R"({"city": "a"})"},
                                       {R"({"city": "a\\)", R"({"city": "a\\"})"},
                                       {R"({"city": "Bern", "da)", R"({"city": "Bern"})"},
                                       {R"({"city": "Bern", "days")", R"({"city": "Bern"})"},
                                       {R"({"city": "Bern", "days": )", R"({"city": "Bern"})"},
                                       {R"({"city": "Bern", "days": tru)", R"({"city": "Bern"})"},
                                       {R"({"city": "Bern",)", R"({"city": "Bern"})"},
                                       {R"({"a": [1, {"b": [2)", R"({"a": [1, {"b": [2]}]})"},
                                       {R"({"a": [1, {"b": )", R"({"a": [1]})"},
                                       {R"({"a": "x, y)", R"({"a": "x, y"})"},
                                       {R"({"a": {"b": 1}, "c)", R"({"a": {"b": 1}})"},
                                       {R"({"cit)", "{}"},
                                       {"{", "{}"},
                                       {"", "{}"},
                                       {"[1, 2", "{}"},
                                       {"nonsense, } ]", "{}"}}) {
    EXPECT_EQ(CompletedJson(cut), completed) << cut;
  }
}

// Wherever an object is cut, an object is left.
TEST(CutJson, EveryBeginningGivesAnObject) {
  const std::string whole =
      R"({"a": [1, 2.5e3, {"b": "x\n\u00e9,]}", "c": null}], "d": {"e": true, "f": [[]]}, "g": ""})";
  for (size_t end = 0; end <= whole.size(); ++end) {
    const std::string completed = CompletedJson(std::string_view(whole).substr(0, end));
    EXPECT_TRUE(completed.starts_with('{') && IsJson(completed)) << completed;
  }
  EXPECT_EQ(CompletedJson(whole), whole);
}

}  // namespace
}  // namespace jointkv::text
