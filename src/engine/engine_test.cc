// Life of requests: what comes out, how it ends, cancel, limits, turns.
#include "engine/engine.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <set>

#include "engine/test_engine.h"

namespace jointkv::engine {
namespace {

Tokens Encode(const Engine& engine, const std::string& text) {
  auto tokens = engine.tokenizer().Encode(text, /*add_special=*/true, /*parse_special=*/true);
  EXPECT_TRUE(tokens.ok());
  return *tokens;
}

// Greedy decoding without an engine: the whole prompt in one step, then token by token.
Tokens PlainGreedy(const Engine& engine, const Tokens& prompt, int n) {
  const EngineOptions& options = engine.options();
  auto file = gguf::GgufFile::Open(options.model_path);
  CHECK(file.ok());
  ThreadPool pool(options.threads);
  models::ModelOptions model_options;
  model_options.max_rows = static_cast<int>(prompt.size());
  model_options.deterministic = options.deterministic;
  auto model = models::Model::Load(*file, model_options, pool);
  CHECK(model.ok());
  // Blocks end where the engine's do: keys are rounded after their rotation by the offset in the block.
  auto cache = kv::KvCache::Create(engine.cache().shape(), engine.cache().cutter(), {options.kv_bytes, false});
  CHECK(cache.ok());
  (*model)->Bind(**cache);
  (*model)->EnsurePositions(static_cast<int>(prompt.size()) + n);
  const SequenceId sequence = (*cache)->Create(DomainId(0), static_cast<int>(prompt.size()) + n);
  std::vector<float> logits((*model)->n_vocab());
  Tokens next = prompt;
  Tokens out;
  int position = 0;
  while (static_cast<int>(out.size()) < n) {
    CHECK((*cache)->Append(sequence, next));
    const int rows = static_cast<int>(next.size());
    const attention::RowSpan span = {sequence, 0, rows, position};
    const int last = rows - 1;
    (*model)->Forward({next, {&span, 1}, {&last, 1}}, **cache, logits.data());
    (*cache)->Commit(sequence);
    position += rows;
    next = {static_cast<TokenId>(std::ranges::max_element(logits) - logits.begin())};
    out.push_back(next[0]);
  }
  return out;
}

// One engine with the default model for all of these tests.
class DefaultModelTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (std::filesystem::exists(DefaultModelPath())) driver_ = new Driver(Options());
  }
  static void TearDownTestSuite() {
    delete driver_;
    driver_ = nullptr;
  }
  void SetUp() override {
    SKIP_WITHOUT_MODEL();
  }

  static EngineOptions Options() {
    EngineOptions options;
    options.model_path = DefaultModelPath();
    options.threads = 2;
    options.kv_bytes = size_t{128} << 20;
    options.deterministic = true;
    return options;
  }
  static Output Complete(const std::string& prompt, const SamplingParams& sampling) {
    const RequestId id = driver_->Submit(Encode(driver_->engine(), prompt), sampling);
    driver_->Run();
    EXPECT_EQ(driver_->of(id).ends, 1);
    return driver_->of(id);
  }

  static Driver* driver_;
};
Driver* DefaultModelTest::driver_ = nullptr;

constexpr const char* kQuestion = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n";

TEST_F(DefaultModelTest, GreedyIsThePlainLoop) {
  const std::string prompt = "The capital of France is";
  const Output output = Complete(prompt, Greedy(24));
  EXPECT_EQ(output.tokens, PlainGreedy(driver_->engine(), Encode(driver_->engine(), prompt), 24));
  EXPECT_NE(output.text.find("Paris"), std::string::npos) << output.text;
  EXPECT_EQ(output.end.finish, FinishReason::kLength);
  EXPECT_EQ(output.text, driver_->engine().tokenizer().Decode(output.tokens, /*with_special=*/false));
}

TEST_F(DefaultModelTest, EndsAtEndOfText) {
  SamplingParams params = Greedy(100);
  params.ignore_eos = false;
  const Output output = Complete(kQuestion, params);
  ASSERT_EQ(output.end.finish, FinishReason::kStop);
  EXPECT_TRUE(driver_->engine().tokenizer().IsEndOfGeneration(output.tokens.back()));
  EXPECT_EQ(output.text.find("<|"), std::string::npos);
  EXPECT_EQ(output.end.prompt_tokens, static_cast<int>(Encode(driver_->engine(), kQuestion).size()));
  const RequestTimes& times = output.end.times;
  EXPECT_LE(times.submitted_s, times.started_s);
  EXPECT_LE(times.started_s, times.first_token_s);
  EXPECT_LE(times.first_token_s, times.finished_s);

  const int length = static_cast<int>(output.tokens.size());
  params.min_tokens = length + 5;
  const Output longer = Complete(kQuestion, params);
  EXPECT_GE(static_cast<int>(longer.tokens.size()), params.min_tokens);
  EXPECT_TRUE(std::equal(output.tokens.begin(), output.tokens.end() - 1, longer.tokens.begin()));

  params = Greedy(length + 10);
  const Output ignored = Complete(kQuestion, params);
  EXPECT_EQ(ignored.end.finish, FinishReason::kLength);
  EXPECT_EQ(static_cast<int>(ignored.tokens.size()), length + 10);
  EXPECT_TRUE(std::equal(output.tokens.begin(), output.tokens.end(), ignored.tokens.begin()));
}

