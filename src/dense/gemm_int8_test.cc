#include "dense/gemm_int8.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/bf16.h"
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
    if (!HasInt8Products()) GTEST_SKIP() << "no 8-bit products";
  }
};

// With 1, 3, 4, 5 and 18 groups, of which one is zero and one has an outlier; plain and as a norm gives them.
TEST_F(GemmInt8Test, ActivationsAreTheNearestCodes) {
  ForEachInt8Kernel([] {
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
  });
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
  ForEachInt8Kernel([] {
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
  });
}

TEST_F(GemmInt8Test, ARowIsTheSameInAnyBatch) {
  ForEachInt8Kernel([] {
    for (const ggml_type type : {GGML_TYPE_Q4_1, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1}) {
      for (const int rows : {2, 16, 130}) {
        Product product{type, 96, 29, true, true, rows};
        product.Pack();
        product.CheckRowsAreIndependent();
      }
    }
  });
}

// Rows and a panel of the largest numbers that there are, and of any; what is in them by the format's description.
struct Extremes {
  static constexpr int kRows = 67;

  GridShape shape;
  int groups;
  std::mt19937_64 random{7};
  std::vector<int> levels = {};     // (kPanel, groups, kGroup)
  std::vector<float> steps = {};    // (kPanel, groups)
  std::vector<float> offsets = {};  // (kPanel, groups)
  HugeBuffer panel{Int8Panel{shape, groups* kGroup}.bytes()};
  HugeBuffer memory{Int8Rows::Bytes(kRows, groups* kGroup)};
  Int8Rows rows{memory.data(), kRows, groups* kGroup};

  int Any(int least, int most) { return std::uniform_int_distribution(least, most)(random); }
  float AnyFloat() { return std::normal_distribution<float>()(random); }

  void Fill() {
    std::memset(panel.data(), 0, panel.size());
    const size_t level_bytes = size_t{kGroup} * kPanel / (shape.bits == 4 ? 2 : 1);
    const size_t group_bytes = level_bytes + kPanel * sizeof(uint16_t);
    const int middle = 1 << (shape.bits - 1);
    for (int column = 0; column < kPanel; ++column) {
      for (int g = 0; g < groups; ++g) {
        std::byte* group = panel.data() + g * group_bytes;
        for (int i = 0; i < kGroup; ++i) {
          const int level[] = {-middle, middle - 1, Any(-middle, middle - 1)};
          levels.push_back(level[(g + column) % 3]);
          const auto code = static_cast<unsigned>(levels.back() + middle) << (8 - shape.bits);
          if (shape.bits == 4) {
            const int half = kPanel / 2;
            group[(i / 4 * half + column % half) * 4 + i % 4] |= std::byte(column < half ? code >> 4 : code);
          } else {
            group[(i / 4 * kPanel + column) * 4 + i % 4] = std::byte(code);
          }
        }
        const ggml_fp16_t step = ggml_fp32_to_fp16(AnyFloat());
        std::memcpy(group + level_bytes + column * sizeof(step), &step, sizeof(step));
        steps.push_back(ggml_fp16_to_fp32(step));
        offsets.push_back(0);
        if (!shape.offsets) continue;
        const uint16_t offset = Bf16FromF32(AnyFloat());
        offsets.back() = F32FromBf16(offset);
        std::memcpy(panel.data() + groups * group_bytes + ((g / 2 * kPanel + column) * 2 + g % 2) * sizeof(offset),
                    &offset, sizeof(offset));
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < groups; ++g) {
        Int8Group& group = *rows.group(r, g);
        int sum = 0;
        for (int i = 0; i < kGroup; ++i) {
          const int code[] = {127, -127, i % 2 == 0 ? 127 : -127, i % 4 < 2 ? -127 : 127, Any(-127, 127)};
          group.codes[i] = static_cast<int8_t>(code[(r + g) % 5]);
          sum += group.codes[i];
        }
        group.scale = std::abs(AnyFloat());
        group.start = -128 * sum;
        const uint32_t own = Bf16FromF32(group.scale * static_cast<float>(sum));
        group.pair_sums = g % 2 == 0 ? own : (rows.group(r, g - 1)->pair_sums & 0xffffu) | own << 16;
      }
    }
  }

