// What is refused, what is cut, and what ends when the store is full.
#include <functional>
#include <limits>

#include "engine/engine.h"
#include "engine/test_engine.h"

namespace jointkv::engine {
namespace {

TEST(LimitsTest, RejectsBadRequests) {
  EngineOptions options = TestOptions();
  options.max_running = 4;
  options.max_context = 300;
  Driver driver(options);
  const auto expect = [&](StatusCode code, const char* names, const Tokens& prompt, const SamplingParams& params) {
    const Status status = driver.SubmitStatus(prompt, params);
    EXPECT_EQ(status.code(), code) << names;
    EXPECT_NE(status.message().find(names), std::string::npos) << status.message();
  };
  expect(StatusCode::kInvalidArgument, "prompt", {}, {});
  expect(StatusCode::kOutOfRange, "1000", {1, 1000}, {});
  expect(StatusCode::kOutOfRange, "-1", {-1}, {});
  expect(StatusCode::kOutOfRange, "300", RandomTokens(300, 1), {});
  const Tokens prompt = {1, 2, 3};
  SamplingParams five;
  five.n = 5;
  expect(StatusCode::kOutOfRange, "max-running 4", prompt, five);

  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<std::pair<const char*, std::function<void(SamplingParams&)>>> bad = {
      {"temperature", [](SamplingParams& p) { p.temperature = -0.1f; }},
      {"temperature", [](SamplingParams& p) { p.temperature = 101; }},
      {"temperature", [&](SamplingParams& p) { p.temperature = nan; }},
      {"top_k", [](SamplingParams& p) { p.top_k = -1; }},
      {"top_p", [](SamplingParams& p) { p.top_p = 0; }},
      {"top_p", [](SamplingParams& p) { p.top_p = 1.01f; }},
      {"top_p", [&](SamplingParams& p) { p.top_p = nan; }},
      {"min_p", [](SamplingParams& p) { p.min_p = -0.1f; }},
      {"min_p", [](SamplingParams& p) { p.min_p = 1.1f; }},
      {"repetition_penalty", [](SamplingParams& p) { p.repetition_penalty = 0; }},
      {"repetition_penalty", [](SamplingParams& p) { p.repetition_penalty = 11; }},
      {"presence_penalty", [](SamplingParams& p) { p.presence_penalty = 2.1f; }},
      {"frequency_penalty", [](SamplingParams& p) { p.frequency_penalty = -2.1f; }},
      {"logit_bias",
       [](SamplingParams& p) {
         p.logit_bias = {{1000, 1.0f}};
       }},
      {"logit_bias",
       [](SamplingParams& p) {
         p.logit_bias = {{1, 101.0f}};
       }},
      {"logit_bias", [](SamplingParams& p) { p.logit_bias.resize(1025); }},
      {"stop", [](SamplingParams& p) { p.stop = {""}; }},
      {"stop", [](SamplingParams& p) { p.stop = {std::string(257, 'x')}; }},
      {"stop", [](SamplingParams& p) { p.stop.assign(17, "x"); }},
      {"stop_tokens", [](SamplingParams& p) { p.stop_tokens = {-1}; }},
      {"stop_tokens", [](SamplingParams& p) { p.stop_tokens = {1000}; }},
      {"stop_tokens", [](SamplingParams& p) { p.stop_tokens.assign(129, 1); }},
      {"max_tokens", [](SamplingParams& p) { p.max_tokens = 0; }},
      {"max_tokens", [](SamplingParams& p) { p.max_tokens = (1 << 20) + 1; }},
      {"min_tokens", [](SamplingParams& p) { p.min_tokens = -1; }},
      {"min_tokens", [](SamplingParams& p) { p.min_tokens = p.max_tokens + 1; }},
      {"n is", [](SamplingParams& p) { p.n = 0; }},
      {"n is", [](SamplingParams& p) { p.n = 129; }},
      {"logprobs", [](SamplingParams& p) { p.logprobs = -2; }},
      {"logprobs", [](SamplingParams& p) { p.logprobs = 21; }},
  };
  for (const auto& [names, change] : bad) {
    SamplingParams params;
    change(params);
    const Status status = driver.SubmitStatus(prompt, params);
    EXPECT_TRUE(status.code() == StatusCode::kInvalidArgument || status.code() == StatusCode::kOutOfRange) << names;
    EXPECT_NE(status.message().find(names), std::string::npos) << status.message();
  }
  EXPECT_TRUE(driver.engine().idle());
}

TEST(LimitsTest, RejectsBadOptions) {
  const auto code = [](const std::function<void(EngineOptions&)>& change) {
    EngineOptions options = TestOptions();
    change(options);
    return Engine::Create(options).status().code();
  };
  EXPECT_EQ(code([](EngineOptions&) {}), StatusCode::kOk);
  EXPECT_EQ(code([](EngineOptions& o) { o.threads = -1; }), StatusCode::kOutOfRange);
  EXPECT_EQ(code([](EngineOptions& o) { o.threads = 1025; }), StatusCode::kOutOfRange);
  EXPECT_EQ(code([](EngineOptions& o) { o.max_running = 0; }), StatusCode::kOutOfRange);
  EXPECT_EQ(code([](EngineOptions& o) { o.max_running = 4097; }), StatusCode::kOutOfRange);
  EXPECT_EQ(code([](EngineOptions& o) { o.step_tokens = 0; }), StatusCode::kOutOfRange);
  EXPECT_EQ(code([](EngineOptions& o) { o.step_tokens = 16385; }), StatusCode::kOutOfRange);
  EXPECT_EQ(code([](EngineOptions& o) { o.max_context = 1 << 30; }), StatusCode::kOutOfRange);
  EXPECT_EQ(code([](EngineOptions& o) { o.max_context = -1; }), StatusCode::kOutOfRange);
  EXPECT_EQ(code([](EngineOptions& o) { o.kv_bytes = 1; }), StatusCode::kInvalidArgument);
  const auto encodes = [](EngineOptions& o) { o.kv_type = {{.type = {codec::Codec::kQ8, codec::Codec::kQ4}}}; };
  EXPECT_EQ(code(encodes), StatusCode::kOk);
  EXPECT_EQ(code([&](EngineOptions& o) {
              encodes(o);
              o.deterministic = true;
            }),
            StatusCode::kUnsupported);
  EXPECT_EQ(code([](EngineOptions& o) { o.model_path += ".none"; }), StatusCode::kNotFound);
}

TEST(LimitsTest, ContextCutsMaxTokens) {
  EngineOptions options = TestOptions();
  options.max_context = 60;
  Driver driver(options);
  const RequestId id = driver.Submit(RandomTokens(50, 6), Greedy(1000));
  const RequestId last = driver.Submit(RandomTokens(59, 6), Greedy(1000));
  driver.Run();
  EXPECT_EQ(driver.of(id).tokens.size(), 10u);
  EXPECT_EQ(driver.of(id).end.finish, FinishReason::kLength);
  EXPECT_EQ(driver.of(last).tokens.size(), 1u);
}

TEST(LimitsTest, WhatCanNeverFit) {
  EngineOptions options = TestOptions();
  options.kv_bytes = size_t{512} << 10;
  Driver driver(options);
  const size_t capacity = driver.engine().kv_stats().capacity_bytes;
  int longest = 1;
  while (driver.engine().cache().MinimumBytes(longest + 1) <= capacity) ++longest;
  ASSERT_LT(longest + 1, driver.engine().max_context());
  const Status status = driver.SubmitStatus(RandomTokens(50, 1), Greedy(longest - 50 + 1));
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_NE(status.message().find("KiB"), std::string::npos) << status.message();

  // The least it could take fits, but real blocks have slack: it ends when it stands alone and is full, the others
  // live.
  for (const int choices : {1, 3}) {
    SamplingParams params = Greedy(longest - 50);
    params.n = choices;
    const RequestId big = driver.Submit(RandomTokens(50, 1), params);
    std::vector<RequestId> small;
    for (int i = 0; i < 5; ++i) small.push_back(driver.Submit(RandomTokens(20, 20 + i), Greedy(30)));
    driver.Run();
    for (int choice = 0; choice < choices; ++choice) {
      const Output& output = driver.of(big, choice);
      EXPECT_EQ(output.ends, 1);
      EXPECT_EQ(output.end.finish, FinishReason::kError);
      EXPECT_EQ(output.end.error.code(), StatusCode::kResourceExhausted);
      EXPECT_NE(output.end.error.message().find("KiB"), std::string::npos) << output.end.error.message();
      EXPECT_GT(output.tokens.size(), 20u);
    }
    for (const RequestId id : small) EXPECT_EQ(driver.of(id).end.finish, FinishReason::kLength);
    driver.ExpectAllFree();
  }
}

// Without fusion the prompt's own blocks are counted, gaps and all.
TEST(LimitsTest, WhatHasTooManyGaps) {
  EngineOptions options = TestOptions();
  options.kv_bytes = size_t{2} << 20;
  options.fusion.policy = joint::Policy::kOff;
  Driver driver(options);
  const size_t capacity = driver.engine().kv_stats().capacity_bytes;
  int longest = 1;
  while (driver.engine().cache().MinimumBytes(longest + 2) <= capacity) ++longest;
  const Tokens prompt = RandomTokens(longest, 8);
  EXPECT_EQ(driver.SubmitStatus(prompt, Greedy(1)).code(), StatusCode::kResourceExhausted);
  const RequestId half = driver.Submit(Tokens(prompt.begin(), prompt.begin() + longest / 2), Greedy(5));
  driver.Run();
  EXPECT_EQ(driver.of(half).end.finish, FinishReason::kLength);
}

// A prompt of several choices that fills the store before they fork ends all of them.
TEST(LimitsTest, ErrorBeforeTheFork) {
  EngineOptions options = TestOptions();
  options.kv_bytes = size_t{256} << 10;
  Driver driver(options);
  int longest = 1;
  while (driver.engine().cache().MinimumBytes(longest + 1) <= driver.engine().kv_stats().capacity_bytes) ++longest;
  SamplingParams params = Greedy(1);
  params.n = 3;
  const RequestId id = driver.Submit(RandomTokens(longest - 1, 8), params);
  driver.Run();
  for (int choice = 0; choice < 3; ++choice) {
    EXPECT_EQ(driver.of(id, choice).ends, 1);
    EXPECT_EQ(driver.of(id, choice).end.finish, FinishReason::kError);
  }
  driver.ExpectAllFree();
}

}  // namespace
}  // namespace jointkv::engine
