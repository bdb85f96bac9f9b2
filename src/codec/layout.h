// Where a byte of a KV block lies. One class answers for every kernel, so neither side of attention ever reduces across
// SIMD lanes.
//
// A physical block holds K or V of one layer: n_kv_heads heads, head after head, each for `cap` tokens (a multiple of
// kClassStep; of blocks of 8 bits and less just as many as it holds). Within one head (hd = head_dim):
//
//   K, bf16      [hd/2 channel pairs][cap tokens][2]   a lane is a token, its 32 bits one rotated pair
//   V, bf16      [cap/2 token pairs][hd channels][2]   a lane is a channel, its 32 bits two tokens
//   K, f16, f32  [hd channels][cap tokens]             channel order: pair 0 first, pair 0 second, pair 1 first, ...
//   V, f16, f32  [cap tokens][hd channels]
//   K and V, q4, q2, q1
//                [hd * bits / 8][cap tokens]           a byte is 8 / bits channels, the first in its lowest bits
//   K, q8        [hd channels][cap tokens]             int8
//   V, q8        [cap tokens][hd channels]             int8
//   all of these, then
//                [cap]                                 a byte for each token's scale, then 16 bits: see quantised.h
//
// V of q4, q2 and q1 lies as K does, because both leave the inverse transform with a lane per token.
//
// A channel pair is a RoPE pair (dense/rope.h), whatever two channels of the model's head vector those are.
#pragma once

#include <cstddef>

#include "base/check.h"
#include "base/checked.h"
#include "codec/codec.h"

namespace jointkv::codec {

inline constexpr int kBlockTokensMax = 32;
inline constexpr int kClassStep = 2;  // size classes: 2, 4, ..., 32 tokens; of quantised blocks 1, 2, ..., 32
inline constexpr int kClasses = kBlockTokensMax / kClassStep;
inline constexpr int kQuantisedClasses = kBlockTokensMax;
inline constexpr int kQuantisedBlockStep = 16;  // bytes of these blocks are a multiple of it

enum class Kind : uint8_t { kK, kV };

struct BlockLayout {
  int n_kv_heads = 0;
  int head_dim = 0;
  Codec codec = Codec::kBf16;

  size_t head_bytes(int cap) const {
    const size_t tokens = cap;
    if (IsQuantised(codec)) return tokens * (head_dim * LevelBits(codec) / 8 + 1) + sizeof(uint16_t);
    return tokens * head_dim * ElementBytes(codec);
  }
  size_t head_offset(int head, int cap) const { return head * head_bytes(cap); }
  // Bytes of a block of kClassStep tokens, padded to a cache line. A block of cap tokens has cap / kClassStep granules,
  // unless its codec is a quantised one: then it is padded as a whole, and to less than a line, for many are small.
  size_t granule_bytes() const { return RoundUp<size_t>(n_kv_heads * head_bytes(kClassStep), 64); }
  size_t block_bytes(int cap) const {
    if (IsQuantised(codec)) return RoundUp<size_t>(n_kv_heads * head_bytes(cap), kQuantisedBlockStep);
    return granule_bytes() * (cap / kClassStep);
  }

  // Byte offset of one element inside its block, for codecs that are not quantised. `channel` counts in pair order:
  // 2 * pair + (0 first, 1 second) for K, the model's own channel for V.
  size_t offset(Kind kind, int head, int token, int channel, int cap) const {
    const size_t t = token;
    const size_t c = channel;
    size_t element = 0;
    if (kind == Kind::kK) {
      element = codec == Codec::kBf16 ? (c / 2 * cap + t) * 2 + c % 2 : c * cap + t;
    } else {
      element = codec == Codec::kBf16 ? (t / 2 * head_dim + c) * 2 + t % 2 : t * head_dim + c;
    }
    return head_offset(head, cap) + element * ElementBytes(codec);
  }
};

constexpr int ClassCapacity(int tokens) { return RoundUp(tokens, kClassStep); }

}  // namespace jointkv::codec