  // One output as the header says: in order of groups, each an exact sum.
  void Check(float value, int row, int column) const {
    float sum = 0;
    Dot magnitudes;
    for (int g = 0; g < groups; ++g) {
      const Int8Group& group = *rows.group(row, g);
      const int at = column * groups + g;
      int dot = 0;
      for (int i = 0; i < kGroup; ++i) dot += levels[at * kGroup + i] * group.codes[i];
      sum = std::fma(static_cast<float>(dot), steps[at] * group.scale, sum);
      magnitudes.Add(dot, steps[at] * group.scale);
      if (g % 2 == 0 && g + 1 < groups) continue;
      if (g % 2 == 1) {
        sum = std::fma(offsets[at], F32FromBf16(static_cast<uint16_t>(group.pair_sums >> 16)), sum);
        magnitudes.Add(offsets[at], F32FromBf16(static_cast<uint16_t>(group.pair_sums >> 16)));
      }
      const float before = F32FromBf16(static_cast<uint16_t>(group.pair_sums));
      sum = std::fma(offsets[at - g % 2], before, sum);
      magnitudes.Add(offsets[at - g % 2], before);
    }
    // AVX-512's own products of pairs of bf16 may round elsewhere.
    const double tolerance = shape.offsets ? 2 * magnitudes.Tolerance() : 0;
    ASSERT_NEAR(value, sum, tolerance) << "row " << row << " column " << column;
  }
};

TEST_F(GemmInt8Test, SumsOfExtremesAreExact) {
  ForEachInt8Kernel([] {
    for (const int bits : {4, 5, 8}) {
      for (const bool with_offsets : {false, true}) {
        for (const int groups : {1, 2, 7}) {
          Extremes extremes{{bits, with_offsets}, groups};
          extremes.Fill();
          // Each number of rows that a kernel may take at once, and more than a block.
          for (const int rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, Extremes::kRows}) {
            std::vector<float> c(static_cast<size_t>(rows) * kPanel);
            PanelProductInt8({&extremes.rows,
                              0,
                              rows,
                              {{bits, with_offsets}, groups * kGroup},
                              extremes.panel.data(),
                              c.data(),
                              kPanel});
            for (int r = 0; r < rows; ++r) {
              for (int column = 0; column < kPanel; ++column) extremes.Check(c[r * kPanel + column], r, column);
            }
          }
        }
      }
    }
  });
}

TEST_F(GemmInt8Test, KernelsWriteTheSameRowsAndPanels) {
  constexpr int k = 5 * 256;
  const Quantised best(70, k, 1);
  for (const ggml_type type : kTypes) {
    const Weight weight(type, k, kPanel, 3);
    const Int8Panel format = {GridShapeOf(type), k};
    const auto pack = [&](HugeBuffer& panel) {
      PackPanelInt8(format, weight.tensor, 0, weight.values.data(), kPanel, panel.data());
    };
    HugeBuffer expected(format.bytes());
    pack(expected);
    ForEachInt8Kernel([&] {
      HugeBuffer panel(format.bytes());
      pack(panel);
      EXPECT_EQ(std::memcmp(panel.data(), expected.data(), format.bytes()), 0) << ggml_type_name(type);
    });
  }
  ForEachInt8Kernel([&] {
    const Quantised x(70, k, 1);
    for (int r = 0; r < 70; ++r) {
      for (int g = 0; g < k / kGroup; ++g) {
        const Int8Group& a = *x.rows.group(r, g);
        const Int8Group& b = *best.rows.group(r, g);
        ASSERT_EQ(std::memcmp(a.codes, b.codes, sizeof(a.codes)), 0) << "row " << r << " group " << g;
        ASSERT_EQ(a.scale, b.scale);
        ASSERT_EQ(a.start, b.start);
        if (g % 2 == 1) {
          ASSERT_EQ(a.pair_sums, b.pair_sums);
        }
      }
    }
  });
}

// A file may hold any bits as scales: results are then meaningless, but nothing may trap.
TEST_F(GemmInt8Test, ScalesThatAreNotNumbersDoNoHarm) {
  ForEachInt8Kernel([] {
    for (const ggml_type type : kTypes) {
      Product product{type, 256, 32, false, false, 3};
      std::ranges::fill(product.weight.bytes, std::byte{0xff});
      ASSERT_TRUE(gguf::Dequantize(product.weight.tensor, 0, 34, product.weight.values.data()).ok());
      product.Pack();
      product.Run(0, 3);
    }
  });
}

}  // namespace
}  // namespace jointkv::dense
