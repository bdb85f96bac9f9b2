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
    weights = reinterpret_cast<uint16_t*>(scores + kGroupMax * kTokens);
  }
  uint32_t* Query(int visit, int g) const { return q + (visit * kGroupMax + g) * q_stride; }

  static constexpr ptrdiff_t kTokens = kVisitsMax * codec::kBlockTokensMax;

  ptrdiff_t q_stride;
  uint32_t* q;        // (visits, queries, pairs rounded up to 16) rotated bf16 pairs
  float* scores;      // (queries, kTokens)
  uint16_t* weights;  // (queries, kTokens) bf16
};

// Visits of one row, one after the other, are added up at once: one softmax over all their tokens, which lie side by
// side in the scratch, each visit's from an even place on. A visit takes kBlockTokensMax places at most, and rounding
// up to 16 adds none to those of earlier visits that were full, so all have room.
struct RowRun {
  int first = 0;  // visits
  int last = 0;
  int begin = 0;  // tokens in the scratch, a multiple of 16
  int end = 0;
};
struct RowRuns {
  explicit RowRuns(const VisitArgs& args) {
    int token = 0;
    for (int i = 0; i < args.n; ++i) {
      const Visit& visit = args.visits[i];
      const Visit* before = i == 0 ? nullptr : &args.visits[i - 1];
      if (before == nullptr || visit.fresh || visit.sum.sums != before->sum.sums || visit.v_scale != before->v_scale) {
        token = RoundUp(token, 16);
        all[n++] = {i, i, token, token};
      }
      at[i] = token;
      token += RoundUp(visit.end, 2);
      all[n - 1].last = i + 1;
      all[n - 1].end = token;
    }
  }

  int n = 0;
  RowRun all[kVisitsMax];
  int at[kVisitsMax];  // a visit's first token in the scratch
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
    float* out = scores + g * Scratch::kTokens;
#pragma GCC unroll 2
    for (int i = 0; i < kWhole; ++i) _mm512_storeu_ps(out + 16 * i, _mm512_add_ps(sum[0][g][i], sum[1][g][i]));
    if constexpr (kTail) _mm256_storeu_ps(out + 16 * kWhole, _mm256_add_ps(tail[0][g], tail[1][g]));
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

// Bits of the tokens that a run's visits see.
struct Visible {
  Visible(const VisitArgs& args, const RowRuns& runs, const RowRun& run) {
    for (int i = run.first; i < run.last; ++i) {
      const Visit& visit = args.visits[i];
      const uint64_t own = ((uint64_t{1} << visit.end) - 1) & ~((uint64_t{1} << visit.begin) - 1);
      const int at = runs.at[i] - run.begin;
      words[at / 64] |= own << (at % 64);
      if (at % 64 > 64 - codec::kBlockTokensMax) words[at / 64 + 1] |= own >> (64 - at % 64);
    }
  }
  __mmask16 Of(int token) const { return static_cast<__mmask16>(words[token / 64] >> (token % 64)); }

  uint64_t words[Scratch::kTokens / 64 + 1] = {};
};

// Turns a run's scores into weights, and sets the factors by which its row's earlier sums shrink.
template <int kQueries>
void Weigh(const VisitArgs& args, const RowRuns& runs, const RowRun& run, const Scratch& scratch, float* correction) {
  const Visit& visit = args.visits[run.first];
  const Visible visible(args, runs, run);
  const float* scores = scratch.scores + run.begin;
  uint16_t* weights = scratch.weights + run.begin;
  const int tokens = run.end - run.begin;
  // Whole vectors of them, and half a one where that does.
  const int whole = RoundUp(tokens - 8, 16);
  const __m512 unseen = _mm512_set1_ps(kUnseen);
  const auto seen = [&](int g, int token) __attribute__((always_inline)) {
    return _mm512_mask_blend_ps(visible.Of(token), unseen, _mm512_loadu_ps(scores + g * Scratch::kTokens + token));
  };
  const auto seen_tail = [&](int g) __attribute__((always_inline)) {
    return _mm256_mask_blend_ps(static_cast<__mmask8>(visible.Of(whole)), _mm512_castps512_ps256(unseen),
                                _mm256_loadu_ps(scores + g * Scratch::kTokens + whole));
  };
  __m512 row[4] = {unseen, unseen, unseen, unseen};
  for (int token = 0; token < whole; token += 16) {
#pragma GCC unroll 4
    for (int g = 0; g < kQueries; ++g) row[g] = _mm512_max_ps(row[g], seen(g, token));
  }
  if (whole < tokens) {
#pragma GCC unroll 4
    for (int g = 0; g < kQueries; ++g) row[g] = _mm512_max_ps(row[g], _mm512_insertf32x8(unseen, seen_tail(g), 0));
  }
  const __m512 old_max = visit.fresh ? unseen : _mm512_broadcast_f32x4(_mm_loadu_ps(visit.sum.stats));
  const __m512 max = _mm512_max_ps(old_max, LargestOf4(row));
  const __m512 shrink = Exp2(_mm512_sub_ps(old_max, max));
  const __m512 v_scale = _mm512_set1_ps(visit.v_scale);
  __m512 query_max[kQueries];
#pragma GCC unroll 4
  for (int g = 0; g < kQueries; ++g) query_max[g] = _mm512_permutexvar_ps(_mm512_set1_epi32(g), max);
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) row[g] = _mm512_setzero_ps();
  for (int token = 0; token < whole; token += 16) {
#pragma GCC unroll 4
    for (int g = 0; g < kQueries; ++g) {
      const __m512 weight = Exp2(_mm512_sub_ps(seen(g, token), query_max[g]));
      row[g] = _mm512_add_ps(row[g], weight);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + g * Scratch::kTokens + token),
                          (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(weight, v_scale)));
    }
  }
  if (whole < tokens) {
#pragma GCC unroll 4
    for (int g = 0; g < kQueries; ++g) {
      const __m256 weight = Exp2(_mm256_sub_ps(seen_tail(g), _mm512_castps512_ps256(query_max[g])));
      row[g] = _mm512_add_ps(row[g], _mm512_zextps256_ps512(weight));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(weights + g * Scratch::kTokens + whole),
                       (__m128i)_mm256_cvtneps_pbh(_mm256_mul_ps(weight, _mm512_castps512_ps256(v_scale))));
    }
  }
  const __m128 shrink4 = _mm512_castps512_ps128(shrink);
  _mm_storeu_ps(correction, shrink4);
  _mm_storeu_ps(visit.sum.stats, _mm512_castps512_ps128(max));
  float* total = visit.sum.stats + kGroupMax;
  const __m128 before = visit.fresh ? _mm_setzero_ps() : _mm_loadu_ps(total);
  _mm_storeu_ps(total, _mm_add_ps(_mm_mul_ps(before, shrink4), _mm512_castps512_ps128(SumsOf4(row))));
}

