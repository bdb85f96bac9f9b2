// The kernels behind dense/gemm_int8.h, one for each instruction set, and how they share a panel's layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "dense/gemm_int8.h"

namespace jointkv::dense {

struct Int8Kernel {
  using Quantise = void(const float* x, float factor, const float* weight, int row, const Int8Rows& out);

  const char* name;    // of the target that it needs, as JOINTKV_TARGET has it
  Quantise* quantise;  // QuantiseRow: neither factor nor weight is used
  Quantise* quantise_scaled;
  // The levels (kGroup) of one output's weights (kGroup): (level + 2^(bits - 1)) << (8 - bits).
  void (*encode_group)(const float* weights, const Grid& grid, int bits, uint8_t* levels);
  void (*panel_product)(const Int8PanelArgs& args);
};

extern const Int8Kernel kInt8Avx512Vnni;
extern const Int8Kernel kInt8Avx2;

// Those that this CPU can run and JOINTKV_TARGET allows, best first, so the first is the one in use.
std::span<const Int8Kernel* const> Int8Kernels();

// Makes gemm_int8.h use `kernel`; null: the best again.
void SetInt8KernelForTest(const Int8Kernel* kernel);

inline constexpr int kSteps = kGroup / 4;  // of four inputs, which one dot product takes
inline constexpr size_t kStepBytes = size_t{kPanel} * 4;
inline constexpr size_t kPanelStepsBytes = size_t{kPanel} * 2;
inline constexpr size_t kPanelOffsetsBytes = size_t{kPanel} * 4;  // of two groups
// How far before the group at work the panel is read into the cache. The processor's own prefetcher gives up between
// the rows of a group.
inline constexpr int kAheadBytes = 4096;

inline size_t LevelBytes(const GridShape& shape) { return kSteps * kStepBytes / (shape.bits == 4 ? 2 : 1); }
inline size_t GroupBytes(const GridShape& shape) { return LevelBytes(shape) + kPanelStepsBytes; }

}  // namespace jointkv::dense
