#include "codec/quantised.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/cpu.h"
#include "codec/block_io.h"
#include "codec/quantised_kernels.h"

namespace jointkv::codec {
namespace {

// What the grids' levels leave of a Gaussian (quantised_kernels.h).
constexpr double kLloydMax = GaussianLoss(Codec::kQ4);
constexpr double kBf16Unit = 0x1p-8;  // largest relative error of rounding to bf16
constexpr std::byte kGuard{0xa5};
constexpr size_t kGuardBytes = 64;

using Values = std::vector<float>;
using Bytes = std::vector<std::byte>;

Values Gaussian(size_t n, std::mt19937& random, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  Values values(n);
  for (float& value : values) value = normal(random);
  return values;
}

bool Fits(int head_dim, Codec codec) { return head_dim * LevelBits(codec) % 8 == 0; }

// A bf16 block of `cap` tokens filled by make(token).
template <class Make>
Bytes Block(const BlockLayout& layout, Kind kind, int cap, int tokens, const Make& make) {
  Bytes block(layout.block_bytes(cap));
  for (int token = 0; token < tokens; ++token) StoreToken(layout, kind, block.data(), cap, token, make(token));
  return block;
}

Values Load(const BlockLayout& layout, Kind kind, const Bytes& block, int cap, int token) {
  Values values(static_cast<size_t>(layout.n_kv_heads) * layout.head_dim);
  LoadToken(layout, kind, block.data(), cap, token, values);
  return values;
}

Bytes Encoded(const BlockLayout& layout, Kind kind, Codec to, const Bytes& block, int cap, int tokens,
              const Bytes& mean) {
  const size_t size = BlockLayout{layout.n_kv_heads, layout.head_dim, to}.block_bytes(tokens);
  Bytes out(size + kGuardBytes, kGuard);
  EncodeBlock(layout, kind, to, block.data(), cap, tokens, {mean.empty() ? nullptr : mean.data()}, out.data());
  for (size_t i = size; i < out.size(); ++i) EXPECT_EQ(out[i], kGuard);
  out.resize(size);
  return out;
}

Bytes Decoded(const BlockLayout& layout, Kind kind, Codec from, const Bytes& block, int cap, int tokens,
              const Bytes& mean) {
  Bytes out(layout.block_bytes(cap) + kGuardBytes, kGuard);
  const Bytes exact(block.begin(), block.end());  // a sanitizer sees who reads behind it
  DecodeBlock(layout, kind, from, exact.data(), cap, tokens, {mean.empty() ? nullptr : mean.data()}, out.data());
  for (size_t i = layout.n_kv_heads * layout.head_bytes(cap); i < out.size(); ++i) EXPECT_EQ(out[i], kGuard);
  out.resize(layout.block_bytes(cap));
  return out;
}

float ScaleOf(const BlockLayout& layout, Codec codec, const Bytes& block, int head, int tokens, int token) {
  const BlockLayout quantised{layout.n_kv_heads, layout.head_dim, codec};
  const std::byte* scales = block.data() + quantised.head_offset(head + 1, tokens) - tokens - sizeof(uint16_t);
  uint16_t unit = 0;
  std::memcpy(&unit, scales + tokens, sizeof(unit));
  return static_cast<float>(scales[token]) * F32FromBf16(unit);
}

struct Case {
  Codec codec;
  Kind kind;
};

std::string Name(const Case& c) { return std::string(CodecName(c.codec)) + (c.kind == Kind::kK ? "K" : "V"); }

class QuantisedTest : public testing::TestWithParam<Case> {
 protected:
  Codec codec() const { return GetParam().codec; }
  Kind kind() const { return GetParam().kind; }
  Bytes RoundTrip(const BlockLayout& layout, const Bytes& block, int cap, int tokens, const Bytes& mean) const {
    return Decoded(layout, kind(), codec(), Encoded(layout, kind(), codec(), block, cap, tokens, mean), cap, tokens,
                   mean);
  }
};

// Squared error over the squares around `mean`, of 60 blocks of tokens made by `make`.
template <class Make>
double Nmse(int head_dim, Kind kind, Codec codec, const Values& mean, const Make& make) {
  const BlockLayout layout{2, head_dim, Codec::kBf16};
  const Bytes means = mean.empty() ? Bytes() : Block(layout, kind, 32, 32, [&](int) { return mean; });
  double error = 0;
  double size = 0;
  for (int n = 0; n < 60; ++n) {
    const Bytes block = Block(layout, kind, 32, 32, [&](int) { return make(); });
    const Bytes back = Decoded(layout, kind, codec, Encoded(layout, kind, codec, block, 32, 32, means), 32, 32, means);
    for (int token = 0; token < 32; ++token) {
      const Values before = Load(layout, kind, block, 32, token);
      const Values after = Load(layout, kind, back, 32, token);
      for (size_t i = 0; i < before.size(); ++i) {
        error += std::pow(after[i] - before[i], 2);
        size += std::pow(before[i] - (mean.empty() ? 0 : mean[i]), 2);
      }
    }
  }
  return error / size;
}

// A scale fitted to one vector follows the tails that it happens to have: the fewer values, the less is lost. bf16 adds
// at most kBf16Unit^2 / 3 of the energy (uniform errors of at most kBf16Unit), 5.1e-6.
TEST(Quantised, Q4OfAGaussianIsLloydMax) {
  std::mt19937 random(1);
  double shorter = 0.7 * kLloydMax;
  for (const int head_dim : {32, 64, 128, 256}) {
    for (const Kind kind : {Kind::kK, Kind::kV}) {
      const double nmse = Nmse(head_dim, kind, Codec::kQ4, {}, [&] { return Gaussian(2 * head_dim, random); });
      EXPECT_GT(nmse, shorter) << head_dim;
      EXPECT_LT(nmse, 1.01 * kLloydMax) << head_dim;
      if (kind == Kind::kV) shorter = 0.99 * nmse;
    }
  }
  EXPECT_GT(shorter, 0.9 * kLloydMax);
}

// The scale with the least error would leave products short by that error, 1 - kLloydMax of what they are. Here scales
// of 64 units and more (a Gaussian's lengths differ by less than a factor of two) are off by 1/128 at most, bf16 by
// 1/256.
TEST(Quantised, Q4KeepsAVectorsProductWithItself) {
  std::mt19937 random(24);
  const BlockLayout layout{1, 64, Codec::kBf16};
  for (const Kind kind : {Kind::kK, Kind::kV}) {
    double squares = 0;
    double products = 0;
    for (int n = 0; n < 100; ++n) {
      const Bytes block = Block(layout, kind, 32, 32, [&](int) { return Gaussian(64, random); });
      const Bytes back =
          Decoded(layout, kind, Codec::kQ4, Encoded(layout, kind, Codec::kQ4, block, 32, 32, {}), 32, 32, {});
      for (int token = 0; token < 32; ++token) {
        const Values before = Load(layout, kind, block, 32, token);
        const Values after = Load(layout, kind, back, 32, token);
        double square = 0;
        double product = 0;
        for (size_t i = 0; i < before.size(); ++i) {
          square += before[i] * before[i];
          product += before[i] * after[i];
        }
        EXPECT_NEAR(product / square, 1, 3 * kBf16Unit);
        squares += square;
        products += product;
      }
    }
    EXPECT_NEAR(products / squares, 1, 0.1 * kLloydMax);
  }
}

TEST(Quantised, FewLevelsOfAGaussianAreLloydMaxToo) {
  std::mt19937 random(12);
  for (const Codec codec : {Codec::kQ2, Codec::kQ1}) {
    for (const Kind kind : {Kind::kK, Kind::kV}) {
      const double nmse = Nmse(256, kind, codec, {}, [&] { return Gaussian(512, random); });
      EXPECT_NEAR(nmse / GaussianLoss(codec), 1, 0.03);
    }
  }
}

// The largest of 128 Gaussian values is about 2.7; a uniform error over a step of 2.7 / 127 has a variance of 3.8e-5,
// and bf16 adds up to 5.1e-6.
TEST(Quantised, Q8LosesLittle) {
  std::mt19937 random(2);
  for (const Kind kind : {Kind::kK, Kind::kV})
    EXPECT_NEAR(Nmse(128, kind, Codec::kQ8, {}, [&] { return Gaussian(256, random); }), 4e-5, 0.8e-5);
}

// Without the transform one large channel would leave the others of its head two levels.
TEST(Quantised, Q4SpreadsAnOutlier) {
  std::mt19937 random(3);
  const double nmse = Nmse(64, Kind::kK, Codec::kQ4, {}, [&] {
    Values values = Gaussian(128, random);
    values[5] *= 30;
    values[70] *= 30;
    return values;
  });
  EXPECT_LT(nmse, 2 * kLloydMax);
}

// bf16 keeps 8 bits of mean and difference together, in the source as in the result: with a mean of 4 standard
// deviations, up to 17 * kBf16Unit^2 / 3 = 8.7e-5 of the difference's energy is lost to the last rounding.
TEST(Quantised, TheErrorIsRelativeToWhatTheMeanLeaves) {
  std::mt19937 random(4);
  Values mean = Gaussian(128, random, 4);
  for (float& value : mean) value = F32FromBf16(Bf16FromF32(value));
  const auto make = [&] {
    Values values = Gaussian(128, random);
    for (size_t i = 0; i < values.size(); ++i) values[i] += mean[i];
    return values;
  };
  for (const Kind kind : {Kind::kK, Kind::kV}) {
    EXPECT_LT(Nmse(64, kind, Codec::kQ4, mean, make), 1.02 * kLloydMax);
    EXPECT_LT(Nmse(64, kind, Codec::kQ8, mean, make), 5e-5 + 8.7e-5);
    EXPECT_GT(Nmse(64, kind, Codec::kQ4, {}, make), kLloydMax / 2);  // of squares that are 17 times as large
  }
}

TEST(Quantised, Q8IsWithinHalfAStep) {
  std::mt19937 random(5);
  for (const Kind kind : {Kind::kK, Kind::kV}) {
    for (const int head_dim : {2, 10, 64}) {
      const BlockLayout layout{2, head_dim, Codec::kBf16};
      const Bytes block = Block(layout, kind, 32, 32, [&](int) { return Gaussian(2 * head_dim, random); });
      const Bytes encoded = Encoded(layout, kind, Codec::kQ8, block, 32, 32, {});
      const Bytes decoded = Decoded(layout, kind, Codec::kQ8, encoded, 32, 32, {});
      for (int token = 0; token < 32; ++token) {
        const Values before = Load(layout, kind, block, 32, token);
        const Values after = Load(layout, kind, decoded, 32, token);
        for (int i = 0; i < 2 * head_dim; ++i) {
          const float half = ScaleOf(layout, Codec::kQ8, encoded, i / head_dim, 32, token) / 2;
          // The quotient is rounded to f32 before it is to an integer: at most 127 * 2^-24 of a step.
          EXPECT_LE(std::abs(after[i] - before[i]), half * (1 + 0x1p-16) + kBf16Unit * (std::abs(before[i]) + half));
        }
      }
    }
  }
}

// What the header says of q4, in doubles and with the matrix written out.
TEST_P(QuantisedTest, DecodesByItsDefinition) {
  if (codec() == Codec::kQ8) GTEST_SKIP() << "not transformed";
  std::mt19937 random(6);
  const int bits = LevelBits(codec());
  const auto& levels = codec() == Codec::kQ4   ? kLevelTable<Codec::kQ4>
                       : codec() == Codec::kQ2 ? kLevelTable<Codec::kQ2>
                                               : kLevelTable<Codec::kQ1>;
  for (const int head_dim : {2, 24, 64, 256}) {
    if (!Fits(head_dim, codec())) continue;
    const BlockLayout layout{1, head_dim, Codec::kBf16};
    const Bytes mean = Block(layout, kind(), 32, 32, [&](int) { return Gaussian(head_dim, random); });
    const Bytes block = Block(layout, kind(), 8, 8, [&](int) { return Gaussian(head_dim, random, 3); });
    const Bytes encoded = Encoded(layout, kind(), codec(), block, 8, 8, mean);
    const Bytes decoded = Decoded(layout, kind(), codec(), encoded, 8, 8, mean);
    const int part = PartOf(head_dim);
    for (int token = 0; token < 8; ++token) {
      const double scale = ScaleOf(layout, codec(), encoded, 0, 8, token);
      const Values center = Load(layout, kind(), mean, 32, token);
      const Values after = Load(layout, kind(), decoded, 8, token);
      for (int c = 0; c < head_dim; ++c) {
        double sum = 0;
        for (int i = c / part * part; i < c / part * part + part; ++i) {
          const int byte = static_cast<uint8_t>(encoded[i * bits / 8 * 8 + token]);
          const int level = levels[byte >> (i * bits % 8) & ((1 << bits) - 1)];
          sum += __builtin_parity(i & c & (part - 1)) != 0 ? -level : level;
        }
        const double value = scale * (kChannelSigns[c] != 0 ? -sum : sum) + center[c];
        EXPECT_NEAR(after[c], value, (kBf16Unit + 0x1p-24) * std::abs(value)) << head_dim;
      }
    }
  }
}

TEST_P(QuantisedTest, HeadsHaveTheirOwnScale) {
  std::mt19937 random(7);
  const BlockLayout layout{2, 64, Codec::kBf16};
  Values values = Gaussian(128, random);
  for (int i = 0; i < 64; ++i) values[i] *= 1e4F;
  const Bytes block = Block(layout, kind(), 4, 1, [&](int) { return values; });
  const Values after = Load(layout, kind(), RoundTrip(layout, block, 4, 1, {}), 4, 0);
  for (int i = 64; i < 128; ++i) EXPECT_NEAR(after[i], values[i], LevelBits(codec()) >= 4 ? 1 : 4);
}

// Tokens of a 64th of the largest one of their head in the block keep a scale that is good to a quarter; far below,
// they decode to the mean.
TEST_P(QuantisedTest, TokensHaveTheirOwnScale) {
  std::mt19937 random(23);
  const BlockLayout layout{2, 64, Codec::kBf16};
  const double most = codec() == Codec::kQ8 ? 2e-4 : codec() == Codec::kQ4 ? 0.02 : codec() == Codec::kQ2 ? 0.2 : 0.5;
  for (const int largest : {-30, 0, 30}) {
    const Bytes block = Block(layout, kind(), 20, 20, [&, exponent = largest](int token) {
      Values values = Gaussian(128, random);
      for (int i = 0; i < 64; ++i) values[i] = std::ldexp(values[i], exponent - (token < 15 ? token / 2 : token + 5));
      return values;
    });
    const Bytes after = RoundTrip(layout, block, 20, 20, {});
    for (int token = 0; token < 20; ++token) {
      double error = 0;
      double size = 0;
      for (int i = 0; i < 64; ++i) {
        const double value = Load(layout, kind(), block, 20, token)[i];
        error += std::pow(Load(layout, kind(), after, 20, token)[i] - value, 2);
        size += value * value;
      }
      if (token < 14) {
        EXPECT_LT(error, (token < 10 ? 1 : 3) * most * size) << token;
      } else if (token > 14) {
        EXPECT_EQ(error, size) << token;
      }
    }
  }
}

TEST_P(QuantisedTest, EveryTokenHasItsOwnMeanAndWhatEqualsItStaysIt) {
  std::mt19937 random(8);
  for (const int head_dim : {2, 48, 64}) {
    if (!Fits(head_dim, codec())) continue;
    const BlockLayout layout{2, head_dim, Codec::kBf16};
    std::vector<Values> means;
    for (int token = 0; token < 32; ++token) means.push_back(Gaussian(2 * head_dim, random));
    const auto of = [&](int token) { return means[token]; };
    const Bytes mean = Block(layout, kind(), 32, 32, of);
    for (const int tokens : {1, 5, 7, 8}) {
      const Bytes block = Block(layout, kind(), 8, tokens, of);
      const Bytes after = RoundTrip(layout, block, 8, tokens, mean);
      for (int token = 0; token < tokens; ++token)
        EXPECT_EQ(Load(layout, kind(), after, 8, token), Load(layout, kind(), mean, 32, token));
      // A query sees no token past them, but kernels multiply what lies there by zero.
      for (int token = tokens; token < 8; ++token) {
        for (const float value : Load(layout, kind(), after, 8, token)) EXPECT_TRUE(std::isfinite(value));
      }
    }
  }
}

TEST_P(QuantisedTest, ExtremeValuesStayFinite) {
  const float largest = F32FromBf16(0x7f7f);
  const BlockLayout layout{1, 64, Codec::kBf16};
  const std::vector<Values> rows = {
      Values(64, largest),
      Values(64, -largest),
      Values(64, 0x1p-133F),
      Values(64, 0x1p-126F),
      Values(64, 0x1p-60F),
      Values(64, std::numeric_limits<float>::infinity()),
      Values(64, std::numeric_limits<float>::quiet_NaN()),
  };
  for (size_t first = 0; first < rows.size(); ++first) {
    for (const float center : {0.0F, largest, -largest, 1.0F}) {
      for (const bool alternate : {false, true}) {
        const Bytes mean = Block(layout, kind(), 32, 32, [&](int) { return Values(64, center); });
        const Bytes block = Block(layout, kind(), 4, 4, [&](int) {
          Values values = rows[first];
          for (size_t i = 0; alternate && i < values.size(); i += 2) values[i] = -values[i];
          return values;
        });
        for (const float value : Load(layout, kind(), RoundTrip(layout, block, 4, 4, mean), 4, 3))
          EXPECT_TRUE(std::isfinite(value)) << first << " " << center;
      }
    }
  }
}

// Every size: nothing outside is touched, decoding twice gives the same, what is past `tokens` is finite, and what is
// decoded resembles what was encoded.
TEST_P(QuantisedTest, EveryCapAndHeadDim) {
  std::mt19937 random(9);
  const double most = codec() == Codec::kQ8 ? 2e-4 : codec() == Codec::kQ4 ? 0.02 : codec() == Codec::kQ2 ? 0.2 : 0.5;
  for (int head_dim = 2; head_dim <= kQuantisedHeadDimMax; head_dim += head_dim < 40 ? 2 : 18) {
    if (!Fits(head_dim, codec())) continue;
    const BlockLayout layout{3, head_dim, Codec::kBf16};
    for (int cap = kClassStep; cap <= kBlockTokensMax; cap += kClassStep) {
      const int tokens = cap - std::min(cap - 1, static_cast<int>(random() % 4));
      const Bytes mean = Block(layout, kind(), 32, 32, [&](int) { return Gaussian(3 * head_dim, random); });
      const Bytes block = Block(layout, kind(), cap, cap, [&](int) { return Gaussian(3 * head_dim, random); });
      const Bytes encoded = Encoded(layout, kind(), codec(), block, cap, tokens, mean);
      const Bytes decoded = Decoded(layout, kind(), codec(), encoded, cap, tokens, mean);
      EXPECT_EQ(decoded, Decoded(layout, kind(), codec(), encoded, cap, tokens, mean));
      double error = 0;
      double size = 0;
      for (int token = 0; token < cap; ++token) {
        const Values before = Load(layout, kind(), block, cap, token);
        const Values after = Load(layout, kind(), decoded, cap, token);
        const Values center = Load(layout, kind(), mean, 32, token);
        if (token >= tokens) {
          for (const float value : after) EXPECT_TRUE(std::isfinite(value));
          continue;
        }
        for (size_t i = 0; i < before.size(); ++i) {
          error += std::pow(after[i] - before[i], 2);
          size += std::pow(before[i] - center[i], 2);
        }
      }
      EXPECT_LT(error, most * size) << head_dim << " x " << cap;
    }
  }
}

TEST(Quantised, Q8TakesNoPairScales) {
  const BlockLayout layout{2, 64, Codec::kBf16};
  std::mt19937 random(22);
  const Bytes block = Block(layout, Kind::kK, 32, 32, [&](int) { return Gaussian(128, random); });
  Values scales(64);
  for (size_t i = 0; i < scales.size(); ++i) scales[i] = i % 2 == 0 ? 0.25F : 4;
  for (const Codec codec : {Codec::kQ8, Codec::kQ4}) {
    const size_t size = BlockLayout{2, 64, codec}.block_bytes(32);
    Bytes with(size);
    Bytes without(size);
    EncodeBlock(layout, Kind::kK, codec, block.data(), 32, 32, {.pair_scales = scales.data()}, with.data());
    EncodeBlock(layout, Kind::kK, codec, block.data(), 32, 32, {}, without.data());
    EXPECT_EQ(with == without, codec == Codec::kQ8);
  }
}

// Errors of scores, sum w (x - y)^2 with w a pair's query energy, against what they would be without factors: by Cauchy
// and Schwarz (sum sqrt(v w))^2 instead of sum v sum w (quantised.h). Errors follow their pairs' factors.
TEST(Quantised, PairScalesMoveErrorsToWhereTheyCostLeast) {
  constexpr int kPairs = 32;
  const BlockLayout layout{1, 2 * kPairs, Codec::kBf16};
  std::mt19937 random(21);
  std::normal_distribution<double> normal;
  std::vector<double> v(kPairs);
  std::vector<double> w(kPairs);
  Values scales(kPairs);
  double sum_v = 0;
  double sum_w = 0;
  double sum_root = 0;
  for (int pair = 0; pair < kPairs; ++pair) {
    v[pair] = std::exp2(2 * normal(random));
    w[pair] = std::exp2(2 * normal(random));
    scales[pair] = static_cast<float>(std::pow(v[pair] / w[pair], 0.25));
    sum_v += v[pair];
    sum_w += w[pair];
    sum_root += std::sqrt(v[pair] * w[pair]);
  }
  double with = 0;
  double without = 0;
  std::vector<double> pair_error(kPairs);
  for (int n = 0; n < 100; ++n) {
    const Bytes block = Block(layout, Kind::kK, 32, 32, [&](int) {
      Values values = Gaussian(2 * kPairs, random);
      for (int c = 0; c < 2 * kPairs; ++c) values[c] *= static_cast<float>(std::sqrt(v[c / 2]));
      return values;
    });
    for (const bool scaled : {false, true}) {
      const Reference reference{.pair_scales = scaled ? scales.data() : nullptr};
      Bytes encoded(BlockLayout{1, 2 * kPairs, Codec::kQ4}.block_bytes(32));
      Bytes decoded(layout.block_bytes(32));
      EncodeBlock(layout, Kind::kK, Codec::kQ4, block.data(), 32, 32, reference, encoded.data());
      DecodeBlock(layout, Kind::kK, Codec::kQ4, encoded.data(), 32, 32, reference, decoded.data());
      for (int token = 0; token < 32; ++token) {
        const Values a = Load(layout, Kind::kK, block, 32, token);
        const Values b = Load(layout, Kind::kK, decoded, 32, token);
        for (int c = 0; c < 2 * kPairs; ++c) {
          const double square = std::pow(a[c] - b[c], 2);
          (scaled ? with : without) += w[c / 2] * square;
          if (scaled) pair_error[c / 2] += square;
        }
      }
    }
  }
  EXPECT_NEAR(with / without, sum_root * sum_root / (sum_v * sum_w), 0.05 * with / without);
  EXPECT_LT(with, without / 2);
  // Of one size before the factors: 6,400 errors a pair, the rounding to bf16 beside them.
  const double unit = pair_error[0] / std::pow(scales[0], 2);
  for (int pair = 0; pair < kPairs; ++pair) EXPECT_NEAR(pair_error[pair] / std::pow(scales[pair], 2) / unit, 1, 0.15);
}

// Blocks of two values and more, magnitudes from 2^-60 to 2^60, some tokens zero.
TEST_P(QuantisedTest, EveryTargetGivesTheSameBits) {
  if (!HasAvx2Kernels(64) && !HasAvx512Kernels(64)) GTEST_SKIP() << "neither AVX2 nor AVX-512 with BF16";
  std::mt19937 random(10);
  for (int head_dim = 8; head_dim <= kQuantisedHeadDimMax; head_dim += 8) {
    const BlockLayout layout{1, head_dim, Codec::kBf16};
    const BlockLayout quantised{1, head_dim, codec()};
    for (int cap = kClassStep; cap <= kBlockTokensMax; cap += kClassStep) {
      for (const bool with_mean : {false, true}) {
        const Bytes mean = Block(layout, kind(), 32, 32, [&](int) { return Gaussian(head_dim, random); });
        // Half of the blocks are of one magnitude: in the others the largest decides what is left of the rest.
        const bool mixed = random() % 2 == 0;
        const float most = std::ldexp(1.0F, static_cast<int>(random() % 120) - 60);
        const Bytes block = Block(layout, kind(), cap, cap, [&](int) {
          const float scale = random() % 4 == 0 ? 0 : std::ldexp(1.0F, static_cast<int>(random() % 120) - 60);
          return Gaussian(head_dim, random, mixed && random() % 2 == 0 ? scale : most);
        });
        const int tokens = cap - static_cast<int>(random() % 2);
        Values pair_scales = Gaussian(head_dim / 2, random);
        for (float& scale : pair_scales) scale = std::clamp(std::exp2(scale), 1 / kPairScaleMax, kPairScaleMax);
        HeadArgs args{kind(), codec(), head_dim, cap, tokens, with_mean ? mean.data() : nullptr};
        if (with_mean) args.pair_scales = pair_scales.data();
        const size_t encoded_bytes = quantised.head_bytes(tokens);
        Bytes encoded[2] = {Bytes(encoded_bytes + kGuardBytes, kGuard), Bytes(encoded_bytes + kGuardBytes, kGuard)};
        EncodeHeadPortable(args, block.data(), encoded[0].data());
        const auto encode = [&](auto kernel) {
          kernel(args, block.data(), encoded[1].data());
          ASSERT_EQ(encoded[0], encoded[1]) << head_dim << " x " << cap;
        };
        if (HasAvx2Kernels(head_dim)) encode(EncodeHeadAvx2);
        if (HasAvx512Kernels(head_dim)) encode(EncodeHeadAvx512);
        // Random bytes too: every level at every place.
        for (size_t i = 0; with_mean && i + tokens + sizeof(uint16_t) < encoded_bytes; ++i) {
          encoded[0][i] = static_cast<std::byte>(random());
        }
        Bytes decoded[2] = {Bytes(layout.head_bytes(cap) + kGuardBytes, kGuard),
                            Bytes(layout.head_bytes(cap) + kGuardBytes, kGuard)};
        const Bytes exact(encoded[0].data(),
                          encoded[0].data() + encoded_bytes);  // a sanitizer sees who reads behind it
        DecodeHeadPortable(args, exact.data(), decoded[0].data());
        const auto decode = [&](auto kernel) {
          kernel(args, exact.data(), decoded[1].data());
          ASSERT_EQ(decoded[0], decoded[1]) << head_dim << " x " << cap;
        };
        if (HasAvx2Kernels(head_dim)) decode(DecodeHeadAvx2);
        if (HasAvx512Kernels(head_dim)) decode(DecodeHeadAvx512);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// A block of any class may be what another of that class is relative to.
TEST_P(QuantisedTest, TheMeanMayBeABlockOfTheSameClass) {
  std::mt19937 random(13);
  for (const int head_dim : {24, 64}) {
    const BlockLayout layout{2, head_dim, Codec::kBf16};
    const size_t size = BlockLayout{2, head_dim, codec()}.block_bytes(32);
    for (int cap = kClassStep; cap <= kBlockTokensMax; cap += kClassStep) {
      std::vector<Values> means(kBlockTokensMax);
      for (Values& mean : means) mean = Gaussian(2 * head_dim, random);
      const auto of = [&](int token) { return means[token]; };
      const Bytes whole = Block(layout, kind(), 32, 32, of);
      const Bytes own = Block(layout, kind(), cap, cap, of);
      const Bytes block = Block(layout, kind(), cap, cap, [&](int) { return Gaussian(2 * head_dim, random); });
      Bytes encoded[2] = {Bytes(size), Bytes(size)};
      Bytes decoded[2] = {Bytes(layout.block_bytes(cap)), Bytes(layout.block_bytes(cap))};
      for (int i = 0; i < 2; ++i) {
        const Reference reference = i == 0 ? Reference{whole.data()} : Reference{own.data(), cap};
        EncodeBlock(layout, kind(), codec(), block.data(), cap, cap, reference, encoded[i].data());
        DecodeBlock(layout, kind(), codec(), encoded[i].data(), cap, cap, reference, decoded[i].data());
      }
      EXPECT_EQ(encoded[0], encoded[1]);
      EXPECT_EQ(decoded[0], decoded[1]);
    }
  }
}

// A decoded block lies on its own grid but for the rounding to bf16, which is far from any boundary between levels:
// encoding it again finds the same levels, and at worst a neighbouring scale, kBf16Unit away, for a few vectors.
TEST_P(QuantisedTest, EncodingADecodedBlockAgainChangesLittle) {
  std::mt19937 random(11);
  const BlockLayout layout{2, 64, Codec::kBf16};
  double first = 0;
  double second = 0;
  for (int n = 0; n < 20; ++n) {
    const Bytes block = Block(layout, kind(), 32, 32, [&](int) { return Gaussian(128, random); });
    const Bytes once = RoundTrip(layout, block, 32, 32, {});
    const Bytes twice = RoundTrip(layout, once, 32, 32, {});
    for (int token = 0; token < 32; ++token) {
      const Values a = Load(layout, kind(), block, 32, token);
      const Values b = Load(layout, kind(), once, 32, token);
      const Values c = Load(layout, kind(), twice, 32, token);
      for (size_t i = 0; i < a.size(); ++i) {
        first += std::pow(a[i] - b[i], 2);
        second += std::pow(b[i] - c[i], 2);
      }
    }
  }
  EXPECT_LT(second, 1e-3 * first);
}

TEST(Quantised, Sizes) {
  // SmolLM2-135M: 32 bytes of levels and one of scale for each of 32 tokens, and two more, of 3 heads.
  EXPECT_EQ((BlockLayout{3, 64, Codec::kQ4}.block_bytes(32)), 3184U);
  EXPECT_EQ((BlockLayout{3, 64, Codec::kQ8}.block_bytes(32)), 6256U);
  EXPECT_EQ((BlockLayout{3, 64, Codec::kQ2}.head_bytes(32)), 546U);
  EXPECT_EQ((BlockLayout{3, 64, Codec::kQ1}.block_bytes(32)), 880U);
  EXPECT_EQ((BlockLayout{1, 2, Codec::kQ4}.head_bytes(4)), 10U);
  EXPECT_EQ((BlockLayout{1, 2, Codec::kQ4}.block_bytes(4)), 16U);
  EXPECT_EQ((BlockLayout{3, 64, Codec::kQ4}.block_bytes(17)), 1696U);  // no token of 33 bytes is added to an odd number
  EXPECT_EQ((BlockLayout{2, 6, Codec::kQ8}.head_offset(1, 12)), 86U);
  EXPECT_FALSE(IsQuantised(Codec::kBf16) || IsQuantised(Codec::kF16) || IsQuantised(Codec::kF32));
}

TEST(QuantisedDeathTest, BrokenContracts) {
  const BlockLayout bf16{1, 64, Codec::kBf16};
  Bytes block(bf16.block_bytes(32));
  EXPECT_DEATH(EncodeBlock(bf16, Kind::kK, Codec::kF16, block.data(), 32, 32, {}, block.data()), "IsQuantised");
  EXPECT_DEATH(EncodeBlock(bf16, Kind::kK, Codec::kQ4, block.data(), 8, 9, {}, block.data()), "tokens");
  EXPECT_DEATH(DecodeHead({1, 258, Codec::kBf16}, Kind::kK, Codec::kQ4, block.data(), 0, 32, 32, {}, block.data()),
               "head_dim");
  EXPECT_DEATH(static_cast<void>(ElementBytes(Codec::kQ4)), "IsQuantised");
}

INSTANTIATE_TEST_SUITE_P(Codecs, QuantisedTest,
                         testing::Values(Case{Codec::kQ8, Kind::kK}, Case{Codec::kQ8, Kind::kV},
                                         Case{Codec::kQ4, Kind::kK}, Case{Codec::kQ4, Kind::kV},
                                         Case{Codec::kQ2, Kind::kK}, Case{Codec::kQ2, Kind::kV},
                                         Case{Codec::kQ1, Kind::kK}, Case{Codec::kQ1, Kind::kV}),
                         [](const auto& param) { return Name(param.param); });

}  // namespace
}  // namespace jointkv::codec
