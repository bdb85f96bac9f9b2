#include "dense/gemm.h"

#include <algorithm>
#include <vector>

#include <gtest/gtest.h>

#include "base/cpu.h"
#include "dense/activations.h"
#include "dense/test_matrices.h"

namespace jointkv::dense {
namespace {

constexpr float kUntouched = 12345.0f;
constexpr int kRowsMax = 30;

struct Product {
  int k = 0;
  int cols = 0;
  bool bias = false;
  bool accumulate = false;
  Precision precision = Precision::kF32;

  std::vector<float> a = {};       // (kRowsMax, k)
  std::vector<float> w = {};       // (cols, k)
  std::vector<float> b = {};       // (kPanel)
  std::vector<float> before = {};  // (kRowsMax, ldc)
  std::vector<uint16_t> a16 = {};
  std::vector<float> panel = {};  // bf16 or f32
  int lda = 0;
  int ldc = 0;

  void Fill(uint64_t seed) {
    lda = k + 6;
    ldc = cols + 5;
    a = RandomFloats(static_cast<size_t>(kRowsMax) * lda, seed);
    w = RandomFloats(static_cast<size_t>(cols) * k, seed + 1);
    b = RandomFloats(kPanel, seed + 2);
    before.assign(static_cast<size_t>(kRowsMax) * ldc, kUntouched);
    const std::vector<float> start = RandomFloats(static_cast<size_t>(kRowsMax) * cols, seed + 3);
    for (int r = 0; r < kRowsMax; ++r) std::copy_n(start.begin() + r * cols, cols, before.begin() + r * ldc);
    panel.resize(static_cast<size_t>(k) * kPanel);
    if (precision == Precision::kBf16) {
      RoundToBf16(a);
      RoundToBf16(w);
      a16 = ToBf16(a);
      PackPanelBf16(w.data(), cols, k, reinterpret_cast<uint16_t*>(panel.data()));
    } else {
      PackPanelF32(w.data(), cols, k, panel.data());
    }
  }

  // Rows [first, first + rows).
  std::vector<float> Run(int first, int rows) const {
    std::vector<float> c(before.begin() + static_cast<ptrdiff_t>(first) * ldc, before.end());
    PanelArgs args;
    args.a = precision == Precision::kBf16 ? static_cast<const void*>(a16.data() + static_cast<ptrdiff_t>(first) * lda)
                                           : a.data() + static_cast<ptrdiff_t>(first) * lda;
    args.lda = lda;
    args.rows = rows;
    args.k = k;
    args.panel = panel.data();
    args.next_panel = rows % 2 == 0 ? panel.data() : nullptr;
    args.c = c.data();
    args.ldc = ldc;
    args.cols = cols;
    args.bias = bias ? b.data() : nullptr;
    args.accumulate = accumulate;
    precision == Precision::kBf16 ? PanelProductBf16(args) : PanelProductF32(args);
    return c;
  }

  void Check(int rows) const {
    const std::vector<float> c = Run(0, rows);
    for (int r = 0; r < kRowsMax; ++r) {
      for (int j = 0; j < ldc; ++j) {
        const float value = c[r * ldc + j];
        if (r >= rows || j >= cols) {
          ASSERT_EQ(value, before[r * ldc + j]) << "row " << r << " column " << j << " is outside";
          continue;
        }
        Dot dot;
        for (int i = 0; i < k; ++i) dot.Add(a[r * lda + i], w[static_cast<size_t>(j) * k + i]);
        if (bias) dot.Add(b[j], 1);
        if (accumulate) dot.Add(before[r * ldc + j], 1);
        ASSERT_NEAR(value, dot.value, dot.Tolerance())
            << "row " << r << " column " << j << " rows " << rows << " k " << k;
      }
    }
  }

  void CheckRowsAreIndependent() const {
    const std::vector<float> all = Run(0, kRowsMax);
    for (int first = 0; first < kRowsMax; ++first) {
      for (int rows = 1; first + rows <= kRowsMax; rows += 1 + rows / 3) {
        const std::vector<float> some = Run(first, rows);
        ASSERT_TRUE(std::equal(some.begin(), some.begin() + static_cast<ptrdiff_t>(rows) * ldc,
                               all.begin() + static_cast<ptrdiff_t>(first) * ldc))
            << rows << " rows from " << first;
      }
    }
  }
};

void CheckProducts(Precision precision) {
  uint64_t seed = 1;
  for (const int k : {2, 6, 64, 576}) {
    for (const int cols : {1, 7, 8, 15, 16, 17, 31, 32}) {
      for (const int flags : {0, 1, 2, 3}) {
        Product product{
            .k = k, .cols = cols, .bias = (flags & 1) != 0, .accumulate = (flags & 2) != 0, .precision = precision};
        product.Fill(seed += 10);
        for (int rows = 1; rows <= kRowsMax; ++rows) product.Check(rows);
        product.CheckRowsAreIndependent();
      }
    }
  }
}

TEST(GemmTest, F32OnEveryTarget) {
  ForEachTarget([] { CheckProducts(Precision::kF32); });
}

TEST(GemmTest, F32TakesAnOddInnerSize) {
  ForEachTarget([] {
    Product product{.k = 33, .cols = 29};
    product.Fill(5);
    product.Check(13);
  });
}

TEST(GemmTest, Bf16) {
  if (!HasAvx512Bf16()) GTEST_SKIP() << "no AVX-512 BF16";
  CheckProducts(Precision::kBf16);
}

// A lane is a column, so cutting a panel into other vectors changes no chain of additions.
TEST(GemmTest, F32IsBitEqualOnTargetsWithFusedMultiplyAdd) {
  Product product{.k = 100, .cols = 30, .bias = true};
  product.Fill(9);
  std::vector<std::vector<float>> results;
  ForEachTarget([&] {
    const int64_t target = hwy::SupportedTargets();
#if HWY_ARCH_X86
    if (target > HWY_AVX2) return;  // multiplies, then adds
#endif
    (void)target;
    results.push_back(product.Run(0, 11));
  });
  for (const std::vector<float>& result : results) EXPECT_EQ(result, results[0]);
}

TEST(GemmTest, PackingFillsMissingColumnsWithZero) {
  const int k = 6;
  const std::vector<float> rows = RandomFloats(3 * k, 3);
  std::vector<float> panel(k * kPanel, kUntouched);
  std::vector<uint16_t> panel16(k * kPanel, 0x4242);
  PackPanelF32(rows.data(), 3, k, panel.data());
  PackPanelBf16(rows.data(), 3, k, panel16.data());
  for (int i = 0; i < k; ++i) {
    for (int column = 0; column < kPanel; ++column) {
      const float expected = column < 3 ? rows[column * k + i] : 0.0f;
      EXPECT_EQ(panel[i * kPanel + column], expected);
      EXPECT_EQ(panel16[(i / 2 * kPanel + column) * 2 + i % 2], Bf16FromF32(expected));
    }
  }
}

}  // namespace
}  // namespace jointkv::dense