TEST_F(DefaultModelTest, StopStringsAcrossTokens) {
  const std::string prompt = "Once upon a time";
  const Output free = Complete(prompt, Greedy(32));
  // The end of one token and the start of the next.
  const text::Tokenizer& tokenizer = driver_->engine().tokenizer();
  const std::string head = tokenizer.Decode({free.tokens.begin(), free.tokens.begin() + 10}, false);
  const std::string stop = free.text.substr(head.size() - 2, 4);
  const size_t at = free.text.find(stop);
  SamplingParams params = Greedy(32);
  params.stop = {"never in the text", stop};
  const Output stopped = Complete(prompt, params);
  EXPECT_EQ(stopped.end.finish, FinishReason::kStop);
  EXPECT_EQ(stopped.text, free.text.substr(0, at));
  EXPECT_LE(stopped.tokens.size(), 12u);

  // What might have become a stop string comes out when it does not.
  params.stop = {free.text.substr(free.text.size() - 3) + "and more"};
  const Output held = Complete(prompt, params);
  EXPECT_EQ(held.end.finish, FinishReason::kLength);
  EXPECT_EQ(held.text, free.text);

  params.stop.clear();
  params.stop_tokens = {free.tokens[7]};
  const Output by_token = Complete(prompt, params);
  const auto first = std::ranges::find(free.tokens, free.tokens[7]) - free.tokens.begin();
  EXPECT_EQ(by_token.end.finish, FinishReason::kStop);
  EXPECT_EQ(by_token.tokens, Tokens(free.tokens.begin(), free.tokens.begin() + first + 1));
  EXPECT_EQ(by_token.text, tokenizer.Decode({free.tokens.begin(), free.tokens.begin() + first}, false));
}

TEST_F(DefaultModelTest, Logprobs) {
  SamplingParams params = Greedy(8);
  params.logprobs = 5;
  const Output output = Complete("Water boils at", params);
  ASSERT_EQ(output.logprobs.size(), 8u);
  for (size_t i = 0; i < output.logprobs.size(); ++i) {
    const SampledLogprobs& row = output.logprobs[i];
    ASSERT_EQ(row.top.size(), 5u);
    EXPECT_EQ(row.top[0].token, output.tokens[i]);
    EXPECT_EQ(row.top[0].logprob, row.chosen);
    double sum = 0;
    for (size_t k = 0; k < row.top.size(); ++k) {
      EXPECT_LE(row.top[k].logprob, row.top[k == 0 ? 0 : k - 1].logprob);
      sum += std::exp(row.top[k].logprob);
    }
    EXPECT_GT(sum, 0.1);
    EXPECT_LE(sum, 1 + 1e-4);
  }
  EXPECT_TRUE(Complete("Water boils at", Greedy(2)).logprobs[0].top.empty());
}

// Hot sampling draws bytes of all kinds; Driver checks each event.
TEST_F(DefaultModelTest, NeverHalfACharacter) {
  SamplingParams params = Seeded(24, 3);
  params.temperature = 20;
  params.n = 12;
  const RequestId id = driver_->Submit(Encode(driver_->engine(), "日本語のテキスト: "), params);
  driver_->Run();
  int multibyte = 0;
  for (int choice = 0; choice < params.n; ++choice) {
    const Output& output = driver_->of(id, choice);
    EXPECT_EQ(output.text, text::SanitizeUtf8(driver_->engine().tokenizer().Decode(output.tokens, false)));
    multibyte += std::ranges::any_of(output.text, [](char c) { return static_cast<unsigned char>(c) >= 0x80; });
  }
  EXPECT_GT(multibyte, 2);
}

TEST(EngineTest, GreedyIsThePlainLoop) {
  for (const char* model : {"llama", "llama-q4_1", "gemma3"}) {
    EngineOptions options = TestOptions(model);
    options.deterministic = true;
    options.step_tokens = 32;
    Driver driver(options);
    const Tokens prompt = RandomTokens(75, 1);
    const RequestId id = driver.Submit(prompt, Greedy(30));
    driver.Run();
    EXPECT_EQ(driver.of(id).tokens, PlainGreedy(driver.engine(), prompt, 30)) << model;
    driver.ExpectAllFree();
  }
}

