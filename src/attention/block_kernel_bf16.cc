#include <algorithm>
#include <type_traits>

#include "attention/kernels.h"
#include "attention/read_ahead.h"
#include "base/check.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "base/avx512bf16_push.h"
// After the push: these helpers are for AVX-512 callers only.
#include "attention/avx512bf16-inl.h"

namespace jointkv::attention {
namespace {

// What is stored for a later step in between, so that one visit need not wait for another's latencies.
struct Scratch {
  Scratch(const VisitArgs& args) {
    q_stride = RoundUp(args.layout->head_dim / 2, 16);
    q = reinterpret_cast<uint32_t*>(args.scratch);
    scores = args.scratch + kVisitsMax * kGroupMax * q_stride;
    weights = reinterpret_cast<uint16_t*>(scores + kVisitsMax * kGroupMax * codec::kBlockTokensMax);
  }
  uint32_t* Query(int visit, int g) const { return q + (visit * kGroupMax + g) * q_stride; }
  float* Scores(int visit, int g) const { return scores + (visit * kGroupMax + g) * codec::kBlockTokensMax; }
  uint16_t* Weights(int visit, int g) const { return weights + (visit * kGroupMax + g) * codec::kBlockTokensMax; }

  ptrdiff_t q_stride;
  uint32_t* q;        // (visits, queries, pairs rounded up to 16) rotated bf16 pairs
  float* scores;      // (visits, queries, kBlockTokensMax)
  uint16_t* weights;  // (visits, queries, kBlockTokensMax) bf16
};

// Scores of tokens [0, 8 kHalves), 8 tokens to half a vector.
template <int kQueries, int kHalves>
void Score(const Visit& visit, int n_pairs, const uint32_t* q, ptrdiff_t q_stride, float* scores, Ahead& ahead) {
  constexpr int kWhole = kHalves / 2;
  constexpr bool kTail = kHalves % 2 != 0;
  Ahead::Range range = ahead.Take();
  // Even and odd pairs sum apart, so that enough products are in flight.
  __m512 sum[2][kQueries][std::max(kWhole, 1)];
  __m256 tail[2][kQueries];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
    for (int g = 0; g < kQueries; ++g) {
      for (auto& vector : sum[half][g]) vector = _mm512_setzero_ps();
      tail[half][g] = _mm256_setzero_ps();
    }
  }
  [[maybe_unused]] const __mmask16 last = LaneMask(visit.cap - 16 * (kWhole - 1));
  [[maybe_unused]] const __mmask8 tail_mask = static_cast<__mmask8>(LaneMask(visit.cap - 16 * kWhole));
  const ptrdiff_t stride = static_cast<ptrdiff_t>(visit.cap) * 4;
  const auto step = [&](int half, int pair) __attribute__((always_inline)) {
    range.Step();
    const std::byte* at = visit.k + pair * stride;
    __m512bh k[std::max(kWhole, 1)];
    [[maybe_unused]] __m256bh k_tail;
#pragma GCC unroll 2
    for (int i = 0; i < kWhole; ++i) {
      // Only the last vector passes the end of the row.
      k[i] = kTail || i + 1 < kWhole ? (__m512bh)_mm512_loadu_si512(at + 64 * i)
                                     : (__m512bh)_mm512_maskz_loadu_epi32(last, at + 64 * i);
    }
    if constexpr (kTail) k_tail = (__m256bh)_mm256_maskz_loadu_epi32(tail_mask, at + 64 * kWhole);
#pragma GCC unroll 4
    for (int g = 0; g < kQueries; ++g) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(q[g * q_stride + pair]));
#pragma GCC unroll 2
      for (int i = 0; i < kWhole; ++i) sum[half][g][i] = _mm512_dpbf16_ps(sum[half][g][i], (__m512bh)x, k[i]);
      if constexpr (kTail) tail[half][g] = _mm256_dpbf16_ps(tail[half][g], (__m256bh)_mm512_castsi512_si256(x), k_tail);
    }
  };
  int pair = 0;
  for (; pair + 2 <= n_pairs; pair += 2) {
    step(0, pair);
    step(1, pair + 1);
  }
  if (pair < n_pairs) step(0, pair);
  ahead.Return(range);
#pragma GCC unroll 4
  for (int g = 0; g < kQueries; ++g) {
    float* out = scores + g * codec::kBlockTokensMax;
#pragma GCC unroll 2
    for (int i = 0; i < kWhole; ++i) _mm512_store_ps(out + 16 * i, _mm512_add_ps(sum[0][g][i], sum[1][g][i]));
    if constexpr (kTail) _mm256_store_ps(out + 16 * kWhole, _mm256_add_ps(tail[0][g], tail[1][g]));
  }
}

