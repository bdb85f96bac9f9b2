// Blocks of 8, 4, 2 and 1 bits a value, made from bf16 blocks and decoded into them. A head vector is one token's
// head_dim values of one head, less what a mean holds for them and, of keys, each channel pair over a factor of its
// own; each has one scale. Layouts: layout.h.
//
//   q8   value = scale * level, levels -127..127
//   q4   values = scale * S H levels: S changes signs by a fixed pattern, H is the Walsh-Hadamard matrix (+-1) of the
//        largest power of two that divides head_dim, part by part, and levels are the 16 of a Gaussian with the least
//        squared error, in integers. Most head vectors are nearly Gaussian after H S, whatever they were before. The
//        scale leaves no error along the vector itself: decoded, it has the vector's own product with it.
//   q2, q1   the same with 4 and 2 levels: for what a block differs by from a mean that resembles it
//
// A scale takes a byte: how many of a unit, a power of two in bf16 which all tokens of a head of a block share; the
// largest is 128 to 255. An error of a scale is one along the vector itself, which the scores that matter most feel
// most: of that many units it is 1/256 at most. (Floats of 4 bits of mantissa in the same byte added a third to the KL
// divergence of q4 on SmolLM2-135M.) A head vector with a scale of less than half a unit decodes to the mean; in q8
// scales are rounded up at least so far that no level passes 127.
//
// Differences from the mean are held within +-2^50, and a head vector whose differences are all smaller than 2^-50
// decodes to the mean. Decoded values below 2^-126 are zeros. Every block decodes to finite values if its mean is
// finite.
//
// The errors of a head vector are of one size in all channels before the factors undo what was done to their pairs.
// With queries of energy w in a pair and keys of variance v around the mean, scores err least where that factor is (v /
// w)^(1/4) (Cauchy-Schwarz: the error is then (sum sqrt(v w))^2 instead of sum v sum w).
//
// Levels and transform are exact in the numbers that they are done in, and products and sums are rounded as one (fused
// multiply-add) or not at all, so that results are the same bits on every processor.
//
// Functions without state, for any thread. head_dim is even, 2..kQuantisedHeadDimMax, of whole bytes in the codec; cap
// is the size class of the bf16 block, of whose tokens the first `tokens` count, at least one.
#pragma once

#include <cstddef>

#include "codec/layout.h"

namespace jointkv::codec {

inline constexpr int kQuantisedHeadDimMax = 256;

// What the levels of a transformed codec leave of the energy of Gaussian values, with the scale of the least error
// (less of short head vectors, to which it is fitted). q4's own scale leaves 1 % more.
constexpr double GaussianLoss(Codec codec) {
  CHECK(IsQuantised(codec) && codec != Codec::kQ8);
  return codec == Codec::kQ4 ? 0.009506 : codec == Codec::kQ2 ? 0.11748 : 0.36338;
}

// What values are encoded relative to.
struct Reference {
  // Subtracted before and added after: bf16 of mean_cap tokens, laid out as the block; null: zeros. Token t takes the
  // mean's token t.
  const std::byte* mean = nullptr;
  int mean_cap = kBlockTokensMax;
  // Of keys in other codecs than q8: factors of what is left, (n_kv_heads, head_dim / 2), within 1 / kPairScaleMax and
  // kPairScaleMax; null: 1.
  const float* pair_scales = nullptr;

  // That of one head.
  Reference OfHead(const BlockLayout& layout, int head) const {
    return {mean == nullptr ? nullptr : mean + layout.head_offset(head, mean_cap), mean_cap,
            pair_scales == nullptr ? nullptr : pair_scales + static_cast<ptrdiff_t>(head) * (layout.head_dim / 2)};
  }
};

inline constexpr float kPairScaleMax = 64;

// block: `source` (bf16) of class cap. out: block_bytes(tokens) bytes of the same heads in codec `to`, all of which are
// set.
void EncodeBlock(const BlockLayout& source, Kind kind, Codec to, const std::byte* block, int cap, int tokens,
                 const Reference& reference, std::byte* out);

// layout: bf16. block: the whole block in codec `from`. reference: as in EncodeBlock, of this head. out: one head of
// class cap; tokens past the last are finite, if the mean is.
void DecodeHead(const BlockLayout& layout, Kind kind, Codec from, const std::byte* block, int head, int cap, int tokens,
                const Reference& reference, std::byte* out);

// out: block_bytes(cap) bytes; those past the heads stay as they are.
void DecodeBlock(const BlockLayout& layout, Kind kind, Codec from, const std::byte* block, int cap, int tokens,
                 const Reference& reference, std::byte* out);

}  // namespace jointkv::codec
