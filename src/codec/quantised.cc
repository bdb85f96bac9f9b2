#include "codec/quantised.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "codec/block_io.h"
#include "codec/quantised_encode-inl.h"
#include "codec/quantised_kernels.h"

namespace jointkv::codec {
namespace {

// To nearest even; what is no normal number becomes zero.
uint32_t NormalBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffU) < 0x00800000U) return bits >> 31 << 15;
  return Bf16FromF32(value);
}

struct Levels {
  int16_t x[kQuantisedHeadDimMax][kLanes];  // (channels, tokens)
};

// S H of the levels.
template <Codec kCodec>
void Inverse(const HeadArgs& args, const uint8_t* bytes, Levels& levels) {
  constexpr int kBits = LevelBits(kCodec);
  constexpr int kPerByte = 8 / kBits;
  for (int c = 0; c < args.head_dim; ++c) {
    for (int t = 0; t < args.tokens; ++t) {
      const int byte = bytes[static_cast<ptrdiff_t>(c / kPerByte) * args.tokens + t];
      levels.x[c][t] = kLevelTable<kCodec>[byte >> (c % kPerByte * kBits) & ((1 << kBits) - 1)];
    }
  }
  const int part = PartOf(args.head_dim);
  for (int half = 1; half < part; half *= 2) {
    for (int c = 0; c < args.head_dim; ++c) {
      if ((c & half) != 0) continue;
      int16_t* a = levels.x[c];
      int16_t* b = levels.x[c + half];
      for (int t = 0; t < args.tokens; ++t) {
        const int sum = a[t] + b[t];
        const int difference = a[t] - b[t];
        a[t] = static_cast<int16_t>(sum);
        b[t] = static_cast<int16_t>(difference);
      }
    }
  }
  for (int c = 0; c < args.head_dim; ++c) {
    if (kChannelSigns[c] == 0) continue;
    for (int t = 0; t < args.tokens; ++t) levels.x[c][t] = static_cast<int16_t>(-levels.x[c][t]);
  }
}

void LevelsOfQ8(const HeadArgs& args, const std::byte* head, Levels& levels) {
  for (int c = 0; c < args.head_dim; ++c) {
    for (int t = 0; t < args.tokens; ++t) {
      const ptrdiff_t at = args.kind == Kind::kK ? static_cast<ptrdiff_t>(c) * args.tokens + t
                                                 : static_cast<ptrdiff_t>(t) * args.head_dim + c;
      levels.x[c][t] = static_cast<int8_t>(head[at]);
    }
  }
}

void CheckArgs(const BlockLayout& layout, Codec codec, int cap, int tokens) {
  CHECK(layout.codec == Codec::kBf16 && IsQuantised(codec));
  CHECK(layout.head_dim >= 2 && layout.head_dim <= kQuantisedHeadDimMax && layout.head_dim % 2 == 0);
  CHECK(layout.head_dim * LevelBits(codec) % 8 == 0);
  CHECK(cap >= kClassStep && cap <= kBlockTokensMax && cap % kClassStep == 0);
  CHECK(tokens >= 1 && tokens <= cap);
}

HeadArgs ArgsOf(const BlockLayout& layout, Kind kind, Codec codec, int cap, int tokens, const Reference& reference) {
  HeadArgs args{kind, codec, layout.head_dim, cap, tokens, reference.mean, reference.mean_cap};
  // A level of q8 follows the largest value of its head vector, which factors make larger: scores err more with them.
  if (reference.pair_scales != nullptr && codec != Codec::kQ8) args.pair_scales = reference.pair_scales;
  return args;
}

}  // namespace

void EncodeHeadPortable(const HeadArgs& args, const std::byte* source, std::byte* out) {
  Tile tile;
  (args.kind == Kind::kK ? LoadK : LoadV)(args, source, tile);
  EncodeTile(args, tile, out);
}

