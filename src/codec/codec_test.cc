#include "codec/codec.h"

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <random>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

namespace jointkv::codec {
namespace {

// A small float format: 1 sign bit, exponent bits, mantissa bits.
struct Format {
  int exponent_bits;
  int mantissa_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int exponent_max() const { return (1 << exponent_bits) - 1; }
};
constexpr Format kF16Format{5, 10};
constexpr Format kBf16Format{8, 7};

// The value of a finite pattern, from the definition.
double Decode(Format f, uint16_t pattern) {
  const int exponent = (pattern >> f.mantissa_bits) & f.exponent_max();
  const int mantissa = pattern & ((1 << f.mantissa_bits) - 1);
  const double fraction = std::ldexp(mantissa, -f.mantissa_bits);
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, 1 - f.bias()) : std::ldexp(1.0 + fraction, exponent - f.bias());
  return (pattern & 0x8000) != 0 ? -magnitude : magnitude;
}

// Nearest representable magnitude, ties to the even pattern, by bisection over the sorted finite patterns.
uint16_t RoundTo(Format f, float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const auto infinity = static_cast<uint16_t>(f.exponent_max() << f.mantissa_bits);
  const double magnitude = std::fabs(static_cast<double>(value));
  if (std::isinf(value)) return sign | infinity;
  uint16_t low = 0;
  uint16_t high = infinity;  // as a value: the next power of two after the largest finite one
  const auto value_of = [&](uint16_t p) { return p == infinity ? std::ldexp(1.0, f.bias() + 1) : Decode(f, p); };
  if (magnitude >= value_of(infinity)) return sign | infinity;
  while (high - low > 1) {
    const auto middle = static_cast<uint16_t>((low + high) / 2);
    (value_of(middle) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - value_of(low);
  const double above = value_of(high) - magnitude;
  if (below != above) return sign | (below < above ? low : high);
  return sign | (low % 2 == 0 ? low : high);
}

uint16_t Encode(Format f, float value) { return f.mantissa_bits == 10 ? F16FromF32(value) : Bf16FromF32(value); }
float DecodeOurs(Format f, uint16_t pattern) {
  return f.mantissa_bits == 10 ? F32FromF16(pattern) : F32FromBf16(pattern);
}

class HalfFormats : public testing::TestWithParam<Format> {};

TEST_P(HalfFormats, EveryPatternBothWays) {
  const Format f = GetParam();
  for (int i = 0; i <= 0xffff; ++i) {
    const auto pattern = static_cast<uint16_t>(i);
    const float value = DecodeOurs(f, pattern);
    const int exponent = (pattern >> f.mantissa_bits) & f.exponent_max();
    const bool has_mantissa = (pattern & ((1 << f.mantissa_bits) - 1)) != 0;
    ASSERT_EQ(std::signbit(value), (pattern & 0x8000) != 0) << i;
    if (exponent == f.exponent_max() && has_mantissa) {
      ASSERT_TRUE(std::isnan(value)) << i;
      ASSERT_TRUE(std::isnan(DecodeOurs(f, Encode(f, value)))) << i;
      continue;
    }
    if (exponent == f.exponent_max()) {
      ASSERT_TRUE(std::isinf(value)) << i;
    } else {
      ASSERT_EQ(static_cast<double>(value), Decode(f, pattern)) << i;
    }
    ASSERT_EQ(Encode(f, value), pattern) << i;
  }
}

// Around every representable value and every midpoint between two: the float itself and its neighbours on both sides.
TEST_P(HalfFormats, RoundsToNearestEvenAtEveryBoundary) {
  const Format f = GetParam();
  const auto infinity = f.exponent_max() << f.mantissa_bits;
  for (int i = 0; i < infinity; ++i) {
    const double value = Decode(f, static_cast<uint16_t>(i));
    const double next = i + 1 == infinity ? std::ldexp(1.0, f.bias() + 1) : Decode(f, static_cast<uint16_t>(i + 1));
    for (const double centre : {value, (value + next) / 2}) {
      const auto exact = static_cast<float>(centre);
      for (const float near : {exact, std::nextafterf(exact, INFINITY), std::nextafterf(exact, -INFINITY)}) {
        ASSERT_EQ(Encode(f, near), RoundTo(f, near)) << near;
        ASSERT_EQ(Encode(f, -near), RoundTo(f, -near)) << -near;
      }
    }
  }
}

TEST_P(HalfFormats, RoundsRandomFloats) {
  const Format f = GetParam();
  std::mt19937 random(1);
  for (int i = 0; i < 2'000'000; ++i) {
    const float value = std::bit_cast<float>(static_cast<uint32_t>(random()));
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(DecodeOurs(f, Encode(f, value))));
    } else {
      ASSERT_EQ(Encode(f, value), RoundTo(f, value)) << value;
    }
  }
}

TEST_P(HalfFormats, ExtremesKeepTheirSign) {
  const Format f = GetParam();
  const auto infinity = static_cast<uint16_t>(f.exponent_max() << f.mantissa_bits);
  EXPECT_EQ(Encode(f, INFINITY), infinity);
  EXPECT_EQ(Encode(f, -INFINITY), infinity | 0x8000);
  EXPECT_EQ(Encode(f, FLT_MAX), infinity);
  EXPECT_EQ(Encode(f, -0.0f), 0x8000);
  EXPECT_EQ(Encode(f, FLT_TRUE_MIN), 0);
  // NaNs whose payload lies only in the bits that are cut off must not become infinite.
  for (const uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffc00000u}) {
    EXPECT_TRUE(std::isnan(DecodeOurs(f, Encode(f, std::bit_cast<float>(bits))))) << bits;
  }
}

INSTANTIATE_TEST_SUITE_P(Codec, HalfFormats, testing::Values(kF16Format, kBf16Format),
                         [](const auto& param) { return param.param.mantissa_bits == 10 ? "F16" : "Bf16"; });

TEST(Codec, NamesGoBothWays) {
  for (const Codec codec : {Codec::kBf16, Codec::kF16, Codec::kF32, Codec::kQ8, Codec::kQ4})
    EXPECT_EQ(ParseCodec(CodecName(codec)), codec);
  for (const std::string_view name : {"", "bf", "bf166", "BF16", "Q8", "q4_0", "q2", "q1"})
    EXPECT_EQ(ParseCodec(name), std::nullopt);
}

}  // namespace
}  // namespace jointkv::codec
