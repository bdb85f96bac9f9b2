#include "base/checked.h"

#include <limits>

#include <gtest/gtest.h>

namespace jointkv {
namespace {

TEST(CheckedTest, RefusesWrapAround) {
  constexpr size_t kMax = std::numeric_limits<size_t>::max();
  EXPECT_EQ(CheckedAdd<size_t>(kMax - 1, 1), kMax);
  EXPECT_EQ(CheckedAdd<size_t>(kMax, 1), std::nullopt);
  EXPECT_EQ(CheckedMul<size_t>(kMax / 2, 2), kMax - 1);
  EXPECT_EQ(CheckedMul<size_t>(kMax / 2 + 1, 2), std::nullopt);
  EXPECT_EQ(CheckedMul<int64_t>(std::numeric_limits<int64_t>::min(), -1), std::nullopt);
  EXPECT_EQ(CheckedAdd<int32_t>(std::numeric_limits<int32_t>::min(), -1), std::nullopt);
}

TEST(CheckedTest, RoundsUp) {
  EXPECT_EQ(CeilDiv(0, 4), 0);
  EXPECT_EQ(CeilDiv(1, 4), 1);
  EXPECT_EQ(CeilDiv(8, 4), 2);
  EXPECT_EQ(RoundUp(9, 4), 12);
  EXPECT_EQ(RoundUp<size_t>(64, 64), size_t{64});
}

}  // namespace
}  // namespace jointkv
