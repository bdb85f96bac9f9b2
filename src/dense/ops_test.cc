#include "dense/ops.h"

#include <cmath>
#include <cstring>
#include <vector>

#include <gtest/gtest.h>

#include "base/huge_buffer.h"
#include "dense/gemm_int8.h"
#include "dense/test_matrices.h"

namespace jointkv::dense {
namespace {

struct Output {
  Output(Precision precision, int rows, int cols)
      : f32(static_cast<size_t>(rows) * cols, -7.0f), bf16(f32.size(), 0x7777) {
    view = {precision == Precision::kBf16 ? static_cast<void*>(bf16.data()) : f32.data(), precision, rows, cols};
  }
  float at(int row, int col) const {
    return view.precision == Precision::kBf16 ? F32FromBf16(view.bf16(row)[col]) : view.f32(row)[col];
  }
  // Half a unit in the last place of the stored type, relative.
  double unit() const { return view.precision == Precision::kBf16 ? kBf16Unit : kF32Unit; }

  std::vector<float> f32;
  std::vector<uint16_t> bf16;
  Activations view;
};

double InverseRms(const float* x, int n, float eps) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return 1 / std::sqrt(sum / n + eps);
}

// A sum of n squares is off by at most n units relative (all terms have one sign), its root by half of that; then come
// a root, a division and two products.
double NormUnits(int n) { return n / 2.0 + 6; }

constexpr int kSizes[] = {1, 3, 15, 16, 17, 64, 576, 579};

TEST(OpsTest, RmsNorm) {
  ThreadPool pool(2);
  ForEachTarget([&] {
    for (const int n : kSizes) {
      for (const int rows : {1, 7, 8, 20}) {
        const std::vector<float> x = RandomFloats(static_cast<size_t>(rows) * n, n, 3);
        const std::vector<float> weight = RandomFloats(n, n + 1);
        for (const Precision precision : {Precision::kF32, Precision::kBf16}) {
          Output y(precision, rows, n);
          RmsNorm(pool, x.data(), weight.data(), 1e-5f, y.view);
          for (int r = 0; r < rows; ++r) {
            const double inverse = InverseRms(x.data() + r * n, n, 1e-5f);
            for (int i = 0; i < n; ++i) {
              const double expected = x[r * n + i] * inverse * weight[i];
              ASSERT_NEAR(y.at(r, i), expected, std::abs(expected) * (NormUnits(n) * kF32Unit + y.unit()))
                  << "n " << n << " column " << i;
            }
          }
        }
      }
    }
  });
}

TEST(OpsTest, RmsNormToInt8IsTheNormQuantised) {
  if (!HasInt8Products()) GTEST_SKIP() << "no 8-bit products";
  ForEachInt8Kernel([] {
    ThreadPool pool(2);
    constexpr int n = 160;
    constexpr int kRows = 70;
    const std::vector<float> x = RandomFloats(size_t{kRows} * n, 1, 3);
    const std::vector<float> weight = RandomFloats(n, 2);
    Output y(Precision::kF32, kRows, n);
    RmsNorm(pool, x.data(), weight.data(), 1e-5f, y.view);
    HugeBuffer fused(Int8Rows::Bytes(kRows, n));
    HugeBuffer apart(Int8Rows::Bytes(kRows, n));
    RmsNorm(pool, x.data(), weight.data(), 1e-5f, {fused.data(), Precision::kInt8, kRows, n});
    const Int8Rows rows(apart.data(), kRows, n);
    for (int r = 0; r < kRows; ++r) QuantiseRow(y.view.f32(r), r, rows);
    EXPECT_EQ(std::memcmp(fused.data(), apart.data(), fused.size()), 0);
  });
}

TEST(OpsTest, RmsNormRowInPlace) {
  ForEachTarget([] {
    for (const int n : kSizes) {
      const std::vector<float> before = RandomFloats(n, n);
      const std::vector<float> weight = RandomFloats(n, n + 1);
      std::vector<float> x = before;
      RmsNormRow(x.data(), weight.data(), 1e-6f, n);
      const double inverse = InverseRms(before.data(), n, 1e-6f);
      for (int i = 0; i < n; ++i) {
        const double expected = before[i] * inverse * weight[i];
        ASSERT_NEAR(x[i], expected, std::abs(expected) * (NormUnits(n) + 1) * kF32Unit);
      }
    }
  });
}

TEST(OpsTest, RmsNormOfZerosIsZero) {
  std::vector<float> x(20, 0.0f);
  const std::vector<float> weight(20, 2.0f);
  RmsNormRow(x.data(), weight.data(), 1e-6f, 20);
  EXPECT_EQ(x, std::vector<float>(20, 0.0f));
}

TEST(OpsTest, AddRmsNorm) {
  ThreadPool pool(3);
  ForEachTarget([&] {
    for (const int n : kSizes) {
      const int rows = 19;
      const std::vector<float> before = RandomFloats(static_cast<size_t>(rows) * n, n);
      const std::vector<float> y = RandomFloats(static_cast<size_t>(rows) * n, n + 1, 10);
      const std::vector<float> weight = RandomFloats(n, n + 2);
      std::vector<float> x = before;
      AddRmsNorm(pool, x.data(), y.data(), weight.data(), 1e-5f, rows, n);
      for (int r = 0; r < rows; ++r) {
        const double inverse = InverseRms(y.data() + r * n, n, 1e-5f);
        for (int i = 0; i < n; ++i) {
          const double added = y[r * n + i] * inverse * weight[i];
          const double expected = before[r * n + i] + added;
          ASSERT_NEAR(x[r * n + i], expected, std::abs(added) * NormUnits(n) * kF32Unit + std::abs(expected) * kF32Unit)
              << "n " << n;
        }
      }
    }
  });
}

double Activation(Gate gate, double g) {
  const double x = gate == Gate::kSilu ? g : 2 * std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g);
  return g / (1 + std::exp(-x));
}