// sums = sums * correction + weights * v of all visits of a run, channels [channel, channel + 16 kVectors); one vector
// may be incomplete. Complete ones are stored without a mask: the next run of the row reads them at once, which masks
// would delay.
template <int kQueries, int kVectors>
void WeightedSum(const VisitArgs& args, const RowRuns& runs, const RowRun& run, const Scratch& scratch,
                 const float* correction, int channel) {
  const int head_dim = args.layout->head_dim;
  const Partial& row = args.visits[run.first].sum;
  const bool fresh = args.visits[run.first].fresh;
  constexpr bool kComplete = kVectors > 1;
  const __mmask16 mask = kComplete ? 0xffff : LaneMask(head_dim - channel);
  const auto load = [&](const void* at) __attribute__((always_inline)) {
    return kComplete ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi32(mask, at);
  };
  __m512 sum[kQueries][kVectors];
  float* rows[kQueries];
#pragma GCC unroll 8
  for (int g = 0; g < kQueries; ++g) {
    rows[g] = row.sums + static_cast<ptrdiff_t>(g) * head_dim + channel;
    const __m512 shrink = _mm512_set1_ps(correction[g]);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      sum[g][i] = fresh ? _mm512_setzero_ps() : _mm512_mul_ps(shrink, _mm512_castsi512_ps(load(rows[g] + 16 * i)));
    }
  }
  const ptrdiff_t stride = static_cast<ptrdiff_t>(head_dim) * 4;
  for (int visit = run.first; visit < run.last; ++visit) {
    const std::byte* v = args.visits[visit].v + static_cast<ptrdiff_t>(channel) * 4;
    const uint16_t* weights = scratch.weights + runs.at[visit];
    const int end = (args.visits[visit].end + 1) / 2;
    Ahead::Range range = args.ahead->Take();
    for (int pair = args.visits[visit].begin / 2; pair < end; ++pair) {
      range.Step();
      range.Step();
      __m512bh values[kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) values[i] = (__m512bh)load(v + pair * stride + 64 * i);
#pragma GCC unroll 8
      for (int g = 0; g < kQueries; ++g) {
        int both;
        __builtin_memcpy(&both, weights + g * Scratch::kTokens + 2 * pair, sizeof(both));
        const __m512bh x = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) sum[g][i] = _mm512_dpbf16_ps(sum[g][i], x, values[i]);
      }
    }
    args.ahead->Return(range);
  }
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
  const RowRuns runs(args);
  for (int i = 0; i < args.n; ++i) {
    const Visit& visit = args.visits[i];
    RotateToPairs<kQueries>(visit.q, n_pairs, visit.cos, visit.sin, visit.k_scale, scratch.Query(i, 0),
                            scratch.q_stride);
  }
  // In order: what a visit's last vector holds beyond its tokens is where the next one's scores go.
  for (int i = 0; i < args.n; ++i) {
    WithHalves(args.visits[i], [&](auto halves) {
      Score<kQueries, decltype(halves)::value>(args.visits[i], n_pairs, scratch.Query(i, 0), scratch.q_stride,
                                               scratch.scores + runs.at[i], *args.ahead);
    });
  }
  float correction[kVisitsMax][4];
  for (int i = 0; i < runs.n; ++i) Weigh<kQueries>(args, runs, runs.all[i], scratch, correction[i]);
  for (int i = 0; i < runs.n; ++i) {
    int channel = 0;
    for (; channel + 64 <= head_dim; channel += 64)
      WeightedSum<kQueries, 4>(args, runs, runs.all[i], scratch, correction[i], channel);
    for (; channel < head_dim; channel += 16)
      WeightedSum<kQueries, 1>(args, runs, runs.all[i], scratch, correction[i], channel);
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
