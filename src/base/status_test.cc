#include "base/status.h"

#include <memory>
#include <string>

#include <gtest/gtest.h>

namespace jointkv {
namespace {

Status Fail() { return {StatusCode::kOutOfRange, "offset 96 past 64"}; }

Expected<std::unique_ptr<int>> MakeInt(bool fail) {
  if (fail) return Fail();
  return std::make_unique<int>(7);
}

Expected<int> Twice(bool fail) {
  ASSIGN_OR_RETURN(const std::unique_ptr<int> a, MakeInt(fail));
  ASSIGN_OR_RETURN(const std::unique_ptr<int> b, MakeInt(false));
  return *a + *b;
}

Status Both(bool fail, int* reached) {
  RETURN_IF_ERROR(fail ? Fail() : Status::Ok());
  ++*reached;
  return Status::Ok();
}

TEST(StatusTest, SaysWhatWentWrong) {
  EXPECT_TRUE(Status().ok());
  EXPECT_EQ(Status::Ok().ToString(), "OK");
  EXPECT_FALSE(Fail().ok());
  EXPECT_EQ(Fail().ToString(), "OUT_OF_RANGE: offset 96 past 64");
}

TEST(StatusTest, NamesEveryCode) {
  std::string before;
  for (int code = 0; code <= static_cast<int>(StatusCode::kInternal); ++code) {
    const std::string name = StatusCodeName(static_cast<StatusCode>(code));
    EXPECT_NE(name, "UNKNOWN");
    EXPECT_NE(name, before);
    before = name;
  }
}

TEST(StatusTest, ExpectedHoldsAValueOrTheReason) {
  Expected<std::unique_ptr<int>> good = MakeInt(false);
  ASSERT_TRUE(good.ok());
  EXPECT_TRUE(good.status().ok());
  EXPECT_EQ(**good, 7);
  const std::unique_ptr<int> taken = std::move(good).value();
  EXPECT_EQ(*taken, 7);
  EXPECT_EQ(MakeInt(true).status().code(), StatusCode::kOutOfRange);
}

TEST(StatusTest, MacrosPassErrorsOn) {
  EXPECT_EQ(*Twice(false), 14);
  EXPECT_EQ(Twice(true).status().message(), "offset 96 past 64");
  int reached = 0;
  EXPECT_TRUE(Both(false, &reached).ok());
  EXPECT_FALSE(Both(true, &reached).ok());
  EXPECT_EQ(reached, 1);
}

TEST(StatusDeathTest, TakingAMissingValueIsABrokenInvariant) {
  EXPECT_DEATH(*MakeInt(true), "invariant broken: ok\\(\\)");
  EXPECT_DEATH(static_cast<void>(Expected<int>{Status::Ok()}), "invariant broken");
}

}  // namespace
}  // namespace jointkv
