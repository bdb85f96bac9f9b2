#include "joint/block_math.h"

#include <algorithm>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "joint/block_math.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h, as Highway asks.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace jointkv::joint::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using codec::Codec;

using DF = hn::CappedTag<float, 16>;
using DU = hn::RebindToUnsigned<DF>;
using VF = hn::Vec<DF>;

struct Difference {
  static VF Apply(VF sum, VF a, VF b) {
    const VF difference = hn::Sub(a, b);
    return hn::MulAdd(difference, difference, sum);
  }
  static float Apply(float sum, float a, float b) { return sum + (a - b) * (a - b); }
};
struct Product {
  static VF Apply(VF sum, VF a, VF b) { return hn::MulAdd(a, b, sum); }
  static float Apply(float sum, float a, float b) { return sum + a * b; }
};

// Elements in the order they lie: a row of bf16 pairs is two vectors, one of each pair's first elements.
template <Codec kCodec>
struct Row;

template <>
struct Row<Codec::kBf16> {
  static constexpr int kStreams = 2;
  static void Load(const std::byte* at, size_t unit, VF* out) {
    const auto raw = hn::LoadU(DU(), reinterpret_cast<const uint32_t*>(at) + unit);
    out[0] = hn::BitCast(DF(), hn::ShiftLeft<16>(raw));
    out[1] = hn::BitCast(DF(), hn::And(raw, hn::Set(DU(), 0xffff0000U)));
  }
  static float LoadOne(const std::byte* at, size_t unit, int stream) {
    uint16_t half;
    std::memcpy(&half, at + 4 * unit + 2 * stream, sizeof(half));
    return codec::F32FromBf16(half);
  }
  static void StoreOne(float value, std::byte* at, size_t unit, int stream) {
    const uint16_t half = codec::Bf16FromF32(value);
    std::memcpy(at + 4 * unit + 2 * stream, &half, sizeof(half));
  }
  // Round to nearest even; stored values are finite.
  static hn::Vec<DU> Rounded(VF value) {
    const auto bits = hn::BitCast(DU(), value);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(DU(), 1));
    return hn::Add(bits, hn::Add(odd, hn::Set(DU(), 0x7fff)));
  }
  static void Store(const VF* values, std::byte* at, size_t unit) {
    const auto low = hn::ShiftRight<16>(Rounded(values[0]));
    const auto high = hn::And(Rounded(values[1]), hn::Set(DU(), 0xffff0000U));
    hn::StoreU(hn::Or(low, high), DU(), reinterpret_cast<uint32_t*>(at) + unit);
  }
};

template <>
struct Row<Codec::kF16> {
  static constexpr int kStreams = 1;
  using D16 = hn::Rebind<hwy::float16_t, DF>;
  using DU16 = hn::Rebind<uint16_t, DF>;
  static void Load(const std::byte* at, size_t unit, VF* out) {
    const auto raw = hn::LoadU(DU16(), reinterpret_cast<const uint16_t*>(at) + unit);
    out[0] = hn::PromoteTo(DF(), hn::BitCast(D16(), raw));
  }
  static float LoadOne(const std::byte* at, size_t unit, int) {
    uint16_t half;
    std::memcpy(&half, at + 2 * unit, sizeof(half));
    return codec::F32FromF16(half);
  }
  static void StoreOne(float value, std::byte* at, size_t unit, int) {
    const uint16_t half = codec::F16FromF32(value);
    std::memcpy(at + 2 * unit, &half, sizeof(half));
  }
  static void Store(const VF* values, std::byte* at, size_t unit) {
    hn::StoreU(hn::BitCast(DU16(), hn::DemoteTo(D16(), values[0])), DU16(), reinterpret_cast<uint16_t*>(at) + unit);
  }
};

