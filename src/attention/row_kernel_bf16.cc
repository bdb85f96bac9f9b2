#include <algorithm>

#include "attention/kernels.h"
#include "base/check.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "base/avx512bf16_push.h"
// After the push: these helpers are for AVX-512 callers only.
#include "attention/avx512bf16-inl.h"

namespace jointkv::attention {
namespace {

// What one block contributes: lanes of scores and pairs of values.
struct BlockSpan {
  int offset = 0;  // of its scores in a query's score row
  int begin = 0;   // first visible token
  int end = 0;     // one past the last
};

template <int kQueries, bool kTwoVectors>
void Scores(const uint32_t* const* q, const std::byte* k, int n_pairs, int cap, __mmask16 load0, __mmask16 load1,
            __mmask16 keep0, __mmask16 keep1, float* const* out) {
  // Even and odd pairs sum apart, so that enough products are in flight.
  __m512 sum[2][kQueries][2];
  for (auto& half : sum) {
    for (auto& row : half) row[0] = row[1] = _mm512_setzero_ps();
  }
  const ptrdiff_t stride = static_cast<ptrdiff_t>(cap) * 4;
  const auto step = [&](int half, int pair) __attribute__((always_inline)) {
    const __m512bh k0 = (__m512bh)_mm512_maskz_loadu_epi32(load0, k + pair * stride);
    const __m512bh k1 = kTwoVectors ? (__m512bh)_mm512_maskz_loadu_epi32(load1, k + pair * stride + 64) : k0;
    for (int g = 0; g < kQueries; ++g) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(q[g][pair]));
      sum[half][g][0] = _mm512_dpbf16_ps(sum[half][g][0], x, k0);
      if (kTwoVectors) sum[half][g][1] = _mm512_dpbf16_ps(sum[half][g][1], x, k1);
    }
  };
  int pair = 0;
  for (; pair + 2 <= n_pairs; pair += 2) {
    step(0, pair);
    step(1, pair + 1);
  }
  if (pair < n_pairs) step(0, pair);
  const __m512 unseen = _mm512_set1_ps(kUnseen);
  for (int g = 0; g < kQueries; ++g) {
    _mm512_storeu_ps(out[g], _mm512_mask_add_ps(unseen, keep0, sum[0][g][0], sum[1][g][0]));
    if (kTwoVectors) _mm512_storeu_ps(out[g] + 16, _mm512_mask_add_ps(unseen, keep1, sum[0][g][1], sum[1][g][1]));
  }
}

template <int kQueries, int kVectors>
void WeightedSum(const RowArgs& args, const BlockSpan* spans, const uint16_t* const* p, int channel) {
  const int head_dim = args.run.layout->head_dim;
  __m512 sum[kQueries][kVectors];
  for (auto& row : sum) {
    for (auto& vector : row) vector = _mm512_setzero_ps();
  }
  __mmask16 mask[kVectors];
  for (int i = 0; i < kVectors; ++i) mask[i] = LaneMask(head_dim - channel - 16 * i);
  const ptrdiff_t stride = static_cast<ptrdiff_t>(head_dim) * 4;
  for (int index = args.first; index < args.last; ++index) {
    const BlockSpan& span = spans[index - args.first];
    const std::byte* v = args.run.Head(args.run.v, index) + static_cast<ptrdiff_t>(channel) * 4;
    for (int pair = span.begin / 2; pair < (span.end + 1) / 2; ++pair) {
      __m512bh values[kVectors];
      for (int i = 0; i < kVectors; ++i)
        values[i] = (__m512bh)_mm512_maskz_loadu_epi32(mask[i], v + pair * stride + 64 * i);
      for (int g = 0; g < kQueries; ++g) {
        int weights;
        __builtin_memcpy(&weights, p[g] + span.offset + 2 * pair, sizeof(weights));
        const __m512bh x = (__m512bh)_mm512_set1_epi32(weights);
        for (int i = 0; i < kVectors; ++i) sum[g][i] = _mm512_dpbf16_ps(sum[g][i], x, values[i]);
      }
    }
  }
  for (int g = 0; g < kQueries; ++g) {
    for (int i = 0; i < kVectors; ++i)
      _mm512_mask_storeu_ps(args.sums + g * head_dim + channel + 16 * i, mask[i], sum[g][i]);
  }
}

