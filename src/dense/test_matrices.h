// Made-up matrices and error bounds for the tests of dense/ and attention/.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/bf16.h"
#include "dense/gemm_int8_kernels.h"
#include "dense/targets.h"
#include "hwy/targets.h"

namespace jointkv::dense {

inline constexpr double kF32Unit = 0x1p-24;  // unit roundoff: half the distance from 1 to the next float
inline constexpr double kBf16Unit = 0x1p-8;

inline std::vector<float> RandomFloats(size_t n, uint64_t seed, float scale = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(n);
  for (float& value : values) value = normal(random);
  return values;
}

inline void RoundToBf16(std::vector<float>& values) {
  for (float& value : values) value = F32FromBf16(Bf16FromF32(value));
}

inline std::vector<uint16_t> ToBf16(const std::vector<float>& values) {
  std::vector<uint16_t> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) out[i] = Bf16FromF32(values[i]);
  return out;
}

// Every Highway target that this CPU can run, then the normal choice again.
inline void ForEachTarget(const std::function<void()>& f) {
  const int64_t supported = hwy::SupportedTargets() & HWY_TARGETS;
  for (int64_t targets = supported | HWY_STATIC_TARGET; targets != 0; targets &= targets - 1) {
    const int64_t target = targets & -targets;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(target);
    const testing::ScopedTrace trace(__FILE__, __LINE__, std::string("target ") + hwy::TargetName(target));
    f();
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

// Every kernel of 8-bit products that may run, then the best again.
inline void ForEachInt8Kernel(const std::function<void()>& f) {
  for (const Int8Kernel* kernel : Int8Kernels()) {
    SetInt8KernelForTest(kernel);
    const testing::ScopedTrace trace(__FILE__, __LINE__, std::string("kernel ") + kernel->name);
    f();
  }
  SetInt8KernelForTest(nullptr);
}

// JOINTKV_TARGET limits the kernels under test as it limits the program.
class ForcedTargetEnvironment : public testing::Environment {
 public:
  void SetUp() override {
    // Asking would fix the answer for the process, and targets_test.cc sets the variable later.
    if (std::getenv("JOINTKV_TARGET") == nullptr) return;
    const Status status = ApplyForcedTarget();
    ASSERT_TRUE(status.ok()) << status.ToString();
  }
};
inline testing::Environment* const kForcedTargetEnvironment =
    testing::AddGlobalTestEnvironment(new ForcedTargetEnvironment);

// A sum of products and what a chain of float additions may be off by: each of n additions rounds by at most one unit
// of a partial sum, which is at most the sum of magnitudes (Higham, Accuracy and Stability, section 3.1).
struct Dot {
  double value = 0;
  double magnitude = 0;
  int terms = 0;

  void Add(double a, double b) {
    value += a * b;
    magnitude += std::abs(a * b);
    ++terms;
  }
  double Tolerance() const { return (terms + 2) * kF32Unit * magnitude; }
};

}  // namespace jointkv::dense
