// Arithmetic on whole stored blocks, in the layout that they lie in (codec/layout.h): distances, blends, sums.
//
// Blocks are of 16- or 32-bit codecs. All work on the first `tokens` of `cap` tokens; what lies past them is read (it
// is finite) and never counts. Threads: any. Fails how: never.
#pragma once

#include <cstddef>
#include <span>

#include "codec/layout.h"

namespace jointkv::joint {

using codec::BlockLayout;
using codec::Kind;

// out[t] = |a_t - b_t|^2, over all KV heads and channels of token t. out: (kBlockTokensMax), entries from `tokens` on
// are left zero.
void TokenDistances(const BlockLayout& layout, Kind kind, const std::byte* a, const std::byte* b, int cap, int tokens,
                    std::span<float, codec::kBlockTokensMax> out);

// out[t] = a_t . b_t, likewise.
void TokenProducts(const BlockLayout& layout, Kind kind, const std::byte* a, const std::byte* b, int cap, int tokens,
                   std::span<float, codec::kBlockTokensMax> out);

// out = a_weight a + b_weight b, rounded to the codec. `out` may be `a` or `b`.
void Blend(const BlockLayout& layout, const std::byte* a, float a_weight, const std::byte* b, float b_weight, int cap,
           std::byte* out);

}  // namespace jointkv::joint
