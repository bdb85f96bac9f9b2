#include "codec/rounding.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "codec/block_io.h"

namespace jointkv::codec {
namespace {

constexpr double kLloydMax = 0.009497;  // 16 levels of a Gaussian

// A block in memory with made-up tokens.
class Block {
 public:
  Block(const BlockLayout& layout, Kind kind, int cap)
      : layout_(layout), kind_(kind), cap_(cap), bytes_(layout.block_bytes(cap), std::byte{0x3c}) {}

  void Store(int token, const std::vector<float>& values) {
    StoreToken(layout_, kind_, bytes_.data(), cap_, token, values);
  }
  std::vector<float> Load(int token) const {
    std::vector<float> values(static_cast<size_t>(layout_.n_kv_heads) * layout_.head_dim);
    LoadToken(layout_, kind_, bytes_.data(), cap_, token, values);
    return values;
  }
  // The same mean for every token.
  void Round(Rounding rounding, std::span<const float> mean, int tokens) {
    std::vector<float> means;
    for (int token = 0; token < tokens; ++token) means.insert(means.end(), mean.begin(), mean.end());
    RoundBlock(layout_, kind_, rounding, means, bytes_.data(), cap_, tokens);
  }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  BlockLayout layout_;
  Kind kind_;
  int cap_;
  std::vector<std::byte> bytes_;
};

std::vector<float> Gaussian(size_t n, std::mt19937& random, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(n);
  for (float& value : values) value = normal(random);
  return values;
}

// Squared error over the squares around `mean`, of tokens made by `make`.
template <class Make>
double Nmse(int head_dim, Rounding rounding, std::span<const float> mean, const Make& make) {
  const BlockLayout layout{2, head_dim, Codec::kF32};
  double error = 0;
  double size = 0;
  for (int n = 0; n < 40; ++n) {
    Block block(layout, Kind::kV, 32);
    std::vector<std::vector<float>> tokens;
    for (int token = 0; token < 32; ++token) block.Store(token, tokens.emplace_back(make()));
    block.Round(rounding, mean, 32);
    for (int token = 0; token < 32; ++token) {
      const std::vector<float> rounded = block.Load(token);
      for (size_t i = 0; i < rounded.size(); ++i) {
        error += std::pow(rounded[i] - tokens[token][i], 2);
        size += std::pow(tokens[token][i] - (mean.empty() ? 0 : mean[i]), 2);
      }
    }
  }
  return error / size;
}

// A scale fitted to one vector follows the tails that it happens to have: the fewer values, the better.
TEST(RoundingTest, Q4OfAGaussianIsLloydMax) {
  std::mt19937 random(1);
  double shorter = 0.7 * kLloydMax;
  for (const int head_dim : {32, 64, 80, 128, 256, 2048}) {
    const double nmse = Nmse(head_dim, Rounding::kQ4, {}, [&] { return Gaussian(2 * head_dim, random); });
    EXPECT_GT(nmse, shorter) << head_dim;
    EXPECT_LT(nmse, 1.01 * kLloydMax) << head_dim;
    shorter = nmse;
  }
  EXPECT_NEAR(shorter, kLloydMax, 0.02 * kLloydMax);
}

TEST(RoundingTest, Q8LosesLittle) {
  std::mt19937 random(2);
  // The largest of 128 Gaussian values is about 2.7; a uniform error over a step of 2.7 / 127 has a variance of 3.8e-5.
  EXPECT_NEAR(Nmse(128, Rounding::kQ8, {}, [&] { return Gaussian(256, random); }), 3.8e-5, 0.8e-5);
}

// Without the transform one large channel would leave the others of its head two levels.
TEST(RoundingTest, Q4SpreadsAnOutlier) {
  std::mt19937 random(3);
  const double nmse = Nmse(64, Rounding::kQ4, {}, [&] {
    std::vector<float> values = Gaussian(128, random);
    values[5] *= 30;
    values[70] *= 30;
    return values;
  });
  EXPECT_LT(nmse, 2 * kLloydMax);
}

TEST(RoundingTest, TheErrorIsRelativeToWhatTheMeanLeaves) {
  std::mt19937 random(4);
  const std::vector<float> mean = Gaussian(128, random, 20);
  const auto make = [&] {
    std::vector<float> values = Gaussian(128, random);
    for (size_t i = 0; i < values.size(); ++i) values[i] += mean[i];
    return values;
  };
  EXPECT_LT(Nmse(64, Rounding::kQ4, mean, make), 1.02 * kLloydMax);
  EXPECT_LT(Nmse(64, Rounding::kQ8, mean, make), 5e-5);
  EXPECT_GT(Nmse(64, Rounding::kQ4, {}, make), kLloydMax / 2);  // of the squares around zero, which are 400 times those
}

TEST(RoundingTest, HeadsHaveTheirOwnScale) {
  std::mt19937 random(5);
  Block block({2, 64, Codec::kF32}, Kind::kK, 4);
  std::vector<float> values = Gaussian(128, random);
  for (int i = 0; i < 64; ++i) values[i] *= 1e4F;
  for (const Rounding rounding : {Rounding::kQ8, Rounding::kQ4}) {
    block.Store(0, values);
    block.Round(rounding, {}, 1);
    for (int i = 64; i < 128; ++i) EXPECT_NEAR(block.Load(0)[i], values[i], 1) << RoundingName(rounding);
  }
}

TEST(RoundingTest, WhatEqualsTheMeanStaysIt) {
  for (const float level : {0.0F, 7.5F}) {
    Block block({2, 48, Codec::kF32}, Kind::kK, 8);
    const std::vector<float> mean(96, level);
    for (int token = 0; token < 8; ++token) block.Store(token, mean);
    for (const Rounding rounding : {Rounding::kQ8, Rounding::kQ4}) {
      block.Round(rounding, mean, 8);
      for (int token = 0; token < 8; ++token) EXPECT_EQ(block.Load(token), mean);
    }
  }
}

TEST(RoundingTest, EveryTokenHasItsOwnMean) {
  const BlockLayout layout{2, 32, Codec::kF32};
  std::mt19937 random(7);
  const std::vector<float> means = Gaussian(5 * 64, random);
  for (const Rounding rounding : {Rounding::kQ8, Rounding::kQ4}) {
    std::vector<std::byte> block(layout.block_bytes(8));
    const auto mean = [&](int token) {
      return std::vector(means.begin() + token * 64, means.begin() + token * 64 + 64);
    };
    for (int token = 0; token < 5; ++token) StoreToken(layout, Kind::kK, block.data(), 8, token, mean(token));
    const std::vector<std::byte> before = block;
    RoundBlock(layout, Kind::kK, rounding, means, block.data(), 8, 5);
    EXPECT_EQ(block, before) << RoundingName(rounding);
  }
}

TEST(RoundingTest, EveryLayoutHoldsTheRoundedValuesAndTheRestIsUntouched) {
  for (const Codec codec : {Codec::kBf16, Codec::kF16, Codec::kF32}) {
    for (const Kind kind : {Kind::kK, Kind::kV}) {
      for (const Rounding rounding : {Rounding::kNone, Rounding::kQ8, Rounding::kQ4}) {
        for (const int tokens : {0, 1, 5, 11, 12}) {
          std::mt19937 random(6);
          const BlockLayout layout{3, 80, codec};
          Block block(layout, kind, 12);
          Block plain({3, 80, Codec::kF32}, kind, 12);
          const std::vector<float> mean = Gaussian(240, random);
          for (int token = 0; token < 12; ++token) {
            block.Store(token, Gaussian(240, random));
            plain.Store(token, block.Load(token));  // the same values, now that they are rounded to the codec
          }
          Block expected = block;
          block.Round(rounding, mean, tokens);
          plain.Round(rounding, mean, tokens);
          for (int token = 0; token < tokens; ++token) expected.Store(token, plain.Load(token));
          EXPECT_EQ(block.bytes(), expected.bytes()) << CodecName(codec) << " " << RoundingName(rounding);
        }
      }
    }
  }
}

TEST(RoundingTest, Bytes) {
  EXPECT_EQ(RoundedHeadBytes(Rounding::kNone, 64), 128);
  EXPECT_EQ(RoundedHeadBytes(Rounding::kQ8, 64), 66);
  EXPECT_EQ(RoundedHeadBytes(Rounding::kQ4, 64), 34);
}

TEST(RoundingTest, NamesGoBothWays) {
  for (const Rounding rounding : {Rounding::kNone, Rounding::kQ8, Rounding::kQ4})
    EXPECT_EQ(ParseRounding(RoundingName(rounding)), rounding);
  for (const std::string_view name : {"", "q", "q4_0", "Q8", "bf16"}) EXPECT_EQ(ParseRounding(name), std::nullopt);
}

}  // namespace
}  // namespace jointkv::codec
