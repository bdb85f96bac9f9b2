// Logprobs of prompt tokens, and embeddings.
#include <algorithm>
#include <cmath>
#include <map>
#include <memory>

#include "engine/engine.h"
#include "engine/test_engine.h"
#include "llama.h"

namespace jointkv::engine {
namespace {

RequestId SubmitRequest(Driver& driver, Request request) {
  const auto id = driver.engine().Submit(std::move(request));
  EXPECT_TRUE(id.ok()) << id.status().ToString();
  return id.ok() ? *id : RequestId();
}

Request Scored(Tokens prompt, int k, int max_tokens) {
  Request request;
  request.prompt = std::move(prompt);
  request.prompt_logprobs = k;
  request.sampling = Greedy(max_tokens);
  return request;
}

Request Embedded(Tokens prompt) {
  Request request;
  request.prompt = std::move(prompt);
  request.embed = true;
  request.sampling.max_tokens = 0;
  return request;
}

// All events of the driver's requests, by choice: Driver keeps the last one only.
using Events = std::map<std::pair<RequestId, int>, std::vector<Event>>;

Events RunAll(Driver& driver) {
  Events events;
  while (driver.Step()) {
    for (const Event& event : driver.events()) events[{event.request, event.choice}].push_back(event);
  }
  return events;
}

void ExpectEqual(const std::vector<SampledLogprobs>& a, const std::vector<SampledLogprobs>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].chosen, b[i].chosen) << i;
    ASSERT_EQ(a[i].top.size(), b[i].top.size());
    for (size_t j = 0; j < a[i].top.size(); ++j) {
      EXPECT_EQ(a[i].top[j].token, b[i].top[j].token);
      EXPECT_EQ(a[i].top[j].logprob, b[i].top[j].logprob);
    }
  }
}

EngineOptions Deterministic() {
  EngineOptions options = TestOptions();
  options.deterministic = true;
  return options;
}

// The same tokens, forced one by one as output: their raw logits say what the logprobs are.
std::vector<SampledLogprobs> ByForcing(const Tokens& tokens, int k) {
  Driver driver(Deterministic());
  std::vector<SampledLogprobs> expected(1);
  SamplingScratch scratch(driver.engine().model().n_vocab());
  driver.engine().ObserveLogits([&](RequestId, int, int position, std::span<const float> logits) {
    if (position + 1 == static_cast<int>(tokens.size())) return;
    const TokenId token = tokens[static_cast<size_t>(position) + 1];
    SampledLogprobs& out = expected.emplace_back();
    TokenLogprobs(logits, token, k, scratch, out);
    double sum = 0;
    for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - logits[static_cast<size_t>(token)]);
    EXPECT_NEAR(out.chosen, -std::log(sum), 1e-5);
  });
  Request request;
  request.prompt = {tokens.front()};
  request.forced.assign(tokens.begin() + 1, tokens.end());
  request.sampling = Greedy(static_cast<int>(tokens.size()));
  SubmitRequest(driver, std::move(request));
  driver.Run();
  return expected;
}

TEST(PromptLogprobs, AreThoseOfTheModel) {
  const Tokens tokens = RandomTokens(200, 1);
  const std::vector<SampledLogprobs> expected = ByForcing(tokens, 3);
  ASSERT_EQ(expected.size(), tokens.size());
  for (const int step_tokens : {512, 16, 1}) {
    EngineOptions options = Deterministic();
    options.step_tokens = step_tokens;
    Driver driver(options);
    // The second finds the first one's blocks in the prefix cache, and may not use them.
    for (int round = 0; round < 2; ++round) {
      const RequestId id = SubmitRequest(driver, Scored(tokens, 3, 2));
      Events all = RunAll(driver);
      const std::vector<Event>& events = all[{id, 0}];
      ASSERT_EQ(events.size(), 2u);
      ExpectEqual(events[0].prompt_logprobs, expected);
      EXPECT_TRUE(events[1].prompt_logprobs.empty());
      EXPECT_EQ(events[1].cached_tokens, 0);
    }
    driver.ExpectAllFree();
  }
}

