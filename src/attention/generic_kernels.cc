// Attention on any CPU and for any codec: the same steps as the AVX-512 BF16 block kernel, in f32 through Highway.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/generic_kernels.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h, as Highway asks.
#include "dense/bf16-inl.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace jointkv::attention::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using codec::Codec;

using DF = hn::CappedTag<float, 16>;

// A vector of stored elements as f32.
template <class D>
HWY_INLINE hn::Vec<D> LoadElements(D d, Codec codec, const std::byte* at) {
  if (codec == Codec::kF32) return hn::LoadU(d, reinterpret_cast<const float*>(at));
  const hn::Rebind<hwy::float16_t, D> d16;
  const hn::Rebind<uint16_t, D> du16;
  return hn::PromoteTo(d, hn::BitCast(d16, hn::LoadU(du16, reinterpret_cast<const uint16_t*>(at))));
}

// A vector of bf16 pairs as two vectors of f32.
template <class D>
HWY_INLINE void LoadPairs(D d, const std::byte* at, hn::Vec<D>& first, hn::Vec<D>& second) {
  const hn::RebindToUnsigned<D> du;
  const auto raw = hn::LoadU(du, reinterpret_cast<const uint32_t*>(at));
  first = hn::BitCast(d, hn::ShiftLeft<16>(raw));
  second = hn::BitCast(d, hn::And(raw, hn::Set(du, 0xffff0000u)));
}

// Scores of tokens [token, token + lanes) of one block. q: (2, n_pairs) rotated.
template <class D>
HWY_INLINE hn::Vec<D> ScoreVector(D d, Codec codec, const float* q, int n_pairs, const std::byte* k, int cap,
                                  int token) {
  auto sum0 = hn::Zero(d);
  auto sum1 = hn::Zero(d);
  for (int pair = 0; pair < n_pairs; ++pair) {
    hn::Vec<D> first;
    hn::Vec<D> second;
    if (codec == Codec::kBf16) {
      LoadPairs(d, k + (static_cast<ptrdiff_t>(pair) * cap + token) * 4, first, second);
    } else {
      const ptrdiff_t bytes = static_cast<ptrdiff_t>(codec::ElementBytes(codec));
      first = LoadElements(d, codec, k + (static_cast<ptrdiff_t>(2 * pair) * cap + token) * bytes);
      second = LoadElements(d, codec, k + (static_cast<ptrdiff_t>(2 * pair + 1) * cap + token) * bytes);
    }
    sum0 = hn::MulAdd(first, hn::Set(d, q[pair]), sum0);
    sum1 = hn::MulAdd(second, hn::Set(d, q[n_pairs + pair]), sum1);
  }
  return hn::Add(sum0, sum1);
}

// sums[channel, + lanes) += weights of tokens [begin, end) times V.
template <class D>
HWY_INLINE hn::Vec<D> WeighVector(D d, Codec codec, const float* weights, int begin, int end, const std::byte* v,
                                  int head_dim, int channel, hn::Vec<D> sum) {
  if (codec == Codec::kBf16) {
    for (int pair = begin / 2; pair < (end + 1) / 2; ++pair) {
      hn::Vec<D> first;
      hn::Vec<D> second;
      LoadPairs(d, v + (static_cast<ptrdiff_t>(pair) * head_dim + channel) * 4, first, second);
      sum = hn::MulAdd(first, hn::Set(d, weights[2 * pair]), sum);
      if (2 * pair + 1 < end) sum = hn::MulAdd(second, hn::Set(d, weights[2 * pair + 1]), sum);
    }
    return sum;
  }
  const ptrdiff_t bytes = static_cast<ptrdiff_t>(codec::ElementBytes(codec));
  for (int token = begin; token < end; ++token) {
    sum = hn::MulAdd(LoadElements(d, codec, v + (static_cast<ptrdiff_t>(token) * head_dim + channel) * bytes),
                     hn::Set(d, weights[token]), sum);
  }
  return sum;
}

void AttendImpl(const VisitArgs& args) {
  const DF d;
  const hn::CappedTag<float, 4> d4;  // capacities are multiples of 4 tokens
  const hn::CappedTag<float, 1> d1;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const int lanes4 = static_cast<int>(hn::Lanes(d4));
  const Codec codec = args.layout->codec;
  const int head_dim = args.layout->head_dim;
  const int n_pairs = head_dim / 2;
  float* row = args.scratch;  // (kBlockTokensMax) scores, then weights
  float* rotated = args.scratch + codec::kBlockTokensMax;

  for (int i = 0; i < args.n * args.queries; ++i) {
    const Visit& visit = args.visits[i / args.queries];
    const int g = i % args.queries;
    const float* q = visit.q + static_cast<ptrdiff_t>(g) * head_dim;
    for (int pair = 0; pair < n_pairs; ++pair) {
      const float cos = visit.cos[pair];
      const float sin = visit.sin[pair];
      rotated[pair] = visit.k_scale * (q[pair] * cos - q[n_pairs + pair] * sin);
      rotated[n_pairs + pair] = visit.k_scale * (q[pair] * sin + q[n_pairs + pair] * cos);
    }
    int token = 0;
    for (; token + lanes <= visit.cap; token += lanes)
      hn::StoreU(ScoreVector(d, codec, rotated, n_pairs, visit.k, visit.cap, token), d, row + token);
    for (; token < visit.cap; token += lanes4)
      hn::StoreU(ScoreVector(d4, codec, rotated, n_pairs, visit.k, visit.cap, token), d4, row + token);

    float& max = visit.stats[g];
    float& total = visit.stats[kGroupMax + g];
    const float old_max = max;
    max = std::max(old_max, *std::max_element(row + visit.begin, row + visit.end));
    const float correction = std::exp2(old_max - max);
    total *= correction;
    if (visit.begin > 0) row[visit.begin - 1] = 0;  // shares a pair with the first visible token
    for (int t = visit.begin; t < visit.end; ++t) {
      const float weight = std::exp2(row[t] - max);
      total += weight;
      row[t] = weight * visit.v_scale;
    }

    float* sums = visit.sums + static_cast<ptrdiff_t>(g) * head_dim;
    const auto add = [&](auto tag, int channel) HWY_ATTR {
      const auto old = hn::Mul(hn::LoadU(tag, sums + channel), hn::Set(tag, correction));
      hn::StoreU(WeighVector(tag, codec, row, visit.begin, visit.end, visit.v, head_dim, channel, old), tag,
                 sums + channel);
    };
    int channel = 0;
    for (; channel + lanes <= head_dim; channel += lanes) add(d, channel);
    for (; channel < head_dim; ++channel) add(d1, channel);
  }
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
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
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
  const hn::CappedTag<float, 1> d1;
  const auto to_bf16 = [&](const float* in, uint16_t* out) {
    int i = 0;
    for (; i + lanes <= head_dim; i += lanes) dense::HWY_NAMESPACE::StoreBf16(d, hn::LoadU(d, in + i), out + i);
    for (; i < head_dim; ++i) dense::HWY_NAMESPACE::StoreBf16(d1, hn::LoadU(d1, in + i), out + i);
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
HWY_EXPORT(StoreTokenImpl);

void AttendGeneric(const VisitArgs& args) { HWY_DYNAMIC_DISPATCH(AttendImpl)(args); }
void StoreToken(const TokenArgs& args) { HWY_DYNAMIC_DISPATCH(StoreTokenImpl)(args); }

}  // namespace jointkv::attention
#endif
