#include "dense/gemm_int8.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/bf16.h"
#include "base/cpu.h"
#include "base/huge_buffer.h"
#include "dense/test_matrices.h"
#include "dense/test_weight.h"

namespace jointkv::dense {
namespace {

constexpr float kUntouched = 12345.0f;
constexpr double kF16Unit = 0x1p-11;
constexpr ggml_type kTypes[] = {GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0,   GGML_TYPE_Q5_1, GGML_TYPE_Q8_0,
                                GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_IQ4_NL, GGML_TYPE_Q3_K, GGML_TYPE_Q6_K};
// Whether the levels are the file's own.
bool IsExact(ggml_type type) { return type != GGML_TYPE_Q3_K && type != GGML_TYPE_Q6_K; }

// Rows of activations and what became of them.
struct Quantised {
  Quantised(int n_rows, int inner, uint64_t seed)
      : values(RandomFloats(static_cast<size_t>(n_rows) * inner, seed)), memory(Int8Rows::Bytes(n_rows, inner)) {
    rows = Int8Rows(memory.data(), n_rows, inner);
    for (int r = 0; r < n_rows; ++r) QuantiseRow(values.data() + static_cast<ptrdiff_t>(r) * inner, r, rows);
  }

  std::vector<float> values;
  HugeBuffer memory;
  Int8Rows rows;
};

class GemmInt8Test : public testing::Test {
 protected:
  void SetUp() override {
    if (!HasAvx512Vnni()) GTEST_SKIP() << "no AVX-512 VNNI";
  }
};

// With 1, 3, 4, 5 and 18 groups, of which one is zero and one has an outlier; plain and as a norm gives them.
TEST_F(GemmInt8Test, ActivationsAreTheNearestCodes) {
  for (const int groups : {1, 3, 4, 5, 18}) {
    const int k = groups * kGroup;
    const int n_rows = 67;
    Quantised x(n_rows, k, static_cast<uint64_t>(groups));
    std::fill_n(x.values.begin() + static_cast<ptrdiff_t>(66) * k, kGroup, 0.0f);
    x.values[static_cast<size_t>(65) * k + 7] = -1000;
    const std::vector<float> weight = RandomFloats(static_cast<size_t>(k), 5);
    for (const bool scaled : {false, true}) {
      for (int r = 0; r < n_rows; ++r) {
        float* values = x.values.data() + static_cast<ptrdiff_t>(r) * k;
        if (scaled) {
          QuantiseScaledRow(values, 0.3f, weight.data(), r, x.rows);
          for (int i = 0; i < k; ++i) values[i] = values[i] * 0.3f * weight[i];
        } else {
          QuantiseRow(values, r, x.rows);
        }
      }
      for (int r = 0; r < n_rows; ++r) {
        for (int g = 0; g < groups; ++g) {
          const Int8Group& group = *x.rows.group(r, g);
          const float* values = x.values.data() + static_cast<ptrdiff_t>(r) * k + g * kGroup;
          float largest = 0;
          for (int i = 0; i < kGroup; ++i) largest = std::max(largest, std::abs(values[i]));
          ASSERT_EQ(group.scale, largest / 127);
          int sum = 0;
          for (int i = 0; i < kGroup; ++i) {
            // Half a step, and the rounding of the inverse scale at up to 127 steps.
            ASSERT_NEAR(values[i], group.scale * group.codes[i], group.scale * (0.5 + 127 * 3 * kF32Unit));
            sum += group.codes[i];
          }
          ASSERT_EQ(group.start, -128 * sum);
          if (g % 2 == 0 && g + 1 < groups) continue;
          const uint16_t own = Bf16FromF32(group.scale * static_cast<float>(sum));
          ASSERT_EQ(static_cast<uint16_t>(g % 2 == 0 ? group.pair_sums : group.pair_sums >> 16), own);
        }
      }
    }
  }
}

TEST_F(GemmInt8Test, GridsAreTheFiles) {
  constexpr int k = 512;
  for (const ggml_type type : kTypes) {
    const Weight weight(type, k, 6, 3);
    const GridShape shape = GridShapeOf(type);
    const double middle = 1 << (shape.bits - 1);
    for (int row = 0; row < 6; ++row) {
      const std::byte* bytes = weight.bytes.data() + static_cast<size_t>(row) * ggml_row_size(type, k);
      for (int g = 0; g < k / kGroup; ++g) {
        const float* values = weight.values.data() + static_cast<ptrdiff_t>(row) * k + g * kGroup;
        const Grid grid = ReadGrid(type, bytes, g, values);
        const double step = std::abs(grid.step);
        if (!shape.offsets) {
          ASSERT_EQ(grid.offset, 0);
        }
        for (int i = 0; i < kGroup; ++i) {
          const double level = grid.step == 0 ? 0 : std::round((values[i] - grid.offset) / grid.step);
          ASSERT_GE(level, -middle) << ggml_type_name(type);
          ASSERT_LT(level, middle) << ggml_type_name(type);
          const double rounding = 4 * kF32Unit * (std::abs(values[i]) + std::abs(grid.offset) + middle * step);
          ASSERT_NEAR(grid.step * level + grid.offset, values[i], IsExact(type) ? rounding : 0.51 * step)
              << ggml_type_name(type) << " row " << row << " group " << g;
        }
      }
    }
  }
  EXPECT_EQ(GridShapeOf(GGML_TYPE_F16).bits, 0);
  EXPECT_EQ(GridShapeOf(GGML_TYPE_BF16).bits, 0);
  EXPECT_EQ(GridShapeOf(GGML_TYPE_F32).bits, 0);
}

struct Product {
  ggml_type type;
  int k;
  int cols;
  bool bias;
  bool accumulate;
  int rows;

