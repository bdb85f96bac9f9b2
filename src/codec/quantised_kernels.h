// One head of a quantised block: the kernels behind quantised.h, for every processor, for AVX2 and for AVX-512 with
// BF16. All give the same bits. Internal to the room; the tests hold them against each other.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "codec/layout.h"
#include "codec/quantised.h"

namespace jointkv::codec {

inline constexpr std::array<float, kQuantisedHeadDimMax / 2> kNoPairScales = [] {
  std::array<float, kQuantisedHeadDimMax / 2> ones{};
  ones.fill(1);
  return ones;
}();

// What a head of `tokens` tokens is encoded from or decoded to (bf16, of class cap), with its mean (bf16, of class
// mean_cap, or null).
struct HeadArgs {
  Kind kind = Kind::kK;
  Codec codec = Codec::kQ4;
  int head_dim = 0;
  int cap = 0;
  int tokens = 0;
  const std::byte* mean = nullptr;
  int mean_cap = kBlockTokensMax;
  const float* pair_scales = kNoPairScales.data();  // kK: (head_dim / 2)
};

void EncodeHeadPortable(const HeadArgs& args, const std::byte* source, std::byte* out);
// cap: ClassCapacity(tokens), as of the two below.
void DecodeHeadPortable(const HeadArgs& args, const std::byte* head, std::byte* out);

// Whether the two below may be called: HasAvx2() and a head_dim of whole vectors.
bool HasAvx2Kernels(int head_dim);
void EncodeHeadAvx2(const HeadArgs& args, const std::byte* source, std::byte* out);
void DecodeHeadAvx2(const HeadArgs& args, const std::byte* head, std::byte* out);

// Whether the two below may be called: HasAvx512Bf16() and a head_dim of whole vectors.
bool HasAvx512Kernels(int head_dim);
void EncodeHeadAvx512(const HeadArgs& args, const std::byte* source, std::byte* out);
void DecodeHeadAvx512(const HeadArgs& args, const std::byte* head, std::byte* out);

// Lloyd-Max grids of a Gaussian (Max, Quantizing for Minimum Distortion, 1960) in integers: the magnitudes, of kLevels
// with their signs, and a standard deviation in their unit. They leave GaussianLoss of the energy; the best real
// levels would leave 0.009501 (q4), 0.11748 (q2), 0.36338 (q1). Sums of kQuantisedHeadDimMax levels fit 16 bits.
template <Codec kCodec>
struct Grid;
template <>
struct Grid<Codec::kQ4> {
  static constexpr std::array<int8_t, 8> kLevels = {5, 15, 25, 36, 48, 62, 79, 104};
  static constexpr float kUnit = 38.1433F;
};
template <>
struct Grid<Codec::kQ2> {
  static constexpr std::array<int8_t, 2> kLevels = {3, 10};
  static constexpr float kUnit = 6.6224F;
};
template <>
struct Grid<Codec::kQ1> {
  static constexpr std::array<int8_t, 1> kLevels = {1};
  static constexpr float kUnit = 1.2533F;
};
static_assert(Grid<Codec::kQ4>::kLevels.back() * kQuantisedHeadDimMax <= INT16_MAX);

// By index: the highest of its bits is the sign. A table of 32, so that what lies above those bits does not matter.
template <Codec kCodec>
inline constexpr std::array<int16_t, 32> kLevelTable = [] {
  constexpr auto& kMagnitudes = Grid<kCodec>::kLevels;
  std::array<int16_t, 32> levels{};
  for (size_t i = 0; i < levels.size(); ++i) {
    const size_t index = i % (2 * kMagnitudes.size());
    const bool negative = index >= kMagnitudes.size();
    levels[i] = static_cast<int16_t>(negative ? -kMagnitudes[index - kMagnitudes.size()] : kMagnitudes[index]);
  }
  return levels;
}();

// The sign bit of a float for each channel.
inline constexpr std::array<uint32_t, kQuantisedHeadDimMax> kChannelSigns = [] {
  std::array<uint32_t, kQuantisedHeadDimMax> signs{};
  uint32_t state = 1;
  for (uint32_t& sign : signs) {
    state = state * 1664525U + 1013904223U;  // Numerical Recipes' generator: the top bit is its best
    sign = ~state & 0x80000000U;
  }
  return signs;
}();

// Channels of one Walsh-Hadamard transform.
constexpr int PartOf(int head_dim) { return head_dim & -head_dim; }

}  // namespace jointkv::codec