TEST(PromptLogprobs, WithoutOutput) {
  Driver driver(Deterministic());
  const Tokens tokens = RandomTokens(70, 2);
  Request several = Scored(tokens, 0, 0);
  several.sampling.n = 2;
  const RequestId id = SubmitRequest(driver, several);
  const RequestId one = SubmitRequest(driver, Scored({5}, 2, 0));
  Events events = RunAll(driver);
  const std::vector<SampledLogprobs> expected = ByForcing(tokens, 0);
  ASSERT_EQ((events[{id, 0}].size()), 1u);
  ASSERT_EQ((events[{id, 1}].size()), 1u);
  const Event& first = events[{id, 0}][0];
  ExpectEqual(first.prompt_logprobs, expected);
  EXPECT_TRUE((events[{id, 1}][0].prompt_logprobs.empty()));
  EXPECT_EQ(first.finish, FinishReason::kLength);
  EXPECT_EQ(first.token, -1);
  EXPECT_EQ(first.output_tokens, 0);
  EXPECT_EQ((events[{one, 0}][0].prompt_logprobs.size()), 1u);
  driver.ExpectAllFree();
}

// Several at once share the room for logits, beside others that decode; the store is too small for all.
TEST(PromptLogprobs, SurviveCompanyAndPreemption) {
  EngineOptions options = Deterministic();
  options.kv_bytes = size_t{1} << 20;
  Driver driver(options);
  std::vector<Tokens> prompts;
  std::vector<RequestId> ids;
  for (uint64_t i = 0; i < 4; ++i) driver.Submit(RandomTokens(150, 50 + i), Seeded(400, i));
  for (uint64_t i = 0; i < 4; ++i) {
    prompts.push_back(RandomTokens(180, i));
    ids.push_back(SubmitRequest(driver, Scored(prompts.back(), 1, 200)));
  }
  Events events = RunAll(driver);
  EXPECT_GT(driver.engine().stats().preemptions, 0) << "the store was not small enough";
  for (size_t i = 0; i < ids.size(); ++i) {
    ExpectEqual(events[{ids[i], 0}].at(0).prompt_logprobs, ByForcing(prompts[i], 1));
  }
  driver.ExpectAllFree();
}

TEST(PromptOutputs, BadRequestsAreRefused) {
  Driver driver(TestOptions());
  const auto refuse = [&](const Request& request, const char* what) {
    const Status status = driver.engine().Submit(request).status();
    ASSERT_FALSE(status.ok()) << what;
    EXPECT_NE(status.message().find(what), std::string::npos) << status.message();
  };
  Request request = Scored({1, 2}, 21, 1);
  refuse(request, "prompt_logprobs");
  request.prompt_logprobs = -2;
  refuse(request, "prompt_logprobs");
  request.prompt_logprobs = -1;
  request.sampling.max_tokens = 0;
  refuse(request, "max_tokens");
  Request embed = Embedded({1, 2});
  embed.sampling.n = 2;
  refuse(embed, "embed");
  embed = Embedded({1, 2});
  embed.sampling.max_tokens = 1;
  refuse(embed, "embed");
  refuse(Embedded({}), "prompt");
}

// llama.cpp's pooled output on the same file.
std::vector<float> JudgeEmbedding(const std::string& path, Tokens tokens, enum llama_pooling_type pooling) {
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_model_params model_params = llama_model_default_params();
  const std::unique_ptr<llama_model, void (*)(llama_model*)> model(
      llama_model_load_from_file(path.c_str(), model_params), llama_model_free);
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = 512;
  params.n_threads = params.n_threads_batch = 2;
  params.embeddings = true;
  params.pooling_type = pooling;
  params.type_k = params.type_v = GGML_TYPE_F32;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  const std::unique_ptr<llama_context, void (*)(llama_context*)> context(llama_init_from_model(model.get(), params),
                                                                         llama_free);
  EXPECT_EQ(llama_decode(context.get(), llama_batch_get_one(tokens.data(), static_cast<int>(tokens.size()))), 0);
  const float* out = llama_get_embeddings_seq(context.get(), 0);
  EXPECT_NE(out, nullptr);
  return {out, out + llama_model_n_embd(model.get())};
}

