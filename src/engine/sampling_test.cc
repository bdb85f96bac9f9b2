#include "engine/sampling.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <random>

namespace jointkv::engine {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

SamplingParams Seeded(uint64_t seed = 1) {
  SamplingParams params;
  params.seed = seed;
  return params;
}

TokenId SampleOnce(const Sampler& sampler, std::vector<float> logits, SampledLogprobs* out = nullptr) {
  SamplingScratch scratch(static_cast<int>(logits.size()));
  return sampler.Sample(logits, scratch, out);
}

std::vector<int> Histogram(const SamplingParams& params, const std::vector<float>& logits, int draws) {
  const int n = static_cast<int>(logits.size());
  Sampler sampler(params, n);
  SamplingScratch scratch(n);
  std::vector<int> counts(n);
  std::vector<float> work;
  for (int i = 0; i < draws; ++i) {
    work = logits;
    const TokenId token = sampler.Sample(work, scratch);
    EXPECT_TRUE(token >= 0 && token < n) << token;
    if (token < 0 || token >= n) return counts;
    ++counts[token];
    sampler.ObserveOutput(token);
  }
  return counts;
}

// The plain way, in double: sort everything, filter, normalise.
std::vector<double> ReferenceDistribution(const SamplingParams& params, const std::vector<float>& logits) {
  const int n = static_cast<int>(logits.size());
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  std::vector<double> weight(n);
  const double max = logits[order[0]];
  for (int i = 0; i < n; ++i) weight[i] = std::exp((logits[i] - max) / params.temperature);
  for (double& w : weight) w = w >= params.min_p ? w : 0;
  if (params.top_k > 0 && params.top_k < n) {
    const float kth = logits[order[params.top_k - 1]];
    for (int i = 0; i < n; ++i) weight[i] = logits[i] >= kth ? weight[i] : 0;
  }
  const double total = std::accumulate(weight.begin(), weight.end(), 0.0);
  double before = 0;
  for (int i : order) {
    const double w = weight[i];
    if (params.top_p < 1 && before >= params.top_p * total) weight[i] = 0;
    before += w;
  }
  const double kept = std::accumulate(weight.begin(), weight.end(), 0.0);
  for (double& w : weight) w /= kept;
  return weight;
}

// Chi-square over tokens with an expectation of 5 or more, the rest pooled; tokens of probability 0 must not occur.
void ExpectDistribution(const SamplingParams& params, const std::vector<float>& logits, int draws) {
  const std::vector<double> expected = ReferenceDistribution(params, logits);
  const std::vector<int> counts = Histogram(params, logits, draws);
  double chi = 0, pooled_expected = 0, pooled_count = 0;
  int cells = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (expected[i] == 0) {
      EXPECT_EQ(counts[i], 0) << "token " << i << " is filtered out";
    } else if (expected[i] * draws >= 5) {
      chi += std::pow(counts[i] - expected[i] * draws, 2) / (expected[i] * draws);
      ++cells;
    } else {
      pooled_expected += expected[i] * draws;
      pooled_count += counts[i];
    }
  }
  if (pooled_expected >= 5) {
    chi += std::pow(pooled_count - pooled_expected, 2) / pooled_expected;
    ++cells;
  }
  // A chi-square of k degrees of freedom has mean k and variance 2k: five deviations above is one in a million.
  const double freedom = std::max(cells - 1, 1);
  EXPECT_LT(chi, freedom + 5 * std::sqrt(2 * freedom) + 10) << "over " << cells << " cells";
}