template <>
struct Row<Codec::kF32> {
  static constexpr int kStreams = 1;
  static void Load(const std::byte* at, size_t unit, VF* out) {
    out[0] = hn::LoadU(DF(), reinterpret_cast<const float*>(at) + unit);
  }
  static float LoadOne(const std::byte* at, size_t unit, int) {
    float value;
    std::memcpy(&value, at + 4 * unit, sizeof(value));
    return value;
  }
  static void StoreOne(float value, std::byte* at, size_t unit, int) {
    std::memcpy(at + 4 * unit, &value, sizeof(value));
  }
  static void Store(const VF* values, std::byte* at, size_t unit) {
    hn::StoreU(values[0], DF(), reinterpret_cast<float*>(at) + unit);
  }
};

// Lanes are tokens: rows of channels (pairs), each `cap` units long. Their sums stay in their lanes.
template <Codec kCodec, class Op>
void OverKeys(const BlockLayout& layout, const std::byte* a, const std::byte* b, int cap, float* out) {
  using R = Row<kCodec>;
  const size_t rows = static_cast<size_t>(layout.n_kv_heads) * layout.head_dim / R::kStreams;
  const size_t lanes = hn::Lanes(DF());
  size_t token = 0;
  for (; token + lanes <= static_cast<size_t>(cap); token += lanes) {
    VF sum[2] = {hn::Zero(DF()), hn::Zero(DF())};
    for (size_t row = 0; row < rows; ++row) {
      VF x[2], y[2];
      R::Load(a, row * cap + token, x);
      R::Load(b, row * cap + token, y);
      for (int i = 0; i < R::kStreams; ++i) sum[i] = Op::Apply(sum[i], x[i], y[i]);
    }
    hn::StoreU(hn::Add(sum[0], sum[1]), DF(), out + token);
  }
  for (; token < static_cast<size_t>(cap); ++token) {
    float sum = 0;
    for (size_t row = 0; row < rows; ++row) {
      for (int i = 0; i < R::kStreams; ++i) {
        sum = Op::Apply(sum, R::LoadOne(a, row * cap + token, i), R::LoadOne(b, row * cap + token, i));
      }
    }
    out[token] = sum;
  }
}

// Lanes are channels: rows of tokens (pairs), each head_dim units long.
template <Codec kCodec, class Op>
void OverValues(const BlockLayout& layout, const std::byte* a, const std::byte* b, int cap, float* out) {
  using R = Row<kCodec>;
  const size_t hd = layout.head_dim;
  const size_t lanes = hn::Lanes(DF());
  for (int head = 0; head < layout.n_kv_heads; ++head) {
    const size_t offset = layout.head_offset(head, cap);
    for (int row = 0; row < cap / R::kStreams; ++row) {
      VF sum[2] = {hn::Zero(DF()), hn::Zero(DF())};
      size_t channel = 0;
      for (; channel + lanes <= hd; channel += lanes) {
        VF x[2], y[2];
        R::Load(a + offset, row * hd + channel, x);
        R::Load(b + offset, row * hd + channel, y);
        for (int i = 0; i < R::kStreams; ++i) sum[i] = Op::Apply(sum[i], x[i], y[i]);
      }
      for (int i = 0; i < R::kStreams; ++i) {
        float total = hn::GetLane(hn::SumOfLanes(DF(), sum[i]));
        for (size_t c = channel; c < hd; ++c) {
          total = Op::Apply(total, R::LoadOne(a + offset, row * hd + c, i), R::LoadOne(b + offset, row * hd + c, i));
        }
        out[row * R::kStreams + i] += total;
      }
    }
  }
}

template <Codec kCodec, class Op>
void OverTokens(const BlockLayout& layout, Kind kind, const std::byte* a, const std::byte* b, int cap, float* out) {
  if (kind == Kind::kK) {
    OverKeys<kCodec, Op>(layout, a, b, cap, out);
  } else {
    OverValues<kCodec, Op>(layout, a, b, cap, out);
  }
}

