// What comes out of requests, and how it ends.
#include "engine/engine.h"

#include <algorithm>
#include <cmath>
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
  void SetUp() override { SKIP_WITHOUT_MODEL(); }

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
  params.n = 48;  // what is drawn differs from processor to processor
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

}  // namespace
}  // namespace jointkv::engine
