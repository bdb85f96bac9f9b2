// The grid on which a quantised matrix's weights lie: in each group of 32 inputs
//   w = step * level + offset,   level an integer in [-2^(bits - 1), 2^(bits - 1)).
// Types with scales for groups of 32 keep the file's own grid, so that levels are exact; the weights of other types are
// fitted to 8 bits, an error of at most half a step of max|w| / 127.
#pragma once

#include <cstddef>

#include "ggml.h"

namespace jointkv::dense {

inline constexpr int kGroup = 32;

struct GridShape {
  int bits = 0;          // 4, 5 or 8; 0: the type is not quantised to 8 bits or less
  bool offsets = false;  // whether offsets may differ from 0
};

GridShape GridShapeOf(ggml_type type);

struct Grid {
  float step = 0;
  float offset = 0;
};

// Of one group of a row. row: the row's bytes in the file; values: (kGroup) what the group's weights stand for.
Grid ReadGrid(ggml_type type, const std::byte* row, int group, const float* values);

}  // namespace jointkv::dense
