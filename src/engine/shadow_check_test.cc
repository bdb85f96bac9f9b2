#include "engine/shadow_check.h"

#include "engine/test_engine.h"

namespace jointkv::engine {
namespace {

EngineOptions Fusing(joint::Policy policy) {
  EngineOptions options = TestOptions();
  options.fusion.policy = policy;
  return options;
}

// An engine with a ShadowCheck, driven as a server would: shadow runs where nothing else is open.
class Server {
 public:
  Server(const EngineOptions& options, const ShadowCheck::Options& shadow)
      : engine_(std::move(Engine::Create(options)).value()), shadow_(*engine_, shadow) {}

  RequestId Submit(Tokens prompt, int max_tokens) {
    Request request;
    request.prompt = std::move(prompt);
    request.sampling = Greedy(max_tokens);
    auto id = engine_->Submit(request);
    EXPECT_TRUE(id.ok()) << id.status().ToString();
    shadow_.OnSubmitted(*id, request);
    return *id;
  }

  bool Step() {
    shadow_.RunWhenIdle();
    std::vector<Event> events;
    const bool busy = engine_->Step(events);
    shadow_.OnEvents(events);
    for (const Event& event : events) {
      EXPECT_TRUE(event.request.valid());
      clients_.push_back(event);
    }
    return busy;
  }

  ShadowCheck& shadow() { return shadow_; }
  Engine& engine() { return *engine_; }
  const std::vector<Event>& clients() const { return clients_; }