TEST(EngineTest, ChoicesShareThePrompt) {
  EngineOptions options = TestOptions();
  options.prefix_cache = false;
  Driver driver(options);
  const Tokens prompt = RandomTokens(200, 2);
  SamplingParams params = Seeded(20, 7);
  params.n = 4;
  const RequestId id = driver.Submit(prompt, params);
  driver.Step();
  ASSERT_EQ(driver.engine().stats().running, 4);
  std::set<int> first;
  for (const Event& event : driver.events()) first.insert(event.choice);
  EXPECT_EQ(first, (std::set<int>{0, 1, 2, 3}));
  // Still one prompt's bytes for four.
  const kv::KvStats forked = driver.engine().kv_stats();
  EXPECT_EQ(forked.logical_bytes, 4 * prompt.size() * driver.engine().cache().shape().logical_token_bytes());
  EXPECT_LE(forked.running_bytes, driver.engine().cache().MinimumBytes(200 * 3 / 2 + 32));
  driver.Step();
  EXPECT_GE(driver.engine().kv_stats().copies_on_write, 1);
  driver.Run();

  std::set<Tokens> texts;
  for (int choice = 0; choice < 4; ++choice) {
    const Output& output = driver.of(id, choice);
    EXPECT_EQ(output.ends, 1);
    EXPECT_EQ(output.tokens.size(), 20u);
    EXPECT_EQ(output.logits[0], driver.of(id, 0).logits[0]) << "not the same distribution after the prompt";
    texts.insert(output.tokens);
  }
  EXPECT_EQ(texts.size(), 4u);
  driver.ExpectAllFree();

  params.temperature = 0;
  const RequestId greedy = driver.Submit(prompt, params);
  driver.Run();
  for (int choice = 1; choice < 4; ++choice) EXPECT_EQ(driver.of(greedy, choice).tokens, driver.of(greedy, 0).tokens);
}

TEST(EngineTest, SeedsReproduce) {
  EngineOptions options = TestOptions();
  options.deterministic = true;
  Driver driver(options);
  const Tokens prompt = RandomTokens(30, 3);
  SamplingParams params = Seeded(24, 11);
  params.n = 3;
  params.repetition_penalty = 1.2f;
  const RequestId a = driver.Submit(prompt, params);
  const RequestId b = driver.Submit(prompt, params);
  params.seed = 12;
  const RequestId other = driver.Submit(prompt, params);
  driver.Run();
  for (int choice = 0; choice < 3; ++choice) {
    EXPECT_EQ(driver.of(a, choice).tokens, driver.of(b, choice).tokens);
    EXPECT_NE(driver.of(a, choice).tokens, driver.of(other, choice).tokens);
  }
}

TEST(EngineTest, CachedPromptTokens) {
  Driver driver(TestOptions());
  const Tokens prompt = RandomTokens(100, 4);
  const RequestId cold = driver.Submit(prompt, Greedy(4));
  driver.Run();
  const RequestId warm = driver.Submit(prompt, Greedy(4));
  driver.Run();
  const RequestId stranger = driver.Submit(prompt, Greedy(4), DomainId(1));
  driver.Run();
  EXPECT_EQ(driver.of(cold).end.cached_tokens, 0);
  EXPECT_GE(driver.of(warm).end.cached_tokens, 100 - 32 - 1);
  EXPECT_EQ(driver.of(stranger).end.cached_tokens, 0);
  EXPECT_EQ(driver.engine().stats().prefix_cached_tokens, driver.of(warm).end.cached_tokens);
  EXPECT_EQ(driver.engine().stats().prompt_tokens, 300);
  EXPECT_EQ(driver.engine().stats().output_tokens, 12);
  driver.ExpectAllFree();
}

TEST(EngineTest, IdleStepsDoNothing) {
  Driver driver(TestOptions());
  EXPECT_TRUE(driver.engine().idle());
  EXPECT_FALSE(driver.Step());
  driver.engine().Cancel(RequestId(3));
  EXPECT_FALSE(driver.Step());
}

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

TEST(EngineTest, CancelLeavesOthersAlone) {
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

TEST(EngineTest, RejectsBadRequests) {
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
      {"logit_bias", [](SamplingParams& p) { p.logit_bias = {{1000, 1.0f}}; }},
      {"logit_bias", [](SamplingParams& p) { p.logit_bias = {{1, 101.0f}}; }},
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

TEST(EngineTest, RejectsBadOptions) {
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
  EXPECT_EQ(code([](EngineOptions& o) { o.model_path += ".none"; }), StatusCode::kNotFound);
}

TEST(EngineTest, ContextCutsMaxTokens) {
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

TEST(EngineTest, WhatCanNeverFit) {
  EngineOptions options = TestOptions();
  options.kv_bytes = size_t{256} << 10;
  Driver driver(options);
  const size_t capacity = driver.engine().kv_stats().capacity_bytes;
  int longest = 1;
  while (driver.engine().cache().MinimumBytes(longest + 1) <= capacity) ++longest;
  ASSERT_LT(longest + 1, driver.engine().max_context());
  const Status status = driver.SubmitStatus(RandomTokens(50, 1), Greedy(longest - 50 + 1));
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_NE(status.message().find("KiB"), std::string::npos) << status.message();

  // The least it could take fits, but real blocks have slack: it ends when it stands alone and is full, the others live.
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

// A prompt of several choices that fills the store before they fork ends all of them.
TEST(EngineTest, ErrorBeforeTheFork) {
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

TEST(EngineTest, DomainsTakeTurns) {
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
TEST(EngineTest, TurnsStartFromThePresent) {
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

TEST(EngineTest, LongPromptsLeaveDecodingItsRows) {
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
