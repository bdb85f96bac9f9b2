// Attention on any CPU and for any codec: the same steps as the AVX-512 BF16 row kernel, in f32 through Highway.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

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

void RowAttentionImpl(const RowArgs& args) {
  const DF d;
  const hn::CappedTag<float, 4> d4;  // capacities are multiples of 4 tokens
  const hn::CappedTag<float, 1> d1;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const int lanes4 = static_cast<int>(hn::Lanes(d4));
  const Codec codec = args.run.layout->codec;
  const int head_dim = args.run.layout->head_dim;
  const int n_pairs = head_dim / 2;
  float* scores = args.scratch;  // (blocks, kBlockTokensMax)
  float* rotated = args.scratch + kSplitBlocks * codec::kBlockTokensMax;

  for (int g = 0; g < args.queries; ++g) {
    const float* q = args.q + static_cast<ptrdiff_t>(g) * head_dim;
    float max = -std::numeric_limits<float>::infinity();
    for (int index = args.first; index < args.last; ++index) {
      const kv::LogicalBlock& block = args.run.blocks[index];
      const float* cos = args.rope->cos(args.position - block.base);
      const float* sin = args.rope->sin(args.position - block.base);
      const float scale = args.run.KScale(index);
      for (int i = 0; i < n_pairs; ++i) {
        rotated[i] = scale * (q[i] * cos[i] - q[n_pairs + i] * sin[i]);
        rotated[n_pairs + i] = scale * (q[i] * sin[i] + q[n_pairs + i] * cos[i]);
      }
      const std::byte* k = args.run.Head(args.run.k, index);
      float* row = scores + (index - args.first) * codec::kBlockTokensMax;
      int token = 0;
      for (; token + lanes <= block.cap; token += lanes)
        hn::StoreU(ScoreVector(d, codec, rotated, n_pairs, k, block.cap, token), d, row + token);
      for (; token < block.cap; token += lanes4)
        hn::StoreU(ScoreVector(d4, codec, rotated, n_pairs, k, block.cap, token), d4, row + token);
      const int begin = args.window == 0 ? 0 : std::max(0, args.position - args.window + 1 - block.start);
      const int end = std::min<int>(block.tokens, args.position + 1 - block.start);
      for (int t = begin; t < end; ++t) max = std::max(max, row[t]);
    }
    float total = 0;
    float* sums = args.sums + static_cast<ptrdiff_t>(g) * head_dim;
    std::fill_n(sums, head_dim, 0.0f);
    for (int index = args.first; index < args.last; ++index) {
      const kv::LogicalBlock& block = args.run.blocks[index];
      float* row = scores + (index - args.first) * codec::kBlockTokensMax;
      const int begin = args.window == 0 ? 0 : std::max(0, args.position - args.window + 1 - block.start);
      const int end = std::min<int>(block.tokens, args.position + 1 - block.start);
      const float scale = args.run.VScale(index);
      if (begin > 0) row[begin - 1] = 0;  // shares a pair with the first visible token
      for (int t = begin; t < end; ++t) {
        const float weight = std::exp2(row[t] - max);
        total += weight;
        row[t] = weight * scale;
      }
      const std::byte* v = args.run.Head(args.run.v, index);
      int channel = 0;
      for (; channel + lanes <= head_dim; channel += lanes) {
        hn::StoreU(WeighVector(d, codec, row, begin, end, v, head_dim, channel, hn::LoadU(d, sums + channel)), d,
                   sums + channel);
      }
      for (; channel < head_dim; ++channel) {
        hn::StoreU(WeighVector(d1, codec, row, begin, end, v, head_dim, channel, hn::LoadU(d1, sums + channel)), d1,
                   sums + channel);
      }
    }
    args.max[g] = max;
    args.total[g] = total;
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

HWY_EXPORT(RowAttentionImpl);
HWY_EXPORT(StoreTokenImpl);

void RowAttentionGeneric(const RowArgs& args) { HWY_DYNAMIC_DISPATCH(RowAttentionImpl)(args); }
void StoreToken(const TokenArgs& args) { HWY_DYNAMIC_DISPATCH(StoreTokenImpl)(args); }

}  // namespace jointkv::attention
#endif
