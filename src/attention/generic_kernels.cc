// Attention on any CPU and for any codec: the same steps as the AVX-512 BF16 block kernel, in f32 through Highway.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "attention/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/generic_kernels.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h, as Highway asks.
#include "attention/generic-inl.h"
#include "dense/bf16-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace jointkv::attention::HWY_NAMESPACE {

// Vectors of sums of so many queries that registers hold beside what is multiplied (16 with AVX2).
constexpr int VectorsMax(int queries) { return std::min(4, 12 / queries); }

// Calls f(count, first) with a constant count <= kMax for pieces of [0, n) that are as equal as can be: short ones keep
// fewer sums in flight.
template <int kMax, class F>
HWY_INLINE void InPieces(int n, const F& f) {
  for (int at = 0; at < n;) {
    const int left = n - at;
    const int count = CeilDiv(left, CeilDiv(left, kMax));
    if (count == 1) f(std::integral_constant<int, 1>(), at);
    if constexpr (kMax >= 2) {
      if (count == 2) f(std::integral_constant<int, 2>(), at);
    }
    if constexpr (kMax >= 3) {
      if (count == 3) f(std::integral_constant<int, 3>(), at);
    }
    if constexpr (kMax >= 4) {
      if (count == 4) f(std::integral_constant<int, 4>(), at);
    }
    at += count;
  }
}

// What is stored for a later step in between, so that one visit need not wait for another's latencies.
struct Scratch {
  explicit Scratch(const VisitArgs& args) : q_stride(args.layout->head_dim) {
    scores = args.scratch;
    q = args.scratch + kVisitsMax * kGroupMax * codec::kBlockTokensMax;
  }
  float* Query(int visit) const { return q + visit * kGroupMax * q_stride; }
  float* Scores(int visit) const { return scores + visit * kGroupMax * codec::kBlockTokensMax; }

  ptrdiff_t q_stride;
  float* scores;  // (visits, queries, kBlockTokensMax), then weights
  float* q;       // (visits, queries, head_dim) rotated
};

// Scores of tokens [0, visit.end), and of some more.
template <Codec kCodec, int kQueries>
HWY_INLINE void Score(const Visit& visit, int head_dim, const float* q, float* scores) {
  const auto score = [&](auto d, auto count, int first) HWY_ATTR {
    const int lanes = static_cast<int>(hn::Lanes(d));
    constexpr int kCount = decltype(count)::value;
    ptrdiff_t token[kCount];
    hn::Vec<decltype(d)> sum[kQueries][kCount];
    for (int i = 0; i < kCount; ++i) {
      // Never past a row's end, so the last vector may overlap the one before.
      token[i] = std::min((first + i) * lanes, visit.cap - lanes);
      for (int g = 0; g < kQueries; ++g) sum[g][i] = hn::Zero(d);
    }
    AddProduct<kCodec>(d, visit.k, visit.cap, token, 0, head_dim, q, head_dim, sum);
    for (int i = 0; i < kCount; ++i) {
      for (int g = 0; g < kQueries; ++g) hn::StoreU(sum[g][i], d, scores + g * codec::kBlockTokensMax + token[i]);
    }
  };
  const DF d;
  const hn::CappedTag<float, 4> d4;  // capacities are multiples of 4 tokens
  const int lanes = static_cast<int>(hn::Lanes(d));
  const int lanes4 = static_cast<int>(hn::Lanes(d4));
  if (visit.cap >= lanes) {
    InPieces<VectorsMax(kQueries)>(CeilDiv(visit.end, lanes),
                                   [&](auto count, int first) HWY_ATTR { score(d, count, first); });
  } else {
    InPieces<1>(CeilDiv(visit.end, lanes4), [&](auto count, int first) HWY_ATTR { score(d4, count, first); });
  }
}

