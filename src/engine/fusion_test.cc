// Fusion as requests meet it: the engine with the bounded policy on, against the engine without.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <set>

#include "engine/engine.h"
#include "engine/test_engine.h"

namespace jointkv::engine {
namespace {

constexpr TokenId kNewLine = 3 + '\n';  // the test vocabulary's byte tokens begin at 3

EngineOptions FusionOptionsFor(const std::string& model, joint::Policy policy = joint::Policy::kBounded) {
  EngineOptions options = TestOptions(model);
  options.quantised_rows = 0;  // not by what is faster just now: engines are compared bit by bit
  options.fusion.policy = policy;
  options.fusion.budget = 0.3F;  // random weights: what a context does to K and V is larger than in a trained model
  return options;
}

// Lines of made-up words, each a block or a few.
Tokens Document(uint64_t seed, int lines = 4) {
  Tokens document;
  for (int line = 0; line < lines; ++line) {
    for (const TokenId token : RandomTokens(24, seed * 100 + static_cast<uint64_t>(line))) {
      document.push_back(300 + token % 600);
    }
    document.push_back(kNewLine);
  }
  return document;
}

// A head of its own, then documents of a pool of six in random order, each prompt in another.
Tokens PoolPrompt(int who, int documents = 4) {
  std::mt19937 random(static_cast<uint32_t>(who));
  int order[] = {0, 1, 2, 3, 4, 5};
  std::shuffle(std::begin(order), std::end(order), random);
  Tokens prompt = RandomTokens(10, 7000 + static_cast<uint64_t>(who));
  prompt.push_back(kNewLine);
  for (int i = 0; i < documents; ++i) {
    const Tokens document = Document(static_cast<uint64_t>(order[i]));
    prompt.insert(prompt.end(), document.begin(), document.end());
  }
  return prompt;
}

RequestId SubmitOf(Driver& driver, Tokens prompt, SamplingParams sampling, bool kv_fusion, Tokens forced = {}) {
  Request request;
  request.prompt = std::move(prompt);
  request.sampling = std::move(sampling);
  request.kv_fusion = kv_fusion;
  request.forced = std::move(forced);
  const auto id = driver.engine().Submit(std::move(request));
  EXPECT_TRUE(id.ok()) << id.status().ToString();
  return *id;
}

// Runs what fills the statistics, so that from here on blocks fuse, and forgets its blocks. Many short prompts: of each
// step a window layer keeps no more than its window.
void Warm(Driver& driver) {
  for (int i = 0; i < 60; ++i) driver.Submit(Document(5000 + static_cast<uint64_t>(i), 3), Greedy(1), DomainId(99));
  driver.Run();
  driver.engine().DropPrefixCache();
}

// Once a scale is known: the geometric mean of each head's factors is 1, and random weights make no two pairs alike.
TEST(EngineFusion, KeysAreEncodedByWhatQueriesLookAt) {
  EngineOptions options = FusionOptionsFor("llama");
  options.kv_type = {{.type = {codec::Codec::kQ4, codec::Codec::kQ8}}};
  Driver driver(options);
  for (int i = 0; i < 3; ++i) driver.Submit(RandomTokens(400, i), Greedy(4));
  EXPECT_EQ(driver.engine().cache().key_reference(0).pair_scales, nullptr);
  driver.Run();
  const kv::KvCache& cache = driver.engine().cache();
  const codec::BlockLayout& layout = cache.shape().layout;
  for (int layer = 0; layer < cache.shape().n_layers(); ++layer) {
    const codec::Reference reference = cache.key_reference(layer);
    ASSERT_NE(reference.pair_scales, nullptr);
    for (int head = 0; head < layout.n_kv_heads; ++head) {
      std::set<float> distinct;
      double log_sum = 0;
      for (int pair = 0; pair < layout.head_dim / 2; ++pair) {
        const float scale = reference.OfHead(layout, head).pair_scales[pair];
        distinct.insert(scale);
        log_sum += std::log(scale);
      }
      EXPECT_NEAR(log_sum, 0, 1e-3);
      EXPECT_EQ(distinct.size(), static_cast<size_t>(layout.head_dim) / 2);
    }
  }
}

TEST(EngineFusion, SharedDocumentsTakeFewerBytesAndEveryRequestEndsRight) {
  for (const char* model : {"llama", "llama-q4_1", "gemma3"}) {
    SCOPED_TRACE(model);
    size_t peak[2] = {};
    for (const bool on : {false, true}) {
      Driver driver(FusionOptionsFor(model, on ? joint::Policy::kBounded : joint::Policy::kOff));
      Warm(driver);
      std::vector<RequestId> ids;
      for (int i = 0; i < 12; ++i) ids.push_back(driver.Submit(PoolPrompt(i), Greedy(8 + i)));
      while (driver.Step()) peak[on] = std::max(peak[on], driver.engine().kv_stats().running_bytes);
      for (int i = 0; i < 12; ++i) {
        const Output& output = driver.of(ids[static_cast<size_t>(i)]);
        EXPECT_EQ(output.end.finish, FinishReason::kLength);
        EXPECT_EQ(output.tokens.size(), static_cast<size_t>(8 + i));
      }
      const joint::FusionStats stats = driver.engine().fusion_stats();
      EXPECT_EQ(stats.fused > 0, on);
      EXPECT_EQ(stats.fused_equal_tokens, stats.fused);
      EXPECT_LE(stats.worst_nmse, 0.3 * (1 + 1e-6));
      driver.ExpectAllFree();
    }
    EXPECT_LT(peak[1], peak[0] * 8 / 10);
  }
}

TEST(EngineFusion, OptOutIsBitIdenticalToAnEngineWithoutFusion) {
  for (const char* model : {"llama", "gemma3"}) {
    SCOPED_TRACE(model);
    Driver off(FusionOptionsFor(model, joint::Policy::kOff));
    Driver on(FusionOptionsFor(model));
    Warm(on);
    for (int i = 0; i < 6; ++i) on.Submit(PoolPrompt(i), Greedy(4));  // leave representatives and a lossy cache
    on.Run();
    ASSERT_GT(on.engine().fusion_stats().fused, 0);
    const int64_t offered = on.engine().fusion_stats().offered;
    // Alone, so that both see the same batches; the second of each adopts what the first one left.
    for (const int who : {0, 100, 0, 100}) {
      const RequestId a = SubmitOf(off, PoolPrompt(who), Greedy(60), false);
      off.Run();
      const RequestId b = SubmitOf(on, PoolPrompt(who), Greedy(60), false);
      on.Run();
      EXPECT_EQ(off.of(a).tokens, on.of(b).tokens);
      EXPECT_EQ(off.of(a).logits, on.of(b).logits);
      EXPECT_EQ(off.of(a).end.cached_tokens, on.of(b).end.cached_tokens);
    }
    EXPECT_EQ(on.engine().fusion_stats().offered, offered);
    on.ExpectAllFree();
  }
}

// A request that meets no representative is computed from its own bytes.
TEST(EngineFusion, ALoneUniqueRequestIsBitIdenticalToo) {
  Driver off(FusionOptionsFor("llama", joint::Policy::kOff));
  Driver on(FusionOptionsFor("llama"));
  Warm(on);
  const RequestId a = off.Submit(Document(800, 8), Greedy(40));
  off.Run();
  const RequestId b = on.Submit(Document(800, 8), Greedy(40));
  on.Run();
  EXPECT_EQ(on.engine().fusion_stats().fused, 0);
  EXPECT_EQ(off.of(a).logits, on.of(b).logits);
}

// While there is room, a prompt is computed from its own bytes to its last token, and fused then.
TEST(EngineFusion, AsLongAsThereIsRoomPromptsAreComputedExactly) {
  for (const char* model : {"llama", "gemma3"}) {
    SCOPED_TRACE(model);
    EngineOptions options = FusionOptionsFor(model);
    options.step_tokens = 64;
    Driver on(options);
    options.fusion.policy = joint::Policy::kOff;
    Driver off(options);
    Warm(on);
    for (int i = 0; i < 6; ++i) {
      const RequestId a = off.Submit(PoolPrompt(i), Greedy(20));
      off.Run();
      const RequestId b = on.Submit(PoolPrompt(i), Greedy(20));
      on.Run();
      EXPECT_EQ(off.of(a).logits[0], on.of(b).logits[0]);
    }
    EXPECT_GT(on.engine().fusion_stats().fused, 0);
  }
}

TEST(EngineFusion, WhereRoomIsShortPromptsFuseBeforeTheyAreComplete) {
  EngineOptions options = FusionOptionsFor("llama");
  options.step_tokens = 64;
  Driver roomy(options);
  Warm(roomy);
  const RequestId alone = roomy.Submit(PoolPrompt(0), Greedy(60));
  while (roomy.of(alone).tokens.empty()) roomy.Step();
  options.kv_bytes = roomy.engine().kv_stats().running_bytes * 4;
  Driver driver(options);
  Warm(driver);
  const int64_t warm = driver.engine().fusion_stats().offered;
  std::vector<RequestId> ids;
  for (int i = 0; i < 6; ++i) ids.push_back(driver.Submit(PoolPrompt(i), Greedy(60)));
  bool early = false;
  bool decodes = false;
  while (driver.Step()) {
    decodes |= !driver.of(ids[0]).tokens.empty();
    early |= !decodes && driver.engine().fusion_stats().offered > warm;
  }
  EXPECT_TRUE(early);
  for (const RequestId id : ids) EXPECT_EQ(driver.of(id).tokens.size(), 60u) << driver.of(id).end.error.ToString();
  driver.ExpectAllFree();
}

TEST(EngineFusion, PreemptionMeetsFusedBlocks) {
  for (const char* model : {"llama", "gemma3"}) {
    SCOPED_TRACE(model);
    EngineOptions options = FusionOptionsFor(model);
    options.kv_bytes = size_t{2150} << 10;
    Driver driver(options);
    Warm(driver);
    std::vector<RequestId> ids;
    for (int i = 0; i < 16; ++i) ids.push_back(driver.Submit(PoolPrompt(i), Greedy(150)));
    driver.Run();
    EXPECT_GT(driver.engine().stats().preemptions, 0);
    EXPECT_GT(driver.engine().fusion_stats().fused, 0);
    for (const RequestId id : ids) {
      EXPECT_EQ(driver.of(id).tokens.size(), 150u) << driver.of(id).end.error.ToString();
    }
    driver.ExpectAllFree();
  }
}

TEST(EngineFusion, CancelInPrefillAndInDecode) {
  for (const bool prefix_cache : {true, false}) {
    EngineOptions options = FusionOptionsFor("gemma3");
    options.prefix_cache = prefix_cache;
    options.step_tokens = 64;
    Driver driver(options);
    Warm(driver);
    std::vector<RequestId> ids;
    for (int i = 0; i < 8; ++i) ids.push_back(driver.Submit(PoolPrompt(i), Greedy(40)));
    while (driver.of(ids[2]).tokens.size() < 5) driver.Step();
    ASSERT_TRUE(driver.of(ids[7]).tokens.empty());
    ASSERT_GT(driver.engine().fusion_stats().fused, 0);
    driver.engine().Cancel(ids[0]);  // decoding, its blocks are others' representatives
    driver.engine().Cancel(ids[2]);
    driver.Step();
    driver.engine().Cancel(ids[3]);  // in prefill
    driver.engine().Cancel(ids[7]);
    driver.Run();
    for (const int i : {0, 2, 3, 7}) {
      EXPECT_EQ(driver.of(ids[static_cast<size_t>(i)]).end.finish, FinishReason::kCancelled);
    }
    for (const int i : {1, 4, 5, 6}) EXPECT_EQ(driver.of(ids[static_cast<size_t>(i)]).tokens.size(), 40u);
    driver.ExpectAllFree();
  }
}

TEST(EngineFusion, ChoicesForkFromFusedBlocks) {
  Driver driver(FusionOptionsFor("llama"));
  Warm(driver);
  driver.Submit(PoolPrompt(0), Greedy(60));
  SamplingParams params = Seeded(50, 5);
  params.n = 4;
  const RequestId id = driver.Submit(PoolPrompt(1), params);
  const RequestId again = driver.Submit(PoolPrompt(2), params);
  driver.Run();
  EXPECT_GT(driver.engine().fusion_stats().fused, 0);
  std::set<Tokens> texts;
  for (int choice = 0; choice < 4; ++choice) {
    EXPECT_EQ(driver.of(id, choice).tokens.size(), 50u);
    EXPECT_EQ(driver.of(again, choice).tokens.size(), 50u);
    texts.insert(driver.of(id, choice).tokens);
    EXPECT_EQ(driver.of(id, choice).logits[0], driver.of(id, 0).logits[0]);
  }
  EXPECT_EQ(texts.size(), 4u);
  driver.ExpectAllFree();
}

TEST(EngineFusion, SwitchedOffInMidRunNothingMoreFuses) {
  EngineOptions options = FusionOptionsFor("llama");
  options.step_tokens = 128;
  Driver driver(options);
  Warm(driver);
  std::vector<RequestId> ids;
  for (int i = 0; i < 10; ++i) ids.push_back(driver.Submit(PoolPrompt(i), Greedy(20)));
  while (driver.engine().fusion_stats().fused == 0) ASSERT_TRUE(driver.Step());
  driver.engine().set_fusion(false);
  const joint::FusionStats stats = driver.engine().fusion_stats();
  for (int i = 0; i < 12; ++i) driver.Step();
  EXPECT_EQ(driver.engine().fusion_stats().offered, stats.offered);
  EXPECT_EQ(driver.engine().fusion_stats().fused, stats.fused);
  driver.engine().set_fusion(true);
  for (int i = 20; i < 24; ++i) ids.push_back(driver.Submit(PoolPrompt(i), Greedy(20)));
  driver.Run();
  EXPECT_GT(driver.engine().fusion_stats().fused, stats.fused);
  for (const RequestId id : ids) EXPECT_EQ(driver.of(id).tokens.size(), 20u);
  driver.ExpectAllFree();
}

// CheckIntegrity, after each step, also says that no block is reachable from two domains.
TEST(EngineFusion, DomainsWithEqualPromptsStayApart) {
  Driver driver(FusionOptionsFor("llama"));
  Warm(driver);
  const size_t before = driver.engine().kv_stats().used_bytes;
  driver.Submit(PoolPrompt(0), Greedy(3), DomainId(1));
  driver.Run();
  const size_t one = driver.engine().kv_stats().used_bytes - before;
  const int64_t fused = driver.engine().fusion_stats().fused;
  driver.Submit(PoolPrompt(0), Greedy(3), DomainId(2));
  driver.Run();
  EXPECT_EQ(driver.engine().kv_stats().used_bytes - before, 2 * one);
  EXPECT_EQ(driver.engine().fusion_stats().fused, 2 * fused);
  driver.Submit(PoolPrompt(1), Greedy(3), DomainId(2));
  driver.Run();
  EXPECT_GT(driver.engine().fusion_stats().fused, 2 * fused);
  driver.ExpectAllFree();
}

TEST(EngineFusion, ForcedTokensComeOutAsGiven) {
  Driver driver(FusionOptionsFor("llama"));
  Warm(driver);
  std::vector<RequestId> ids;
  const Tokens forced = Document(3, 2);
  for (int i = 0; i < 4; ++i) ids.push_back(SubmitOf(driver, PoolPrompt(i), Greedy(60), true, forced));
  SamplingParams few = Greedy(7);
  const RequestId cut = SubmitOf(driver, PoolPrompt(4), few, true, forced);
  driver.Run();
  for (const RequestId id : ids) {
    const Tokens& tokens = driver.of(id).tokens;
    ASSERT_EQ(tokens.size(), 60u);
    EXPECT_TRUE(std::equal(forced.begin(), forced.end(), tokens.begin()));
  }
  EXPECT_EQ(driver.of(cut).tokens, Tokens(forced.begin(), forced.begin() + 7));
  driver.ExpectAllFree();
}

TEST(EngineFusion, DeterministicEnginesNeverFuse) {
  EngineOptions options = FusionOptionsFor("llama");
  options.deterministic = true;
  Driver driver(options);
  Warm(driver);
  for (int i = 0; i < 4; ++i) driver.Submit(PoolPrompt(i), Greedy(5));
  driver.Run();
  EXPECT_EQ(driver.engine().fusion_stats().offered, 0);
  EXPECT_EQ(driver.engine().options().fusion.policy, joint::Policy::kOff);
}

TEST(EngineFusion, BudgetsAreChecked) {
  for (const float budget : {0.0F, -1.0F, 1.5F, std::nanf("")}) {
    EngineOptions options = FusionOptionsFor("llama");
    options.fusion.budget = budget;
    const auto engine = Engine::Create(options);
    ASSERT_FALSE(engine.ok());
    EXPECT_EQ(engine.status().code(), StatusCode::kOutOfRange);
    EXPECT_NE(engine.status().message().find("kv-budget"), std::string::npos);
  }
}

// Random requests over shared documents in little room, with opt-outs, cancels and the switch. JOINTKV_SOAK_STEPS sets
// the steps of each seed.
class FusionSoakTest : public testing::TestWithParam<int> {};

TEST_P(FusionSoakTest, EveryChoiceEndsAndNothingLeaks) {
  const int seed = GetParam();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(static_cast<uint64_t>(seed));
  const auto draw = [&](int n) { return static_cast<int>(random() % static_cast<uint64_t>(n)); };
  const char* models[] = {"llama", "llama-q4_1", "gemma3"};
  EngineOptions options = FusionOptionsFor(models[seed % 3]);
  options.threads = 1 + draw(3);
  options.kv_bytes = size_t{700 + static_cast<size_t>(draw(1500))} << 10;
  options.prefix_cache = draw(3) != 0;
  options.max_running = 1 + draw(12);
  options.step_tokens = 16 + draw(200);
  options.fusion.budget = draw(2) == 0 ? 0.05F : 0.8F;
  if (draw(4) == 0) options.kv_type = {{.type = {codec::Codec::kF16, codec::Codec::kF16}}};
  Driver driver(options);

  const char* wanted = std::getenv("JOINTKV_SOAK_STEPS");
  const int steps = wanted == nullptr ? 200 : std::atoi(wanted);
  std::vector<std::pair<RequestId, int>> submitted;  // and choices
  std::set<RequestId> cancelled;
  for (int step = 0; step < steps; ++step) {
    while (draw(4) == 0) {
      Request request;
      request.prompt = PoolPrompt(draw(40), draw(5));
      request.prompt.resize(1 + static_cast<size_t>(draw(static_cast<int>(request.prompt.size()))));
      request.sampling = Seeded(1 + draw(60), random());
      request.sampling.n = draw(5) == 0 ? 1 + draw(options.max_running) : 1;
      request.domain = DomainId(draw(2));
      request.kv_fusion = draw(4) != 0;
      if (draw(3) == 0) request.forced = Document(static_cast<uint64_t>(draw(6)), 1);
      const int choices = request.sampling.n;
      const auto id = driver.engine().Submit(std::move(request));
      ASSERT_TRUE(id.ok() || id.status().code() == StatusCode::kResourceExhausted) << id.status().ToString();
      if (id.ok()) submitted.push_back({*id, choices});
    }
    if (draw(10) == 0 && !submitted.empty()) {
      const RequestId id = submitted[static_cast<size_t>(draw(static_cast<int>(submitted.size())))].first;
      driver.engine().Cancel(id);
      cancelled.insert(id);
    }
    if (draw(20) == 0) driver.engine().set_fusion(draw(3) != 0);
    if (draw(40) == 0) driver.engine().DropPrefixCache();
    driver.Step();
  }
  driver.Run();
  for (const auto& [id, choices] : submitted) {
    for (int choice = 0; choice < choices; ++choice) {
      const Output& output = driver.of(id, choice);
      EXPECT_EQ(output.ends, 1);
      if (output.end.finish == FinishReason::kCancelled) {
        EXPECT_TRUE(cancelled.contains(id));
      }
      if (output.end.finish == FinishReason::kError) {
        EXPECT_EQ(output.end.error.code(), StatusCode::kResourceExhausted);
      }
    }
  }
  const joint::FusionStats stats = driver.engine().fusion_stats();
  EXPECT_LE(stats.worst_nmse, options.fusion.budget * (1 + 1e-6));
  driver.ExpectAllFree();
}

INSTANTIATE_TEST_SUITE_P(Seeds, FusionSoakTest, testing::Range(0, 12));

}  // namespace
}  // namespace jointkv::engine
