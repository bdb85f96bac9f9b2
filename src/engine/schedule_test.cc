// Cancel at every stage, turns among domains, and rows among prompts and decoding sequences.
#include <algorithm>
#include <set>

#include "engine/engine.h"
#include "engine/test_engine.h"

namespace jointkv::engine {
namespace {

struct CancelCase {
  const char* name;
  int steps_before;  // of the request that is cancelled
  int choices;
};

class CancelTest : public testing::TestWithParam<CancelCase> {};

// A prompt of 100 tokens in steps of 16: steps 1 to 6 are prefill, step 7 gives the first token.
TEST_P(CancelTest, EndsEachChoiceAndFreesItsBlocks) {
  EngineOptions options = TestOptions();
  options.step_tokens = 16;
  options.prefix_cache = false;
  Driver driver(options);
  SamplingParams params = Seeded(1000, 5);
  params.n = GetParam().choices;
  const RequestId id = driver.Submit(RandomTokens(100, 5), params);
  for (int step = 0; step < GetParam().steps_before; ++step) driver.Step();
  driver.engine().Cancel(id);
  driver.engine().Cancel(id);
  driver.engine().Cancel(RequestId(77));
  driver.engine().Cancel(RequestId());
  EXPECT_TRUE(driver.Step());
  EXPECT_EQ(driver.events().size(), static_cast<size_t>(GetParam().choices));
  for (int choice = 0; choice < GetParam().choices; ++choice) {
    const Output& output = driver.of(id, choice);
    EXPECT_EQ(output.ends, 1);
    EXPECT_EQ(output.end.finish, FinishReason::kCancelled);
    EXPECT_TRUE(output.end.error.ok());
    EXPECT_EQ(output.end.token, -1);
    EXPECT_EQ(output.end.prompt_tokens, 100);
  }
  EXPECT_TRUE(driver.engine().idle());
  driver.ExpectAllFree();
  driver.engine().Cancel(id);
  EXPECT_FALSE(driver.Step());
}

INSTANTIATE_TEST_SUITE_P(Engine, CancelTest,
                         testing::Values(CancelCase{"Queue", 0, 1}, CancelCase{"Prefill", 3, 1},
                                         CancelCase{"Decode", 20, 1}, CancelCase{"QueueChoices", 0, 4},
                                         CancelCase{"BeforeFork", 3, 4}, CancelCase{"AfterFork", 12, 4}),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(ScheduleTest, CancelLeavesOthersAlone) {
  EngineOptions options = TestOptions();
  options.deterministic = true;
  options.max_running = 3;
  const auto run = [&](bool cancel) {
    Driver driver(options);
    std::vector<RequestId> ids;
    for (int i = 0; i < 6; ++i) ids.push_back(driver.Submit(RandomTokens(40, 10 + i), Greedy(20)));
    for (int step = 0; step < 8; ++step) driver.Step();
    if (cancel) {
      driver.engine().Cancel(ids[1]);
      driver.engine().Cancel(ids[4]);
    }
    driver.Run();
    std::vector<Tokens> tokens;
    for (const int kept : {0, 2, 3, 5}) tokens.push_back(driver.of(ids[kept]).tokens);
    driver.ExpectAllFree();
    return tokens;
  };
  EXPECT_EQ(run(true), run(false));
}

TEST(ScheduleTest, DomainsTakeTurns) {
  EngineOptions options = TestOptions();
  options.max_running = 4;
  Driver driver(options);
  const DomainId flood(1), guest(2);
  const Tokens prompt = RandomTokens(60, 9);
  for (int i = 0; i < 50; ++i) driver.Submit(i == 0 ? prompt : RandomTokens(60, 100 + i), Greedy(10), flood);
  for (int step = 0; step < 12; ++step) driver.Step();
  const RequestId first = driver.Submit(prompt, Greedy(10), guest);
  const RequestId second = driver.Submit(RandomTokens(60, 101), Greedy(10), guest);
  const int64_t before = driver.engine().stats().prompt_tokens / 60;
  driver.Run();
  std::vector<std::pair<double, RequestId>> started;
  for (const auto& [key, output] : driver.outputs()) started.push_back({output.end.times.started_s, key.first});
  std::ranges::sort(started);
  const auto rank = [&](RequestId id) {
    return std::ranges::find(started, id, &std::pair<double, RequestId>::second) - started.begin();
  };
  EXPECT_LE(rank(first), before + 1);
  EXPECT_LE(rank(second), before + 4);
  EXPECT_EQ(driver.of(first).end.cached_tokens, 0);
  EXPECT_EQ(driver.of(second).end.cached_tokens, 0);
  driver.ExpectAllFree();
}

// What a domain was given while the other was away is not held against it, and idleness is not saved up.
TEST(ScheduleTest, TurnsStartFromThePresent) {
  EngineOptions options = TestOptions();
  options.max_running = 1;
  Driver driver(options);
  const DomainId a(1), b(2);
  const auto order = [&] {
    std::string domains;
    std::map<RequestId, char> names;
    for (int i = 0; i < 4; ++i) names[driver.Submit(RandomTokens(20, 40 + i), Greedy(5), a)] = 'a';
    for (int i = 0; i < 4; ++i) names[driver.Submit(RandomTokens(20, 50 + i), Greedy(5), b)] = 'b';
    while (driver.Step()) {
      for (const Event& event : driver.events()) {
        if (event.finish != FinishReason::kNone) domains += names[event.request];
      }
    }
    return domains;
  };
  for (int i = 0; i < 20; ++i) driver.Submit(RandomTokens(20, 60 + i), Greedy(5), a);
  driver.Run();
  for (int round = 0; round < 2; ++round) {
    const std::string domains = order();
    EXPECT_EQ(domains.size(), 8u);
    EXPECT_EQ(domains.find("aaa"), std::string::npos) << domains;
    EXPECT_EQ(domains.find("bbb"), std::string::npos) << domains;
    for (int i = 0; i < 20; ++i) driver.Submit(RandomTokens(20, 80 + i), Greedy(5), b);
    driver.Run();
  }
}

TEST(ScheduleTest, LongPromptsLeaveDecodingItsRows) {
  for (const int step_tokens : {1, 3, 8, 40}) {
    EngineOptions options = TestOptions();
    options.max_running = 8;
    options.step_tokens = step_tokens;
    options.prefix_cache = false;
    Driver driver(options);
    const size_t token_bytes = driver.engine().cache().shape().logical_token_bytes();
    size_t before = 0;
    const auto step = [&] {
      driver.Step();
      const size_t after = driver.engine().kv_stats().logical_bytes;
      const auto rows = static_cast<int>((after - before) / token_bytes);
      before = after;
      EXPECT_GE(rows, 1);
      EXPECT_LE(rows, std::max(step_tokens, driver.engine().stats().running));
    };
    std::set<RequestId> decoding;
    for (int i = 0; i < 5; ++i) decoding.insert(driver.Submit(RandomTokens(10, 30 + i), Greedy(400)));
    const auto all_decode = [&] {
      return std::ranges::all_of(decoding, [&](RequestId id) { return !driver.of(id).tokens.empty(); });
    };
    while (!all_decode()) step();
    const RequestId first = driver.Submit(RandomTokens(150, 40), Greedy(5));
    const RequestId second = driver.Submit(RandomTokens(60, 41), Greedy(5));
    int steps = 0;
    while (driver.of(first).tokens.empty()) {
      step();
      ++steps;
      std::set<RequestId> moved;
      for (const Event& event : driver.events()) moved.insert(event.request);
      EXPECT_TRUE(std::ranges::includes(moved, decoding));
    }
    EXPECT_TRUE(driver.of(second).tokens.empty()) << "the older prompt comes first";
    EXPECT_GE(steps, 150 / std::max(1, step_tokens));
    EXPECT_LE(steps, 150 / std::max(1, step_tokens - 5) + 2);
  }
}

// Decodes a crowd of one domain beside one request of another in room for a part of it; preemptions by domain.
std::map<DomainId, int> Preempted(Driver& driver, const std::map<RequestId, DomainId>& domains) {
  std::map<DomainId, int> preempted;
  const auto of_domain = [&](DomainId domain) { return driver.engine().domain_stats()[domain]; };
  std::map<DomainId, int> waiting;
  for (const auto& [id, domain] : domains) waiting[domain] = of_domain(domain).waiting;
  while (driver.Step()) {
    for (auto& [domain, before] : waiting) {
      const int now = of_domain(domain).waiting;
      preempted[domain] += std::max(0, now - before);
      before = now;
    }
  }
  return preempted;
}

TEST(ScheduleTest, WhoHoldsMostGivesWay) {
  for (const bool guest_is_oldest : {false, true}) {
    EngineOptions options = TestOptions();
    options.kv_bytes = size_t{2} << 20;
    options.prefix_cache = false;
    Driver driver(options);
    const DomainId crowd(1), guest(2);
    std::map<RequestId, DomainId> domains;
    const auto submit_guest = [&] {
      domains.emplace(driver.Submit(RandomTokens(60, 999), Greedy(300), guest), guest);
      driver.Step();
    };
    if (guest_is_oldest) submit_guest();
    for (int i = 0; i < 6; ++i) {
      domains.emplace(driver.Submit(RandomTokens(60, 100 + i), Greedy(400), crowd), crowd);
      driver.Step();
    }
    if (!guest_is_oldest) submit_guest();
    const std::map<DomainId, int> preempted = Preempted(driver, domains);
    EXPECT_GT(preempted.at(crowd), 0);
    EXPECT_EQ(preempted.at(guest), 0) << "the youngest of all, but not of those who hold most";
    for (const auto& [id, domain] : domains) EXPECT_EQ(driver.of(id).end.finish, FinishReason::kLength);
    driver.ExpectAllFree();
  }
}

// It holds more than its share all the time and is preempted for it, but it ends while small ones keep coming.
TEST(ScheduleTest, WhoHoldsMostEndsToo) {
  EngineOptions options = TestOptions();
  options.kv_bytes = size_t{2} << 20;
  options.prefix_cache = false;
  Driver driver(options);
  const DomainId large(1), small(2);
  uint64_t seed = 0;
  const auto submit_small = [&] { return driver.Submit(RandomTokens(40, 100 + seed++), Greedy(150), small); };
  std::vector<RequestId> smalls;
  for (int i = 0; i < 6; ++i) smalls.push_back(submit_small());
  driver.Step();
  const RequestId id = driver.Submit(RandomTokens(600, 1), Greedy(200), large);
  int steps = 0;
  while (driver.of(id).ends == 0 && steps < 20000) {
    driver.Step();
    ++steps;
    for (const Event& event : driver.events()) {
      if (event.finish != FinishReason::kNone && event.request != id) smalls.push_back(submit_small());
    }
  }
  EXPECT_EQ(driver.of(id).end.finish, FinishReason::kLength) << steps;
  EXPECT_GT(driver.engine().stats().preemptions, 0);
  driver.Run();
  for (const RequestId other : smalls) EXPECT_EQ(driver.of(other).end.finish, FinishReason::kLength);
  driver.ExpectAllFree();
}

// Rows lie in 16 bit until they are encoded: a whole step's would often not fit beside what runs, where a few rows' do.
TEST(ScheduleTest, EncodedPromptsTakeSmallStepsBeforeTheyArePreempted) {
  constexpr int kRequests = 16;
  EngineOptions options = TestOptions();
  options.kv_type = {{.type = {codec::Codec::kQ8, codec::Codec::kQ8}}};
  options.fusion.policy = joint::Policy::kOff;
  options.kv_bytes = size_t{3000} << 10;  // of two thirds of them
  Driver driver(options);
  std::vector<RequestId> ids;
  for (int i = 0; i < kRequests; ++i) ids.push_back(driver.Submit(RandomTokens(900, i), Greedy(20)));
  driver.Run();
  for (const RequestId id : ids) EXPECT_EQ(driver.of(id).end.finish, FinishReason::kLength);
  EXPECT_LT(driver.engine().stats().preemptions, 3 * kRequests);  // 79 with whole steps
  driver.ExpectAllFree();
}

TEST(KeptShareTest, FollowsWhatFusionLeaves) {
  KeptShare share(100);
  EXPECT_DOUBLE_EQ(share.value(), 1);
  share.Add(0, 0);
  EXPECT_DOUBLE_EQ(share.value(), 1);
  // 100 blocks from before count half.
  share.Add(100, 100);
  EXPECT_DOUBLE_EQ(share.value(), 50.0 / 150);
  for (int i = 0; i < 20; ++i) share.Add(100, 75);
  EXPECT_NEAR(share.value(), 0.25, 1e-4);
  for (int i = 0; i < 20; ++i) share.Add(10, 0);
  EXPECT_GT(share.value(), 0.75);
  // Blocks that were offered earlier.
  share.Add(0, 1000);
  EXPECT_DOUBLE_EQ(share.value(), 0);
}

class AdmissionTest : public testing::Test {
 protected:
  static constexpr int kRequests = 56;
  static constexpr int kPrivate = 32;  // more than fit on their own
  static constexpr int kFew = 10;
  static constexpr size_t kKvBytes = size_t{32} << 20;  // 32,768 tokens
  static constexpr TokenId kNewLine = 3 + '\n';

  static EngineOptions Options(joint::Policy policy) {
    EngineOptions options = TestOptions();
    options.kv_bytes = kKvBytes;
    options.step_tokens = 4096;
    options.fusion.policy = policy;
    options.fusion.budget = 1;  // random weights: equal text differs more than in a trained model
    return options;
  }

  static Tokens Lines(uint64_t seed, int lines) {
    Tokens tokens;
    for (int line = 0; line < lines; ++line) {
      for (const TokenId token : RandomTokens(23, 100 * seed + static_cast<uint64_t>(line))) {
        tokens.push_back(300 + token % 600);
      }
      tokens.push_back(kNewLine);
    }
    return tokens;
  }

  // Fills the statistics that fusion waits for.
  static void Warm(Driver& driver) {
    driver.set_check_integrity(false);  // a store of this size takes long to check
    for (uint64_t i = 0; i < 60; ++i) driver.Submit(Lines(5000 + i, 4), Greedy(1), DomainId(99));
    driver.Run();
    driver.engine().DropPrefixCache();
  }

  // Most that ran at once of so many prompts of 50 lines, all with the same 47 but for a head of their own.
  static int RunningPeak(Driver& driver, bool kv_fusion, uint64_t seed, uint64_t requests) {
    const Tokens shared = Lines(1, 47);
    for (uint64_t i = 0; i < requests; ++i) {
      Request request;
      request.prompt = Lines(seed + i, 3);
      request.prompt.insert(request.prompt.end(), shared.begin(), shared.end());
      request.sampling = Greedy(28);
      request.kv_fusion = kv_fusion;
      EXPECT_TRUE(driver.engine().Submit(std::move(request)).ok());
    }
    int peak = 0;
    while (driver.Step()) peak = std::max(peak, driver.engine().stats().running);
    return peak;
  }
};

TEST_F(AdmissionTest, CountsOnWhatFusionFrees) {
  Driver off(Options(joint::Policy::kOff));
  off.set_check_integrity(false);
  const int private_peak = RunningPeak(off, true, 100, kPrivate);
  EXPECT_LT(private_peak, kPrivate);
  // Slabs that other classes hold are not counted, so a store filled to the brim preempts a few.
  EXPECT_LE(off.engine().stats().preemptions, kFew);

  Driver on(Options(joint::Policy::kBounded));
  Warm(on);
  EXPECT_GE(RunningPeak(on, true, 200, kRequests), private_peak * 3 / 2);
  EXPECT_EQ(on.engine().stats().preemptions, 0);
  // Requests that opt out keep all.
  EXPECT_LE(RunningPeak(on, false, 300, kPrivate), private_peak);
  EXPECT_LE(on.engine().stats().preemptions, kFew);
  on.engine().set_fusion(false);
  EXPECT_LE(RunningPeak(on, true, 400, kPrivate), private_peak);
  EXPECT_LE(on.engine().stats().preemptions, 2 * kFew);
  on.ExpectAllFree();
}

// A crowd that shares nothing comes after one that shared much: some are preempted until admission knows, all end.
TEST_F(AdmissionTest, LearnsThatFusionFreesNothingAnyMore) {
  Driver driver(Options(joint::Policy::kBounded));
  Warm(driver);
  RunningPeak(driver, true, 200, kRequests);
  std::vector<RequestId> ids;
  for (uint64_t i = 0; i < kPrivate; ++i) ids.push_back(driver.Submit(Lines(1000 + i, 50), Greedy(28)));
  driver.Run();
  for (const RequestId id : ids) EXPECT_EQ(driver.of(id).end.finish, FinishReason::kLength);
  EXPECT_LE(driver.engine().stats().preemptions, kFew);
  driver.ExpectAllFree();
}

}  // namespace
}  // namespace jointkv::engine
