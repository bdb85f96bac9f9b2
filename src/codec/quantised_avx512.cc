#include <cstring>

#include "base/check.h"
#include "base/cpu.h"
#include "codec/quantised_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <bit>
#include <cmath>

#include "base/avx512bf16_push.h"
// After the push: compiled for AVX-512.
#include "codec/quantised_encode-inl.h"

namespace jointkv::codec {
namespace {

constexpr int kGroup = 16;  // channels whose first four stages happen in registers

struct Levels {
  alignas(64) int16_t x[kQuantisedHeadDimMax][kLanes];  // (channels, tokens)
};

inline __mmask16 LaneMask(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1U << n) - 1); }

// Levels of 32 tokens, or of 16: half the work for a block that has no more.
struct Whole {
  using Vector = __m512i;
  static Vector Load(const int16_t* at) { return _mm512_load_si512(at); }
  static void Store(int16_t* at, Vector v) { _mm512_store_si512(at, v); }
  static Vector LoadBytes(const std::byte* at, uint32_t mask) {
    return _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, at));
  }
  static Vector LoadTable(const int16_t* at) { return _mm512_loadu_si512(at); }
  static Vector Lookup(Vector index, int shift, Vector table) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(index, shift), table);
  }
  static Vector Add(Vector a, Vector b) { return _mm512_add_epi16(a, b); }
  static Vector Subtract(Vector a, Vector b) { return _mm512_sub_epi16(a, b); }
};

struct Half {
  using Vector = __m256i;
  static Vector Load(const int16_t* at) { return _mm256_load_si256(reinterpret_cast<const Vector*>(at)); }
  static void Store(int16_t* at, Vector v) { _mm256_store_si256(reinterpret_cast<Vector*>(at), v); }
  static Vector LoadBytes(const std::byte* at, uint32_t mask) {
    return _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), at));
  }
  static Vector LoadTable(const int16_t* at) { return _mm256_loadu_si256(reinterpret_cast<const Vector*>(at)); }
  static Vector Lookup(Vector index, int shift, Vector table) {
    return _mm256_permutexvar_epi16(_mm256_srli_epi16(index, shift), table);
  }
  static Vector Add(Vector a, Vector b) { return _mm256_add_epi16(a, b); }
  static Vector Subtract(Vector a, Vector b) { return _mm256_sub_epi16(a, b); }
};

// v[i] +- v[i + half] for each two of kN vectors, for half = 1, 2, ..., kN / 2.
template <typename Of, int kN>
inline __attribute__((always_inline)) void Butterflies(typename Of::Vector (&v)[kN]) {
#pragma GCC unroll 8
  for (int half = 1; half < kN; half *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) {
      if ((i & half) != 0) continue;
      const auto a = v[i];
      v[i] = Of::Add(a, v[i + half]);
      v[i + half] = Of::Subtract(a, v[i + half]);
    }
  }
}

// The levels, and the stages of H among each kGroup channels.
template <typename Of, Codec kCodec>
void FirstStages(const HeadArgs& args, const std::byte* bytes, Levels& levels) {
  constexpr int kBits = LevelBits(kCodec);
  constexpr int kPerByte = 8 / kBits;
  const auto table = Of::LoadTable(kLevelTable<kCodec>.data());  // 16 entries and the same again
  const auto mask = static_cast<uint32_t>((uint64_t{1} << args.tokens) - 1);
  for (int c = 0; c < args.head_dim; c += kGroup) {
    typename Of::Vector v[kGroup];
#pragma GCC unroll 8
    for (int i = 0; i < kGroup / kPerByte; ++i) {
      const std::byte* row = bytes + static_cast<ptrdiff_t>(c / kPerByte + i) * args.tokens;
      const auto byte = Of::LoadBytes(row, mask);
#pragma GCC unroll 8
      for (int j = 0; j < kPerByte; ++j) v[kPerByte * i + j] = Of::Lookup(byte, j * kBits, table);
    }
    Butterflies<Of>(v);
#pragma GCC unroll 16
    for (int i = 0; i < kGroup; ++i) Of::Store(levels.x[c + i], v[i]);
  }
}

// The stages of H among kN channels that lie kGroup apart, in each part of kN * kGroup channels.
template <typename Of, int kN>
void LastStages(int head_dim, Levels& levels) {
  for (int part = 0; part < head_dim; part += kN * kGroup) {
    for (int c = part; c < part + kGroup; ++c) {
      typename Of::Vector v[kN];
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) v[i] = Of::Load(levels.x[c + i * kGroup]);
      Butterflies<Of>(v);
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) Of::Store(levels.x[c + i * kGroup], v[i]);
    }
  }
}

// H of the levels.
template <typename Of, Codec kCodec>
void InverseOf(const HeadArgs& args, const std::byte* bytes, Levels& levels) {
  FirstStages<Of, kCodec>(args, bytes, levels);
  switch (PartOf(args.head_dim) / kGroup) {
    case 1: return;
    case 2: return LastStages<Of, 2>(args.head_dim, levels);
    case 4: return LastStages<Of, 4>(args.head_dim, levels);
    case 8: return LastStages<Of, 8>(args.head_dim, levels);
    default: return LastStages<Of, 16>(args.head_dim, levels);
  }
}

