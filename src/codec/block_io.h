// Reading and writing single tokens of a block, plainly: for copies between size classes, for tests and as the judge of
// the kernels. Not for inner loops.
#pragma once

#include <span>

#include "codec/layout.h"

namespace jointkv::codec {

// values: (n_kv_heads, head_dim) f32 of one token, K in pair order and already rotated.
void StoreToken(const BlockLayout& layout, Kind kind, std::byte* block, int cap, int token,
                std::span<const float> values);
void LoadToken(const BlockLayout& layout, Kind kind, const std::byte* block, int cap, int token,
               std::span<float> values);

// Copies the first `tokens` tokens from a block of one size class into a block of another, bit for bit. What lies past
// them in `to` becomes zero, so that kernels may read whole vectors.
void CopyBlock(const BlockLayout& layout, Kind kind, const std::byte* from, int from_cap, std::byte* to, int to_cap,
               int tokens);

}  // namespace jointkv::codec
