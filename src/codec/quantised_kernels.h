// One head of a quantised block: the kernels behind quantised.h, for every processor and for AVX-512 with BF16. Both
// give the same bits. Internal to the room; the tests hold them against each other.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "codec/layout.h"
#include "codec/quantised.h"

namespace jointkv::codec {

// What a head is encoded from or decoded to (bf16, cap tokens), with its mean (bf16, kBlockTokensMax tokens, or null).
struct HeadArgs {
  Kind kind = Kind::kK;
  Codec codec = Codec::kQ4;
  int head_dim = 0;
  int cap = 0;
  const std::byte* mean = nullptr;
};

void EncodeHeadPortable(const HeadArgs& args, const std::byte* source, int tokens, std::byte* out);
void DecodeHeadPortable(const HeadArgs& args, const std::byte* head, std::byte* out);

// Whether the two below may be called: HasAvx512Bf16() and a head_dim of whole vectors.
bool HasAvx512Kernels(int head_dim);
void EncodeHeadAvx512(const HeadArgs& args, const std::byte* source, int tokens, std::byte* out);
void DecodeHeadAvx512(const HeadArgs& args, const std::byte* head, std::byte* out);

// The 16-level Lloyd-Max grid of a Gaussian (Max, Quantizing for Minimum Distortion, 1960) in integers: these levels
// leave an error of 0.009506 of the energy when a standard deviation is kGridUnit, where the best real ones leave
// 0.009501. Sums of kQuantisedHeadDimMax of them fit 16 bits.
inline constexpr std::array<int8_t, 8> kGridLevels = {5, 15, 25, 36, 48, 62, 79, 104};
inline constexpr float kGridUnit = 38.1433F;
static_assert(kGridLevels.back() * kQuantisedHeadDimMax <= INT16_MAX);

// By nibble: bit 3 is the sign.
inline constexpr std::array<int8_t, 16> kNibbleLevels = [] {
  std::array<int8_t, 16> levels{};
  for (size_t i = 0; i < kGridLevels.size(); ++i) {
    levels[i] = kGridLevels[i];
    levels[i + 8] = static_cast<int8_t>(-kGridLevels[i]);
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