template <class Op>
void OverCodecs(const BlockLayout& layout, Kind kind, const std::byte* a, const std::byte* b, int cap, float* out) {
  switch (layout.codec) {
    case Codec::kBf16: return OverTokens<Codec::kBf16, Op>(layout, kind, a, b, cap, out);
    case Codec::kF16: return OverTokens<Codec::kF16, Op>(layout, kind, a, b, cap, out);
    case Codec::kF32: return OverTokens<Codec::kF32, Op>(layout, kind, a, b, cap, out);
    default: HWY_ABORT("encoded block");
  }
}

void Distances(const BlockLayout& layout, Kind kind, const std::byte* a, const std::byte* b, int cap, float* out) {
  OverCodecs<Difference>(layout, kind, a, b, cap, out);
}

void Products(const BlockLayout& layout, Kind kind, const std::byte* a, const std::byte* b, int cap, float* out) {
  OverCodecs<Product>(layout, kind, a, b, cap, out);
}

template <Codec kCodec>
void BlendOf(const std::byte* a, float a_weight, const std::byte* b, float b_weight, size_t units, std::byte* out) {
  using R = Row<kCodec>;
  const size_t lanes = hn::Lanes(DF());
  const VF wa = hn::Set(DF(), a_weight);
  const VF wb = hn::Set(DF(), b_weight);
  size_t unit = 0;
  for (; unit + lanes <= units; unit += lanes) {
    VF x[2], y[2];
    R::Load(a, unit, x);
    R::Load(b, unit, y);
    for (int i = 0; i < R::kStreams; ++i) x[i] = hn::MulAdd(wb, y[i], hn::Mul(wa, x[i]));
    R::Store(x, out, unit);
  }
  for (; unit < units; ++unit) {
    for (int i = 0; i < R::kStreams; ++i) {
      R::StoreOne(b_weight * R::LoadOne(b, unit, i) + a_weight * R::LoadOne(a, unit, i), out, unit, i);
    }
  }
}

void BlendAny(const BlockLayout& layout, const std::byte* a, float a_weight, const std::byte* b, float b_weight,
              int cap, std::byte* out) {
  const size_t elements = static_cast<size_t>(layout.n_kv_heads) * layout.head_dim * cap;
  switch (layout.codec) {
    case Codec::kBf16: return BlendOf<Codec::kBf16>(a, a_weight, b, b_weight, elements / 2, out);
    case Codec::kF16: return BlendOf<Codec::kF16>(a, a_weight, b, b_weight, elements, out);
    case Codec::kF32: return BlendOf<Codec::kF32>(a, a_weight, b, b_weight, elements, out);
    default: HWY_ABORT("encoded block");
  }
}

}  // namespace jointkv::joint::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace jointkv::joint {
namespace {

HWY_EXPORT(Distances);
HWY_EXPORT(Products);
HWY_EXPORT(BlendAny);

}  // namespace

void TokenDistances(const BlockLayout& layout, Kind kind, const std::byte* a, const std::byte* b, int cap, int tokens,
                    std::span<float, codec::kBlockTokensMax> out) {
  std::fill(out.begin(), out.end(), 0.0F);
  HWY_DYNAMIC_DISPATCH(Distances)(layout, kind, a, b, cap, out.data());
  std::fill(out.begin() + tokens, out.end(), 0.0F);
}

void TokenProducts(const BlockLayout& layout, Kind kind, const std::byte* a, const std::byte* b, int cap, int tokens,
                   std::span<float, codec::kBlockTokensMax> out) {
  std::fill(out.begin(), out.end(), 0.0F);
  HWY_DYNAMIC_DISPATCH(Products)(layout, kind, a, b, cap, out.data());
  std::fill(out.begin() + tokens, out.end(), 0.0F);
}

void Blend(const BlockLayout& layout, const std::byte* a, float a_weight, const std::byte* b, float b_weight, int cap,
           std::byte* out) {
  HWY_DYNAMIC_DISPATCH(BlendAny)(layout, a, a_weight, b, b_weight, cap, out);
}

}  // namespace jointkv::joint
#endif