// Turns a visit's scores into weights, zeros for what is not visible, and sets the factors by which its earlier sums
// shrink.
template <int kQueries>
HWY_INLINE void Weigh(const Visit& visit, float* scores, float* correction) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const int end = RoundUp(visit.end, 2);  // a pair is multiplied as a whole
  float largest[kQueries];
  for (int g = 0; g < kQueries; ++g) {
    float* row = scores + g * codec::kBlockTokensMax;
    auto max = hn::Set(d, kUnseen);
    for (int token = 0; token < end; token += lanes) {
      const auto index = hn::Iota(di, token);
      const auto visible = hn::And(hn::Lt(hn::Set(di, visit.begin - 1), index), hn::Lt(index, hn::Set(di, visit.end)));
      const auto seen = hn::IfThenElse(hn::RebindMask(d, visible), hn::LoadU(d, row + token), hn::Set(d, kUnseen));
      hn::StoreU(seen, d, row + token);
      max = hn::Max(max, seen);
    }
    largest[g] = hn::GetLane(hn::MaxOfLanes(d, max));
  }
  float* max = visit.sum.stats;
  float* total = visit.sum.stats + kGroupMax;
  std::copy_n(max, kGroupMax, correction);
  for (int g = 0; g < kQueries; ++g) max[g] = std::max(max[g], largest[g]);
  const hn::CappedTag<float, kGroupMax> d4;
  for (int g = 0; g < kGroupMax; g += static_cast<int>(hn::Lanes(d4)))
    hn::StoreU(Exp2(d4, hn::Sub(hn::LoadU(d4, correction + g), hn::LoadU(d4, max + g))), d4, correction + g);
  for (int g = 0; g < kQueries; ++g) {
    float* row = scores + g * codec::kBlockTokensMax;
    auto sum = hn::Zero(d);
    for (int token = 0; token < end; token += lanes) {
      const auto weight = Exp2(d, hn::Sub(hn::LoadU(d, row + token), hn::Set(d, max[g])));
      sum = hn::Add(sum, weight);
      hn::StoreU(hn::Mul(weight, hn::Set(d, visit.v_scale)), d, row + token);
    }
    total[g] = total[g] * correction[g] + hn::GetLane(hn::SumOfLanes(d, sum));
  }
}

// sums = sums * correction + weights * v.
template <Codec kCodec, int kQueries>
HWY_INLINE void WeightedSum(const Visit& visit, int head_dim, const float* correction, const float* weights) {
  const auto add = [&](auto d, auto count, int channel) HWY_ATTR {
    const int lanes = static_cast<int>(hn::Lanes(d));
    constexpr int kCount = decltype(count)::value;
    ptrdiff_t column[kCount];
    hn::Vec<decltype(d)> sum[kQueries][kCount];
    for (int i = 0; i < kCount; ++i) {
      column[i] = channel + i * lanes;
      for (int g = 0; g < kQueries; ++g)
        sum[g][i] = hn::Mul(hn::LoadU(d, visit.sum.sums + g * head_dim + column[i]), hn::Set(d, correction[g]));
    }
    AddProduct<kCodec>(d, visit.v, head_dim, column, visit.begin, visit.end, weights, codec::kBlockTokensMax, sum);
    for (int i = 0; i < kCount; ++i) {
      for (int g = 0; g < kQueries; ++g) hn::StoreU(sum[g][i], d, visit.sum.sums + g * head_dim + column[i]);
    }
  };
  const DF d;
  const hn::CappedTag<float, 1> d1;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const int vectors = head_dim / lanes;
  InPieces<VectorsMax(kQueries)>(vectors, [&](auto count, int first) HWY_ATTR { add(d, count, first * lanes); });
  InPieces<1>(head_dim - vectors * lanes,
              [&](auto count, int first) HWY_ATTR { add(d1, count, vectors * lanes + first); });
}

template <Codec kCodec, int kQueries>
void AttendBlocks(const VisitArgs& args) {
  const int head_dim = args.layout->head_dim;
  const Scratch scratch(args);
  for (int i = 0; i < args.n; ++i) {
    const Visit& visit = args.visits[i];
    if (visit.fresh) visit.sum.Clear(kQueries, head_dim);
    for (int g = 0; g < kQueries; ++g) {
      RotateQuery(visit.q + static_cast<ptrdiff_t>(g) * head_dim, head_dim / 2, visit.cos, visit.sin, visit.k_scale,
                  scratch.Query(i) + g * scratch.q_stride);
    }
  }
  for (int i = 0; i < args.n; ++i)
    Score<kCodec, kQueries>(args.visits[i], head_dim, scratch.Query(i), scratch.Scores(i));
  float correction[kVisitsMax][kGroupMax];
  for (int i = 0; i < args.n; ++i) Weigh<kQueries>(args.visits[i], scratch.Scores(i), correction[i]);
  for (int i = 0; i < args.n; ++i)
    WeightedSum<kCodec, kQueries>(args.visits[i], head_dim, correction[i], scratch.Scores(i));
}