 private:
  std::unique_ptr<Engine> engine_;
  ShadowCheck shadow_;
  std::vector<Event> clients_;
};

TEST(ShadowCheck, ExactKvDiffersByRoundingOnly) {
  Server server(Fusing(joint::Policy::kOff), {.rate = 1, .tokens_max = 20});
  for (uint64_t i = 0; i < 3; ++i) server.Submit(RandomTokens(60, i), 30);
  while (server.Step()) {
  }
  const ShadowCheck::Stats& stats = server.shadow().stats();
  EXPECT_EQ(stats.runs, 3);
  EXPECT_EQ(stats.rows, 60);
  EXPECT_EQ(stats.dropped, 0);
  EXPECT_EQ(stats.bytes, 0u);
  // f32 throughout: what differs is the order of sums.
  EXPECT_LT(stats.kl_sum / static_cast<double>(stats.rows), 1e-6);
  EXPECT_EQ(server.shadow().TakeRunKls().size(), 3u);
  EXPECT_TRUE(server.shadow().TakeRunKls().empty());
  EXPECT_EQ(server.clients().size(), 90u) << "clients see nothing of the second runs";
}

// Lines of made-up words, each a block.
Tokens Document(uint64_t seed, int lines) {
  Tokens document;
  for (int line = 0; line < lines; ++line) {
    for (const TokenId token : RandomTokens(24, seed * 100 + static_cast<uint64_t>(line))) {
      document.push_back(300 + token % 600);
    }
    document.push_back(3 + '\n');  // the test vocabulary's byte tokens begin at 3
  }
  return document;
}

// The same text behind different beginnings is fused, at a price that the check must see.
TEST(ShadowCheck, SeesWhatFusionCosts) {
  EngineOptions options = Fusing(joint::Policy::kBounded);
  options.fusion.budget = 0.3F;  // random weights: what a context does to K and V is large
  Server server(options, {.rate = 1});
  for (uint64_t i = 0; i < 60; ++i) {  // fills the statistics that fusion goes by
    Request request;
    request.prompt = Document(5000 + i, 3);
    request.sampling = Greedy(1);
    ASSERT_TRUE(server.engine().Submit(std::move(request)).ok());
  }
  while (server.Step()) {
  }
  for (uint64_t i = 0; i < 6; ++i) {
    Tokens prompt = Document(7000 + i, 1);
    const Tokens common = Document(1, 12);
    prompt.insert(prompt.end(), common.begin(), common.end());
    server.Submit(std::move(prompt), 20);
  }
  while (server.Step()) {
  }
  ASSERT_GT(server.engine().fusion_stats().fused, 0);
  EXPECT_EQ(server.shadow().stats().runs, 6);
  EXPECT_GT(server.shadow().stats().kl_sum, 1e-4);
}

TEST(ShadowCheck, GivesWayAndStaysWithinItsLimits) {
  ShadowCheck::Options options{.rate = 0.5, .tokens_max = 10};
  options.bytes_max = 25 * kTestVocab * sizeof(float);
  options.waiting_max = 2;
  Server server(Fusing(joint::Policy::kOff), options);
  for (uint64_t i = 0; i < 8; ++i) server.Submit(RandomTokens(20, i), 10);
  while (!server.engine().idle()) server.Step();
  EXPECT_LE(server.shadow().stats().bytes, options.bytes_max);
  EXPECT_EQ(server.shadow().stats().waiting, 2);
  EXPECT_EQ(server.shadow().stats().dropped, 2) << "half of eight were sampled, two may wait";
  server.Step();  // a second run begins
  server.Submit(RandomTokens(20, 100), 5);
  while (server.Step()) {
  }
  EXPECT_EQ(server.shadow().stats().dropped, 3);
  EXPECT_EQ(server.shadow().stats().bytes, 0u);
  EXPECT_EQ(server.clients().size(), 85u);
  EXPECT_TRUE(server.engine().idle());
}

// What is shown of an engine is its clients' work.
TEST(ShadowCheck, NoFigureCountsItsRuns) {
  Server server(Fusing(joint::Policy::kOff), {.rate = 1});
  const Engine& engine = server.engine();
  server.Submit(RandomTokens(60, 1), 12);
  while (!engine.idle()) server.Step();
  const EngineStats before = engine.stats();
  const kv::KvStats kv_before = engine.kv_stats();
  const auto unchanged = [&] {
    const EngineStats stats = engine.stats();
    EXPECT_EQ(stats.running, 0);
    EXPECT_EQ(stats.waiting, 0);
    EXPECT_EQ(stats.running_peak, 1);
    EXPECT_EQ(stats.steps, before.steps);
    EXPECT_EQ(stats.prompt_tokens, before.prompt_tokens);
    EXPECT_EQ(stats.prefill_tokens, before.prefill_tokens);
    EXPECT_EQ(stats.output_tokens, 12);
    EXPECT_EQ(stats.decode_tokens, before.decode_tokens);
    EXPECT_EQ(stats.prefill_s + stats.decode_s, before.prefill_s + before.decode_s);
    EXPECT_EQ(stats.kv_bytes_peak, before.kv_bytes_peak);
    const DomainStats domain = engine.domain_stats().at(DomainId(0));
    EXPECT_EQ(domain.running + domain.waiting, 0);
    EXPECT_TRUE(engine.block_map({}).sequences.empty());
    const kv::KvStats kv = engine.kv_stats();
    EXPECT_EQ(kv.running_bytes, 0U);
    EXPECT_EQ(kv.logical_bytes, 0U);
    EXPECT_EQ(kv.prefix_query_tokens, kv_before.prefix_query_tokens);
    EXPECT_EQ(kv.prefix_hit_tokens, kv_before.prefix_hit_tokens);
    EXPECT_TRUE(engine.sharing_stats(1 << 20).domain_bytes.empty());
  };
  int steps = 0;
  while (server.Step()) {
    unchanged();
    ++steps;
  }
  EXPECT_GE(steps, 12);
  EXPECT_EQ(server.shadow().stats().runs, 1);

  // A client's request shows at once, also before the run that it ends is gone.
  server.Submit(RandomTokens(30, 2), 3);
  while (!engine.idle()) server.Step();
  server.Step();  // its second run begins
  server.Submit(RandomTokens(20, 3), 2);
  EXPECT_EQ(engine.stats().waiting, 1);
  EXPECT_EQ(engine.stats().running, 0);
  server.Step();
  EXPECT_EQ(engine.stats().running, 1);
  EXPECT_GT(engine.kv_stats().running_bytes, 0U);
  EXPECT_EQ(engine.stats().output_tokens, 16);
  while (server.Step()) {
  }
  EXPECT_EQ(engine.stats().output_tokens, 17);
}

TEST(ShadowCheck, OnlyAnIdleEngineTakesARun) {
  Driver driver(TestOptions());
  driver.Submit(RandomTokens(20, 1), Greedy(5));
  Request request;
  request.prompt = RandomTokens(20, 2);
  request.sampling = Greedy(5);
  request.shadow = true;
  EXPECT_EQ(driver.engine().Submit(request).status().code(), StatusCode::kUnsupported);
  driver.Run();
  EXPECT_TRUE(driver.engine().Submit(request).ok());
  driver.Run();
  EXPECT_EQ(driver.engine().stats().output_tokens, 5);
}

TEST(ShadowCheck, OffKeepsNothing) {
  Server server(Fusing(joint::Policy::kOff), {});
  server.Submit(RandomTokens(20, 1), 5);
  while (server.Step()) {
  }
  EXPECT_EQ(server.shadow().stats().runs, 0);
  EXPECT_EQ(server.clients().size(), 5u);
}

}  // namespace
}  // namespace jointkv::engine