// Lane q of the result, and of each four after it: all lanes of rows[q], combined by `op`.
template <typename Op>
__m512 Combine4(const __m512 (&rows)[4], const Op& op) {
  const __m512 ab = op(_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[0], rows[1]));
  const __m512 cd = op(_mm512_unpacklo_ps(rows[2], rows[3]), _mm512_unpackhi_ps(rows[2], rows[3]));
  __m512 all = op(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  all = op(all, _mm512_shuffle_f32x4(all, all, 0x4e));
  return op(all, _mm512_shuffle_f32x4(all, all, 0xb1));
}

__m512 LargestOf4(const __m512 (&rows)[4]) {
  return Combine4(
      rows, [](__m512 a, __m512 b) __attribute__((always_inline)) { return _mm512_max_ps(a, b); });
}

__m512 SumsOf4(const __m512 (&rows)[4]) {
  return Combine4(
      rows, [](__m512 a, __m512 b) __attribute__((always_inline)) { return _mm512_add_ps(a, b); });
}

// Turns a visit's scores of tokens [0, 8 kHalves) into weights, and sets the factors by which its earlier sums shrink.
template <int kQueries, int kHalves>
void Weigh(const Visit& visit, const float* scores, uint16_t* weights, float* correction) {
  constexpr int kWhole = kHalves / 2;
  constexpr bool kTail = kHalves % 2 != 0;
  const uint64_t visible = ((uint64_t{1} << visit.end) - 1) & ~((uint64_t{1} << visit.begin) - 1);
  const __m512 unseen = _mm512_set1_ps(kUnseen);
  __m512 seen[kQueries][std::max(kWhole, 1)];
  __m256 tail[kQueries];
  __m512 row[4] = {unseen, unseen, unseen, unseen};
#pragma GCC unroll 4
  for (int g = 0; g < kQueries; ++g) {
    const float* in = scores + g * codec::kBlockTokensMax;
    if constexpr (kTail) {
      tail[g] = _mm256_mask_blend_ps(static_cast<__mmask8>(visible >> (16 * kWhole)), _mm512_castps512_ps256(unseen),
                                     _mm256_load_ps(in + 16 * kWhole));
      row[g] = _mm512_insertf32x8(unseen, tail[g], 0);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kWhole; ++i) {
      seen[g][i] =
          _mm512_mask_blend_ps(static_cast<__mmask16>(visible >> (16 * i)), unseen, _mm512_load_ps(in + 16 * i));
      row[g] = _mm512_max_ps(row[g], seen[g][i]);
    }
  }
  const __m512 old_max = visit.fresh ? unseen : _mm512_broadcast_f32x4(_mm_loadu_ps(visit.sum.stats));
  const __m512 max = _mm512_max_ps(old_max, LargestOf4(row));
  const __m512 shrink = Exp2(_mm512_sub_ps(old_max, max));
  const __m512 v_scale = _mm512_set1_ps(visit.v_scale);
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) row[g] = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int g = 0; g < kQueries; ++g) {
    const __m512 query_max = _mm512_permutexvar_ps(_mm512_set1_epi32(g), max);
    uint16_t* out = weights + g * codec::kBlockTokensMax;
    if constexpr (kTail) {
      const __m256 weight = Exp2(_mm256_sub_ps(tail[g], _mm512_castps512_ps256(query_max)));
      row[g] = _mm512_zextps256_ps512(weight);
      _mm_store_si128(reinterpret_cast<__m128i*>(out + 16 * kWhole),
                      (__m128i)_mm256_cvtneps_pbh(_mm256_mul_ps(weight, _mm512_castps512_ps256(v_scale))));
    }
#pragma GCC unroll 2
    for (int i = 0; i < kWhole; ++i) {
      const __m512 weight = Exp2(_mm512_sub_ps(seen[g][i], query_max));
      row[g] = _mm512_add_ps(row[g], weight);
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + 16 * i),
                         (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(weight, v_scale)));
    }
  }
  const __m128 shrink4 = _mm512_castps512_ps128(shrink);
  _mm_storeu_ps(correction, shrink4);
  _mm_storeu_ps(visit.sum.stats, _mm512_castps512_ps128(max));
  float* total = visit.sum.stats + kGroupMax;
  const __m128 before = visit.fresh ? _mm_setzero_ps() : _mm_loadu_ps(total);
  _mm_storeu_ps(total, _mm_add_ps(_mm_mul_ps(before, shrink4), _mm512_castps512_ps128(SumsOf4(row))));
}