std::vector<float> RandomLogits(int n, float deviation, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> logits(n);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

TEST(SamplingDistribution, MatchesReferenceOverFilterCombinations) {
  unsigned seed = 1;
  for (int n : {1, 64, 65, 1000}) {
    for (float temperature : {0.5f, 1.0f, 1.7f}) {
      for (int top_k : {0, 1, 7, 150}) {
        for (float top_p : {1.0f, 0.9f, 0.3f}) {
          for (float min_p : {0.0f, 0.05f}) {
            SamplingParams params = Seeded(seed);
            params.temperature = temperature;
            params.top_k = top_k;
            params.top_p = top_p;
            params.min_p = min_p;
            SCOPED_TRACE(testing::Message() << "n " << n << " temperature " << temperature << " top_k " << top_k
                                            << " top_p " << top_p << " min_p " << min_p);
            ExpectDistribution(params, RandomLogits(n, 2, seed++), 3000);
          }
        }
      }
    }
  }
}

TEST(SamplingDistribution, FullVocabulary) {
  SamplingParams params = Seeded(3);
  params.temperature = 0.8f;
  params.top_p = 0.95f;
  ExpectDistribution(params, RandomLogits(49152, 2.5f, 5), 2000);
}

TEST(SamplingFilters, TopKKeepsTiesAtItsEdge) {
  SamplingParams params = Seeded();
  params.top_k = 2;
  const auto counts = Histogram(params, {1, 3, 2, 2, 0}, 2000);
  EXPECT_EQ(counts[0], 0);
  EXPECT_EQ(counts[4], 0);
  EXPECT_GT(counts[1], counts[2]);
  EXPECT_GT(counts[2], 0);
  EXPECT_GT(counts[3], 0);
}

TEST(SamplingFilters, TopKOneIsGreedyAndTopKAboveVocabularyIsOff) {
  SamplingParams params = Seeded();
  params.top_k = 1;
  EXPECT_EQ(Histogram(params, {0, 1, 0.9f}, 500)[1], 500);
  params.top_k = 1000;
  EXPECT_GT(Histogram(params, {0, 1, 0.9f}, 500)[0], 0);
}

TEST(SamplingFilters, TinyTopPKeepsTheLikeliest) {
  SamplingParams params = Seeded();
  params.top_p = 1e-6f;
  EXPECT_EQ(Histogram(params, {0, 1, 0.9f}, 500)[1], 500);
  // Equal ones: the lowest id alone.
  EXPECT_EQ(Histogram(params, std::vector<float>(300, 2.0f), 500)[0], 500);
}

TEST(SamplingFilters, TopPAmongEqualTokensKeepsTheLowestIds) {
  SamplingParams params = Seeded();
  params.top_p = 0.5f;
  const auto counts = Histogram(params, std::vector<float>(200, -1.0f), 4000);
  for (int i = 0; i < 200; ++i) EXPECT_EQ(counts[i] > 0, i < 100) << i;
}

TEST(SamplingFilters, MinPOneKeepsOnlyTheLikeliestAndItsEquals) {
  SamplingParams params = Seeded();
  params.min_p = 1;
  const auto counts = Histogram(params, {5, 4.99f, 5, -3}, 1000);
  EXPECT_EQ(counts[1] + counts[3], 0);
  EXPECT_GT(counts[0], 400);
  EXPECT_GT(counts[2], 400);
}

TEST(SamplingGreedy, LowestIndexWinsAtAnyOffset) {
  SamplingParams params = Seeded();
  params.temperature = 0;
  for (int n : {1, 5, 64, 131, 1000}) {
    for (int at = 0; at < n; at += 1 + n / 17) {
      std::vector<float> logits(n, -1.0f);
      logits[at] = 2;
      logits[n - 1] = 2;
      EXPECT_EQ(SampleOnce(Sampler(params, n), logits), at);
    }
  }
  params.temperature = 1e-7f;
  EXPECT_TRUE(Sampler(params, 3).greedy());
}

TEST(SamplingRandom, SameSeedSameTokensOtherSeedOthers) {
  const auto logits = RandomLogits(500, 1, 9);
  const auto run = [&](const Sampler& start) {
    Sampler sampler = start;
    std::vector<TokenId> tokens;
    for (int i = 0; i < 50; ++i) {
      tokens.push_back(SampleOnce(sampler, logits));
      sampler.ObserveOutput(tokens.back());
    }
    return tokens;
  };
  const Sampler first(Seeded(5), 500);
  EXPECT_EQ(run(first), run(Sampler(Seeded(5), 500)));
  EXPECT_NE(run(first), run(Sampler(Seeded(6), 500)));
  EXPECT_NE(run(first), run(Sampler(Seeded(5), 500, {}, 1)));
  EXPECT_EQ(run(first.Fork(3)), run(Sampler(Seeded(5), 500, {}, 3)));
  EXPECT_NE(run(Sampler(SamplingParams{}, 500)), run(Sampler(SamplingParams{}, 500)));
}

TEST(SamplingRandom, DrawDependsOnThePositionAlone) {
  const auto logits = RandomLogits(500, 1, 9);
  Sampler sampler(Seeded(5), 500);
  for (int i = 0; i < 10; ++i) sampler.ObserveOutput(i);
  const TokenId token = SampleOnce(sampler, logits);
  EXPECT_EQ(SampleOnce(sampler, logits), token);  // not observed: the same draw
  Sampler other(Seeded(5), 500);
  for (int i = 0; i < 10; ++i) other.ObserveOutput(499 - i);
  EXPECT_EQ(SampleOnce(other, logits), token);
}

TEST(SamplingPenalties, HandComputed) {
  SamplingParams params;
  params.temperature = 0;
  params.repetition_penalty = 2;
  params.presence_penalty = 0.5f;
  params.frequency_penalty = 0.25f;
  params.logit_bias = {{3, 1.5f}};
  Sampler sampler(params, 5);
  sampler.ObservePrompt(std::vector<TokenId>{0, 0, 1, 70, -1});
  for (TokenId token : {2, 2, 2, 1}) sampler.ObserveOutput(token);
  std::vector<float> logits = {4, -1, 8, 1, 2};
  SamplingScratch scratch(5);
  EXPECT_EQ(sampler.Sample(logits, scratch), 2);
  EXPECT_FLOAT_EQ(logits[0], 2);                      // 4 / 2: prompt tokens are repeated but not present
  EXPECT_FLOAT_EQ(logits[1], -1 * 2 - 0.25f - 0.5f);  // a negative logit is multiplied
  EXPECT_FLOAT_EQ(logits[2], 8 / 2 - 3 * 0.25f - 0.5f);
  EXPECT_FLOAT_EQ(logits[3], 2.5f);
  EXPECT_FLOAT_EQ(logits[4], 2);

  std::vector<float> again = {4, -1, 8, 1, 2};
  Sampler fork = sampler.Fork(1);
  fork.ObserveOutput(4);
  fork.Sample(again, scratch);
  EXPECT_FLOAT_EQ(again[4], 1 - 0.75f);
  EXPECT_EQ(sampler.output_tokens(), 4);
}

TEST(SamplingPenalties, PenaltiesComeBeforeBiasAndTemperature) {
  SamplingParams params = Seeded();
  params.repetition_penalty = 2;
  params.logit_bias = {{0, 100.0f}};
  Sampler sampler(params, 2);
  sampler.ObservePrompt(std::vector<TokenId>{0});
  std::vector<float> logits = {-10, 0};
  SamplingScratch scratch(2);
  EXPECT_EQ(sampler.Sample(logits, scratch), 0);
  EXPECT_FLOAT_EQ(logits[0], 80);
}

TEST(SamplingMinTokens, StopTokensAreHeldOff) {
  SamplingParams params = Seeded();
  params.temperature = 0;
  params.min_tokens = 2;
  params.stop_tokens = {1};
  const std::vector<TokenId> end_tokens = {2};
  Sampler sampler(params, 3, end_tokens);
  const std::vector<float> logits = {0, 5, 9};
  EXPECT_EQ(SampleOnce(sampler, logits), 0);
  sampler.ObserveOutput(0);
  EXPECT_EQ(SampleOnce(sampler, logits), 0);
  sampler.ObserveOutput(0);
  EXPECT_EQ(SampleOnce(sampler, logits), 2);
}

TEST(SamplingBadLogits, NanAndInfinity) {
  for (float temperature : {0.0f, 1.0f}) {
    for (float top_p : {1.0f, 0.9f}) {
      for (int top_k : {0, 2}) {
        SamplingParams params = Seeded();
        params.temperature = temperature;
        params.top_p = top_p;
        params.top_k = top_k;
        params.logprobs = 2;
        const Sampler sampler(params, 200);
        SampledLogprobs out;
        EXPECT_EQ(SampleOnce(sampler, std::vector<float>(200, kNan), &out), Sampler::kNoToken);
        EXPECT_EQ(SampleOnce(sampler, std::vector<float>(200, -kInf), &out), Sampler::kNoToken);
        EXPECT_EQ(out.chosen, -kInf);
        EXPECT_TRUE(out.top.empty());
        std::vector<float> one(200, kNan);
        one[150] = -3;
        EXPECT_EQ(SampleOnce(sampler, one, &out), 150);
        EXPECT_FLOAT_EQ(out.chosen, 0);
        ASSERT_EQ(out.top.size(), 1u);
        std::vector<float> infinite(200, 1.0f);
        infinite[7] = kNan;
        infinite[90] = kInf;
        infinite[91] = -kInf;
        EXPECT_EQ(SampleOnce(sampler, infinite, &out), 90);
        EXPECT_FLOAT_EQ(out.chosen, 0);
        std::vector<float> extremes(200, std::numeric_limits<float>::lowest());
        extremes[33] = std::numeric_limits<float>::max();
        EXPECT_EQ(SampleOnce(sampler, extremes, &out), 33);
      }
    }
  }
}

TEST(SamplingLogprobs, AreOfTheRawDistribution) {
  SamplingParams params = Seeded();
  params.temperature = 0.2f;
  params.repetition_penalty = 5;
  params.logit_bias = {{0, -100.0f}};
  params.logprobs = 3;
  const auto logits = RandomLogits(300, 2, 11);
  double sum = 0;
  for (float logit : logits) sum += std::exp(static_cast<double>(logit));
  std::vector<TokenId> order(300);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });

  Sampler sampler(params, 300);
  sampler.ObservePrompt(order);
  SampledLogprobs out;
  const TokenId token = SampleOnce(sampler, logits, &out);
  // Tolerance: the weights' relative error of 4e-7 and float logits of magnitude 8.
  EXPECT_NEAR(out.chosen, logits[token] - std::log(sum), 2e-6);
  ASSERT_EQ(out.top.size(), 3u);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(out.top[i].token, order[i]);
    EXPECT_NEAR(out.top[i].logprob, logits[order[i]] - std::log(sum), 2e-6);
  }
}

