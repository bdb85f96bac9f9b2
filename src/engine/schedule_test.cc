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

}  // namespace
}  // namespace jointkv::engine
