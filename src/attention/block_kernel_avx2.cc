// bf16 blocks on AVX2, in f32. The same sums as those of the generic kernel; registers are allotted by hand, and visits
// to one block meet it together, so that what is read and widened once serves all of them.
#include <algorithm>
#include <type_traits>

#include "attention/kernels.h"
#include "attention/read_ahead.h"
#include "base/check.h"
#include "base/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace jointkv::attention {

#include "base/avx2_push.h"
namespace {

constexpr int kLanes = 8;
constexpr int kRowsMax = 6;  // queries that meet a block together
constexpr int kTokensMax = codec::kBlockTokensMax;
// Floats from a rotated query's row to the next, and to its second halves. Known here, so that one register addresses
// all rows: with more GCC runs out of them and moves sums to the stack. Rows are an odd number of cache lines long, so
// that they spread over all sets of a cache.
constexpr int kQueryStride = kAvx2HeadDimMax + 16;
constexpr int kHalfStride = kQueryStride / 2;
static_assert(VisitScratchFloats(1) >= size_t{kVisitsMax} * kGroupMax * (kTokensMax + kQueryStride));

// Vectors of sums of so many rows that 16 registers hold beside what is multiplied.
constexpr int VectorsOf(int rows) { return rows <= 2 ? 4 : rows == 3 ? 3 : 2; }

// Visits [first, first + n) to one block, of different rows; any of them sees tokens [begin, end).
struct Group {
  int first;
  int n;
  int begin;
  int end;
};

// What is stored for a later step in between, so that one visit need not wait for another's latencies.
struct Scratch {
  explicit Scratch(const VisitArgs& args)
      : queries(args.queries),
        scores(args.scratch),
        q(args.scratch + static_cast<ptrdiff_t>(kVisitsMax) * kGroupMax * kTokensMax) {}

  float* Query(int visit) const { return q + static_cast<ptrdiff_t>(visit) * queries * kQueryStride; }
  float* Scores(int visit) const { return scores + static_cast<ptrdiff_t>(visit) * queries * kTokensMax; }

  int queries;
  float* scores;  // (visits, queries, kTokensMax), then weights
  float* q;       // (visits, queries, 2, kHalfStride) rotated
};

// Makes GCC keep a sum in its register. Left alone it loads so far ahead that sums wait on the stack.
inline __attribute__((always_inline)) void Hold(__m256& value) { __asm__("" : "+x"(value)); }

// The first of each two bf16 values, or the second, as f32.
template <bool kSecond>
inline __attribute__((always_inline)) __m256 Half(__m256i pairs) {
  return _mm256_castsi256_ps(kSecond ? _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000)))
                                     : _mm256_slli_epi32(pairs, 16));
}

// sum += factors (kRows) times the halves of vectors of pairs. The fewer of the two stay in registers meanwhile.
template <bool kSecond, int kRows, int kVectors>
inline __attribute__((always_inline)) void AddHalves(const __m256i (&pairs)[kVectors], const float* factors,
                                                     ptrdiff_t stride, __m256 (&sum)[kRows][kVectors]) {
  if constexpr (kRows < kVectors) {
    __m256 factor[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) factor[r] = _mm256_set1_ps(factors[r * stride]);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const __m256 value = Half<kSecond>(pairs[i]);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sum[r][i] = _mm256_fmadd_ps(value, factor[r], sum[r][i]);
        Hold(sum[r][i]);
      }
    }
  } else {
    __m256 value[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) value[i] = Half<kSecond>(pairs[i]);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m256 factor = _mm256_set1_ps(factors[r * stride]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        sum[r][i] = _mm256_fmadd_ps(value[i], factor, sum[r][i]);
        Hold(sum[r][i]);
      }
    }
  }
}

template <int kVectors>
inline __attribute__((always_inline)) void Load(const std::byte* at, const ptrdiff_t (&offset)[kVectors],
                                                __m256i (&pairs)[kVectors]) {
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) pairs[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + offset[i]));
}

// Scores of kVectors vectors of tokens from `first` on, of kRows queries. The last vector may overlap the one before:
// nothing is read past a row's end.
template <int kRows, int kVectors>
__attribute__((noinline)) void ScoreTokens(const Visit& visit, int first, int head_dim, const float* q, float* scores,
                                           Ahead& ahead) {
  Ahead::Range range = ahead.Take();
  __m256 sum[kRows][kVectors];
  ptrdiff_t token[kVectors];
  ptrdiff_t offset[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    token[i] = std::min(first + i * kLanes, visit.cap - kLanes);
    offset[i] = token[i] * 4;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r][i] = _mm256_setzero_ps();
  }
  const std::byte* at = visit.k;
  const ptrdiff_t stride = static_cast<ptrdiff_t>(visit.cap) * 4;
  for (int pair = 0; pair < head_dim / 2; ++pair, at += stride) {
    __m256i pairs[kVectors];
    range.Step();
    Load(at, offset, pairs);
    AddHalves<false>(pairs, q + pair, kQueryStride, sum);
    range.Step();
    Load(at, offset, pairs);
    AddHalves<true>(pairs, q + kHalfStride + pair, kQueryStride, sum);
  }
  ahead.Return(range);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) _mm256_storeu_ps(scores + r * kTokensMax + token[i], sum[r][i]);
  }
}

