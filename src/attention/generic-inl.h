// Helpers of the f32 kernels, for any codec and Highway target. Per-target include guard, as Highway asks.
#if defined(JOINTKV_ATTENTION_GENERIC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef JOINTKV_ATTENTION_GENERIC_INL_H_
#undef JOINTKV_ATTENTION_GENERIC_INL_H_
#else
#define JOINTKV_ATTENTION_GENERIC_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "codec/codec.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace jointkv::attention::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using codec::Codec;

using DF = hn::CappedTag<float, 16>;

// 2^x for x <= 0, to 2e-7 relative, exactly 1 for 0; below 2^-126.5 zero. x as an integer and a fraction in [-1/2,
// 1/2]: adding 1.5 * 2^23 leaves the integer in the low bits of the sum, and 127 more make it an exponent. The
// polynomial is the one of degree 6 with the least relative error among those that are 1 at 0.
template <class D>
HWY_INLINE hn::Vec<D> Exp2(D d, hn::Vec<D> x) {
  const hn::RebindToUnsigned<D> du;
  const auto shift = hn::Set(d, 12582912.0f + 127);
  x = hn::Max(x, hn::Set(d, -127.0f));
  const auto shifted = hn::Add(x, shift);
  const auto f = hn::Sub(x, hn::Sub(shifted, shift));
  auto y = hn::Set(d, 1.51867454e-4f);
  y = hn::MulAdd(y, f, hn::Set(d, 1.34071184e-3f));
  y = hn::MulAdd(y, f, hn::Set(d, 9.61901713e-3f));
  y = hn::MulAdd(y, f, hn::Set(d, 5.5503063e-2f));
  y = hn::MulAdd(y, f, hn::Set(d, 2.40226433e-1f));
  y = hn::MulAdd(y, f, hn::Set(d, 6.93147242e-1f));
  y = hn::MulAdd(y, f, hn::Set(d, 1.0f));
  return hn::Mul(y, hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(du, shifted))));
}

// What a kernel multiplies with lies as a matrix of (rows, width): K as (channels in pair order, tokens), V as (tokens,
// channels). In bf16, rows 2 i and 2 i + 1 lie as pairs.
template <Codec kCodec, int kOdd, class D>
HWY_INLINE hn::Vec<D> LoadRow(D d, const std::byte* matrix, ptrdiff_t width, ptrdiff_t pair, ptrdiff_t column) {
  const ptrdiff_t at = (2 * pair + kOdd) * width + column;
  if constexpr (kCodec == Codec::kBf16) {
    const hn::RebindToUnsigned<D> du;
    const auto both = hn::LoadU(du, reinterpret_cast<const uint32_t*>(matrix) + pair * width + column);
    return hn::BitCast(d, kOdd == 0 ? hn::ShiftLeft<16>(both) : hn::And(both, hn::Set(du, 0xffff0000u)));
  } else if constexpr (kCodec == Codec::kF16) {
    const hn::Rebind<hwy::float16_t, D> d16;
    const hn::Rebind<uint16_t, D> du16;
    return hn::PromoteTo(d, hn::BitCast(d16, hn::LoadU(du16, reinterpret_cast<const uint16_t*>(matrix) + at)));
  } else {
    return hn::LoadU(d, reinterpret_cast<const float*>(matrix) + at);
  }
}

// sum += x (kQueries, rows) times rows [begin, end) of a matrix, each lane one chain of sums in the order of rows. In
// bf16 whole pairs: x must be zero beside.
template <Codec kCodec, int kQueries, int kVectors, class D>
HWY_INLINE void AddProduct(D d, const std::byte* matrix, ptrdiff_t width, const ptrdiff_t (&column)[kVectors],
                           ptrdiff_t begin, ptrdiff_t end, const float* x, ptrdiff_t x_stride,
                           hn::Vec<D> (&sum)[kQueries][kVectors]) {
  const auto add = [&](ptrdiff_t pair, auto odd) HWY_ATTR {
    constexpr int kOdd = decltype(odd)::value;
    const float* factor = x + 2 * pair + kOdd;
    // What is fewer stays in registers.
    if constexpr (kQueries < kVectors) {
      hn::Vec<D> factors[kQueries];
      for (int q = 0; q < kQueries; ++q) factors[q] = hn::Set(d, factor[q * x_stride]);
      for (int i = 0; i < kVectors; ++i) {
        const auto values = LoadRow<kCodec, kOdd>(d, matrix, width, pair, column[i]);
        for (int q = 0; q < kQueries; ++q) sum[q][i] = hn::MulAdd(values, factors[q], sum[q][i]);
      }
    } else {
      hn::Vec<D> values[kVectors];
      for (int i = 0; i < kVectors; ++i) values[i] = LoadRow<kCodec, kOdd>(d, matrix, width, pair, column[i]);
      for (int q = 0; q < kQueries; ++q) {
        const auto one = hn::Set(d, factor[q * x_stride]);
        for (int i = 0; i < kVectors; ++i) sum[q][i] = hn::MulAdd(values[i], one, sum[q][i]);
      }
    }
  };
  constexpr std::integral_constant<int, 0> kEvenRow;
  constexpr std::integral_constant<int, 1> kOddRow;
  ptrdiff_t pair = begin / 2;
  if (kCodec != Codec::kBf16 && begin % 2 != 0) add(pair++, kOddRow);
  const ptrdiff_t pairs = kCodec == Codec::kBf16 ? (end + 1) / 2 : end / 2;
  for (; pair < pairs; ++pair) {
    add(pair, kEvenRow);
    add(pair, kOddRow);
  }
  if (kCodec != Codec::kBf16 && end % 2 != 0) add(pair, kEvenRow);
}

// Calls f(tag, column) for vectors that cover columns [0, n) of an even `width`; the last may overlap the one before,
// because what lies behind a row is not to be read.
template <class F>
HWY_INLINE void CoverColumns(int n, int width, const F& f) {
  const auto cover = [&](auto d) HWY_ATTR {
    const int lanes = static_cast<int>(hn::Lanes(d));
    for (int column = 0; column < n; column += lanes) f(d, std::min(column, width - lanes));
  };
  const DF d;
  const hn::CappedTag<float, 4> d4;
  const hn::CappedTag<float, 2> d2;
  if (width >= static_cast<int>(hn::Lanes(d))) {
    cover(d);
  } else if (width >= static_cast<int>(hn::Lanes(d4))) {
    cover(d4);
  } else {
    cover(d2);
  }
}

// Rotates q (2, n_pairs), times `factor`, into (n_pairs, 2).
HWY_INLINE void RotateQuery(const float* q, int n_pairs, const float* cos, const float* sin, float factor, float* out) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  int i = 0;
  for (; i + lanes <= n_pairs; i += lanes) {
    const auto c = hn::Mul(hn::Set(d, factor), hn::LoadU(d, cos + i));
    const auto s = hn::Mul(hn::Set(d, factor), hn::LoadU(d, sin + i));
    const auto x = hn::LoadU(d, q + i);
    const auto y = hn::LoadU(d, q + n_pairs + i);
    hn::StoreInterleaved2(hn::MulSub(x, c, hn::Mul(y, s)), hn::MulAdd(x, s, hn::Mul(y, c)), d, out + 2 * i);
  }
  for (; i < n_pairs; ++i) {
    const float c = factor * cos[i];
    const float s = factor * sin[i];
    out[2 * i] = q[i] * c - q[n_pairs + i] * s;
    out[2 * i + 1] = q[i] * s + q[n_pairs + i] * c;
  }
}

}  // namespace jointkv::attention::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard
