#include "cli/eval_run.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "engine/test_models.h"

namespace jointkv::cli {
namespace {

using engine::Engine;

constexpr size_t kContinuation = 6;

std::unique_ptr<Engine> Load(int step_tokens = 64, size_t kv_bytes = size_t{32} << 20) {
  engine::EngineOptions options;
  options.model_path = engine::TestModelPath("llama");
  options.threads = 2;
  options.kv_bytes = kv_bytes;
  options.step_tokens = step_tokens;
  EvalSetting exact;
  exact.fusion.policy = joint::Policy::kOff;
  exact.kv_type = {codec::Codec::kF32, codec::Codec::kF32};
  Expected<std::unique_ptr<Engine>> loaded = Engine::Create(exact.Apply(options));
  EXPECT_TRUE(loaded.ok()) << loaded.status().message();
  return std::move(loaded).value();
}

std::vector<TokenId> RandomTokens(size_t n, std::mt19937_64& random) {
  std::vector<TokenId> tokens(n);
  for (TokenId& token : tokens) token = static_cast<TokenId>(300 + random() % 700);
  return tokens;
}

std::vector<EncodedRequest> RandomRequests(size_t count, size_t prompt_tokens) {
  std::mt19937_64 random(1);
  std::vector<EncodedRequest> requests;
  for (size_t i = 0; i < count; ++i) {
    requests.push_back({RandomTokens(prompt_tokens + i, random), RandomTokens(kContinuation, random), {}});
  }
  return requests;
}

ExactLogits Room(size_t requests) {
  return std::move(ExactLogits::Create(requests, kContinuation, engine::kTestVocab)).value();
}

EvalRun Measure(Engine& engine, const std::vector<EncodedRequest>& requests, ExactLogits& exact, bool scored) {
  size_t last = 0;
  Expected<EvalRun> run = RunForced(engine, requests, exact, scored, [&last](size_t done, size_t total) {
    EXPECT_LE(last, done);
    EXPECT_LE(done, total);
    last = done;
  });
  EXPECT_TRUE(run.ok()) << run.status().message();
  EXPECT_EQ(last, requests.size() * kContinuation);
  return run.ok() ? std::move(run).value() : EvalRun();
}

TEST(RunForcedTest, KeepsTheLogitsBeforeEachForcedToken) {
  const auto requests = RandomRequests(3, 90);
  ExactLogits exact = Room(3);
  Measure(*Load(), requests, exact, false);
  const auto engine = Load();
  for (size_t i = 0; i < requests.size(); ++i) {
    engine::Request alone;
    alone.prompt = requests[i].prompt;
    alone.prompt.insert(alone.prompt.end(), requests[i].continuation.begin(), requests[i].continuation.begin() + 4);
    alone.sampling.max_tokens = 1;
    std::vector<float> logits;
    engine->ObserveLogits(
        [&](engine::RequestId, int, int, std::span<const float> row) { logits.assign(row.begin(), row.end()); });
    ASSERT_TRUE(engine->Submit(std::move(alone)).ok());
    std::vector<engine::Event> events;
    while (!engine->idle()) engine->Step(events);
    const std::span<const float> kept = exact.at(i, 4);
    ASSERT_EQ(logits.size(), kept.size());
    for (size_t j = 0; j < logits.size(); ++j) ASSERT_NEAR(logits[j], kept[j], 1e-3);
  }
}

TEST(RunForcedTest, TheExactCacheLosesNothingAgainstItself) {
  const auto requests = RandomRequests(5, 120);
  ExactLogits exact = Room(5);
  Measure(*Load(), requests, exact, false);
  const EvalRun run = Measure(*Load(40), requests, exact, true);
  ASSERT_EQ(run.scores.size(), 5 * kContinuation);
  const Quality quality = QualityOf(run.scores);
  EXPECT_LT(quality.kl_mean, 1e-6);
  EXPECT_EQ(quality.top1, 1);
  EXPECT_NEAR(quality.ppl_ratio, 1, 1e-3);
  EXPECT_GT(run.step_s, 0);
}

// One row a step is left for prompts: the first request is long done with its continuation when the last begins.
TEST(RunForcedTest, NobodyLeavesBeforeAllAreResident) {
  const auto requests = RandomRequests(4, 60);
  ExactLogits exact = Room(4);
  const EvalRun run = Measure(*Load(16), requests, exact, false);
  EXPECT_TRUE(run.fullest.all_resident);
  EXPECT_GT(run.engine.output_tokens, static_cast<int64_t>(4 * kContinuation));
  size_t prompt_tokens = 0;
  for (const EncodedRequest& request : requests) prompt_tokens += request.prompt.size();
  const auto engine = Load();
  const size_t token_bytes = engine->cache().shape().logical_token_bytes();
  EXPECT_GE(run.fullest.logical_bytes, prompt_tokens * token_bytes);
  // Private f32 blocks: two bytes held for each byte of 16-bit values, and the waste of small slabs.
  EXPECT_GT(run.fullest.ratio(), 0.1);
  EXPECT_LT(run.fullest.ratio(), 0.5);
}

TEST(RunForcedTest, TellsWhenNotAllFitTogether) {
  const auto requests = RandomRequests(6, 400);
  ExactLogits exact = Room(6);
  const EvalRun run = Measure(*Load(64, size_t{2} << 20), requests, exact, false);
  EXPECT_FALSE(run.fullest.all_resident);
  EXPECT_GT(run.fullest.logical_bytes, 0U);
}

TEST(RunForcedTest, RefusesWhatDoesNotFitTheContext) {
  const auto requests = RandomRequests(1, engine::kTestContext - 3);
  ExactLogits exact = Room(1);
  const auto engine = Load();
  const Status status = RunForced(*engine, requests, exact, false, [](size_t, size_t) {}).status();
  EXPECT_EQ(status.code(), StatusCode::kOutOfRange);
}

}  // namespace
}  // namespace jointkv::cli