// The same for a block of less than a vector of tokens.
template <int kRows>
__attribute__((noinline)) void ScoreShort(const Visit& visit, int head_dim, const float* q, float* scores) {
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(visit.cap), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  __m256 sum[kRows][1];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r][0] = _mm256_setzero_ps();
  const std::byte* at = visit.k;
  const ptrdiff_t stride = static_cast<ptrdiff_t>(visit.cap) * 4;
  for (int pair = 0; pair < head_dim / 2; ++pair, at += stride) {
    const __m256i pairs[1] = {_mm256_maskload_epi32(reinterpret_cast<const int*>(at), mask)};
    AddHalves<false>(pairs, q + pair, kQueryStride, sum);
    AddHalves<true>(pairs, q + kHalfStride + pair, kQueryStride, sum);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) _mm256_storeu_ps(scores + r * kTokensMax, sum[r][0]);
}

// Scores of tokens [0, end), and of some more.
template <int kRows>
void Score(const Visit& visit, int end, int head_dim, const float* q, float* scores, Ahead& ahead) {
  if (visit.cap < kLanes) return ScoreShort<kRows>(visit, head_dim, q, scores);
  constexpr int kVectors = VectorsOf(kRows);
  int vectors = CeilDiv(end, kLanes);
  int first = 0;
  if constexpr (kVectors >= 3) {
    if (vectors == 3) return ScoreTokens<kRows, 3>(visit, first, head_dim, q, scores, ahead);
  }
  if constexpr (kVectors >= 4) {
    if (vectors == 4) return ScoreTokens<kRows, 4>(visit, first, head_dim, q, scores, ahead);
  }
  for (; vectors >= 2; vectors -= 2, first += 2 * kLanes)
    ScoreTokens<kRows, 2>(visit, first, head_dim, q, scores, ahead);
  if (vectors == 1) ScoreTokens<kRows, 1>(visit, first, head_dim, q, scores, ahead);
}

// sums = sums * correction + weights * v, of kVectors vectors of channels.
template <int kRows, int kVectors>
__attribute__((noinline)) void AddValues(const Visit& visit, const Group& group, int head_dim, int channel,
                                         const float* correction, const float* weights, float* const* sums,
                                         Ahead& ahead) {
  Ahead::Range range = ahead.Take();
  __m256 sum[kRows][kVectors];
  ptrdiff_t offset[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) offset[i] = static_cast<ptrdiff_t>(channel + i * kLanes) * 4;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __m256 factor = _mm256_set1_ps(correction[r]);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i)
      sum[r][i] = _mm256_mul_ps(factor, _mm256_loadu_ps(sums[r] + channel + i * kLanes));
  }
  const ptrdiff_t stride = static_cast<ptrdiff_t>(head_dim) * 4;
  const std::byte* at = visit.v + group.begin / 2 * stride;
  for (int pair = group.begin / 2; pair < (group.end + 1) / 2; ++pair, at += stride) {
    __m256i pairs[kVectors];
    range.Step();
    Load(at, offset, pairs);
    AddHalves<false>(pairs, weights + 2 * pair, kTokensMax, sum);
    range.Step();
    Load(at, offset, pairs);
    AddHalves<true>(pairs, weights + 2 * pair + 1, kTokensMax, sum);
  }
  ahead.Return(range);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) _mm256_storeu_ps(sums[r] + channel + i * kLanes, sum[r][i]);
  }
}

template <int kRows>
void WeightedSum(const Visit& visit, const Group& group, int head_dim, const float* correction, const float* weights,
                 float* const* sums, Ahead& ahead) {
  constexpr int kVectors = VectorsOf(kRows);
  for (int channel = 0; channel < head_dim;) {
    const int left = (head_dim - channel) / kLanes;  // never one
    if (left == kVectors || left >= kVectors + 2) {
      AddValues<kRows, kVectors>(visit, group, head_dim, channel, correction, weights, sums, ahead);
      channel += kVectors * kLanes;
    } else {
      AddValues<kRows, 2>(visit, group, head_dim, channel, correction, weights, sums, ahead);
      channel += 2 * kLanes;
    }
  }
}

