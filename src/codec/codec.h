// How K and V elements are stored. A block names its codec; kernels switch on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "base/bf16.h"
#include "base/check.h"

namespace jointkv::codec {

enum class Codec : uint8_t { kBf16, kF16, kF32, kQ8, kQ4, kQ2, kQ1 };

// Levels and one scale per head vector (see quantised.h) instead of elements that stand alone.
constexpr bool IsQuantised(Codec codec) { return codec >= Codec::kQ8; }

// Bits of a level; quantised codecs only.
constexpr int LevelBits(Codec codec) {
  CHECK(IsQuantised(codec));
  return codec == Codec::kQ8 ? 8 : codec == Codec::kQ4 ? 4 : codec == Codec::kQ2 ? 2 : 1;
}

// Not for quantised codecs.
constexpr size_t ElementBytes(Codec codec) {
  CHECK(!IsQuantised(codec));
  return codec == Codec::kF32 ? 4 : 2;
}

const char* CodecName(Codec codec);
std::optional<Codec> ParseCodec(std::string_view name);  // those that a user may ask for: not q2 and q1

using jointkv::Bf16FromF32;
using jointkv::F32FromBf16;

uint16_t F16FromF32(float value);
float F32FromF16(uint16_t value);

}  // namespace jointkv::codec
