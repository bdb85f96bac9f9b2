#include <cstring>

#include "base/check.h"
#include "base/cpu.h"
#include "codec/quantised_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "base/avx2_push.h"
// After the push: compiled for AVX2.
#include "codec/quantised_encode-inl.h"

namespace jointkv::codec {
namespace {

constexpr int kStep = 8;  // tokens, or channels, of one vector of floats

constexpr int kLevelStep = 16;  // tokens of one vector of levels

struct Levels {
  alignas(64) int16_t x[kQuantisedHeadDimMax][kLanes];  // (channels, tokens), whole vectors of cap tokens
};

inline __m256i Load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
inline void Store(void* at, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(at), v); }

// Bytes are read 32 tokens at a time whatever the block holds: from a copy where that would pass the scales behind
// them.
template <Codec kCodec>
void LoadLevels(const HeadArgs& args, const std::byte* bytes, Levels& levels) {
  constexpr int kBits = LevelBits(kCodec);
  constexpr int kPerByte = 8 / kBits;
  const int rows = args.head_dim / kPerByte;
  std::byte copy[kQuantisedHeadDimMax / kPerByte * kLanes + 32];
  if (kLanes > 2 * args.tokens + 2) {  // the last row's tokens and the scales
    std::memcpy(copy, bytes, static_cast<size_t>(rows) * args.tokens);
    bytes = copy;
  }
  alignas(16) int8_t entries[16];
  for (int i = 0; i < 16; ++i) entries[i] = static_cast<int8_t>(kLevelTable<kCodec>[i]);
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(entries)));
  const __m256i mask = _mm256_set1_epi8((1 << kBits) - 1);
  for (int row = 0; row < rows; ++row) {
    const __m256i packed = Load(bytes + static_cast<ptrdiff_t>(row) * args.tokens);
#pragma GCC unroll 8
    for (int i = 0; i < kPerByte; ++i) {
      const __m256i level = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, i * kBits), mask));
      int16_t* out = levels.x[row * kPerByte + i];
      Store(out, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(level)));
      if (args.cap > kLevelStep) Store(out + kLevelStep, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(level, 1)));
    }
  }
}

// v[i] +- v[i + half] for each two of kN vectors, for half = 1, 2, ..., kN / 2.
template <int kN>
inline __attribute__((always_inline)) void Butterflies(__m256i (&v)[kN]) {
#pragma GCC unroll 8
  for (int half = 1; half < kN; half *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kN; ++i) {
      if ((i & half) != 0) continue;
      const __m256i a = v[i];
      v[i] = _mm256_add_epi16(a, v[i + half]);
      v[i + half] = _mm256_sub_epi16(a, v[i + half]);
    }
  }
}

// log2(kN) stages of H among channels that lie `distance` apart, in each part of kN * distance channels.
template <int kN>
void Stages(const HeadArgs& args, int distance, Levels& levels) {
  for (int part = 0; part < args.head_dim; part += kN * distance) {
    for (int c = part; c < part + distance; ++c) {
      for (int token = 0; token < args.cap; token += kLevelStep) {
        __m256i v[kN];
#pragma GCC unroll 8
        for (int i = 0; i < kN; ++i) v[i] = Load(levels.x[c + i * distance] + token);
        Butterflies(v);
#pragma GCC unroll 8
        for (int i = 0; i < kN; ++i) Store(levels.x[c + i * distance] + token, v[i]);
      }
    }
  }
}

// H of the levels.
template <Codec kCodec>
void Inverse(const HeadArgs& args, const std::byte* bytes, Levels& levels) {
  LoadLevels<kCodec>(args, bytes, levels);
  const int part = PartOf(args.head_dim);
  int distance = 1;
  for (; distance * 8 <= part; distance *= 8) Stages<8>(args, distance, levels);
  if (part / distance == 4) Stages<4>(args, distance, levels);
  if (part / distance == 2) Stages<2>(args, distance, levels);
}

// While there is one, results that are no normal number become zero. What computes them must not be inlined beside it.
class FlushToZero {
 public:
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before_); }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
  unsigned before_;
};