// Rotates q (queries, 2, n_pairs), times `factor`, into the same order.
void RotateQueries(const Visit& visit, int queries, int head_dim, float* out) {
  const int n_pairs = head_dim / 2;
  const __m256 factor = _mm256_set1_ps(visit.k_scale);
  for (int i = 0; i < n_pairs; i += kLanes) {
    const __m256 cos = _mm256_mul_ps(factor, _mm256_loadu_ps(visit.cos + i));
    const __m256 sin = _mm256_mul_ps(factor, _mm256_loadu_ps(visit.sin + i));
    for (int g = 0; g < queries; ++g) {
      const float* in = visit.q + static_cast<ptrdiff_t>(g) * head_dim + i;
      float* row = out + g * kQueryStride + i;
      const __m256 x = _mm256_loadu_ps(in);
      const __m256 y = _mm256_loadu_ps(in + n_pairs);
      _mm256_storeu_ps(row, _mm256_fmsub_ps(x, cos, _mm256_mul_ps(y, sin)));
      _mm256_storeu_ps(row + kHalfStride, _mm256_fmadd_ps(x, sin, _mm256_mul_ps(y, cos)));
    }
  }
}

// 2^x for x <= 0: generic-inl.h's.
inline __m256 Exp2(__m256 x) {
  const __m256 shift = _mm256_set1_ps(12582912.0f + 127);
  x = _mm256_max_ps(x, _mm256_set1_ps(-127.0f));
  const __m256 shifted = _mm256_add_ps(x, shift);
  const __m256 f = _mm256_sub_ps(x, _mm256_sub_ps(shifted, shift));
  __m256 y = _mm256_set1_ps(1.51867454e-4f);
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(1.34071184e-3f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(9.61901713e-3f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(5.5503063e-2f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(2.40226433e-1f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(6.93147242e-1f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(1.0f));
  return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}

inline __m128 Exp2(__m128 x) { return _mm256_castps256_ps128(Exp2(_mm256_castps128_ps256(x))); }

// Lane q of the result: all lanes of rows[q], combined by `op`.
template <typename Op>
inline __attribute__((always_inline)) __m128 Combine4(const __m256 (&rows)[4], const Op& op) {
  __m128 half[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) half[q] = op(_mm256_castps256_ps128(rows[q]), _mm256_extractf128_ps(rows[q], 1));
  const __m128 ab = op(_mm_unpacklo_ps(half[0], half[1]), _mm_unpackhi_ps(half[0], half[1]));
  const __m128 cd = op(_mm_unpacklo_ps(half[2], half[3]), _mm_unpackhi_ps(half[2], half[3]));
  return op(_mm_shuffle_ps(ab, cd, 0x44), _mm_shuffle_ps(ab, cd, 0xee));
}

// Turns a visit's scores into weights of tokens [0, 8 vectors), zeros for what is not visible, and sets the factors by
// which its earlier sums shrink.
template <int kQueries>
void Weigh(const Visit& visit, int vectors, float* scores, float* correction) {
  const __m256 unseen = _mm256_set1_ps(kUnseen);
  const __m256i begin = _mm256_set1_epi32(visit.begin - 1);
  const __m256i end = _mm256_set1_epi32(visit.end);
  __m256 rows[4] = {unseen, unseen, unseen, unseen};
  for (int i = 0; i < vectors; ++i) {
    const __m256i token = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(i * kLanes));
    const __m256 visible =
        _mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpgt_epi32(token, begin), _mm256_cmpgt_epi32(end, token)));
#pragma GCC unroll 4
    for (int g = 0; g < kQueries; ++g) {
      float* at = scores + g * kTokensMax + i * kLanes;
      const __m256 seen = _mm256_blendv_ps(unseen, _mm256_loadu_ps(at), visible);
      _mm256_storeu_ps(at, seen);
      rows[g] = _mm256_max_ps(rows[g], seen);
    }
  }
  const __m128 largest = Combine4(
      rows, [](__m128 a, __m128 b) __attribute__((always_inline)) { return _mm_max_ps(a, b); });
  const __m128 old_max = _mm_loadu_ps(visit.sum.stats);
  const __m128 max = _mm_max_ps(old_max, largest);
  const __m128 shrink = Exp2(_mm_sub_ps(old_max, max));
  const __m256 v_scale = _mm256_set1_ps(visit.v_scale);
  __m256 own_max[kQueries];
#pragma GCC unroll 4
  for (int g = 0; g < kQueries; ++g)
    own_max[g] = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(max), _mm256_set1_epi32(g));
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) rows[g] = _mm256_setzero_ps();
  for (int i = 0; i < vectors; ++i) {
#pragma GCC unroll 4
    for (int g = 0; g < kQueries; ++g) {
      float* at = scores + g * kTokensMax + i * kLanes;
      const __m256 weight = Exp2(_mm256_sub_ps(_mm256_loadu_ps(at), own_max[g]));
      rows[g] = _mm256_add_ps(rows[g], weight);
      _mm256_storeu_ps(at, _mm256_mul_ps(weight, v_scale));
    }
  }
  const __m128 sums = Combine4(
      rows, [](__m128 a, __m128 b) __attribute__((always_inline)) { return _mm_add_ps(a, b); });
  _mm_storeu_ps(correction, shrink);
  _mm_storeu_ps(visit.sum.stats, max);
  float* total = visit.sum.stats + kGroupMax;
  _mm_storeu_ps(total, _mm_fmadd_ps(_mm_loadu_ps(total), shrink, sums));
}

