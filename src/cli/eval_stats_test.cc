#include "cli/eval_stats.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace jointkv::cli {
namespace {

std::vector<float> Logits(std::initializer_list<double> probabilities, double shift = 0) {
  std::vector<float> logits;
  for (const double p : probabilities) logits.push_back(static_cast<float>(std::log(p) + shift));
  return logits;
}

// exact (1/2, 1/4, 1/4), ours (1/4, 1/2, 1/4): KL = 1/2 ln 2 - 1/4 ln 2 = ln 2 / 4.
TEST(ScoreTokenTest, MatchesAHandComputation) {
  const TokenScore score = ScoreToken(Logits({0.5, 0.25, 0.25}, 7), Logits({0.25, 0.5, 0.25}, -3), 2);
  EXPECT_NEAR(score.kl, std::log(2.0) / 4, 1e-6);
  EXPECT_NEAR(score.nll_exact, std::log(4.0), 1e-6);
  EXPECT_NEAR(score.nll_ours, std::log(4.0), 1e-6);
  EXPECT_FALSE(score.same_top);
}

TEST(ScoreTokenTest, IsNotSymmetric) {
  // exact (0.9, 0.1) ours (0.5, 0.5): 0.9 ln 1.8 + 0.1 ln 0.2.
  const TokenScore score = ScoreToken(Logits({0.9, 0.1}), Logits({0.5, 0.5}), 0);
  EXPECT_NEAR(score.kl, 0.9 * std::log(1.8) + 0.1 * std::log(0.2), 1e-6);
  EXPECT_NEAR(score.nll_ours - score.nll_exact, std::log(1.8), 1e-6);
  EXPECT_TRUE(score.same_top);
}

TEST(ScoreTokenTest, EqualLogitsScoreNothing) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 5);
  std::vector<float> logits(1 << 18);
  for (float& logit : logits) logit = normal(random);
  const TokenScore score = ScoreToken(logits, logits, 17);
  EXPECT_EQ(score.kl, 0);
  EXPECT_EQ(score.nll_exact, score.nll_ours);
  EXPECT_TRUE(score.same_top);
}

// A shift d of one logit with probability p costs about p (1 - p) d^2 / 2, here 1.25e-9: far below f32 sums.
TEST(ScoreTokenTest, KeepsSmallDifferencesInALargeVocabulary) {
  std::vector<float> exact(1 << 18, 0.0F);
  exact[5] = std::log(static_cast<float>(exact.size() - 1));  // probability 1/2
  std::vector<float> ours = exact;
  ours[5] += 1e-4F;
  const double d = static_cast<double>(ours[5]) - exact[5];
  EXPECT_NEAR(ScoreToken(exact, ours, 5).kl, d * d / 8, 5e-11);  // rounding of 2^18 terms
}

TEST(ScoreTokenTest, ImpossibleTokensDoNotCount) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(ScoreToken(std::vector<float>{0, -inf}, std::vector<float>{0, -inf}, 0).kl, 0);
  EXPECT_EQ(ScoreToken(std::vector<float>{0, 0}, std::vector<float>{0, -inf}, 0).kl, inf);
}

TEST(QualityTest, SumsUp) {
  const std::vector<TokenScore> scores = {{0.1, 1, 1.5, true}, {0.3, 2, 1.8, false}, {0.2, 1, 1.3, true}};
  const Quality quality = QualityOf(scores);
  EXPECT_EQ(quality.tokens, 3);
  EXPECT_NEAR(quality.kl_mean, 0.2, 1e-12);
  EXPECT_NEAR(quality.kl_p99, 0.2 + 0.98 * 0.1, 1e-12);
  EXPECT_NEAR(quality.top1, 2.0 / 3, 1e-12);
  EXPECT_NEAR(quality.ppl_ratio, std::exp(0.2), 1e-12);
}

TEST(QualityTest, NothingScoredIsNoLoss) {
  EXPECT_EQ(QualityOf({}).tokens, 0);
  EXPECT_EQ(QualityOf({}).ppl_ratio, 1);
}

TEST(SpreadTest, KnowsBothEnds) {
  const Spread spread = SpreadOf(std::vector<double>{2, 6, 1});
  EXPECT_NEAR(spread.mean, 3, 1e-12);
  EXPECT_EQ(spread.min, 1);
  EXPECT_EQ(spread.max, 6);
  EXPECT_EQ(SpreadOf({}).max, 0);
}

}  // namespace
}  // namespace jointkv::cli