// As bf16 in the upper halves of lanes: to nearest even.
inline __m256i UpperBf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

// scale * level + mean as bf16, where lanes are pairs: first in the low half.
template <bool kMean>
inline __attribute__((always_inline)) __m256i Pairs(__m256i first, __m256i second, __m256 first_scale,
                                                    __m256 second_scale, const std::byte* mean, ptrdiff_t mean_at) {
  __m256 low = _mm256_setzero_ps();
  __m256 high = _mm256_setzero_ps();
  if constexpr (kMean) {
    const __m256i both = Load(mean + mean_at);
    low = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    high = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  low = _mm256_fmadd_ps(_mm256_cvtepi32_ps(first), first_scale, low);
  high = _mm256_fmadd_ps(_mm256_cvtepi32_ps(second), second_scale, high);
  return _mm256_blend_epi16(_mm256_srli_epi32(UpperBf16(low), 16), UpperBf16(high), 0xaa);
}

inline __m256 Signed(__m256 x, __m256i signs) {
  return _mm256_castsi256_ps(_mm256_xor_si256(_mm256_castps_si256(x), signs));
}

// Calls f(token, scales of kStep tokens from `token` on) for steps that cover the block; the last may overlap the one
// before.
template <typename F>
inline __attribute__((always_inline)) void ForTokens(const HeadArgs& args, const std::byte* scales, const F& f) {
  uint16_t bits = 0;
  std::memcpy(&bits, scales + args.tokens, sizeof(bits));
  const __m256 unit = _mm256_set1_ps(F32FromBf16(bits));
  std::byte padded[kLanes] = {};
  std::memcpy(padded, scales, args.tokens);
  for (int at = 0; at < args.cap; at += kStep) {
    const int token = at + kStep <= args.cap ? at : args.cap - kStep;
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(padded + token)));
    f(token, _mm256_mul_ps(_mm256_cvtepi32_ps(bytes), unit));
  }
}

template <bool kMean>
void StoreK(const HeadArgs& args, const Levels& levels, const std::byte* scales, std::byte* out) {
  ForTokens(
      args, scales, [&](int token, __m256 scale) __attribute__((always_inline)) {
        for (int pair = 0; pair < args.head_dim / 2; ++pair) {
          const auto level = [&](int c) __attribute__((always_inline)) {
            return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(&levels.x[c][token])));
          };
          const auto sign = [](int c) __attribute__((always_inline)) {
            return _mm256_set1_epi32(static_cast<int>(kChannelSigns[c]));
          };
          const __m256 own = _mm256_mul_ps(scale, _mm256_set1_ps(args.pair_scales[pair]));
          Store(
              out + (static_cast<ptrdiff_t>(pair) * args.cap + token) * 4,
              Pairs<kMean>(level(2 * pair), level(2 * pair + 1), Signed(own, sign(2 * pair)),
                           Signed(own, sign(2 * pair + 1)), args.mean, (pair * args.mean_cap + token) * ptrdiff_t{4}));
        }
      });
}

