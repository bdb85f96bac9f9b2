#include "dense/gemm_int8.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/bf16.h"
#include "base/check.h"
#include "base/checked.h"
#include "base/cpu.h"
#include "dense/gemm_int8_kernels.h"

namespace jointkv::dense {

std::span<const Int8Kernel* const> Int8Kernels() {
  static const std::vector<const Int8Kernel*> kernels = [] {
    std::vector<const Int8Kernel*> all;
#if defined(__x86_64__)
    if (HasAvx512Vnni()) all.push_back(&kInt8Avx512Vnni);
    if (HasAvx2()) all.push_back(&kInt8Avx2);
#endif
    return all;
  }();
  return kernels;
}

bool HasInt8Products() { return !Int8Kernels().empty(); }

namespace {

const Int8Kernel* g_kernel_for_test = nullptr;

const Int8Kernel& Kernel() {
  if (g_kernel_for_test != nullptr) return *g_kernel_for_test;
  static const Int8Kernel* const best = [] {
    CHECK(HasInt8Products());
    return Int8Kernels().front();
  }();
  return *best;
}

}  // namespace

void SetInt8KernelForTest(const Int8Kernel* kernel) { g_kernel_for_test = kernel; }

// An odd number of cache lines, so that a row's groups spread over all sets of a cache.
ptrdiff_t Int8Rows::StrideBytes(int rows) {
  constexpr ptrdiff_t kLine = 64;
  return (CeilDiv<ptrdiff_t>(std::min(rows, kBlock) * sizeof(Int8Group), kLine) | 1) * kLine;
}

Int8Rows::Int8Rows(std::byte* memory, int rows, int k)
    : memory_(memory), groups_(k / kGroup), stride_bytes_(StrideBytes(rows)) {}

size_t Int8Rows::Bytes(int rows, int k) {
  return static_cast<size_t>(CeilDiv(rows, kBlock)) * (k / kGroup) * static_cast<size_t>(StrideBytes(rows));
}

size_t Int8Panel::bytes() const {
  const size_t groups = k / kGroup;
  return groups * GroupBytes(shape) + (shape.offsets ? CeilDiv<size_t>(groups, 2) * kPanelOffsetsBytes : 0);
}

void PackPanelInt8(const Int8Panel& format, const gguf::Tensor& tensor, int first_row, const float* values, int n_rows,
                   void* panel) {
  const Int8Kernel& kernel = Kernel();
  const GridShape& shape = format.shape;
  const int groups = format.k / kGroup;
  const size_t group_bytes = GroupBytes(shape);
  auto* bytes = static_cast<std::byte*>(panel);
  auto* out_offsets = reinterpret_cast<uint16_t*>(bytes + groups * group_bytes);
  std::memset(panel, 0, format.bytes());
  for (int column = 0; column < n_rows; ++column) {
    const std::byte* row = tensor.data + (first_row + column) * ggml_row_size(tensor.type, format.k);
    const float* weights = values + static_cast<ptrdiff_t>(column) * format.k;
    for (int group = 0; group < groups; ++group, weights += kGroup) {
      const Grid grid = ReadGrid(tensor.type, row, group, weights);
      uint8_t levels[kGroup];
      kernel.encode_group(weights, grid, shape.bits, levels);
      std::byte* out = bytes + group * group_bytes;
      const bool high_bits = column >= kPanel / 2;
      for (int i = 0; i < kGroup; ++i) {
        if (shape.bits != 4) {
          out[(i / 4 * kPanel + column) * 4 + i % 4] = std::byte{levels[i]};
        } else {
          out[(i / 4 * (kPanel / 2) + column % (kPanel / 2)) * 4 + i % 4] |=
              static_cast<std::byte>(high_bits ? levels[i] : levels[i] >> 4);
        }
      }
      reinterpret_cast<uint16_t*>(out + LevelBytes(shape))[column] = ggml_fp32_to_fp16(grid.step);
      if (shape.offsets) out_offsets[(group / 2 * kPanel + column) * 2 + group % 2] = Bf16FromF32(grid.offset);
    }
  }
}

void QuantiseRow(const float* x, int row, const Int8Rows& out) { Kernel().quantise(x, 1, nullptr, row, out); }

void QuantiseScaledRow(const float* x, float factor, const float* weight, int row, const Int8Rows& out) {
  Kernel().quantise_scaled(x, factor, weight, row, out);
}

void PanelProductInt8(const Int8PanelArgs& args) { Kernel().panel_product(args); }

}  // namespace jointkv::dense