  Weight weight{type, k, cols + 2, 11};
  Quantised x{rows, k, 12};
  std::vector<float> b = RandomFloats(kPanel, 13);
  int ldc = cols + 5;
  std::vector<float> before = RandomFloats(static_cast<size_t>(rows) * ldc, 14);
  Int8Panel format{GridShapeOf(type), k};
  HugeBuffer panel{format.bytes()};

  void Pack() {
    PackPanelInt8(format, weight.tensor, 2, weight.values.data() + static_cast<ptrdiff_t>(2) * k, cols, panel.data());
    for (int r = 0; r < rows; ++r) std::fill_n(before.begin() + static_cast<ptrdiff_t>(r) * ldc + cols, 5, kUntouched);
  }

  std::vector<float> Run(int first, int n) const {
    std::vector<float> c(before.begin() + static_cast<ptrdiff_t>(first) * ldc,
                         before.begin() + static_cast<ptrdiff_t>(first + n) * ldc);
    PanelProductInt8(
        {&x.rows, first, n, format, panel.data(), c.data(), ldc, cols, bias ? b.data() : nullptr, accumulate});
    return c;
  }

  // Against the weights as the file has them and the activations as they were quantised.
  void Check() const {
    const std::vector<float> c = Run(0, rows);
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < ldc; ++j) {
        const float value = c[static_cast<size_t>(r) * ldc + j];
        if (j >= cols) {
          ASSERT_EQ(value, kUntouched) << "row " << r << " column " << j << " is outside";
          continue;
        }
        const std::byte* row_bytes = weight.bytes.data() + static_cast<size_t>(j + 2) * ggml_row_size(type, k);
        const float* w = weight.values.data() + static_cast<ptrdiff_t>(j + 2) * k;
        Dot dot;
        double storage = 0;  // steps are kept in f16, offsets and what they are multiplied with in bf16
        for (int g = 0; g < k / kGroup; ++g) {
          const Int8Group& group = *x.rows.group(r, g);
          const Grid grid = ReadGrid(type, row_bytes, g, w + g * kGroup);
          int sum = 0;
          for (int i = 0; i < kGroup; ++i) {
            const double code = static_cast<double>(group.scale) * group.codes[i];
            const double level_part = w[g * kGroup + i] - static_cast<double>(grid.offset);
            dot.Add(code, level_part);
            dot.Add(code, grid.offset);
            sum += group.codes[i];
            storage += std::abs(code) * (std::abs(level_part) * kF16Unit + (IsExact(type) ? 0 : 0.51 * grid.step));
          }
          storage += std::abs(group.scale * sum * grid.offset) * 2.01 * kBf16Unit;
        }
        if (bias) dot.Add(b[j], 1);
        if (accumulate) dot.Add(before[static_cast<size_t>(r) * ldc + j], 1);
        ASSERT_NEAR(value, dot.value, dot.Tolerance() + storage)
            << ggml_type_name(type) << " row " << r << " column " << j << " rows " << rows << " k " << k;
      }
    }
  }

  void CheckRowsAreIndependent() const {
    const std::vector<float> all = Run(0, rows);
    for (int r = 0; r < rows; ++r) {
      // The same row alone in a call of its own.
      Product one{type, k, cols, bias, accumulate, 1};
      one.x.values.assign(x.values.begin() + static_cast<ptrdiff_t>(r) * k,
                          x.values.begin() + static_cast<ptrdiff_t>(r + 1) * k);
      QuantiseRow(one.x.values.data(), 0, one.x.rows);
      one.Pack();
      one.before.assign(before.begin() + static_cast<ptrdiff_t>(r) * ldc,
                        before.begin() + static_cast<ptrdiff_t>(r + 1) * ldc);
      const std::vector<float> alone = one.Run(0, 1);
      ASSERT_TRUE(std::equal(alone.begin(), alone.end(), all.begin() + static_cast<ptrdiff_t>(r) * ldc)) << "row " << r;
    }
    if (rows > Int8Rows::kBlock) {
      const std::vector<float> rest = Run(Int8Rows::kBlock, rows - Int8Rows::kBlock);
      EXPECT_TRUE(std::equal(rest.begin(), rest.end(), all.begin() + static_cast<ptrdiff_t>(Int8Rows::kBlock) * ldc));
    }
  }
};

TEST_F(GemmInt8Test, IsTheProduct) {
  for (const ggml_type type : kTypes) {
    for (const int k : {32, 96, 256, 768}) {
      if (k % ggml_blck_size(type) != 0) continue;
      for (const int cols : {1, 7, 16, 17, 31, 32}) {
        for (const int flags : {0, 1, 2, 3}) {
          for (const int rows : {1, 5, 16, 65}) {
            Product product{type, k, cols, (flags & 1) != 0, (flags & 2) != 0, rows};
            product.Pack();
            product.Check();
          }
        }
      }
    }
  }
}

TEST_F(GemmInt8Test, ARowIsTheSameInAnyBatch) {
  for (const ggml_type type : {GGML_TYPE_Q4_1, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1}) {
    for (const int rows : {2, 16, 130}) {
      Product product{type, 96, 29, true, true, rows};
      product.Pack();
      product.CheckRowsAreIndependent();
    }
  }
}

// A file may hold any bits as scales: results are then meaningless, but nothing may trap.
TEST_F(GemmInt8Test, ScalesThatAreNotNumbersDoNoHarm) {
  for (const ggml_type type : kTypes) {
    Product product{type, 256, 32, false, false, 3};
    std::ranges::fill(product.weight.bytes, std::byte{0xff});
    ASSERT_TRUE(gguf::Dequantize(product.weight.tensor, 0, 34, product.weight.values.data()).ok());
    product.Pack();
    product.Run(0, 3);
  }
}

}  // namespace
}  // namespace jointkv::dense
