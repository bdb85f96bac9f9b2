#include "cli/bench_capacity.h"

#include <gtest/gtest.h>

#include <random>

#include "cli/model_size.h"
#include "engine/test_models.h"

namespace jointkv::cli {
namespace {

TEST(CapacityMeterTest, CountsWhatRanAndTheStepsThatOnlyDecode) {
  engine::EngineOptions options;
  options.model_path = engine::TestModelPath("llama");
  options.threads = 2;
  options.kv_bytes = size_t{32} << 20;
  options.step_tokens = 4096;
  options.fusion.policy = joint::Policy::kOff;
  auto engine = engine::Engine::Create(options);
  ASSERT_TRUE(engine.ok()) << engine.status().message();
  CapacityMeter meter(**engine);
  EXPECT_EQ(meter.held(), 0);
  EXPECT_EQ(meter.decoding().tok_s(), 0);

  std::mt19937 random(1);
  for (int i = 0; i < 40; ++i) {
    engine::Request request;
    for (int token = 0; token < 1200; ++token) request.prompt.push_back(static_cast<TokenId>(300 + random() % 600));
    request.sampling.temperature = 0;
    request.sampling.ignore_eos = true;
    request.sampling.max_tokens = 24;
    ASSERT_TRUE((*engine)->Submit(std::move(request)).ok());
  }
  std::vector<engine::Event> events;
  while ((*engine)->Step(events)) meter.AfterStep();
  EXPECT_LE(meter.held(), (*engine)->stats().running_peak);
  EXPECT_GT(meter.held(), 1);
  EXPECT_LT(meter.held(), 40);
  const CapacityMeter::Decoding decoding = meter.decoding();
  EXPECT_GT(decoding.tok_s(), 0);
  EXPECT_GE(decoding.requests, 0.9 * meter.held());
  EXPECT_LE(decoding.requests, meter.held());
  EXPECT_GT(decoding.attention_s, 0);
  EXPECT_GT(decoding.attention_plan_s, 0);
  EXPECT_LT(decoding.attention_s + decoding.attention_plan_s, decoding.seconds);
  EXPECT_GT(decoding.kv_bytes, decoding.requests * 1200 * 2);
  EXPECT_LE(decoding.kv_bytes, static_cast<double>((*engine)->kv_stats().capacity_bytes));
  const gguf::Hyperparameters& hp = (*engine)->model().hyperparameters();
  EXPECT_GE(decoding.attention_flops, decoding.requests * AttentionFlops(hp, 1200));
  EXPECT_LE(decoding.attention_flops, decoding.requests * AttentionFlops(hp, 1224));
}

}  // namespace
}  // namespace jointkv::cli