TEST(SamplingLogprobs, CountsAndTies) {
  SamplingParams params = Seeded();
  params.temperature = 0;
  SampledLogprobs out;
  out.chosen = 7;
  SampleOnce(Sampler(params, 3), {1, 2, 3}, &out);
  EXPECT_EQ(out.chosen, 7);  // off: untouched
  params.logprobs = 0;
  SampleOnce(Sampler(params, 3), {1, 1, 1}, &out);
  EXPECT_NEAR(out.chosen, -std::log(3.0), 1e-6);
  EXPECT_TRUE(out.top.empty());
  params.logprobs = 2;
  SampleOnce(Sampler(params, 4), {1, 5, 1, 1}, &out);
  ASSERT_EQ(out.top.size(), 2u);
  EXPECT_EQ(out.top[0].token, 1);
  EXPECT_EQ(out.top[1].token, 0);
  params.logprobs = 20;
  SampleOnce(Sampler(params, 4), {1, 5, 1, 1}, &out);
  EXPECT_EQ(out.top.size(), 4u);
}

TEST(SamplingValidate, Table) {
  struct Case {
    const char* field;
    std::function<void(SamplingParams&)> change;
    bool ok;
  };
  const std::vector<Case> cases = {
      {"", [](SamplingParams&) {}, true},
      {"temperature", [](SamplingParams& p) { p.temperature = -0.1f; }, false},
      {"temperature", [](SamplingParams& p) { p.temperature = kNan; }, false},
      {"temperature", [](SamplingParams& p) { p.temperature = kInf; }, false},
      {"temperature", [](SamplingParams& p) { p.temperature = 0; }, true},
      {"top_k", [](SamplingParams& p) { p.top_k = -1; }, false},
      {"top_k", [](SamplingParams& p) { p.top_k = 1 << 30; }, true},
      {"top_p", [](SamplingParams& p) { p.top_p = 0; }, false},
      {"top_p", [](SamplingParams& p) { p.top_p = 1.01f; }, false},
      {"top_p", [](SamplingParams& p) { p.top_p = kNan; }, false},
      {"min_p", [](SamplingParams& p) { p.min_p = -0.01f; }, false},
      {"min_p", [](SamplingParams& p) { p.min_p = 1; }, true},
      {"repetition_penalty", [](SamplingParams& p) { p.repetition_penalty = 0; }, false},
      {"repetition_penalty", [](SamplingParams& p) { p.repetition_penalty = 10.5f; }, false},
      {"presence_penalty", [](SamplingParams& p) { p.presence_penalty = -2.5f; }, false},
      {"frequency_penalty", [](SamplingParams& p) { p.frequency_penalty = 2.5f; }, false},
      {"frequency_penalty", [](SamplingParams& p) { p.frequency_penalty = -2; }, true},
      {"logit_bias token",
       [](SamplingParams& p) {
         p.logit_bias = {{100, 1.0f}};
       },
       false},
      {"logit_bias token",
       [](SamplingParams& p) {
         p.logit_bias = {{-1, 1.0f}};
       },
       false},
      {"logit_bias of token 4",
       [](SamplingParams& p) {
         p.logit_bias = {{4, 101.0f}};
       },
       false},
      {"logit_bias of token 4",
       [](SamplingParams& p) {
         p.logit_bias = {{4, kNan}};
       },
       false},
      {"logit_bias",
       [](SamplingParams& p) {
         p.logit_bias.assign(1025, {4, 1.0f});
       },
       false},
      {"logit_bias",
       [](SamplingParams& p) {
         p.logit_bias = {{99, -100.0f}};
       },
       true},
      {"stop[1]",
       [](SamplingParams& p) {
         p.stop = {"a", ""};
       },
       false},
      {"stop[0]", [](SamplingParams& p) { p.stop = {std::string(257, 'x')}; }, false},
      {"stop", [](SamplingParams& p) { p.stop.assign(17, "x"); }, false},
      {"stop", [](SamplingParams& p) { p.stop.assign(16, "x"); }, true},
      {"stop_tokens", [](SamplingParams& p) { p.stop_tokens = {100}; }, false},
      {"stop_tokens", [](SamplingParams& p) { p.stop_tokens.assign(129, 1); }, false},
      {"max_tokens", [](SamplingParams& p) { p.max_tokens = 0; }, false},
      {"max_tokens", [](SamplingParams& p) { p.max_tokens = (1 << 20) + 1; }, false},
      {"min_tokens", [](SamplingParams& p) { p.min_tokens = 300; }, false},
      {"min_tokens", [](SamplingParams& p) { p.min_tokens = -1; }, false},
      {"n is", [](SamplingParams& p) { p.n = 0; }, false},
      {"n is", [](SamplingParams& p) { p.n = 129; }, false},
      {"logprobs", [](SamplingParams& p) { p.logprobs = 21; }, false},
      {"logprobs", [](SamplingParams& p) { p.logprobs = -2; }, false},
      {"logprobs", [](SamplingParams& p) { p.logprobs = 20; }, true},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    SamplingParams params;
    cases[i].change(params);
    const Status status = Validate(params, 100);
    EXPECT_EQ(status.ok(), cases[i].ok) << "case " << i << ": " << status.message();
    if (!cases[i].ok) {
      EXPECT_NE(status.message().find(cases[i].field), std::string::npos) << status.message();
    }
  }
  SamplingParams params;
  params.top_p = 1.5f;
  EXPECT_EQ(Validate(params, 100).message(), "sampling: top_p is 1.5, must be above 0 and at most 1");
}

}  // namespace
}  // namespace jointkv::engine
