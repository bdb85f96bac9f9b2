#include "joint/statistics.h"

#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "codec/block_io.h"
#include "codec/quantised.h"
#include "dense/test_matrices.h"

namespace jointkv::joint {
namespace {

using codec::BlockLayout;
using codec::Codec;
using codec::kBlockTokensMax;
using codec::Kind;

constexpr BlockLayout kLayout = {2, 8, Codec::kF32};
constexpr size_t kWidth = 16;
constexpr int kKeys = 0;    // table of K of layer 0
constexpr int kValues = 1;  // of V
constexpr int kPositions = 2048;

dense::RopeTable MakeRope(float attn_factor) {
  gguf::Rope rope;
  rope.n_rot = kLayout.head_dim;
  rope.freq_base = 100;
  rope.attn_factor = attn_factor;
  dense::RopeTable table(rope, {});
  table.Ensure(kPositions);
  return table;
}

// Keys as a model would store them: pairs turned by the angle of `position`, times the magnitude.
void Turn(const dense::RopeTable& rope, int position, std::span<float> keys) {
  for (size_t i = 0; i < keys.size(); i += 2) {
    const int pair = static_cast<int>(i / 2) % rope.n_pairs();
    const float c = rope.cos(position)[pair];
    const float s = rope.sin(position)[pair];
    const float x = keys[i];
    const float y = keys[i + 1];
    keys[i] = x * c - y * s;
    keys[i + 1] = x * s + y * c;
  }
}

// `n` vectors with a mean that is far from zero.
std::vector<std::vector<float>> Vectors(int n, uint64_t seed) {
  std::vector<std::vector<float>> vectors;
  const auto noise = dense::RandomFloats(n * kWidth, seed);
  for (int t = 0; t < n; ++t) {
    vectors.emplace_back(noise.begin() + t * static_cast<int>(kWidth),
                         noise.begin() + (t + 1) * static_cast<int>(kWidth));
    for (size_t i = 0; i < kWidth; ++i) vectors.back()[i] += static_cast<float>(i) - 5;
  }
  return vectors;
}

std::vector<double> MeanOf(std::span<const std::vector<float>> vectors) {
  std::vector<double> mean(kWidth);
  for (const auto& vector : vectors) {
    for (size_t i = 0; i < kWidth; ++i) mean[i] += vector[i] / static_cast<double>(vectors.size());
  }
  return mean;
}

double EnergyOf(std::span<const std::vector<float>> vectors) {
  const auto mean = MeanOf(vectors);
  double sum = 0;
  for (const auto& vector : vectors) {
    for (size_t i = 0; i < kWidth; ++i) sum += std::pow(vector[i] - mean[i], 2);
  }
  return sum / static_cast<double>(vectors.size());
}

// Feeds blocks of `length` tokens that start at `start`, as a store would with position-free or absolute keys.
void Feed(Statistics& statistics, int table, const dense::RopeTable* rope, std::span<const std::vector<float>> vectors,
          int length, int start, bool absolute) {
  const Kind kind = static_cast<Kind>(table % 2);
  const int cap = codec::ClassCapacity(length);
  for (size_t at = 0; at < vectors.size(); at += static_cast<size_t>(length)) {
    std::vector<std::byte> block(kLayout.block_bytes(cap));
    const int tokens = std::min(length, static_cast<int>(vectors.size() - at));
    const int base = absolute ? start + static_cast<int>(at) : 0;
    for (int t = 0; t < tokens; ++t) {
      std::vector<float> values = vectors[at + static_cast<size_t>(t)];
      if (rope != nullptr && kind == Kind::kK) Turn(*rope, base + t, values);
      codec::StoreToken(kLayout, kind, block.data(), cap, t, values);
    }
    statistics.Add(table, kind, block.data(), cap, base, 0, tokens);
  }
}

TEST(Statistics, NothingIsKnownBeforeTheFirstToken) {
  const Statistics statistics(kLayout, {nullptr, nullptr});
  for (int table = 0; table < 4; ++table) {
    EXPECT_EQ(statistics.energy(table), 0);
    EXPECT_FALSE(statistics.enough(table));
  }
  std::vector<float> mean;
  statistics.Mean(kValues, Kind::kV, 0, 3, mean);
  EXPECT_EQ(mean, std::vector<float>(3 * kWidth));
}

TEST(Statistics, EnergyIsTheMeanSquareAroundTheMean) {
  Statistics statistics(kLayout, {nullptr});
  const auto vectors = Vectors(300, 1);
  Feed(statistics, kValues, nullptr, vectors, 11, 0, false);
  EXPECT_NEAR(statistics.energy(kValues) / EnergyOf(vectors), 1, 1e-9);
  EXPECT_EQ(statistics.energy(kKeys), 0) << "each table counts for itself";
}

TEST(Statistics, EachChannelHasItsVariance) {
  const dense::RopeTable rope = MakeRope(1.25F);
  Statistics statistics(kLayout, {&rope});
  auto vectors = Vectors(400, 8);
  for (auto& vector : vectors) {
    for (size_t i = 0; i < kWidth; ++i) vector[i] *= static_cast<float>(i + 1);
  }
  Feed(statistics, kValues, nullptr, vectors, 11, 0, false);
  Feed(statistics, kKeys, &rope, vectors, 11, 0, false);
  const auto mean = MeanOf(vectors);
  for (size_t i = 0; i < kWidth; ++i) {
    double variance = 0;
    for (const auto& vector : vectors) variance += std::pow(vector[i] - mean[i], 2) / 400;
    EXPECT_NEAR(statistics.variance(kValues)[i] / variance, 1, 1e-9) << i;
    EXPECT_NEAR(statistics.variance(kKeys)[i] / variance, 1, 1e-3) << i;
  }
}

TEST(Statistics, KeysCountUnrotatedWhateverTheyWereRotatedFrom) {
  for (const float attn_factor : {1.0F, 1.25F}) {
    const dense::RopeTable rope = MakeRope(attn_factor);
    for (const bool absolute : {false, true}) {
      Statistics statistics(kLayout, {&rope});
      const auto vectors = Vectors(500, 2);
      Feed(statistics, kKeys, &rope, vectors, 13, 40, absolute);
      EXPECT_NEAR(statistics.energy(kKeys) / EnergyOf(vectors), 1, 1e-4) << attn_factor << absolute;
      // Values are not rotated.
      Feed(statistics, kValues, &rope, vectors, 13, 40, absolute);
      EXPECT_NEAR(statistics.energy(kValues) / EnergyOf(vectors), 1, 1e-9);
    }
  }
}

TEST(Statistics, TheMeanComesBackAsItWouldBeStored) {
  const dense::RopeTable rope = MakeRope(1.25F);
  Statistics statistics(kLayout, {&rope});
  const auto vectors = Vectors(200, 3);
  Feed(statistics, kKeys, &rope, vectors, 7, 0, false);
  std::vector<float> mean;
  statistics.Mean(kKeys, Kind::kK, 90, 4, mean);
  ASSERT_EQ(mean.size(), 4 * kWidth);
  const auto plain = MeanOf(vectors);
  for (int t = 0; t < 4; ++t) {
    std::vector<float> expected(plain.begin(), plain.end());
    Turn(rope, 90 + t, expected);
    for (size_t i = 0; i < kWidth; ++i) EXPECT_NEAR(mean[static_cast<size_t>(t) * kWidth + i], expected[i], 1e-4);
  }
}

TEST(Statistics, OnlyTheTokensGivenCount) {
  Statistics statistics(kLayout, {nullptr});
  auto vectors = Vectors(9, 4);
  std::ranges::fill(vectors[0], 1e6F);  // the first token of a sequence
  std::vector<std::byte> block(kLayout.block_bytes(12));
  for (int t = 0; t < 9; ++t)
    codec::StoreToken(kLayout, Kind::kV, block.data(), 12, t, vectors[static_cast<size_t>(t)]);
  statistics.Add(kValues, Kind::kV, block.data(), 12, 0, 1, 9);
  EXPECT_NEAR(statistics.energy(kValues) / EnergyOf(std::span(vectors).subspan(1)), 1, 1e-9);
}

TEST(Statistics, EnoughBeforeFull) {
  Statistics statistics(kLayout, {nullptr});
  const auto vectors = Vectors(Statistics::kTokensMax + 500, 5);
  const auto counted = std::span(vectors).first(Statistics::kTokensMax);
  Feed(statistics, kValues, nullptr, std::span(vectors).first(Statistics::kTokensMin - 1), 32, 0, false);
  EXPECT_FALSE(statistics.enough(kValues));
  Feed(statistics, kValues, nullptr, std::span(vectors).subspan(Statistics::kTokensMin - 1), 32, 0, false);
  EXPECT_TRUE(statistics.enough(kValues));
  EXPECT_NEAR(statistics.energy(kValues) / EnergyOf(counted), 1, 1e-9);
}

// Rounding may leave the difference of two equal sums on either side of zero.
TEST(Statistics, EqualVectorsHaveNoEnergyToSpeakOf) {
  Statistics statistics(kLayout, {nullptr});
  const std::vector<std::vector<float>> vectors(600, Vectors(1, 6)[0]);
  Feed(statistics, kValues, nullptr, vectors, 32, 0, false);
  EXPECT_NEAR(statistics.energy(kValues), 0, 1e-10);
}

TEST(PairScales, AreTheFourthRootOfVarianceOverQueryEnergy) {
  // Two heads of two pairs; a pair's variance is its channels' sum.
  const std::vector<double> variance = {1, 3, 2, 62, 1, 1, 1, 1};
  const std::vector<double> energy = {10, 40, 7, 7};
  const std::vector<float> scales = PairScales(variance, energy, 2);
  // 4 / 10 and 64 / 40, whose geometric mean is 0.8: a half and twice that.
  EXPECT_NEAR(scales[0], std::pow(0.5, 0.25), 1e-6);
  EXPECT_NEAR(scales[1], std::pow(2.0, 0.25), 1e-6);
  EXPECT_NEAR(scales[2], 1, 1e-6) << "each head for itself";
  EXPECT_NEAR(scales[3], 1, 1e-6);
  // Any unit will do.
  std::vector<double> larger = energy;
  for (double& w : larger) w *= 1e9;
  for (size_t i = 0; i < 4; ++i) EXPECT_NEAR(PairScales(variance, larger, 2)[i], scales[i], 1e-6);
}

TEST(PairScales, WhatIsHardlyThereHasALimit) {
  const std::vector<double> variance = {0, -1e-18, 50, 50, 50, 50, 50, 50};
  const std::vector<float> scales = PairScales(variance, std::vector<double>{1, 1, 0, 1}, 1);
  for (const float scale : scales) {
    EXPECT_GE(scale, 1 / codec::kPairScaleMax);
    EXPECT_LE(scale, codec::kPairScaleMax);
  }
  // A thousandth of the mean of 75, over a thousandth of 0.75 of a query.
  EXPECT_NEAR(scales[0] / scales[1], std::pow(0.075 / 100, 0.25), 1e-6);
  EXPECT_NEAR(scales[2] / scales[1], std::pow(1 / 0.00075, 0.25), 1e-4);
}

TEST(PairScales, WithoutNumbersThereAreNone) {
  const std::vector<float> ones(2, 1.0F);
  const double inf = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(PairScales(std::vector<double>(4, 0), std::vector<double>{1, 2}, 1), ones);
  EXPECT_EQ(PairScales(std::vector<double>{1, 2, 3, 4}, std::vector<double>{0, 0}, 1), ones);
  for (const double bad : {inf, nan}) {
    EXPECT_EQ(PairScales(std::vector<double>{1, bad, 3, 4}, std::vector<double>{1, 1}, 1), ones);
    EXPECT_EQ(PairScales(std::vector<double>{1, 2, 3, 4}, std::vector<double>{bad, 1}, 1), ones);
  }
}

}  // namespace
}  // namespace jointkv::joint
