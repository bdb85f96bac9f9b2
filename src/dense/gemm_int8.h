// Products of 8-bit integers: rows of quantised activations times one packed panel of a quantised matrix.
//
// Both sides are quantised in groups of kGroup inputs: w = step * level + offset (weight_grid.h), x = scale * code with
// code = x / scale rounded to [-127, 127], scale = max|x| / 127. A panel is kPanel outputs, a SIMD lane is an output:
//   groups    [k / kGroup] of
//     levels  [kGroup / 4][kPanel][4] as unsigned bytes (level + 2^(bits - 1)) << (8 - bits); 4 bits: two halves of the
//             columns share a byte, columns 0 to 15 in the low bits
//     steps   [kPanel] f16
//   offsets   [k / kGroup / 2 pairs][kPanel][2] bf16, where the type has them
// Sums are exact within a group; groups are added in order in f32, whatever the number of rows, so a row's result never
// depends on its batch. All requires HasInt8Products().
// One kernel for each instruction set: gemm_int8_vnni.cc, gemm_int8_avx2.cc, chosen in gemm_int8.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dense/gemm.h"
#include "dense/weight_grid.h"
#include "gguf/gguf_file.h"

namespace jointkv::dense {

// AVX-512 VNNI with BF16, or AVX2 with FMA and F16C, as far as JOINTKV_TARGET allows (base/cpu.h).
bool HasInt8Products();

// One row's group of activations.
struct alignas(16) Int8Group {
  int8_t codes[kGroup];
  float scale;
  int32_t start;       // -128 times the sum of the codes: undoes that levels are stored unsigned
  uint32_t pair_sums;  // of each odd or last group: scale times the sum of the codes as bf16, the group before it in
                       // the low half (of an even one: itself in the low half)
};

// Activations after quantisation, in memory of the caller's: blocks of kBlock rows, or all where there are fewer, by
// group and then row.
class Int8Rows {
 public:
  static constexpr int kBlock = 64;  // rows whose sums stay in the first-level cache

  Int8Rows() = default;
  Int8Rows(std::byte* memory, int rows, int k);
  static size_t Bytes(int rows, int k);

  int groups() const { return groups_; }
  // Consecutive rows of the block lie side by side.
  Int8Group* group(int row, int group) const {
    const ptrdiff_t block = row / kBlock;
    return reinterpret_cast<Int8Group*>(memory_ + (block * groups_ + group) * stride_bytes_) + row % kBlock;
  }

 private:
  static ptrdiff_t StrideBytes(int rows);

  std::byte* memory_ = nullptr;
  int groups_ = 0;
  ptrdiff_t stride_bytes_ = 0;  // from a block's group to the next
};

// x: (k) the row, or before it is multiplied with `factor` and weight (k).
void QuantiseRow(const float* x, int row, const Int8Rows& out);
void QuantiseScaledRow(const float* x, float factor, const float* weight, int row, const Int8Rows& out);

struct Int8Panel {
  GridShape shape;
  int k = 0;

  size_t bytes() const;
};

// The tensor's rows from first_row on, with their values (n_rows <= kPanel, k) in f32.
void PackPanelInt8(const Int8Panel& format, const gguf::Tensor& tensor, int first_row, const float* values, int n_rows,
                   void* panel);

struct Int8PanelArgs {
  const Int8Rows* a = nullptr;
  int first_row = 0;  // a multiple of Int8Rows::kBlock
  int rows = 0;
  Int8Panel format;
  const std::byte* panel = nullptr;
  float* c = nullptr;           // (rows, cols)
  ptrdiff_t ldc = 0;            // elements
  int cols = kPanel;            // columns to write, <= kPanel
  const float* bias = nullptr;  // (kPanel) or null
  bool accumulate = false;      // c += a * panel instead of c =
};

void PanelProductInt8(const Int8PanelArgs& args);

}  // namespace jointkv::dense