template <Codec kCodec>
void Inverse(const HeadArgs& args, const std::byte* bytes, Levels& levels) {
  (args.cap > 16 ? InverseOf<Whole, kCodec> : InverseOf<Half, kCodec>)(args, bytes, levels);
}

// scale * level + mean as bf16, where lanes are pairs: first in the low half.
template <bool kMean>
inline __attribute__((always_inline)) __m512i Pairs(__m512i first, __m512i second, __m512 first_scale,
                                                    __m512 second_scale, __mmask16 mask, const std::byte* mean,
                                                    ptrdiff_t mean_at) {
  __m512 low = _mm512_setzero_ps();
  __m512 high = _mm512_setzero_ps();
  if constexpr (kMean) {
    const __m512i both = _mm512_maskz_loadu_epi32(mask, mean + mean_at);
    low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    high = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(first), first_scale, low);
  high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(second), second_scale, high);
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

inline __m512 Signed(__m512 x, __m512i signs) {
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), signs));
}

// The scales of tokens [token, token + 16), zeros past the last one.
inline __m512 LoadScales(const HeadArgs& args, const std::byte* scales, int token) {
  uint16_t unit = 0;
  std::memcpy(&unit, scales + args.tokens, sizeof(unit));
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(LaneMask(args.tokens - token), scales + token));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(bytes), _mm512_set1_ps(F32FromBf16(unit)));
}

template <bool kMean>
void StoreK(const HeadArgs& args, const Levels& levels, const std::byte* scales, std::byte* out) {
  for (int token = 0; token < args.cap; token += 16) {
    const __mmask16 mask = LaneMask(args.cap - token);
    const __m512 scale = LoadScales(args, scales, token);
    for (int pair = 0; pair < args.head_dim / 2; ++pair) {
      const auto level = [&](int c) __attribute__((always_inline)) {
        return _mm512_cvtepi16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(&levels.x[c][token])));
      };
      const auto sign = [](int c) __attribute__((always_inline)) {
        return _mm512_set1_epi32(static_cast<int>(kChannelSigns[c]));
      };
      const __m512 own = _mm512_mul_ps(scale, _mm512_set1_ps(args.pair_scales[pair]));
      const __m512i values =
          Pairs<kMean>(level(2 * pair), level(2 * pair + 1), Signed(own, sign(2 * pair)),
                       Signed(own, sign(2 * pair + 1)), mask, args.mean, (pair * args.mean_cap + token) * ptrdiff_t{4});
      _mm512_mask_storeu_epi32(out + (static_cast<ptrdiff_t>(pair) * args.cap + token) * 4, mask, values);
    }
  }
}

