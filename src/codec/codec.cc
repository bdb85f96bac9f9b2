#include "codec/codec.h"

#include <bit>

namespace jointkv::codec {

const char* CodecName(Codec codec) {
  switch (codec) {
    case Codec::kBf16: return "bf16";
    case Codec::kF16: return "f16";
    case Codec::kF32: return "f32";
    case Codec::kQ8: return "q8";
    case Codec::kQ4: return "q4";
    case Codec::kQ2: return "q2";
    case Codec::kQ1: return "q1";
  }
  return "?";
}

std::optional<Codec> ParseCodec(std::string_view name) {
  for (const Codec codec : {Codec::kBf16, Codec::kF16, Codec::kF32, Codec::kQ8, Codec::kQ4}) {
    if (name == CodecName(codec)) return codec;
  }
  return std::nullopt;
}

// Branches follow IEEE 754 binary16: normal, subnormal, overflow to infinity, NaN.
uint16_t F16FromF32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;            // rounds to 65,536 or more
  if (magnitude < 0x38800000u) {                                  // below 2^-14: subnormal, one unit is 2^-24
    const float scaled = std::bit_cast<float>(magnitude) + 0.5f;  // 0.5 has an ulp of 2^-24: the sum rounds for us
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(scaled) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

float F32FromF16(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  const uint32_t magnitude = value & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude < 0x400u) {
    const float scaled = static_cast<float>(magnitude) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
}

}  // namespace jointkv::codec