// Turns one query's scores into weights, times the scale of each 16 of them where there are such, and returns the
// weights' sum, before that.
template <bool kScaled>
float Weigh(const float* scores, int width, float max, const float* scale, uint16_t* p) {
  __m512 total = _mm512_setzero_ps();
  for (int i = 0; i < width; i += 16) {
    __m512 weight = Exp2(_mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(max)));
    total = _mm512_add_ps(total, weight);
    if (kScaled) weight = _mm512_mul_ps(weight, _mm512_set1_ps(scale[i / 16]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i), (__m256i)_mm512_cvtneps_pbh(weight));
  }
  return _mm512_reduce_add_ps(total);
}

template <int kQueries>
void Row(const RowArgs& args) {
  const int head_dim = args.run.layout->head_dim;
  const int n_pairs = head_dim / 2;
  constexpr int kScores = kSplitBlocks * codec::kBlockTokensMax;
  float* scores[kQueries];
  uint16_t* p[kQueries];
  uint32_t* rotated[kQueries];
  for (int g = 0; g < kQueries; ++g) {
    scores[g] = args.scratch + g * kScores;
    p[g] = reinterpret_cast<uint16_t*>(args.scratch + kGroupMax * kScores + g * kScores / 2);
    rotated[g] = reinterpret_cast<uint32_t*>(args.scratch + 2 * kGroupMax * kScores +
                                             static_cast<ptrdiff_t>(g) * RoundUp(n_pairs, 16));
  }

  BlockSpan spans[kSplitBlocks];
  float v_scale[kScores / 16];  // of 16 scores each
  int width = 0;
  for (int index = args.first; index < args.last; ++index) {
    const kv::LogicalBlock& block = args.run.blocks[index];
    BlockSpan& span = spans[index - args.first];
    span.offset = width;
    span.begin = args.window == 0 ? 0 : std::max(0, args.position - args.window + 1 - block.start);
    span.end = std::min<int>(block.tokens, args.position + 1 - block.start);
    const int delta = args.position - block.base;
    const float k_scale = args.run.KScale(index);
    for (int g = 0; g < kQueries; ++g) {
      RotateToPairs(args.q + static_cast<ptrdiff_t>(g) * head_dim, n_pairs, args.rope->cos(delta),
                    args.rope->sin(delta), k_scale, rotated[g]);
    }
    if (args.run.v_scale != nullptr) v_scale[width / 16] = v_scale[width / 16 + 1] = args.run.v_scale[index];
    float* out[kQueries];
    for (int g = 0; g < kQueries; ++g) out[g] = scores[g] + width;
    const std::byte* k = args.run.Head(args.run.k, index);
    const int cap = block.cap;
    const uint32_t visible =
        static_cast<uint32_t>(((uint64_t{1} << span.end) - 1) & ~((uint64_t{1} << span.begin) - 1));
    const auto keep0 = static_cast<__mmask16>(visible & 0xffff);
    const auto keep1 = static_cast<__mmask16>(visible >> 16);
    if (span.end <= 16) {
      Scores<kQueries, false>(rotated, k, n_pairs, cap, LaneMask(cap), 0, keep0, 0, out);
      width += 16;
    } else {
      Scores<kQueries, true>(rotated, k, n_pairs, cap, LaneMask(cap), LaneMask(cap - 16), keep0, keep1, out);
      width += 32;
    }
  }

  for (int g = 0; g < kQueries; ++g) {
    __m512 largest = _mm512_loadu_ps(scores[g]);
    for (int i = 16; i < width; i += 16) largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores[g] + i));
    const float max = _mm512_reduce_max_ps(largest);
    args.max[g] = max;
    args.total[g] = args.run.v_scale == nullptr ? Weigh<false>(scores[g], width, max, nullptr, p[g])
                                                : Weigh<true>(scores[g], width, max, v_scale, p[g]);
  }

  int channel = 0;
  for (; channel + 48 < head_dim; channel += 64) WeightedSum<kQueries, 4>(args, spans, p, channel);
  for (; channel < head_dim; channel += 16) WeightedSum<kQueries, 1>(args, spans, p, channel);
}

}  // namespace

void RowAttentionBf16(const RowArgs& args) {
  static_assert(kGroupMax == 4);
  switch (args.queries) {
    case 1: return Row<1>(args);
    case 2: return Row<2>(args);
    case 3: return Row<3>(args);
    default: return Row<4>(args);
  }
}

}  // namespace jointkv::attention
#include "base/avx512bf16_pop.h"

#else
namespace jointkv::attention {
void RowAttentionBf16(const RowArgs&) { CHECK(false); }
}  // namespace jointkv::attention
#endif