// 16 rows of 16 lanes of 32 bits become 16 columns.
inline __attribute__((always_inline)) void Transpose(__m512i (&v)[16]) {
  __m512i w[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  // v[4 i + j]: column j of each quarter, rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);       // quarters 0 and 2 of rows 0 to 7
    const __m512i b = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);       // quarters 1 and 3
    const __m512i c = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);  // the same of rows 8 to 15
    const __m512i d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
    w[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    w[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    w[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    w[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = w[i];
}

// In each half, 8 rows of 8 lanes of 32 bits become 8 columns.
inline __attribute__((always_inline)) void TransposeHalves(__m512i (&v)[8]) {
  __m512i w[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  // v[4 i + j]: column j of each quarter, rows 4 i to 4 i + 3.
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
  }
  const __m512i lower = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0);  // the lower quarters of both halves
  const __m512i upper = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    w[j] = _mm512_permutex2var_epi64(v[j], lower, v[4 + j]);
    w[4 + j] = _mm512_permutex2var_epi64(v[j], upper, v[4 + j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = w[i];
}

// Levels of channels [c, c + 16): a vector for each two tokens.
inline __attribute__((always_inline)) void ToTokenPairs(const Levels& levels, int c, __m512i (&v)[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(levels.x[c + i]);
  Transpose(v);
}

// The same of up to 16 tokens.
inline __attribute__((always_inline)) void ToTokenPairs(const Levels& levels, int c, __m512i (&v)[8]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(Half::Load(levels.x[c + i])), Half::Load(levels.x[c + 8 + i]), 1);
  TransposeHalves(v);
}

template <bool kMean, int kTokenPairs>
void StoreV(const HeadArgs& args, const Levels& levels, const std::byte* scales, std::byte* out) {
  alignas(64) float scale[kLanes];
  for (int token = 0; token < kLanes; token += 16) _mm512_store_ps(scale + token, LoadScales(args, scales, token));
  for (int c = 0; c < args.head_dim; c += 16) {
    __m512i v[kTokenPairs];  // a lane is two tokens
    ToTokenPairs(levels, c, v);
    const __m512i signs = _mm512_loadu_si512(&kChannelSigns[c]);
#pragma GCC unroll 16
    for (int pair = 0; pair < kTokenPairs; ++pair) {
      if (2 * pair >= args.cap) break;
      const ptrdiff_t at = (static_cast<ptrdiff_t>(pair) * args.head_dim + c) * 4;
      const __m512i values =
          Pairs<kMean>(_mm512_srai_epi32(_mm512_slli_epi32(v[pair], 16), 16), _mm512_srai_epi32(v[pair], 16),
                       Signed(_mm512_set1_ps(scale[2 * pair]), signs),
                       Signed(_mm512_set1_ps(scale[2 * pair + 1]), signs), 0xffff, args.mean, at);
      _mm512_storeu_si512(out + at, values);
    }
  }
}

template <Codec kCodec, bool kMean>
void DecodeTransformed(const HeadArgs& args, const std::byte* head, std::byte* out) {
  Levels levels;
  Inverse<kCodec>(args, head, levels);
  const std::byte* scales = head + static_cast<ptrdiff_t>(args.head_dim * LevelBits(kCodec) / 8) * args.tokens;
  if (args.kind == Kind::kK) {
    StoreK<kMean>(args, levels, scales, out);
  } else {
    (args.cap > 16 ? StoreV<kMean, 16> : StoreV<kMean, 8>)(args, levels, scales, out);
  }
}

inline __m512i LoadQ8(const std::byte* at, __mmask16 mask) {
  return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, at));
}

template <bool kMean>
void DecodeQ8(const HeadArgs& args, const std::byte* head, std::byte* out) {
  const std::byte* scales = head + static_cast<ptrdiff_t>(args.head_dim) * args.tokens;
  if (args.kind == Kind::kK) {
    for (int token = 0; token < args.cap; token += 16) {
      const __mmask16 mask = LaneMask(args.cap - token);
      const __mmask16 stored = LaneMask(args.tokens - token);
      const __m512 scale = LoadScales(args, scales, token);
      for (int pair = 0; pair < args.head_dim / 2; ++pair) {
        const std::byte* levels = head + static_cast<ptrdiff_t>(2 * pair) * args.tokens + token;
        const __m512 own = _mm512_mul_ps(scale, _mm512_set1_ps(args.pair_scales[pair]));
        const __m512i values = Pairs<kMean>(LoadQ8(levels, stored), LoadQ8(levels + args.tokens, stored), own, own,
                                            mask, args.mean, (pair * args.mean_cap + token) * ptrdiff_t{4});
        _mm512_mask_storeu_epi32(out + (static_cast<ptrdiff_t>(pair) * args.cap + token) * 4, mask, values);
      }
    }
    return;
  }
  alignas(64) float scale[kLanes];
  for (int token = 0; token < kLanes; token += 16) _mm512_store_ps(scale + token, LoadScales(args, scales, token));
  for (int pair = 0; pair < args.cap / 2; ++pair) {
    const __m512 first = _mm512_set1_ps(scale[2 * pair]);
    const __m512 second = _mm512_set1_ps(scale[2 * pair + 1]);
    const std::byte* levels = head + static_cast<ptrdiff_t>(2 * pair) * args.head_dim;
    const __mmask16 both = 2 * pair + 1 < args.tokens ? 0xffff : 0;
    for (int c = 0; c < args.head_dim; c += 16) {
      const ptrdiff_t at = (static_cast<ptrdiff_t>(pair) * args.head_dim + c) * 4;
      _mm512_storeu_si512(out + at, Pairs<kMean>(LoadQ8(levels + c, 0xffff), LoadQ8(levels + args.head_dim + c, both),
                                                 first, second, 0xffff, args.mean, at));
    }
  }
}

template <bool kMean>
void Decode(const HeadArgs& args, const std::byte* head, std::byte* out) {
  switch (args.codec) {
    case Codec::kQ4: return DecodeTransformed<Codec::kQ4, kMean>(args, head, out);
    case Codec::kQ2: return DecodeTransformed<Codec::kQ2, kMean>(args, head, out);
    case Codec::kQ1: return DecodeTransformed<Codec::kQ1, kMean>(args, head, out);
    default: return DecodeQ8<kMean>(args, head, out);
  }
}

}  // namespace

void EncodeHeadAvx512(const HeadArgs& args, const std::byte* source, std::byte* out) {
  Tile tile;
  (args.kind == Kind::kK ? LoadK : LoadV)(args, source, tile);
  EncodeTile(args, tile, out);
}

void DecodeHeadAvx512(const HeadArgs& args, const std::byte* head, std::byte* out) {
  (args.mean != nullptr ? Decode<true> : Decode<false>)(args, head, out);
}

}  // namespace jointkv::codec
#include "base/avx512bf16_pop.h"

namespace jointkv::codec {
bool HasAvx512Kernels(int head_dim) { return HasAvx512Bf16() && head_dim % kGroup == 0; }
}  // namespace jointkv::codec

#else
namespace jointkv::codec {
bool HasAvx512Kernels(int) { return false; }
void EncodeHeadAvx512(const HeadArgs&, const std::byte*, std::byte*) { CHECK(false); }
void DecodeHeadAvx512(const HeadArgs&, const std::byte*, std::byte*) { CHECK(false); }
}  // namespace jointkv::codec
#endif