double RelativeError(const std::vector<float>& reference, const std::vector<float>& ours) {
  EXPECT_EQ(reference.size(), ours.size());
  double difference = 0;
  double norm = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    difference += std::pow(static_cast<double>(reference[i]) - ours[i], 2);
    norm += std::pow(static_cast<double>(reference[i]), 2);
  }
  return std::sqrt(difference / norm);
}

// Both sides compute in f32 and differ in the order of sums of at most 300 terms, which costs at most 300 * 2^-24 =
// 2e-5 of a product, for some ten products one behind the other whose errors are independent.
constexpr double kF32Error = 1e-4;

TEST(Embeddings, AreLlamaCppsMean) {
  const Tokens tokens = RandomTokens(150, 3);
  const std::vector<float> judge = JudgeEmbedding(TestModelPath("llama"), tokens, LLAMA_POOLING_TYPE_MEAN);
  for (const int step_tokens : {512, 40, 1}) {
    EngineOptions options = TestOptions();
    options.step_tokens = step_tokens;
    Driver driver(options);
    driver.Submit(RandomTokens(30, 9), Greedy(20));
    const RequestId id = SubmitRequest(driver, Embedded(tokens));
    const RequestId again = SubmitRequest(driver, Embedded(tokens));
    const RequestId scored = SubmitRequest(driver, Scored(tokens, 0, 1));
    Events events = RunAll(driver);
    for (const RequestId request : {id, again}) {
      ASSERT_EQ((events[{request, 0}].size()), 1u);
      const Event& event = events[{request, 0}][0];
      EXPECT_EQ(event.finish, FinishReason::kLength);
      EXPECT_EQ(event.prompt_tokens, 150);
      EXPECT_LE(RelativeError(judge, event.embedding), kF32Error);
    }
    EXPECT_TRUE((events[{scored, 0}].at(0).embedding.empty()));
    EXPECT_EQ((events[{scored, 0}].at(0).prompt_logprobs.size()), tokens.size());
    driver.ExpectAllFree();
  }
}

TEST(Embeddings, SurvivePreemption) {
  const Tokens tokens = RandomTokens(400, 4);
  EngineOptions options = TestOptions();
  options.kv_bytes = size_t{1} << 20;
  options.step_tokens = 32;
  Driver driver(options);
  for (uint64_t i = 0; i < 4; ++i) driver.Submit(RandomTokens(100, 50 + i), Seeded(500, i));
  const RequestId id = SubmitRequest(driver, Embedded(tokens));
  Events events = RunAll(driver);
  const std::vector<float> judge = JudgeEmbedding(TestModelPath("llama"), tokens, LLAMA_POOLING_TYPE_MEAN);
  EXPECT_LE(RelativeError(judge, events[{id, 0}].at(0).embedding), kF32Error);
  driver.ExpectAllFree();
}

// Quantised weights: both round activations to 8 bits before each product, each in its own way. A rounding to 8 bits of
// groups of 32 errs by about 2^-9 of the group's largest; some 200 of them, independent, come to a few per cent.
TEST(Embeddings, OfTheDefaultModel) {
  SKIP_WITHOUT_MODEL();
  EngineOptions options = TestOptions();
  options.model_path = DefaultModelPath();
  Driver driver(options);
  const auto tokens =
      driver.engine().tokenizer().Encode("The weather is lovely today, and so is the sea.", true, false);
  ASSERT_TRUE(tokens.ok());
  const RequestId id = SubmitRequest(driver, Embedded(*tokens));
  Events events = RunAll(driver);
  const std::vector<float> judge = JudgeEmbedding(DefaultModelPath(), *tokens, LLAMA_POOLING_TYPE_MEAN);
  EXPECT_LE(RelativeError(judge, events[{id, 0}].at(0).embedding), 0.05);
}

}  // namespace
}  // namespace jointkv::engine