template <Codec kCodec>
void AttendCodec(const VisitArgs& args) {
  static_assert(kGroupMax == 4);
  switch (args.queries) {
    case 1: return AttendBlocks<kCodec, 1>(args);
    case 2: return AttendBlocks<kCodec, 2>(args);
    case 3: return AttendBlocks<kCodec, 3>(args);
    default: return AttendBlocks<kCodec, 4>(args);
  }
}

void AttendImpl(const VisitArgs& args) {
  switch (args.layout->codec) {
    case Codec::kBf16: return AttendCodec<Codec::kBf16>(args);
    case Codec::kF16: return AttendCodec<Codec::kF16>(args);
    default: return AttendCodec<Codec::kF32>(args);
  }
}

// Calls f(tag, i) for vectors, and then single elements, of [0, n).
template <class F>
HWY_INLINE void ForVectors(int n, const F& f) {
  const DF d;
  const hn::CappedTag<float, 1> d1;
  const int lanes = static_cast<int>(hn::Lanes(d));
  int i = 0;
  for (; i + lanes <= n; i += lanes) f(d, i);
  for (; i < n; ++i) f(d1, i);
}

void CombineImpl(const Partial& sum, const Partial& more, int queries, int head_dim) {
  const hn::CappedTag<float, kGroupMax> d4;
  float keep[kGroupMax];
  float add[kGroupMax];
  for (int g = 0; g < kGroupMax; g += static_cast<int>(hn::Lanes(d4))) {
    const auto load = [&](const Partial& from, int row)
                          HWY_ATTR { return hn::LoadU(d4, from.stats + static_cast<ptrdiff_t>(row * kGroupMax) + g); };
    const auto largest = hn::Max(load(sum, 0), load(more, 0));
    const auto own = Exp2(d4, hn::Sub(load(sum, 0), largest));
    const auto others = Exp2(d4, hn::Sub(load(more, 0), largest));
    hn::StoreU(own, d4, keep + g);
    hn::StoreU(others, d4, add + g);
    hn::StoreU(hn::MulAdd(load(sum, 1), own, hn::Mul(load(more, 1), others)), d4, sum.stats + kGroupMax + g);
    hn::StoreU(largest, d4, sum.stats + g);
  }
  for (int g = 0; g < queries; ++g) {
    float* to = sum.sums + static_cast<ptrdiff_t>(g) * head_dim;
    const float* from = more.sums + static_cast<ptrdiff_t>(g) * head_dim;
    ForVectors(head_dim, [&](auto d, int i) HWY_ATTR {
      const auto own = hn::Mul(hn::LoadU(d, to + i), hn::Set(d, keep[g]));
      hn::StoreU(hn::MulAdd(hn::LoadU(d, from + i), hn::Set(d, add[g]), own), d, to + i);
    });
  }
}

void WriteAverageImpl(const float* sums, float total, int n, const dense::Activations& out, int row, int column) {
  const float scale = 1 / total;
  const bool bf16 = out.precision == dense::Precision::kBf16;
  uint16_t* to_bf16 = bf16 ? out.bf16(row) + column : nullptr;
  float* to_f32 = bf16 ? nullptr : out.f32(row) + column;
  ForVectors(n, [&](auto d, int i) HWY_ATTR {
    const auto average = hn::Mul(hn::LoadU(d, sums + i), hn::Set(d, scale));
    if (bf16) {
      dense::HWY_NAMESPACE::StoreBf16(d, average, to_bf16 + i);
    } else {
      hn::StoreU(average, d, to_f32 + i);
    }
  });
}

// In pair order: first halves, then second halves.
HWY_INLINE void ToPairOrder(const float* in, int head_dim, bool neox, float* out) {
  if (neox) {
    std::copy_n(in, head_dim, out);
    return;
  }
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const int n_pairs = head_dim / 2;
  int i = 0;
  for (; i + lanes <= n_pairs; i += lanes) {
    hn::Vec<DF> first;
    hn::Vec<DF> second;
    hn::LoadInterleaved2(d, in + 2 * i, first, second);
    hn::StoreU(first, d, out + i);
    hn::StoreU(second, d, out + n_pairs + i);
  }
  for (; i < n_pairs; ++i) {
    out[i] = in[2 * i];
    out[n_pairs + i] = in[2 * i + 1];
  }
}

HWY_INLINE void StoreElement(Codec codec, float value, std::byte* at) {
  if (codec == Codec::kF32) {
    std::memcpy(at, &value, sizeof(value));
    return;
  }
  const uint16_t half = codec::F16FromF32(value);
  std::memcpy(at, &half, sizeof(half));
}

