#include "cli/summary.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace jointkv::cli {
namespace {

using engine::Event;
using engine::FinishReason;

Event End(int choice, FinishReason finish, double first_token_s, double finished_s, int output_tokens) {
  Event event;
  event.choice = choice;
  event.finish = finish;
  event.output_tokens = output_tokens;
  event.times = {.submitted_s = 10, .started_s = 10.5, .first_token_s = first_token_s, .finished_s = finished_s};
  return event;
}

TEST(PercentileTest, IsLinearBetweenNeighbours) {
  EXPECT_EQ(Percentile({}, 0.5), 0);
  EXPECT_EQ(Percentile({7}, 0.95), 7);
  EXPECT_EQ(Percentile({3, 1, 2}, 0.5), 2);
  EXPECT_DOUBLE_EQ(Percentile({1, 2, 3, 4}, 0.5), 2.5);
  EXPECT_DOUBLE_EQ(Percentile({40, 10, 30, 20, 50}, 0.95), 48);
  EXPECT_EQ(Percentile({5, 1}, 0), 1);
  EXPECT_EQ(Percentile({5, 1}, 1), 5);
}

TEST(TimesTest, AreMillisecondsFromSubmission) {
  const Event event = End(0, FinishReason::kLength, 11, 13, 5);
  EXPECT_DOUBLE_EQ(QueueMs(event.times), 500);
  EXPECT_DOUBLE_EQ(TtftMs(event.times), 1000);
  EXPECT_DOUBLE_EQ(TpotMs(event.times, 5), 500);
}

TEST(TimesTest, AreZeroForWhatNeverHappened) {
  const engine::RequestTimes cancelled = {.submitted_s = 10, .finished_s = 11};
  EXPECT_EQ(QueueMs(cancelled), 0);
  EXPECT_EQ(TtftMs(cancelled), 0);
  EXPECT_EQ(TpotMs({.submitted_s = 1, .first_token_s = 2, .finished_s = 2}, 1), 0);
}

TEST(SummaryTest, CountsRequestsOnceAndOnlyThoseThatFinished) {
  SummaryBuilder builder;
  builder.Add(End(0, FinishReason::kLength, 11, 13, 5));
  builder.Add(End(1, FinishReason::kStop, 11, 12, 5));
  builder.Add(End(0, FinishReason::kStop, 13, 13, 1));
  builder.Add(End(0, FinishReason::kError, 11, 12, 2));
  builder.Add(End(0, FinishReason::kCancelled, 0, 12, 0));
  engine::EngineStats stats;
  stats.prompt_tokens = 300;
  stats.prefill_tokens = 200;
  stats.prefill_s = 0.5;
  stats.output_tokens = 100;
  stats.decode_tokens = 90;
  stats.decode_s = 3;
  stats.kv_bytes_peak = 100;
  stats.kv_bytes_logical_peak = 250;
  stats.running_peak = 4;
  stats.preemptions = 1;
  stats.prefix_cached_tokens = 100;
  const Summary summary = builder.Build(stats, 4);
  EXPECT_EQ(summary.requests, 2);
  EXPECT_DOUBLE_EQ(summary.req_s, 0.5);
  EXPECT_DOUBLE_EQ(summary.prefill_tok_s, 400);
  EXPECT_DOUBLE_EQ(summary.decode_tok_s, 30);
  EXPECT_DOUBLE_EQ(summary.ttft_ms.p50, 2000);  // of 1 s and 3 s
  EXPECT_DOUBLE_EQ(summary.tpot_ms.p50, 375);   // of 500 ms and 250 ms
  EXPECT_DOUBLE_EQ(summary.tpot_ms.p95, 487.5);
}

TEST(SummaryTest, OfNothingHasNoNaN) {
  const Summary summary = SummaryBuilder().Build({}, 0);
  EXPECT_EQ(summary.req_s, 0);
  EXPECT_EQ(summary.prefill_tok_s, 0);
  EXPECT_EQ(summary.ttft_ms.p95, 0);
  EXPECT_EQ(ToTable(summary).find("nan"), std::string::npos);
}

TEST(SummaryTest, JsonHasExactlyThePromisedFields) {
  const nlohmann::ordered_json json = ToJson(Summary{});
  std::vector<std::string> keys;
  for (const auto& [key, value] : json.items()) keys.push_back(key);
  EXPECT_EQ(keys,
            (std::vector<std::string>{"requests", "prompt_tokens", "output_tokens", "wall_s", "req_s", "prefill_tok_s",
                                      "decode_tok_s", "ttft_ms", "tpot_ms", "kv_bytes_peak", "kv_bytes_logical_peak",
                                      "running_peak", "preemptions", "prefix_cached_tokens"}));
  EXPECT_EQ(json["ttft_ms"].dump(), R"({"p50":0.0,"p95":0.0})");
}

TEST(WriteTextFileTest, SaysWhyNot) {
  const Status status = WriteTextFile("/nonexistent/summary.json", "{}");
  EXPECT_EQ(status.code(), StatusCode::kIo);
  EXPECT_EQ(status.message(), "'/nonexistent/summary.json': No such file or directory");
}

}  // namespace
}  // namespace jointkv::cli