void DecodeHeadPortable(const HeadArgs& args, const std::byte* head, std::byte* out) {
  Levels levels;
  for (int c = 0; c < args.head_dim && args.tokens < args.cap; ++c) levels.x[c][args.tokens] = 0;
  const auto* bytes = reinterpret_cast<const uint8_t*>(head);
  switch (args.codec) {
    case Codec::kQ4: Inverse<Codec::kQ4>(args, bytes, levels); break;
    case Codec::kQ2: Inverse<Codec::kQ2>(args, bytes, levels); break;
    case Codec::kQ1: Inverse<Codec::kQ1>(args, bytes, levels); break;
    default: LevelsOfQ8(args, head, levels);
  }
  const std::byte* scales = head + static_cast<ptrdiff_t>(args.tokens) * args.head_dim * LevelBits(args.codec) / 8;
  uint16_t unit = 0;
  std::memcpy(&unit, scales + args.tokens, sizeof(unit));
  float scale[kLanes] = {};
  for (int t = 0; t < args.tokens; ++t) scale[t] = static_cast<float>(scales[t]) * F32FromBf16(unit);
  struct Value {
    float level;
    float scale;
  };
  const auto store = [&](ptrdiff_t at, ptrdiff_t mean_at, Value first, Value second) {
    const uint32_t mean = args.mean == nullptr ? 0 : PairAt(args.mean, mean_at);
    const uint32_t pair = NormalBf16(std::fma(first.level, first.scale, Low(mean))) |
                          NormalBf16(std::fma(second.level, second.scale, High(mean))) << 16;
    std::memcpy(out + at * 4, &pair, sizeof(pair));
  };
  const auto level = [&](ptrdiff_t c, int t) { return static_cast<float>(levels.x[c][t]); };
  if (args.kind == Kind::kK) {
    for (ptrdiff_t pair = 0; pair < args.head_dim / 2; ++pair) {
      for (int t = 0; t < args.cap; ++t) {
        const float s = scale[t] * args.pair_scales[pair];
        store(pair * args.cap + t, pair * args.mean_cap + t, {level(2 * pair, t), s}, {level(2 * pair + 1, t), s});
      }
    }
  } else {
    for (int t = 0; t < args.cap; t += 2) {
      const ptrdiff_t row = static_cast<ptrdiff_t>(t / 2) * args.head_dim;
      for (int c = 0; c < args.head_dim; ++c)
        store(row + c, row + c, {level(c, t), scale[t]}, {level(c, t + 1), scale[t + 1]});
    }
  }
}

void EncodeBlock(const BlockLayout& source, Kind kind, Codec to, const std::byte* block, int cap, int tokens,
                 const Reference& reference, std::byte* out) {
  CheckArgs(source, to, cap, tokens);
  const auto encode = HasAvx512Kernels(source.head_dim) ? EncodeHeadAvx512
                      : HasAvx2Kernels(source.head_dim) ? EncodeHeadAvx2
                                                        : EncodeHeadPortable;
  const BlockLayout target{source.n_kv_heads, source.head_dim, to};
  for (int head = 0; head < source.n_kv_heads; ++head) {
    encode(ArgsOf(source, kind, to, cap, tokens, reference.OfHead(source, head)), block + source.head_offset(head, cap),
           out + target.head_offset(head, tokens));
  }
  const size_t end = target.head_offset(target.n_kv_heads, tokens);
  std::memset(out + end, 0, target.block_bytes(tokens) - end);
}

void DecodeHead(const BlockLayout& layout, Kind kind, Codec from, const std::byte* block, int head, int cap, int tokens,
                const Reference& reference, std::byte* out) {
  CheckArgs(layout, from, cap, tokens);
  const int own_cap = ClassCapacity(tokens);
  if (cap != own_cap) {  // a block that found no place of its own class
    std::byte own[kQuantisedHeadDimMax * kBlockTokensMax * sizeof(uint16_t)];
    DecodeHead(layout, kind, from, block, head, own_cap, tokens, reference, own);
    CopyBlock({1, layout.head_dim, layout.codec}, kind, own, own_cap, out, cap, tokens);
    return;
  }
  const auto decode = HasAvx512Kernels(layout.head_dim) ? DecodeHeadAvx512
                      : HasAvx2Kernels(layout.head_dim) ? DecodeHeadAvx2
                                                        : DecodeHeadPortable;
  const BlockLayout source{layout.n_kv_heads, layout.head_dim, from};
  decode(ArgsOf(layout, kind, from, cap, tokens, reference), block + source.head_offset(head, tokens), out);
}

void DecodeBlock(const BlockLayout& layout, Kind kind, Codec from, const std::byte* block, int cap, int tokens,
                 const Reference& reference, std::byte* out) {
  for (int head = 0; head < layout.n_kv_heads; ++head) {
    DecodeHead(layout, kind, from, block, head, cap, tokens, reference.OfHead(layout, head),
               out + layout.head_offset(head, cap));
  }
}

}  // namespace jointkv::codec