void StoreTokenImpl(const TokenArgs& args) {
  const codec::BlockLayout& layout = *args.layout;
  const int head_dim = layout.head_dim;
  const int n_pairs = head_dim / 2;
  const ptrdiff_t cap = args.cap;
  for (int head = 0; head < args.n_heads; ++head) {
    float* q = args.q + static_cast<ptrdiff_t>(head) * head_dim;
    ToPairOrder(args.qkv + static_cast<ptrdiff_t>(head) * head_dim, head_dim, args.neox, q);
    for (int i = 0; i < head_dim; ++i) q[i] *= args.q_scale;
  }
  float* pairs = args.scratch;
  auto* halves = reinterpret_cast<uint16_t*>(args.scratch + head_dim);
  const auto to_bf16 = [&](const float* in, uint16_t* out) {
    ForVectors(head_dim,
               [&](auto v, int i) HWY_ATTR { dense::HWY_NAMESPACE::StoreBf16(v, hn::LoadU(v, in + i), out + i); });
  };
  for (int head = 0; head < layout.n_kv_heads; ++head) {
    ToPairOrder(args.qkv + static_cast<ptrdiff_t>(args.n_heads + head) * head_dim, head_dim, args.neox, pairs);
    for (int i = 0; i < n_pairs; ++i) {
      const float x = pairs[i];
      const float y = pairs[n_pairs + i];
      pairs[i] = x * args.cos[i] - y * args.sin[i];
      pairs[n_pairs + i] = x * args.sin[i] + y * args.cos[i];
    }
    const float* value = args.qkv + static_cast<ptrdiff_t>(args.n_heads + layout.n_kv_heads + head) * head_dim;
    std::byte* k = args.k_block + layout.head_offset(head, args.cap);
    std::byte* v = args.v_block + layout.head_offset(head, args.cap);
    if (layout.codec == Codec::kBf16) {
      to_bf16(pairs, halves);
      auto* k_pairs = reinterpret_cast<uint32_t*>(k) + args.offset;
      for (int i = 0; i < n_pairs; ++i)
        k_pairs[i * cap] = halves[i] | (static_cast<uint32_t>(halves[n_pairs + i]) << 16);
      to_bf16(value, halves);
      auto* v_pairs = reinterpret_cast<uint32_t*>(v) + static_cast<ptrdiff_t>(args.offset / 2) * head_dim;
      if (args.offset % 2 == 0) {
        // The other token of the pair becomes zero until it is written: it may be multiplied by a weight of zero.
        for (int i = 0; i < head_dim; ++i) v_pairs[i] = halves[i];
      } else {
        for (int i = 0; i < head_dim; ++i) v_pairs[i] |= static_cast<uint32_t>(halves[i]) << 16;
      }
      continue;
    }
    const ptrdiff_t bytes = static_cast<ptrdiff_t>(codec::ElementBytes(layout.codec));
    for (int i = 0; i < n_pairs; ++i) {
      StoreElement(layout.codec, pairs[i], k + (2 * i * cap + args.offset) * bytes);
      StoreElement(layout.codec, pairs[n_pairs + i], k + ((2 * i + 1) * cap + args.offset) * bytes);
    }
    for (int i = 0; i < head_dim; ++i)
      StoreElement(layout.codec, value[i], v + (static_cast<ptrdiff_t>(args.offset) * head_dim + i) * bytes);
  }
}

}  // namespace jointkv::attention::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace jointkv::attention {

HWY_EXPORT(AttendImpl);
HWY_EXPORT(CombineImpl);
HWY_EXPORT(WriteAverageImpl);
HWY_EXPORT(StoreTokenImpl);

void AttendGeneric(const VisitArgs& args) { HWY_DYNAMIC_DISPATCH(AttendImpl)(args); }
void Combine(const Partial& sum, const Partial& more, int queries, int head_dim) {
  HWY_DYNAMIC_DISPATCH(CombineImpl)(sum, more, queries, head_dim);
}
void WriteAverage(const float* sums, float total, int n, const dense::Activations& out, int row, int column) {
  HWY_DYNAMIC_DISPATCH(WriteAverageImpl)(sums, total, n, out, row, column);
}
void StoreToken(const TokenArgs& args) { HWY_DYNAMIC_DISPATCH(StoreTokenImpl)(args); }

}  // namespace jointkv::attention
#endif