// sums = sums * correction + weights * v, channels [channel, channel + 16 kVectors); one vector may be incomplete.
// Complete ones are stored without a mask: the next visit of the row reads them at once, which masks would delay.
template <int kQueries, int kVectors>
void WeightedSum(const Visit& visit, int head_dim, const float* correction, const uint16_t* weights, int channel,
                 Ahead& ahead) {
  Ahead::Range range = ahead.Take();
  constexpr bool kComplete = kVectors > 1;
  const __mmask16 mask = kComplete ? 0xffff : LaneMask(head_dim - channel);
  const auto load = [&](const void* at) __attribute__((always_inline)) {
    return kComplete ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi32(mask, at);
  };
  __m512 sum[kQueries][kVectors];
  float* rows[kQueries];
#pragma GCC unroll 8
  for (int g = 0; g < kQueries; ++g) {
    rows[g] = visit.sum.sums + static_cast<ptrdiff_t>(g) * head_dim + channel;
    const __m512 shrink = _mm512_set1_ps(correction[g]);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      sum[g][i] =
          visit.fresh ? _mm512_setzero_ps() : _mm512_mul_ps(shrink, _mm512_castsi512_ps(load(rows[g] + 16 * i)));
    }
  }
  const std::byte* v = visit.v + static_cast<ptrdiff_t>(channel) * 4;
  const ptrdiff_t stride = static_cast<ptrdiff_t>(head_dim) * 4;
  const int end = (visit.end + 1) / 2;
  for (int pair = visit.begin / 2; pair < end; ++pair) {
    range.Step();
    range.Step();
    __m512bh values[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) values[i] = (__m512bh)load(v + pair * stride + 64 * i);
#pragma GCC unroll 8
    for (int g = 0; g < kQueries; ++g) {
      int both;
      __builtin_memcpy(&both, weights + g * codec::kBlockTokensMax + 2 * pair, sizeof(both));
      const __m512bh x = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sum[g][i] = _mm512_dpbf16_ps(sum[g][i], x, values[i]);
    }
  }
  ahead.Return(range);
#pragma GCC unroll 8
  for (int g = 0; g < kQueries; ++g) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      if (kComplete) {
        _mm512_storeu_ps(rows[g] + 16 * i, sum[g][i]);
      } else {
        _mm512_mask_storeu_ps(rows[g] + 16 * i, mask, sum[g][i]);
      }
    }
  }
}

// Calls f with the constant that counts a visit's tokens up to the last visible one, in halves of a vector.
template <typename F>
void WithHalves(const Visit& visit, const F& f) {
  static_assert(codec::kBlockTokensMax == 32);
  switch (CeilDiv(visit.end, 8)) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, 4>());
  }
}

template <int kQueries>
void Attend(const VisitArgs& args) {
  const int head_dim = args.layout->head_dim;
  const int n_pairs = head_dim / 2;
  const Scratch scratch(args);
  Ahead& ahead = *args.ahead;
  for (int i = 0; i < args.n; ++i) {
    const Visit& visit = args.visits[i];
    RotateToPairs<kQueries>(visit.q, n_pairs, visit.cos, visit.sin, visit.k_scale, scratch.Query(i, 0),
                            scratch.q_stride);
  }
  for (int i = 0; i < args.n; ++i) {
    WithHalves(args.visits[i], [&](auto halves) {
      Score<kQueries, decltype(halves)::value>(args.visits[i], n_pairs, scratch.Query(i, 0), scratch.q_stride,
                                               scratch.Scores(i, 0), ahead);
    });
  }
  float correction[kVisitsMax][4];
  for (int i = 0; i < args.n; ++i) {
    WithHalves(args.visits[i], [&](auto halves) {
      Weigh<kQueries, decltype(halves)::value>(args.visits[i], scratch.Scores(i, 0), scratch.Weights(i, 0),
                                               correction[i]);
    });
  }
  for (int i = 0; i < args.n; ++i) {
    const Visit& visit = args.visits[i];
    int channel = 0;
    for (; channel + 64 <= head_dim; channel += 64)
      WeightedSum<kQueries, 4>(visit, head_dim, correction[i], scratch.Weights(i, 0), channel, ahead);
    for (; channel < head_dim; channel += 16)
      WeightedSum<kQueries, 1>(visit, head_dim, correction[i], scratch.Weights(i, 0), channel, ahead);
  }
}

}  // namespace

void AttendBf16(const VisitArgs& args) {
  static_assert(kGroupMax == 4);
  switch (args.queries) {
    case 1: return Attend<1>(args);
    case 2: return Attend<2>(args);
    case 3: return Attend<3>(args);
    default: return Attend<4>(args);
  }
}

}  // namespace jointkv::attention
#include "base/avx512bf16_pop.h"

#else
namespace jointkv::attention {
void AttendBf16(const VisitArgs&) { CHECK(false); }
}  // namespace jointkv::attention
#endif
