#include "dense/weight_grid.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace jointkv::dense {
namespace {

constexpr int kSuperBlock = 256;  // of the K types

float HalfAt(const std::byte* at) {
  ggml_fp16_t half;
  std::memcpy(&half, at, sizeof(half));
  return ggml_fp16_to_fp32(half);
}

// Scale and minimum of group `i` of 8 in a super-block of Q4_K or Q5_K: 6 bits each, the last four groups' high bits
// above the first four's numbers.
void KScale(const std::byte* packed, int i, int& scale, int& minimum) {
  const auto at = [&](int j) { return std::to_integer<int>(packed[j]); };
  if (i < 4) {
    scale = at(i) & 63;
    minimum = at(i + 4) & 63;
  } else {
    scale = (at(i + 4) & 15) | (at(i - 4) >> 6 << 4);
    minimum = (at(i + 4) >> 4) | (at(i) >> 6 << 4);
  }
}

// The step is rounded as the panels store it.
float FittedStep(const float* values) {
  float largest = 0;
  for (int i = 0; i < kGroup; ++i) largest = std::max(largest, std::abs(values[i]));
  return ggml_fp16_to_fp32(ggml_fp32_to_fp16(largest / 127));
}

}  // namespace

GridShape GridShapeOf(ggml_type type) {
  switch (type) {
    case GGML_TYPE_Q4_0: return {4, false};
    case GGML_TYPE_Q4_1:
    case GGML_TYPE_Q4_K: return {4, true};
    case GGML_TYPE_Q5_0: return {5, false};
    case GGML_TYPE_Q5_1:
    case GGML_TYPE_Q5_K: return {5, true};
    default: return {ggml_is_quantized(type) && ggml_blck_size(type) % kGroup == 0 ? 8 : 0, false};
  }
}

Grid ReadGrid(ggml_type type, const std::byte* row, int group, const float* values) {
  const auto middle = static_cast<float>(1 << (GridShapeOf(type).bits - 1));
  const std::byte* block = row + group / (ggml_blck_size(type) / kGroup) * ggml_type_size(type);
  switch (type) {
    case GGML_TYPE_Q4_0:
    case GGML_TYPE_Q5_0:
    case GGML_TYPE_Q8_0:
    case GGML_TYPE_IQ4_NL: return {HalfAt(block), 0};
    case GGML_TYPE_Q4_1:
    case GGML_TYPE_Q5_1: {
      const float step = HalfAt(block);
      return {step, HalfAt(block + 2) + middle * step};
    }
    case GGML_TYPE_Q4_K:
    case GGML_TYPE_Q5_K: {
      int scale = 0;
      int minimum = 0;
      KScale(block + 4, group % (kSuperBlock / kGroup), scale, minimum);
      const float step = HalfAt(block) * static_cast<float>(scale);
      return {step, middle * step - HalfAt(block + 2) * static_cast<float>(minimum)};
    }
    default: return {FittedStep(values), 0};
  }
}

}  // namespace jointkv::dense