// 8 rows of 8 lanes of 32 bits become 8 columns.
inline __attribute__((always_inline)) void Transpose(__m256i (&v)[8]) {
  __m256i w[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    w[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
  // v[4 i + j]: column j of each half, rows 4 i to 4 i + 3.
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_unpacklo_epi64(w[i], w[i + 2]);
    v[i + 1] = _mm256_unpackhi_epi64(w[i], w[i + 2]);
    v[i + 2] = _mm256_unpacklo_epi64(w[i + 1], w[i + 3]);
    v[i + 3] = _mm256_unpackhi_epi64(w[i + 1], w[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    w[j] = _mm256_permute2x128_si256(v[j], v[4 + j], 0x20);
    w[4 + j] = _mm256_permute2x128_si256(v[j], v[4 + j], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = w[i];
}

template <bool kMean>
void StoreV(const HeadArgs& args, const Levels& levels, const std::byte* scales, std::byte* out) {
  alignas(32) float scale[kLanes];
  ForTokens(
      args, scales, [&](int token, __m256 s) __attribute__((always_inline)) { _mm256_storeu_ps(scale + token, s); });
  for (int c = 0; c < args.head_dim; c += kStep) {
    const __m256i signs = Load(&kChannelSigns[c]);
    for (int token = 0; token < args.cap; token += 2 * kStep) {
      __m256i v[8];  // a lane is two tokens
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) v[i] = Load(levels.x[c + i] + token);
      Transpose(v);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const int t = token + 2 * i;
        if (t >= args.cap) break;
        const ptrdiff_t at = (static_cast<ptrdiff_t>(t / 2) * args.head_dim + c) * 4;
        Store(out + at, Pairs<kMean>(_mm256_srai_epi32(_mm256_slli_epi32(v[i], 16), 16), _mm256_srai_epi32(v[i], 16),
                                     Signed(_mm256_set1_ps(scale[t]), signs),
                                     Signed(_mm256_set1_ps(scale[t + 1]), signs), args.mean, at));
      }
    }
  }
}

template <Codec kCodec, bool kMean>
void DecodeTransformed(const HeadArgs& args, const std::byte* head, std::byte* out) {
  Levels levels;
  Inverse<kCodec>(args, head, levels);
  const std::byte* scales = head + static_cast<ptrdiff_t>(args.head_dim * LevelBits(kCodec) / 8) * args.tokens;
  (args.kind == Kind::kK ? StoreK<kMean> : StoreV<kMean>)(args, levels, scales, out);
}

inline __m256i LoadQ8(const std::byte* at) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
}

template <bool kMean>
void DecodeQ8(const HeadArgs& args, const std::byte* head, std::byte* out) {
  const std::byte* scales = head + static_cast<ptrdiff_t>(args.head_dim) * args.tokens;
  if (args.kind == Kind::kK) {
    ForTokens(
        args, scales, [&](int token, __m256 scale) __attribute__((always_inline)) {
          for (int pair = 0; pair < args.head_dim / 2; ++pair) {
            const std::byte* levels = head + static_cast<ptrdiff_t>(2 * pair) * args.tokens + token;
            const __m256 own = _mm256_mul_ps(scale, _mm256_set1_ps(args.pair_scales[pair]));
            Store(out + (static_cast<ptrdiff_t>(pair) * args.cap + token) * 4,
                  Pairs<kMean>(LoadQ8(levels), LoadQ8(levels + args.tokens), own, own, args.mean,
                               (pair * args.mean_cap + token) * ptrdiff_t{4}));
          }
        });
    return;
  }
  alignas(32) float scale[kLanes];
  ForTokens(
      args, scales, [&](int token, __m256 s) __attribute__((always_inline)) { _mm256_storeu_ps(scale + token, s); });
  for (int t = 0; t < args.cap; t += 2) {
    const __m256 first = _mm256_set1_ps(scale[t]);
    const __m256 second = _mm256_set1_ps(scale[t + 1]);
    const std::byte* levels = head + static_cast<ptrdiff_t>(t) * args.head_dim;
    const std::byte* next = t + 1 < args.tokens ? levels + args.head_dim : levels;  // its scale is zero
    for (int c = 0; c < args.head_dim; c += kStep) {
      const ptrdiff_t at = (static_cast<ptrdiff_t>(t / 2) * args.head_dim + c) * 4;
      Store(out + at, Pairs<kMean>(LoadQ8(levels + c), LoadQ8(next + c), first, second, args.mean, at));
    }
  }
}

template <bool kMean>
__attribute__((noinline)) void Decode(const HeadArgs& args, const std::byte* head, std::byte* out) {
  switch (args.codec) {
    case Codec::kQ4: return DecodeTransformed<Codec::kQ4, kMean>(args, head, out);
    case Codec::kQ2: return DecodeTransformed<Codec::kQ2, kMean>(args, head, out);
    case Codec::kQ1: return DecodeTransformed<Codec::kQ1, kMean>(args, head, out);
    default: return DecodeQ8<kMean>(args, head, out);
  }
}

// The first kCap of each row's in_cap tokens, of kBytes bytes each, in rows of kStep.
template <int kCap, int kBytes>
inline __attribute__((always_inline)) void Widen(const std::byte* in, int in_cap, ptrdiff_t rows, std::byte* out) {
  std::memset(out, 0, static_cast<size_t>(rows) * kStep * kBytes);
  for (ptrdiff_t row = 0; row < rows; ++row)
    std::memcpy(out + row * kStep * kBytes, in + row * in_cap * kBytes, kCap * kBytes);
}

// A block of less than a vector of tokens: as one of a vector, of which a part is kept. What is read behind the last
// token of a row has a scale of zero.
template <int kCap>
void DecodeShort(const HeadArgs& args, const std::byte* head, std::byte* out) {
  const int head_dim = args.head_dim;
  const int tokens = args.tokens;
  const ptrdiff_t rows = head_dim * LevelBits(args.codec) / 8;
  std::byte wide_head[kQuantisedHeadDimMax * kStep + kStep + sizeof(uint16_t)];
  std::byte wide_mean[kQuantisedHeadDimMax * kStep * 2];
  std::byte wide_out[kQuantisedHeadDimMax * kStep * 2];
  if (args.codec == Codec::kQ8 && args.kind == Kind::kV) {
    std::memset(wide_head, 0, static_cast<size_t>(head_dim) * kStep);
    std::memcpy(wide_head, head, static_cast<size_t>(head_dim) * tokens);
  } else {
    Widen<kCap, 1>(head, tokens, rows, wide_head);
  }
  std::memset(wide_head + rows * kStep, 0, kStep);
  std::memcpy(wide_head + rows * kStep, head + rows * tokens, tokens);
  std::memcpy(wide_head + rows * kStep + kStep, head + rows * tokens + tokens, sizeof(uint16_t));
  HeadArgs wide = args;
  wide.cap = wide.tokens = kStep;
  if (args.mean != nullptr && args.mean_cap < kStep) {
    wide.mean = wide_mean;
    wide.mean_cap = kStep;
    if (args.kind == Kind::kK) {
      Widen<kCap, 4>(args.mean, args.mean_cap, head_dim / 2, wide_mean);
    } else {
      std::memset(wide_mean, 0, static_cast<size_t>(head_dim) * kStep * 2);
      std::memcpy(wide_mean, args.mean, static_cast<size_t>(head_dim) * kCap * 2);
    }
  }
  (args.mean != nullptr ? Decode<true> : Decode<false>)(wide, wide_head, wide_out);
  if (args.kind == Kind::kV) {
    std::memcpy(out, wide_out, static_cast<size_t>(head_dim) * kCap * 2);
    return;
  }
  for (ptrdiff_t pair = 0; pair < head_dim / 2; ++pair)
    std::memcpy(out + pair * kCap * 4, wide_out + pair * kStep * 4, kCap * 4);
}

}  // namespace

void EncodeHeadAvx2(const HeadArgs& args, const std::byte* source, std::byte* out) {
  Tile tile;
  (args.kind == Kind::kK ? LoadK : LoadV)(args, source, tile);
  EncodeTile(args, tile, out);
}

void DecodeHeadAvx2(const HeadArgs& args, const std::byte* head, std::byte* out) {
  static_assert(kClassStep == 2 && kStep == 8);
  const FlushToZero flush;
  if (args.cap == 2) return DecodeShort<2>(args, head, out);
  if (args.cap == 4) return DecodeShort<4>(args, head, out);
  if (args.cap == 6) return DecodeShort<6>(args, head, out);
  (args.mean != nullptr ? Decode<true> : Decode<false>)(args, head, out);
}

}  // namespace jointkv::codec
#include "base/avx2_pop.h"

namespace jointkv::codec {
bool HasAvx2Kernels(int head_dim) { return HasAvx2() && head_dim % kStep == 0; }
}  // namespace jointkv::codec

#else
namespace jointkv::codec {
bool HasAvx2Kernels(int) { return false; }
void EncodeHeadAvx2(const HeadArgs&, const std::byte*, std::byte*) { CHECK(false); }
void DecodeHeadAvx2(const HeadArgs&, const std::byte*, std::byte*) { CHECK(false); }
}  // namespace jointkv::codec
#endif