// Visits in the order in which they come, in groups that meet their block, `block` of a visit, together.
class Groups {
 public:
  Groups(const VisitArgs& args, const std::byte* Visit::*block) {
    for (int i = 0; i < args.n; i += groups_[n_++].n) groups_[n_] = From(args, i, block);
  }

  const Group* begin() const { return groups_; }
  const Group* end() const { return groups_ + n_; }

 private:
  static Group From(const VisitArgs& args, int first, const std::byte* Visit::*block) {
    const Visit* visits = args.visits + first;
    Group group = {first, 1, visits[0].begin, visits[0].end};
    const int most = std::min(args.n - first, args.queries == 1 ? 4 : kRowsMax / args.queries);
    for (; group.n < most; ++group.n) {
      const Visit& visit = visits[group.n];
      if (visit.*block != visits[0].*block) break;
      // A row that meets a block twice adds up in order.
      const auto same_row = [&](const Visit& other) { return other.sum.sums == visit.sum.sums; };
      if (std::any_of(visits, &visit, same_row)) break;
      group.begin = std::min(group.begin, visit.begin);
      group.end = std::max(group.end, visit.end);
    }
    return group;
  }

  Group groups_[kVisitsMax];
  int n_ = 0;
};

// Calls f with the constant that `rows` is.
template <typename F>
void WithRows(int rows, const F& f) {
  switch (rows) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    default: return f(std::integral_constant<int, 6>());
  }
}

}  // namespace

void AttendAvx2(const VisitArgs& args) {
  const int head_dim = args.layout->head_dim;
  const int queries = args.queries;
  const Scratch scratch(args);
  Ahead& ahead = *args.ahead;
  for (int i = 0; i < args.n; ++i) {
    if (args.visits[i].fresh) args.visits[i].sum.Clear(queries, head_dim);
    RotateQueries(args.visits[i], queries, head_dim, scratch.Query(i));
  }
  for (const Group& group : Groups(args, &Visit::k)) {
    WithRows(group.n * queries, [&](auto rows) {
      Score<decltype(rows)::value>(args.visits[group.first], group.end, head_dim, scratch.Query(group.first),
                                   scratch.Scores(group.first), ahead);
    });
  }
  static_assert(kGroupMax == 4);
  const auto weigh = queries == 1 ? Weigh<1> : queries == 2 ? Weigh<2> : queries == 3 ? Weigh<3> : Weigh<4>;
  const Groups groups(args, &Visit::v);
  float correction[kVisitsMax][kGroupMax];
  for (const Group& group : groups) {
    for (int visit = group.first; visit < group.first + group.n; ++visit)
      weigh(args.visits[visit], CeilDiv(group.end, kLanes), scratch.Scores(visit), correction[visit]);
  }
  for (const Group& group : groups) {
    float* sums[kRowsMax];
    float shrink[kRowsMax];
    for (int row = 0; row < group.n * queries; ++row) {
      const int visit = group.first + row / queries;
      sums[row] = args.visits[visit].sum.sums + static_cast<ptrdiff_t>(row % queries) * head_dim;
      shrink[row] = correction[visit][row % queries];
    }
    WithRows(group.n * queries, [&](auto rows) {
      WeightedSum<decltype(rows)::value>(args.visits[group.first], group, head_dim, shrink, scratch.Scores(group.first),
                                         sums, ahead);
    });
  }
}

#include "base/avx2_pop.h"

bool HasAvx2Kernel(int head_dim) { return HasAvx2() && head_dim % (2 * kLanes) == 0 && head_dim <= kAvx2HeadDimMax; }

}  // namespace jointkv::attention

#else
namespace jointkv::attention {
bool HasAvx2Kernel(int) { return false; }
void AttendAvx2(const VisitArgs&) { CHECK(false); }
}  // namespace jointkv::attention
#endif
