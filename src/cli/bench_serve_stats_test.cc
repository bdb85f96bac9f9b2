#include "cli/bench_serve_stats.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace jointkv::cli {
namespace {

RequestOutcome Done(double arrival_s, double start_s, double ttft_s, std::vector<double> itl_s, double latency_s) {
  RequestOutcome outcome;
  outcome.success = true;
  outcome.arrival_s = arrival_s;
  outcome.start_s = start_s;
  outcome.ttft_s = ttft_s;
  outcome.latency_s = latency_s;
  outcome.output_tokens = static_cast<int64_t>(itl_s.size()) + 1;
  outcome.itl_s = std::move(itl_s);
  outcome.prompt_tokens = 100;
  outcome.cached_tokens = 10;
  return outcome;
}

// Three that end and one that fails, over 4 seconds.
std::vector<RequestOutcome> Outcomes() {
  std::vector<RequestOutcome> outcomes = {Done(0, 0, 0.2, {0.1, 0.1}, 0.4), Done(0, 0, 0.4, {0.2, 0.4}, 1.0),
                                          Done(0, 1.0, 0.6, {}, 0.6)};
  RequestOutcome failed;
  failed.error = "gone";
  failed.prompt_tokens = 1000;
  outcomes.push_back(failed);
  return outcomes;
}

TEST(ServeStatsTest, IsWhatAHandCalculationGives) {
  ServeStatsOptions options;
  options.metrics = {"ttft", "tpot", "itl", "e2el", "client_queue_time", "e2el_including_client_queue"};
  options.percentiles = {50, 99.9};
  const std::vector<RequestOutcome> outcomes = Outcomes();
  const auto json = ToJson(ComputeServeStats(outcomes, 4, {}), outcomes, options);
  EXPECT_EQ(json["duration"], 4.0);
  EXPECT_EQ(json["completed"], 3);
  EXPECT_EQ(json["failed"], 1);
  EXPECT_EQ(json["total_input_tokens"], 300);
  EXPECT_EQ(json["total_cached_tokens"], 30);
  EXPECT_EQ(json["total_output_tokens"], 7);
  EXPECT_DOUBLE_EQ(json["request_throughput"], 0.75);
  EXPECT_DOUBLE_EQ(json["output_throughput"], 1.75);
  EXPECT_DOUBLE_EQ(json["total_token_throughput"], 76.75);
  EXPECT_TRUE(json["request_goodput"].is_null());
  EXPECT_FALSE(json.contains("ttfts"));
  // TTFT 200, 400, 600: mean 400, deviations -200, 0, 200.
  EXPECT_DOUBLE_EQ(json["mean_ttft_ms"], 400);
  EXPECT_DOUBLE_EQ(json["median_ttft_ms"], 400);
  EXPECT_NEAR(json["std_ttft_ms"].get<double>(), 163.299316, 1e-6);
  EXPECT_DOUBLE_EQ(json["p50_ttft_ms"], 400);
  EXPECT_NEAR(json["p99.9_ttft_ms"].get<double>(), 599.6, 1e-9);
  // TPOT of those with more than one token: 200 / 2 and 600 / 2.
  EXPECT_DOUBLE_EQ(json["mean_tpot_ms"], 200);
  EXPECT_DOUBLE_EQ(json["std_tpot_ms"], 100);
  // ITL 100, 100, 200, 400.
  EXPECT_DOUBLE_EQ(json["mean_itl_ms"], 200);
  EXPECT_DOUBLE_EQ(json["median_itl_ms"], 150);
  EXPECT_NEAR(json["mean_e2el_ms"].get<double>(), 2000.0 / 3, 1e-9);
  EXPECT_NEAR(json["mean_client_queue_time_ms"].get<double>(), 1000.0 / 3, 1e-9);
  EXPECT_DOUBLE_EQ(json["median_e2el_including_client_queue_ms"], 1000);
  // Texts at 0.2, 0.3, 0.4; 0.4, 0.6, 1.0; 1.6: five in the first second.
  EXPECT_DOUBLE_EQ(json["max_output_tokens_per_s"], 5);
  EXPECT_EQ(json["max_concurrent_requests"], 2);
  EXPECT_EQ(json["rtfx"], 0.0);
  EXPECT_EQ(json["latencies"].size(), 4);
  EXPECT_EQ(json["queue_times"].size(), 4);
}

TEST(ServeStatsTest, GoodRequestsMeetEveryGoal) {
  ServeStatsOptions options;
  const std::vector<RequestOutcome> outcomes = Outcomes();
  const auto goodput = [&](std::vector<ServeGoal> goals) {
    options.goals = goals;
    return ToJson(ComputeServeStats(outcomes, 4, goals), outcomes, options)["request_goodput"].get<double>();
  };
  EXPECT_DOUBLE_EQ(goodput({{"ttft", 400}}), 0.5);
  EXPECT_DOUBLE_EQ(goodput({{"tpot", 150}}), 0.5);  // a request of one token has none to wait for
  EXPECT_DOUBLE_EQ(goodput({{"e2el", 600}}), 0.5);
  EXPECT_DOUBLE_EQ(goodput({{"ttft", 500}, {"tpot", 200}, {"e2el", 2000}}), 0.25);
  EXPECT_DOUBLE_EQ(goodput({{"ttft", 1}}), 0);
}

TEST(ServeStatsTest, DetailsListEveryRequest) {
  ServeStatsOptions options;
  options.detailed = true;
  const std::vector<RequestOutcome> outcomes = Outcomes();
  const auto json = ToJson(ComputeServeStats(outcomes, 4, {}), outcomes, options);
  EXPECT_EQ(json["output_lens"], nlohmann::ordered_json::parse("[3, 3, 1, 0]"));
  EXPECT_EQ(json["input_lens"], nlohmann::ordered_json::parse("[100, 100, 100, 1000]"));
  EXPECT_EQ(json["itls"], nlohmann::ordered_json::parse("[[0.1, 0.1], [0.2, 0.4], [], []]"));
  EXPECT_EQ(json["start_times"], nlohmann::ordered_json::parse("[0.0, 0.0, 1.0, 0.0]"));
  EXPECT_EQ(json["queue_times"], nlohmann::ordered_json::parse("[0.0, 0.0, 1.0, 0.0]"));
  EXPECT_EQ(json["errors"], nlohmann::ordered_json::parse(R"(["", "", "", "gone"])"));
  for (const char* key : {"ttfts", "latencies", "generated_texts"}) EXPECT_EQ(json[key].size(), 4) << key;
}

TEST(ServeStatsTest, EmbeddingsHaveNoOutput) {
  ServeStatsOptions options = {.metrics = {"e2el"}, .detailed = true, .embeddings = true};
  const std::vector<RequestOutcome> outcomes = Outcomes();
  const ServeStats stats = ComputeServeStats(outcomes, 4, {});
  const auto json = ToJson(stats, outcomes, options);
  EXPECT_EQ(json["total_input_sequences"], 3);
  EXPECT_DOUBLE_EQ(json["input_sequence_throughput"], 0.75);
  for (const char* key : {"output_throughput", "total_output_tokens", "ttfts", "output_lens", "rtfx"}) {
    EXPECT_FALSE(json.contains(key)) << key;
  }
  EXPECT_EQ(json["input_lens"].size(), 4);
  const std::string table = ToTable(stats, options, {});
  EXPECT_NE(table.find("Input throughput (inputs/s):             0.75"), std::string::npos) << table;
  EXPECT_EQ(table.find("generated"), std::string::npos);
}

TEST(ServeStatsTest, NothingDoneIsAllZeros) {
  const std::vector<RequestOutcome> outcomes(2);
  const auto json = ToJson(ComputeServeStats(outcomes, 0, {}), outcomes, {});
  EXPECT_EQ(json["completed"], 0);
  EXPECT_EQ(json["failed"], 2);
  EXPECT_EQ(json["request_throughput"], 0.0);
  EXPECT_EQ(json["p99_ttft_ms"], 0.0);
}

TEST(ServeStatsTest, TableHasTheChosenMetrics) {
  ServeStatsOptions options;
  options.metrics = {"ttft"};
  options.percentiles = {50, 99};
  const std::string table =
      ToTable(ComputeServeStats(Outcomes(), 4, {}), options, {.max_concurrency = 3, .request_rate = 2.5});
  for (const char* line : {"Successful requests:                     3         \n",
                           "Maximum request concurrency:             3         \n",
                           "Request rate configured (RPS):           2.50      \n",
                           "Mean TTFT (ms):                          400.00    \n",
                           "P99 TTFT (ms):                           596.00    \n"}) {
    EXPECT_NE(table.find(line), std::string::npos) << line << table;
  }
  EXPECT_EQ(table.find("TPOT"), std::string::npos);
}

TEST(ServeStatsTest, KnowsItsMetrics) {
  EXPECT_NE(FindServeMetric("itl"), nullptr);
  EXPECT_EQ(FindServeMetric("ttfb"), nullptr);
}

}  // namespace
}  // namespace jointkv::cli
