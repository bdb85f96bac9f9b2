// Constrained output through the engine: it is in the grammar whatever the model, the sampling and the load.
#include "text/grammar.h"

#include "engine/engine.h"
#include "engine/test_engine.h"
#include "json.h"

namespace jointkv::engine {
namespace {

constexpr char kSchema[] =
    R"({"type":"object","properties":{"name":{"type":"string","maxLength":8},"age":{"type":"integer","minimum":0,
        "maximum":150},"tags":{"type":"array","items":{"enum":["a","b"]},"maxItems":3}},
        "required":["name","age","tags"],"additionalProperties":false})";

RequestId SubmitJson(Driver& driver, Tokens prompt, const SamplingParams& sampling, const char* schema = kSchema) {
  Request request;
  request.prompt = std::move(prompt);
  request.sampling = sampling;
  auto grammar = text::Grammar::FromJsonSchema(driver.engine().tokenizer(), schema);
  EXPECT_TRUE(grammar.ok()) << grammar.status().ToString();
  request.grammar = *grammar;
  const auto id = driver.engine().Submit(std::move(request));
  EXPECT_TRUE(id.ok()) << id.status().ToString();
  return *id;
}

void ExpectPerson(const Output& output) {
  EXPECT_EQ(output.ends, 1);
  ASSERT_EQ(output.end.finish, FinishReason::kStop) << output.end.error.ToString() << output.text;
  const common_json json = common_json::parse_no_throw(output.text);
  ASSERT_FALSE(json.is_discarded()) << output.text;
  EXPECT_EQ(json.size(), 3u);
  EXPECT_TRUE(json.at("name").is_string());
  EXPECT_GE(json.at("age").get<int>(), 0);
  EXPECT_LE(json.at("age").get<int>(), 150);
  EXPECT_LE(json.at("tags").size(), 3u);
}

SamplingParams Sampled(int n, uint64_t seed) {
  SamplingParams params = Seeded(600, seed);
  params.n = n;
  params.ignore_eos = seed % 2 == 0;
  if (seed % 3 == 0) params.top_p = 0.8f;
  if (seed % 3 == 1) params.temperature = 2.5f;
  return params;
}

TEST(EngineGrammar, RandomModelsWriteWhatTheSchemaSays) {
  Driver driver(TestOptions());
  std::vector<RequestId> ids;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    ids.push_back(SubmitJson(driver, RandomTokens(20, seed), Sampled(seed == 5 ? 4 : 1, seed)));
  }
  SamplingParams greedy = Greedy(600);
  greedy.repetition_penalty = 1.3f;  // else it may say the same for ever
  greedy.logprobs = 2;
  ids.push_back(SubmitJson(driver, RandomTokens(20, 99), greedy));
  const RequestId free = driver.Submit(RandomTokens(20, 7), Seeded(50, 7));
  driver.Run();
  for (const auto& [key, output] : driver.outputs()) {
    if (key.first == free) {
      EXPECT_EQ(output.end.finish, FinishReason::kLength);
    } else {
      ExpectPerson(output);
    }
  }
  // Raw logprobs: the model's own distribution, in which forced characters are unlikely.
  for (const SampledLogprobs& logprobs : driver.of(ids.back()).logprobs) {
    ASSERT_EQ(logprobs.top.size(), 2u);
    EXPECT_LE(logprobs.chosen, logprobs.top[0].logprob);
  }
  driver.ExpectAllFree();
}

TEST(EngineGrammar, SameSeedSameTextAlsoWhenPreempted) {
  const auto run = [](size_t kv_bytes, int others) {
    EngineOptions options = TestOptions();
    options.deterministic = true;
    options.kv_bytes = kv_bytes;
    Driver driver(options);
    for (int i = 0; i < others; ++i) driver.Submit(RandomTokens(150, 1000 + static_cast<uint64_t>(i)), Seeded(400, 5));
    const RequestId id = SubmitJson(driver, RandomTokens(40, 3), Sampled(3, 11));
    driver.Run();
    Tokens all;
    for (int choice = 0; choice < 3; ++choice) {
      ExpectPerson(driver.of(id, choice));
      const Tokens& tokens = driver.of(id, choice).tokens;
      all.insert(all.end(), tokens.begin(), tokens.end());
    }
    return std::pair(all, driver.engine().stats().preemptions);
  };
  const auto [alone, none] = run(size_t{64} << 20, 0);
  const auto [crowded, preemptions] = run(size_t{1} << 20, 4);
  EXPECT_EQ(none, 0);
  EXPECT_GT(preemptions, 0) << "the store was not small enough";
  EXPECT_EQ(alone, crowded);
}

TEST(EngineGrammar, EndsWhenCompleteOrAtTheLimit) {
  Driver driver(TestOptions());
  SamplingParams sampling = Greedy(100);
  sampling.min_tokens = 50;
  Request request;
  request.prompt = RandomTokens(5, 1);
  request.sampling = sampling;
  request.grammar = *text::Grammar::FromGbnf(driver.engine().tokenizer(), "root ::= \"yes\"");
  const RequestId complete = *driver.engine().Submit(std::move(request));
  const RequestId cut = SubmitJson(driver, RandomTokens(5, 1), Greedy(3));
  driver.Run();
  EXPECT_EQ(driver.of(complete).text, "yes");
  EXPECT_EQ(driver.of(complete).end.finish, FinishReason::kStop);
  EXPECT_EQ(driver.of(cut).end.finish, FinishReason::kLength);

  Request dead;
  dead.prompt = RandomTokens(5, 1);
  dead.grammar = *text::Grammar::FromGbnf(driver.engine().tokenizer(), "root ::= \"a\"");
  dead.sampling = Greedy(5);
  dead.sampling.logit_bias = {};
  dead.forced = {3};
  EXPECT_EQ(driver.engine().Submit(std::move(dead)).status().code(), StatusCode::kInvalidArgument);
}

TEST(EngineGrammar, AmbiguousGrammarsEndTheirRequestOnly) {
  Driver driver(TestOptions());
  Request request;
  request.prompt = RandomTokens(5, 1);
  request.sampling = Seeded(1500, 1);
  request.grammar = *text::Grammar::FromGbnf(
      driver.engine().tokenizer(),
      "root ::= \"[\" root \"]\" | \"[\" root root \"]\" | \"[\" root root root \"]\" | \"[\" root \"a\"");
  const RequestId hostile = *driver.engine().Submit(std::move(request));
  const RequestId other = SubmitJson(driver, RandomTokens(20, 2), Sampled(1, 2));
  driver.Run();
  EXPECT_NE(driver.of(hostile).end.finish, FinishReason::kStop);
  ExpectPerson(driver.of(other));
  driver.ExpectAllFree();
}

TEST(EngineGrammar, DefaultModelWritesJson) {
  SKIP_WITHOUT_MODEL();
  EngineOptions options = TestOptions();
  options.model_path = DefaultModelPath();
  Driver driver(options);
  const auto prompt = driver.engine().tokenizer().Encode("A person as JSON: ", true, false);
  ASSERT_TRUE(prompt.ok());
  SamplingParams greedy = Greedy(200);
  greedy.ignore_eos = false;
  const RequestId id = SubmitJson(driver, *prompt, greedy);
  SamplingParams sampled = Seeded(300, 4);
  sampled.n = 3;
  const RequestId several = SubmitJson(driver, *prompt, sampled);
  driver.Run();
  ExpectPerson(driver.of(id));
  for (int choice = 0; choice < 3; ++choice) ExpectPerson(driver.of(several, choice));
}

}  // namespace
}  // namespace jointkv::engine
