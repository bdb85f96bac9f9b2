// What a coarser codec does to the values of a block, done in place: for judging the codec apart from its storage.
//
//   q8   signed 8-bit integers, one 16-bit scale per head vector
//   q4   the 16-level Lloyd-Max grid of a Gaussian, one 16-bit scale per head vector, which a random-sign Hadamard
//        transform has made nearly Gaussian before
//
// A head vector is one token's head_dim values of one head, less the mean of their channels.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "codec/layout.h"

namespace jointkv::codec {

enum class Rounding : uint8_t { kNone, kQ8, kQ4 };

const char* RoundingName(Rounding rounding);
std::optional<Rounding> ParseRounding(std::string_view name);

// Bytes of one head vector in that codec, scale included; kNone: 16 bit.
double RoundedHeadBytes(Rounding rounding, int head_dim);

// Rounds the first `tokens` tokens of a block of K or V of one layer; the results are stored in the block's own codec.
// `mean` (tokens, n_kv_heads, head_dim) is what is subtracted before and added after, in the channel order of
// StoreToken; empty: zeros. Values must be finite.
void RoundBlock(const BlockLayout& layout, Kind kind, Rounding rounding, std::span<const float> mean, std::byte* block,
                int cap, int tokens);

}  // namespace jointkv::codec