// The exponent x is formed in float, so exp(-x) carries |x| units and a few more (Highway's Exp: 1 ulp); 1 + exp(-x)
// passes on at most all of that. Once exp(-x) overflows, g times less than 2^-128 becomes zero.
double ActivationTolerance(Gate gate, double g) {
  const double x = gate == Gate::kSilu ? 0 : 3.2 * std::sqrt(2 / M_PI) * (std::abs(g) + 0.14 * std::abs(g * g * g));
  return std::abs(Activation(gate, g)) * (x + 8) * kF32Unit + (1 + std::abs(g)) * 0x1p-125;
}

TEST(OpsTest, GatedProduct) {
  // Ordinary values and the far ends, where exp() overflows.
  std::vector<float> gates = RandomFloats(60, 1, 4);
  for (const float far : {0.0f, 0.5f, 5.0f, 10.0f, 13.5f, 20.0f, 50.0f, 88.0f, 90.0f, 104.0f, 120.0f, 178.0f, 200.0f,
                          1000.0f, 3e4f, 1e6f}) {
    gates.push_back(far);
    gates.push_back(-far);
  }
  const int cols = static_cast<int>(gates.size());
  const int ld = cols + 3;
  const int rows = 5;
  std::vector<float> g(static_cast<size_t>(rows) * ld);
  const std::vector<float> u = RandomFloats(g.size(), 2);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < cols; ++c) g[r * ld + c] = gates[(c + r * 5) % cols];  // each value in a vector and in a tail
  }
  ForEachTarget([&] {
    for (const Gate gate : {Gate::kSilu, Gate::kGelu}) {
      for (const Precision precision : {Precision::kF32, Precision::kBf16}) {
        Output y(precision, rows + 2, cols + 9);
        const float outside = y.at(0, 0);
        GatedProduct(gate, g.data(), u.data(), ld, rows, cols, y.view, 1, 4);
        for (int r = 0; r < rows + 2; ++r) {
          for (int c = 0; c < cols + 9; ++c) {
            if (r < 1 || r > rows || c < 4 || c >= cols + 4) {
              ASSERT_EQ(y.at(r, c), outside);
              continue;
            }
            const float gate_value = g[(r - 1) * ld + c - 4];
            const float value = u[(r - 1) * ld + c - 4];
            const double expected = Activation(gate, gate_value) * value;
            const double tolerance =
                ActivationTolerance(gate, gate_value) * std::abs(value) + std::abs(expected) * y.unit();
            ASSERT_NEAR(y.at(r, c), expected, tolerance)
                << "gate " << static_cast<int>(gate) << " of " << gate_value << " times " << value;
          }
        }
      }
    }
  });
}

// tanh to 1e-5 relative is what a logit needs (Highway's Tanh: 4 ulp); far values saturate.
TEST(OpsTest, SoftCap) {
  ThreadPool pool(2);
  ForEachTarget([&] {
    for (const size_t n : {size_t{1}, size_t{15}, size_t{37}, size_t{40000}}) {
      std::vector<float> before = RandomFloats(n, n, 40);
      for (size_t i = 0; i < n; i += 11)
        before[i] = (i % 2 == 0 ? 1.0f : -1.0f) * std::pow(10.0f, static_cast<float>(i % 8) - 1);
      std::vector<float> x = before;
      SoftCap(pool, 30, x.data(), n);
      for (size_t i = 0; i < n; ++i) {
        const double expected = 30 * std::tanh(before[i] / 30.0);
        ASSERT_NEAR(x[i], expected, 1e-6 * (1 + std::abs(expected))) << "of " << before[i];
      }
    }
  });
}

TEST(OpsTest, Scale) {
  std::vector<float> x = {1, -2, 0.5f};
  Scale(3, x.data(), x.size());
  EXPECT_EQ(x, (std::vector<float>{3, -6, 1.5f}));
}

TEST(OpsTest, Bf16OutputIsTheRoundedF32Output) {
  ThreadPool pool(1);
  const int n = 577;
  const std::vector<float> x = RandomFloats(n, 1);
  const std::vector<float> weight = RandomFloats(n, 2);
  ForEachTarget([&] {
    Output f32(Precision::kF32, 1, n);
    Output bf16(Precision::kBf16, 1, n);
    RmsNorm(pool, x.data(), weight.data(), 1e-5f, f32.view);
    RmsNorm(pool, x.data(), weight.data(), 1e-5f, bf16.view);
    EXPECT_EQ(bf16.bf16, ToBf16(f32.f32));
  });
}

}  // namespace
}  // namespace jointkv::dense
