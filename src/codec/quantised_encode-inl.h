// Encoding of one head in plain loops over tokens, compiled once for each target. Sources that include it are built
// with -ffp-contract=off (src/CMakeLists.txt), so that every target rounds alike.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "codec/quantised_kernels.h"

namespace jointkv::codec {
namespace {

constexpr int kLanes = kBlockTokensMax;  // a lane is a token
constexpr float kLargest = 0x1p50F;
constexpr float kLeast = 0x1p-50F;

// Scales to try, in root mean squares.
constexpr std::array<float, 3> kScales = {0.94F, 1.0F, 1.06F};

struct Tile {
  alignas(64) float x[kQuantisedHeadDimMax][kLanes];  // (channels, tokens)
};

inline float Low(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
inline float High(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000U); }

// NaN becomes a number too.
inline float Held(float x) { return x > -kLargest ? (x < kLargest ? x : kLargest) : -kLargest; }

inline uint32_t PairAt(const std::byte* pairs, ptrdiff_t i) {
  uint32_t pair = 0;
  std::memcpy(&pair, pairs + i * 4, sizeof(pair));
  return pair;
}

// Differences from the mean over their pairs' factors; zeros for tokens that do not count.
inline void LoadK(const HeadArgs& args, const std::byte* source, Tile& tile) {
  const int tokens = args.tokens;
  for (int pair = 0; pair < args.head_dim / 2; ++pair) {
    uint32_t values[kLanes] = {};
    uint32_t means[kLanes] = {};
    std::memcpy(values, source + static_cast<ptrdiff_t>(pair) * args.cap * 4, static_cast<size_t>(tokens) * 4);
    if (args.mean != nullptr)
      std::memcpy(means, args.mean + static_cast<ptrdiff_t>(pair) * args.mean_cap * 4, static_cast<size_t>(tokens) * 4);
    const float factor = 1 / args.pair_scales[pair];
    for (int t = 0; t < kLanes; ++t) {
      tile.x[2 * pair][t] = Held((Low(values[t]) - Low(means[t])) * factor);
      tile.x[2 * pair + 1][t] = Held((High(values[t]) - High(means[t])) * factor);
    }
  }
}

inline void LoadV(const HeadArgs& args, const std::byte* source, Tile& tile) {
  const int tokens = args.tokens;
  for (int t = 0; t < kLanes; t += 2) {
    const ptrdiff_t row = static_cast<ptrdiff_t>(t / 2) * args.head_dim;
    for (int c = 0; c < args.head_dim; ++c) {
      const uint32_t value = t < tokens ? PairAt(source, row + c) : 0;
      const uint32_t mean = t < tokens && args.mean != nullptr ? PairAt(args.mean, row + c) : 0;
      tile.x[c][t] = Held(Low(value) - Low(mean));
      tile.x[c][t + 1] = t + 1 < tokens ? Held(High(value) - High(mean)) : 0;
    }
  }
}

// H S: the largest sum is 2^58.
inline void Transform(int head_dim, Tile& tile) {
  for (int c = 0; c < head_dim; ++c) {
    const float sign = kChannelSigns[c] != 0 ? -1.0F : 1.0F;
    for (int t = 0; t < kLanes; ++t) tile.x[c][t] *= sign;
  }
  const int part = PartOf(head_dim);
  for (int half = 1; half < part; half *= 2) {
    for (int c = 0; c < head_dim; ++c) {
      if ((c & half) != 0) continue;
      float* a = tile.x[c];
      float* b = tile.x[c + half];
      for (int t = 0; t < kLanes; ++t) {
        const float sum = a[t] + b[t];
        b[t] = a[t] - b[t];
        a[t] = sum;
      }
    }
  }
}

// Boundary `i` lies between levels i and i + 1.
template <Codec kCodec>
constexpr float Boundary(size_t i) {
  return static_cast<float>(Grid<kCodec>::kLevels[i] + Grid<kCodec>::kLevels[i + 1]) / 2;
}

// Scales as a block keeps them.
struct Scales {
  alignas(64) float value[kLanes];
  uint8_t byte[kLanes];
  uint16_t unit;
};

// Rounds to the nearest scales that can be kept; below half of the range, if `up`, to the least with which a largest
// level of 127 becomes no more than 127.49.
inline void RoundScales(const float* scales, bool up, Scales& out) {
  float largest = 0;
  for (int t = 0; t < kLanes; ++t) largest = scales[t] > largest ? scales[t] : largest;
  // The power of two of which the largest is 128 to 256 times. kLeast bounds scales from below: no number is subnormal.
  const uint32_t exponent = std::bit_cast<uint32_t>(largest) >> 23;
  const float unit = largest == 0 ? 0 : std::bit_cast<float>((exponent - 7) << 23);
  const float per_unit = largest == 0 ? 0 : std::bit_cast<float>((254 + 7 - exponent) << 23);
  for (int t = 0; t < kLanes; ++t) {
    const float units = scales[t] * per_unit;
    const float nearest = units + 0.5F;
    const float above = std::ceil(units * 0.9962F);
    const int byte = static_cast<int>(up && units < 127.5F ? above : nearest);
    out.byte[t] = static_cast<uint8_t>(byte < 255 ? byte : 255);
    out.value[t] = static_cast<float>(out.byte[t]) * unit;
  }
  out.unit = Bf16FromF32(unit);
}

inline void StoreScales(const Scales& scales, int tokens, std::byte* out) {
  std::memcpy(out, scales.byte, tokens);
  std::memcpy(out + tokens, &scales.unit, sizeof(scales.unit));
}

// Once levels g are chosen, the scale with the least error is <x, g> / <g, g>, and removes <x, g>^2 / <g, g>. What it
// gives is shorter than x by that error, so that products with it are too small: with 16 levels, where little is paid
// for it, the scale is <x, x> / <x, g> instead, and <x, y> = <x, x> for what y is decoded. inverse: by which each
// token's x is multiplied before the nearest level is chosen.
template <Codec kCodec>
void FitScales(int head_dim, const Tile& tile, float (&inverse)[kLanes], Scales& scales) {
  constexpr auto& kLevels = Grid<kCodec>::kLevels;
  constexpr bool kManyLevels = kLevels.size() == 8;
  alignas(64) float squared[kLanes] = {};
  alignas(64) float rms[kLanes];
  alignas(64) float most[kLanes];
  alignas(64) float fitted[kLanes];
  for (int c = 0; c < head_dim; ++c) {
    for (int t = 0; t < kLanes; ++t) squared[t] += tile.x[c][t] * tile.x[c][t];
  }
  for (int t = 0; t < kLanes; ++t) {
    rms[t] = std::sqrt(squared[t] / static_cast<float>(head_dim));
    most[t] = -1;
  }
  for (const float candidate : kScales) {
    alignas(64) float tried[kLanes];
    alignas(64) float along[kLanes] = {};
    alignas(64) float squares[kLanes] = {};  // integers below 2^24
    for (int t = 0; t < kLanes; ++t) tried[t] = Grid<kCodec>::kUnit / (candidate * (rms[t] < kLeast ? kLeast : rms[t]));
    for (int c = 0; c < head_dim; ++c) {
      for (int t = 0; t < kLanes; ++t) {
        const float magnitude = std::fabs(tile.x[c][t]);
        const float scaled = magnitude * tried[t];
        float level = kLevels[0];
        for (size_t i = 0; i + 1 < kLevels.size(); ++i)
          level = scaled > Boundary<kCodec>(i) ? static_cast<float>(kLevels[i + 1]) : level;
        along[t] += magnitude * level;
        squares[t] += level * level;
      }
    }
    for (int t = 0; t < kLanes; ++t) {
      const float scale = along[t] / squares[t];
      const float removed = scale * along[t];
      const bool better = removed > most[t];
      inverse[t] = better ? tried[t] : inverse[t];
      fitted[t] = better ? (kManyLevels ? squared[t] / along[t] : scale) : fitted[t];
      most[t] = better ? removed : most[t];
    }
    if (kLevels.size() == 1) break;  // whatever the scale, the level is the same
  }
  const float norm = 1 / static_cast<float>(PartOf(head_dim));  // H H is PartOf times the identity
  for (int t = 0; t < kLanes; ++t) fitted[t] = rms[t] < kLeast ? 0 : fitted[t] * norm;
  RoundScales(fitted, false, scales);
}

template <Codec kCodec>
void EncodeTransformed(const HeadArgs& args, Tile& tile, std::byte* out) {
  constexpr auto& kLevels = Grid<kCodec>::kLevels;
  constexpr int kBits = LevelBits(kCodec);
  constexpr int kPerByte = 8 / kBits;
  Transform(args.head_dim, tile);
  alignas(64) float inverse[kLanes] = {};
  Scales scales;
  FitScales<kCodec>(args.head_dim, tile, inverse, scales);
  for (int c = 0; c < args.head_dim; c += kPerByte) {
    alignas(64) int32_t packed[kLanes] = {};
    alignas(64) uint8_t bytes[kLanes];
    for (int i = 0; i < kPerByte; ++i) {
      const float* x = tile.x[c + i];
      for (int t = 0; t < kLanes; ++t) {
        const float scaled = std::fabs(x[t]) * inverse[t];
        int32_t index = x[t] < 0 ? static_cast<int32_t>(kLevels.size()) : 0;
        for (size_t level = 0; level + 1 < kLevels.size(); ++level) index += scaled > Boundary<kCodec>(level) ? 1 : 0;
        packed[t] |= index << (i * kBits);
      }
    }
    for (int t = 0; t < kLanes; ++t) bytes[t] = static_cast<uint8_t>(packed[t]);
    std::memcpy(out + static_cast<ptrdiff_t>(c / kPerByte) * args.tokens, bytes, args.tokens);
  }
  StoreScales(scales, args.tokens, out + static_cast<ptrdiff_t>(args.head_dim / kPerByte) * args.tokens);
}

constexpr float kToInteger = 0x1.8p23F;  // added and subtracted again, rounds to an integer
constexpr int kQ8Scales = 6;             // that are tried

// Of the least scales that can be kept, the one with the least error: of a decoded block it is what it was.
inline void FitQ8Scales(int head_dim, const Tile& tile, Scales& scales) {
  const float unit = F32FromBf16(scales.unit);
  alignas(64) float least[kLanes];
  const Scales smallest = scales;
  for (int more = 0; more < kQ8Scales; ++more) {
    alignas(64) float value[kLanes];
    alignas(64) float inverse[kLanes];
    alignas(64) float error[kLanes] = {};
    uint8_t byte[kLanes];
    for (int t = 0; t < kLanes; ++t) {
      // Zero stays zero, and from 128 units on the nearest scale is as good as any.
      const bool fixed = smallest.byte[t] == 0 || smallest.byte[t] >= 128;
      byte[t] = static_cast<uint8_t>(smallest.byte[t] + (fixed ? 0 : more));
      value[t] = static_cast<float>(byte[t]) * unit;
      inverse[t] = byte[t] == 0 ? 0 : 1 / value[t];
    }
    for (int c = 0; c < head_dim; ++c) {
      for (int t = 0; t < kLanes; ++t) {
        const float level = tile.x[c][t] * inverse[t] + kToInteger - kToInteger;
        const float left = tile.x[c][t] - level * value[t];
        error[t] += left * left;
      }
    }
    for (int t = 0; t < kLanes; ++t) {
      const bool better = more == 0 || error[t] < least[t];
      least[t] = better ? error[t] : least[t];
      scales.byte[t] = better ? byte[t] : scales.byte[t];
      scales.value[t] = better ? value[t] : scales.value[t];
    }
  }
}

inline void EncodeQ8(const HeadArgs& args, const Tile& tile, std::byte* out) {
  alignas(64) float largest[kLanes] = {};
  alignas(64) float divisor[kLanes];
  for (int c = 0; c < args.head_dim; ++c) {
    for (int t = 0; t < kLanes; ++t) {
      const float magnitude = std::fabs(tile.x[c][t]);
      largest[t] = magnitude > largest[t] ? magnitude : largest[t];
    }
  }
  for (int t = 0; t < kLanes; ++t) largest[t] = largest[t] < kLeast ? 0 : largest[t] / 127;
  Scales scales;
  RoundScales(largest, true, scales);
  FitQ8Scales(args.head_dim, tile, scales);
  for (int t = 0; t < kLanes; ++t) divisor[t] = scales.value[t] == 0 ? 2 * kLargest : scales.value[t];
  for (int c = 0; c < args.head_dim; ++c) {
    alignas(64) int8_t levels[kLanes];
    for (int t = 0; t < kLanes; ++t) {
      const float rounded = tile.x[c][t] / divisor[t] + kToInteger;  // the quotient is below 127.5
      levels[t] = static_cast<int8_t>(std::bit_cast<uint32_t>(rounded) - std::bit_cast<uint32_t>(kToInteger));
    }
    if (args.kind == Kind::kK) {
      std::memcpy(out + static_cast<ptrdiff_t>(c) * args.tokens, levels, args.tokens);
    } else {
      for (int t = 0; t < args.tokens; ++t)
        out[static_cast<ptrdiff_t>(t) * args.head_dim + c] = static_cast<std::byte>(levels[t]);
    }
  }
  StoreScales(scales, args.tokens, out + static_cast<ptrdiff_t>(args.head_dim) * args.tokens);
}

inline void EncodeTile(const HeadArgs& args, Tile& tile, std::byte* out) {
  switch (args.codec) {
    case Codec::kQ4: return EncodeTransformed<Codec::kQ4>(args, tile, out);
    case Codec::kQ2: return EncodeTransformed<Codec::kQ2>(args, tile, out);
    case Codec::kQ1: return EncodeTransformed<Codec::kQ1>(args, tile, out);
    default: return EncodeQ8(args, tile, out);
  }
}

}  // namespace
}  // namespace jointkv::codec
