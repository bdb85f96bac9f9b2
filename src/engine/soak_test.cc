// Random requests, cancels and parameters in little room. JOINTKV_SOAK_STEPS sets the steps of each seed.
#include <cstdlib>
#include <set>

#include "engine/engine.h"
#include "engine/test_engine.h"

namespace jointkv::engine {
namespace {

class SoakTest : public testing::TestWithParam<int> {};

TEST_P(SoakTest, EveryChoiceEndsAndNothingLeaks) {
  const int seed = GetParam();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(static_cast<uint64_t>(seed));
  const auto draw = [&](int n) { return static_cast<int>(random() % static_cast<uint64_t>(n)); };
  const char* models[] = {"llama", "llama-q4_1", "gemma3"};
  EngineOptions options = TestOptions(models[seed % 3]);
  options.threads = 1 + draw(3);
  options.kv_bytes = size_t{300 + static_cast<size_t>(draw(600))} << 10;
  options.prefix_cache = draw(3) != 0;
  options.max_running = 1 + draw(10);
  options.step_tokens = 1 + draw(40);
  options.deterministic = draw(2) == 0;
  Driver driver(options);

  const char* wanted = std::getenv("JOINTKV_SOAK_STEPS");
  const int steps = wanted == nullptr ? 300 : std::atoi(wanted);
  std::vector<std::pair<RequestId, int>> submitted;  // and choices
  std::set<RequestId> cancelled;
  const Tokens common = RandomTokens(60, static_cast<uint64_t>(seed));
  for (int step = 0; step < steps; ++step) {
    while (draw(4) == 0) {
      Tokens prompt(common.begin(), common.begin() + draw(2) * draw(60));
      const Tokens own = RandomTokens(1 + draw(80), random());
      prompt.insert(prompt.end(), own.begin(), own.end());
      SamplingParams params = Seeded(1 + draw(60), random());
      if (draw(3) == 0) params.temperature = 0;
      params.ignore_eos = draw(2) == 0;
      params.n = draw(4) == 0 ? 1 + draw(options.max_running) : 1;
      if (draw(4) == 0) params.presence_penalty = 0.5f;
      if (draw(4) == 0) params.min_tokens = draw(params.max_tokens);
      if (draw(4) == 0) params.stop = {"w1", " w22 w"};
      if (draw(4) == 0) params.stop_tokens = {draw(kTestVocab), draw(kTestVocab)};
      if (draw(4) == 0) params.logprobs = draw(5);
      if (draw(3) == 0) params.top_p = 0.9f;
      Request request;
      request.prompt = prompt;
      request.sampling = params;
      request.domain = DomainId(draw(3));
      if (draw(6) == 0) request.prompt_logprobs = draw(4);
      if (draw(8) == 0 && params.stop_tokens.empty()) {
        request.grammar = *text::Grammar::AnyJsonObject(driver.engine().tokenizer());
      }
      if (draw(10) == 0) {
        request.embed = true;
        request.prompt_logprobs = -1;
        request.sampling = SamplingParams();
        request.sampling.max_tokens = 0;
      }
      const auto id = driver.engine().Submit(request);
      if (id.ok()) {
        submitted.push_back({*id, request.sampling.n});
      } else {
        EXPECT_EQ(id.status().code(), StatusCode::kResourceExhausted) << id.status().ToString();
      }
    }
    if (draw(12) == 0 && !submitted.empty()) {
      const RequestId id = submitted[static_cast<size_t>(draw(static_cast<int>(submitted.size())))].first;
      driver.engine().Cancel(id);
      cancelled.insert(id);
    }
    driver.Step();
  }
  driver.Run();

  int64_t output_tokens = 0;
  for (const auto& [id, choices] : submitted) {
    for (int choice = 0; choice < choices; ++choice) {
      const Output& output = driver.of(id, choice);
      EXPECT_EQ(output.ends, 1);
      output_tokens += static_cast<int64_t>(output.tokens.size());
      if (output.end.finish == FinishReason::kCancelled) {
        EXPECT_TRUE(cancelled.contains(id));
      }
      // A lone request may outgrow the store.
      if (output.end.finish == FinishReason::kError) {
        EXPECT_EQ(output.end.error.code(), StatusCode::kResourceExhausted);
      }
    }
  }
  EXPECT_EQ(driver.engine().stats().output_tokens, output_tokens);
  driver.ExpectAllFree();
}

INSTANTIATE_TEST_SUITE_P(Seeds, SoakTest, testing::Range(0, 12));

}  // namespace
}  // namespace jointkv::engine
