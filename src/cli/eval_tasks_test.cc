#include "cli/eval_tasks.h"

#include <gtest/gtest.h>

namespace jointkv::cli {
namespace {

TEST(EvalTasksTest, FindsTheLastNumber) {
  EXPECT_EQ(LastNumber("3 + 4 = 7. So 12"), 12);
  EXPECT_EQ(LastNumber("#### 1,234,567."), 1234567);
  EXPECT_EQ(LastNumber("costs $18.50, he said"), 18.5);
  EXPECT_EQ(LastNumber("minus: -4"), -4);
  EXPECT_EQ(LastNumber("5-4"), 4);
  EXPECT_EQ(LastNumber("1, 2"), 2);
  EXPECT_EQ(LastNumber("no number"), std::nullopt);
  EXPECT_EQ(LastNumber(""), std::nullopt);
  EXPECT_EQ(LastNumber("version 1.2.3"), std::nullopt);
}

TEST(EvalTasksTest, NormalisesAnswers) {
  EXPECT_EQ(NormaliseAnswer(" The  U.S. -- an\nAnswer, a test! "), "us answer test");
  EXPECT_EQ(NormaliseAnswer("the"), "");
}

TEST(EvalTasksTest, Judges) {
  EXPECT_TRUE(IsRight(Task::kGsm8k, "She makes 9 * 2 = $18 a day.\n#### 18", {" 18"}));
  EXPECT_TRUE(IsRight(Task::kGsm8k, "#### 70000.00", {"70,000"}));
  EXPECT_FALSE(IsRight(Task::kGsm8k, "18 and then 19", {"18"}));
  EXPECT_FALSE(IsRight(Task::kGsm8k, "none", {"18"}));
  EXPECT_FALSE(IsRight(Task::kGsm8k, "18", {}));
  EXPECT_TRUE(IsRight(Task::kNq, "It was released on May 18, 2018, in the U.S.", {"x", "may 18 2018"}));
  EXPECT_FALSE(IsRight(Task::kNq, "often", {"ten"}));
  EXPECT_FALSE(IsRight(Task::kNq, "anything", {"the"}));
}

TEST(EvalTasksTest, BinomialErrorOfAHalf) {
  EXPECT_DOUBLE_EQ(BinomialError(0.5, 100), 0.05);
  EXPECT_EQ(BinomialError(0, 100), 0);
  EXPECT_EQ(BinomialError(0.5, 0), 0);
}

}  // namespace
}  // namespace jointkv::cli
