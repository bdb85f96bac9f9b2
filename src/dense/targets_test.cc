#include "dense/targets.h"

#include <algorithm>
#include <cstdlib>

#include <gtest/gtest.h>

#include "base/cpu.h"
#include "hwy/targets.h"

namespace jointkv::dense {
namespace {

// The variable is read once per process, so each case has a process of its own, which must not ask before it is set.
[[noreturn]] void RunForced(const char* target, bool (*holds)(const Status&)) {
  setenv("JOINTKV_TARGET", target, 1);
  std::exit(holds(ApplyForcedTarget()) ? 0 : 1);
}

class TargetsDeathTest : public testing::Test {
 protected:
  void SetUp() override {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    if (std::getenv("JOINTKV_TARGET") != nullptr) GTEST_SKIP() << "JOINTKV_TARGET is set";
  }
};

TEST_F(TargetsDeathTest, ALesserTargetLimitsEveryDispatch) {
  EXPECT_EXIT(RunForced(hwy::TargetName(HWY_STATIC_TARGET),
                        [](const Status& status) {
                          const auto names = SupportedTargetNames();
                          return status.ok() && !HasAvx512Bf16() && HasAvx2() == (HWY_STATIC_TARGET <= HWY_AVX2) &&
                                 names.size() == 1 && names[0] == ForcedTarget();
                        }),
              testing::ExitedWithCode(0), "");
#if HWY_ARCH_X86
  if ((hwy::SupportedTargets() & HWY_AVX2) == 0) GTEST_SKIP() << "no AVX2";
  EXPECT_EXIT(RunForced("AVX2",
                        [](const Status& status) {
                          return status.ok() && !HasAvx512Bf16() && HasAvx2() && SupportedTargetNames()[0] == "avx2" &&
                                 hwy::SupportedTargets() == (hwy::SupportedTargets() & ~(HWY_AVX2 - 1));
                        }),
              testing::ExitedWithCode(0), "");
#endif
}

TEST_F(TargetsDeathTest, UnknownNamesAreRefused) {
  EXPECT_EXIT(RunForced("avx9",
                        [](const Status& status) {
                          return status.code() == StatusCode::kInvalidArgument &&
                                 status.message().find("'avx9'") != std::string::npos;
                        }),
              testing::ExitedWithCode(0), "");
}

TEST_F(TargetsDeathTest, Bf16LeavesOutTheIntegers) {
  EXPECT_EXIT(
      RunForced("avx512bf16", [](const Status& status) { return status.ok() == HasAvx512Bf16() && !HasAvx512Vnni(); }),
      testing::ExitedWithCode(0), "");
}

TEST_F(TargetsDeathTest, TheBestTargetsNeedTheCpu) {
  EXPECT_EXIT(RunForced("avx512vnni", [](const Status& status) { return status.ok() == HasAvx512Vnni(); }),
              testing::ExitedWithCode(0), "");
  EXPECT_EXIT(RunForced("avx512bf16", [](const Status& status) { return status.ok() == HasAvx512Bf16(); }),
              testing::ExitedWithCode(0), "");
}

TEST(TargetsTest, NamesAreDistinct) {
  auto names = SupportedTargetNames();
  ASSERT_FALSE(names.empty());
  std::ranges::sort(names);
  EXPECT_EQ(std::ranges::adjacent_find(names), names.end());
  EXPECT_EQ(std::ranges::count(names, "avx512bf16"), HasAvx512Bf16() ? 1 : 0);
  EXPECT_EQ(std::ranges::count(names, "avx512vnni"), HasAvx512Vnni() ? 1 : 0);
}

}  // namespace
}  // namespace jointkv::dense
