#include "server/metrics.h"

#include <atomic>
#include <cmath>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <thread>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "engine/test_engine.h"

namespace jointkv::server {
namespace {

using engine::Driver;
using engine::FinishReason;
using engine::Greedy;
using engine::RandomTokens;
using engine::TestOptions;

// The text format, read back as strictly as Prometheus' own parser and `promtool check metrics` do.
// Threads: one. Owns: the samples. Fails how: by ADD_FAILURE.
class Exposition {
 public:
  explicit Exposition(const std::string& text) {
    EXPECT_TRUE(text.ends_with('\n'));
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) Read(line);
    for (const auto& [name, type] : types_) {
      EXPECT_TRUE(helps_.contains(name)) << name;
      EXPECT_EQ(type == "counter", name.ends_with("_total")) << name;
      if (type == "histogram") CheckHistogram(name);
    }
  }

  // "name" or "name{label="value"}", without model_name.
  double Value(const std::string& key) const {
    const auto found = samples_.find(key);
    if (found != samples_.end()) return found->second;
    ADD_FAILURE() << "no sample " << key;
    return std::nan("");
  }
  const std::map<std::string, double>& samples() const { return samples_; }
  const std::map<std::string, std::string>& types() const { return types_; }

 private:
  void Read(const std::string& line) {
    static const std::regex kMeta("# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.+)");
    static const std::regex kSample(
        "([a-zA-Z_:][a-zA-Z0-9_:]*)\\{model_name=\"tiny \\\\\"q\\\\\"\"(,[^}]*)?\\} (\\S+)");
    std::smatch match;
    if (std::regex_match(line, match, kMeta)) {
      auto& seen = match[1] == "HELP" ? helps_ : types_;
      EXPECT_TRUE(seen.emplace(match[2], match[3]).second) << "twice: " << line;
      family_ = match[2];
      return;
    }
    if (!std::regex_match(line, match, kSample)) {
      ADD_FAILURE() << "not a sample of this model: " << line;
      return;
    }
    const std::string name = match[1];
    EXPECT_TRUE(name == family_ || (types_[family_] == "histogram" && name.starts_with(family_ + "_"))) << line;
    const std::string labels = match[2].length() > 0 ? "{" + match[2].str().substr(1) + "}" : "";
    const double value = match[3] == "+Inf" ? HUGE_VAL : std::stod(match[3]);
    EXPECT_TRUE(std::isfinite(value)) << line;
    EXPECT_TRUE(samples_.emplace(name + labels, value).second) << "twice: " << line;
  }

  void CheckHistogram(const std::string& name) {
    static const std::regex kBound(".*le=\"([^\"]+)\".*");
    std::map<double, double> buckets;
    for (const auto& [key, value] : samples_) {
      std::smatch match;
      if (!key.starts_with(name + "_bucket{") || !std::regex_match(key, match, kBound)) continue;
      buckets[match[1] == "+Inf" ? HUGE_VAL : std::stod(match[1])] = value;
    }
    ASSERT_GT(buckets.size(), 1u) << name;
    double before = 0;
    for (const auto& [bound, value] : buckets) {
      EXPECT_GE(value, before) << name << " at " << bound;
      before = value;
    }
    EXPECT_EQ(buckets.rbegin()->first, HUGE_VAL);
    EXPECT_EQ(buckets.rbegin()->second, Value(name + "_count"));
  }

  std::string family_;
  std::map<std::string, std::string> helps_;
  std::map<std::string, std::string> types_;
  std::map<std::string, double> samples_;
};

constexpr const char* kModel = "tiny \"q\"";

engine::Event Finished(int choice, FinishReason reason, int output_tokens) {
  engine::Event event;
  event.choice = choice;
  event.finish = reason;
  event.prompt_tokens = 30;
  event.output_tokens = output_tokens;
  event.times = {100, 100.5, 102, 106};
  return event;
}

TEST(Metrics, HaveVllmsNamesFromTheStart) {
  const Exposition text(Metrics(kModel).Render());
  for (const char* counter : {"prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens",
                              "generation_tokens", "request_success"}) {
    EXPECT_EQ(text.types().at("vllm:" + std::string(counter) + "_total"), "counter");
  }
  for (const char* gauge : {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}) {
    EXPECT_EQ(text.types().at("vllm:" + std::string(gauge)), "gauge");
  }
  for (const char* histogram :
       {"time_to_first_token_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds",
        "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_inference_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
        "request_prompt_tokens", "request_generation_tokens"}) {
    EXPECT_EQ(text.types().at("vllm:" + std::string(histogram)), "histogram");
  }
  for (const char* reason : {"stop", "length", "abort", "error"}) {
    EXPECT_EQ(text.Value("vllm:request_success_total{finished_reason=\"" + std::string(reason) + "\"}"), 0);
  }
  for (const auto& [name, type] : text.types()) EXPECT_TRUE(name.starts_with("vllm:") || name.starts_with("jointkv_"));
}

TEST(Metrics, ARequestsTimesLandInTheirHistograms) {
  Metrics metrics(kModel);
  metrics.RequestFinished(Finished(0, FinishReason::kStop, 5));
  metrics.RequestFinished(Finished(1, FinishReason::kLength, 9));
  const Exposition text(metrics.Render());
  const auto expect = [&](const std::string& name, int count, double sum) {
    EXPECT_EQ(text.Value("vllm:" + name + "_count"), count) << name;
    EXPECT_DOUBLE_EQ(text.Value("vllm:" + name + "_sum"), sum) << name;
  };
  expect("time_to_first_token_seconds", 1, 2);
  expect("request_queue_time_seconds", 1, .5);
  expect("request_prefill_time_seconds", 1, 1.5);
  expect("request_prompt_tokens", 1, 30);
  expect("request_decode_time_seconds", 2, 8);
  expect("request_inference_time_seconds", 2, 11);
  expect("e2e_request_latency_seconds", 2, 12);
  expect("request_generation_tokens", 2, 14);
  expect("request_time_per_output_token_seconds", 2, 4. / 4 + 4. / 8);
  EXPECT_EQ(text.Value("vllm:time_to_first_token_seconds_bucket{le=\"1\"}"), 0);
  EXPECT_EQ(text.Value("vllm:time_to_first_token_seconds_bucket{le=\"2.5\"}"), 1);
  EXPECT_EQ(text.Value("vllm:request_success_total{finished_reason=\"stop\"}"), 1);
  EXPECT_EQ(text.Value("vllm:request_success_total{finished_reason=\"length\"}"), 1);
}

TEST(Metrics, WhatNeverRanHasNoTimesOfRunning) {
  Metrics metrics(kModel);
  engine::Event event = Finished(0, FinishReason::kCancelled, 0);
  event.times = {100, 0, 0, 101};
  metrics.RequestFinished(event);
  event.finish = FinishReason::kError;
  metrics.RequestFinished(event);
  const Exposition text(metrics.Render());
  EXPECT_EQ(text.Value("vllm:e2e_request_latency_seconds_sum"), 2);
  for (const char* name : {"time_to_first_token", "request_queue_time", "request_inference_time",
                           "request_prefill_time", "request_decode_time", "request_time_per_output_token"}) {
    EXPECT_EQ(text.Value("vllm:" + std::string(name) + "_seconds_count"), 0) << name;
  }
  EXPECT_EQ(text.Value("vllm:request_success_total{finished_reason=\"abort\"}"), 1);
  EXPECT_EQ(text.Value("vllm:request_success_total{finished_reason=\"error\"}"), 1);
}

TEST(Metrics, TokensAndShadowChecksAreObserved) {
  Metrics metrics(kModel);
  metrics.TokenEmitted(.03);
  metrics.TokenEmitted(.2);
  metrics.UpdateShadow({.runs = 1, .rows = 7, .dropped = 2}, {.002});
  const Exposition text(metrics.Render());
  for (const char* name : {"vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"}) {
    EXPECT_EQ(text.Value(std::string(name) + "_bucket{le=\"0.05\"}"), 1);
    EXPECT_EQ(text.Value(std::string(name) + "_count"), 2);
  }
  EXPECT_EQ(text.Value("jointkv_shadow_kl_nats_bucket{le=\"0.001\"}"), 0);
  EXPECT_EQ(text.Value("jointkv_shadow_kl_nats_bucket{le=\"0.003\"}"), 1);
  EXPECT_EQ(text.Value("jointkv_shadow_runs_total"), 1);
  EXPECT_EQ(text.Value("jointkv_shadow_tokens_total"), 7);
  EXPECT_EQ(text.Value("jointkv_shadow_dropped_total"), 2);
}

double SumOf(const Exposition& text, const std::string& family) {
  double sum = 0;
  for (const auto& [key, value] : text.samples()) sum += key.starts_with(family + "{") ? value : 0;
  return sum;
}

TEST(Metrics, FollowAnEngine) {
  Driver driver(TestOptions());
  Metrics metrics(kModel);
  metrics.NameTenant(DomainId(0), "red");
  metrics.NameTenant(DomainId(1), "blue");
  const auto prompt = RandomTokens(200, 1);
  engine::SamplingParams two = Greedy(20);
  two.n = 2;
  driver.Submit(prompt, two);
  driver.Submit(prompt, Greedy(20), DomainId(1));
  for (int i = 0; i < 4; ++i) driver.Step();
  driver.Submit(prompt, Greedy(20));
  for (int i = 0; i < 2; ++i) driver.Step();
  metrics.Update(driver.engine());
  const Exposition text(metrics.Render());
  const kv::KvStats kv = driver.engine().kv_stats();

  EXPECT_EQ(text.Value("vllm:num_requests_running"), 4);
  EXPECT_EQ(text.Value("jointkv_tenant_requests_running{tenant=\"red\"}"), 3);
  EXPECT_EQ(text.Value("jointkv_tenant_requests_running{tenant=\"blue\"}"), 1);
  EXPECT_EQ(text.Value("vllm:prompt_tokens_total"), 600);
  EXPECT_EQ(text.Value("vllm:prefix_cache_queries_total"), 600);
  EXPECT_GT(text.Value("vllm:prefix_cache_hits_total"), 100);
  EXPECT_EQ(text.Value("vllm:generation_tokens_total"), static_cast<double>(driver.engine().stats().output_tokens));
  EXPECT_GT(text.Value("jointkv_kv_copies_on_write_total"), 0);
  EXPECT_EQ(text.Value("jointkv_kv_bytes{kind=\"running\"}"), static_cast<double>(kv.running_bytes));
  EXPECT_EQ(text.Value("jointkv_kv_bytes{kind=\"logical\"}"), static_cast<double>(kv.logical_bytes));
  EXPECT_GT(text.Value("jointkv_kv_slots{state=\"prefix\"}"), 0);
  EXPECT_GT(text.Value("jointkv_kv_blocks{readers=\"3-4\"}"), 0);
  EXPECT_DOUBLE_EQ(
      text.Value("jointkv_tenant_kv_bytes{tenant=\"red\"}") + text.Value("jointkv_tenant_kv_bytes{tenant=\"blue\"}"),
      static_cast<double>(kv.running_bytes));
  // Three readers of one prompt; f32 blocks are twice the yardstick.
  EXPECT_GT(text.Value("jointkv_kv_compression_factor{factor=\"exact_sharing\"}"), 1);
  EXPECT_NEAR(text.Value("jointkv_kv_compression_factor{factor=\"codec\"}"), .5, 1e-9);
  EXPECT_NEAR(text.Value("jointkv_kv_compression"),
              static_cast<double>(kv.logical_bytes) / static_cast<double>(kv.running_bytes), 1e-9);
  EXPECT_NEAR(text.Value("jointkv_kv_compression"),
              text.Value("jointkv_kv_compression_factor{factor=\"exact_sharing\"}") *
                  text.Value("jointkv_kv_compression_factor{factor=\"fusion\"}") *
                  text.Value("jointkv_kv_compression_factor{factor=\"codec\"}"),
              1e-9);
}

TEST(Metrics, FusionIsCounted) {
  Driver driver(TestOptions());
  Metrics metrics(kModel);
  // The scale of each table comes from the first thousand tokens; then the same text in another context.
  driver.Submit(RandomTokens(1500, 2), Greedy(1));
  driver.Run();
  const auto document = RandomTokens(300, 3);
  for (uint64_t seed = 4; seed < 8; ++seed) {
    auto prompt = RandomTokens(40, seed);
    prompt.insert(prompt.end(), document.begin(), document.end());
    driver.Submit(prompt, Greedy(30));
  }
  for (int i = 0; i < 10; ++i) driver.Step();
  metrics.Update(driver.engine());
  const Exposition text(metrics.Render());
  const joint::FusionStats fusion = driver.engine().fusion_stats();
  ASSERT_GT(fusion.fused, 0);
  EXPECT_EQ(text.Value("jointkv_fusion_offered_blocks_total"), static_cast<double>(fusion.offered));
  EXPECT_EQ(SumOf(text, "jointkv_fusion_fused_blocks_total") + SumOf(text, "jointkv_fusion_rejected_blocks_total") +
                text.Value("jointkv_fusion_residual_blocks_total"),
            static_cast<double>(fusion.offered));
  EXPECT_EQ(text.Value("jointkv_fusion_residual_blocks_total"), static_cast<double>(fusion.residuals));
  EXPECT_EQ(text.Value("jointkv_fusion_rejected_blocks_total{reason=\"over_budget\"}"),
            static_cast<double>(fusion.rejected));
  EXPECT_GT(text.Value("jointkv_fusion_representatives"), 0);
  EXPECT_GT(text.Value("jointkv_fusion_seconds_total"), 0);
  EXPECT_EQ(text.Value("jointkv_fusion_worst_nmse"), fusion.worst_nmse);
  EXPECT_GT(text.Value("jointkv_kv_slots{state=\"fused\"}"), 0);
  EXPECT_GT(text.Value("jointkv_kv_compression_factor{factor=\"fusion\"}"), 1);
}

TEST(Metrics, CountersOnlyGrow) {
  Driver driver(TestOptions());
  Metrics metrics(kModel);
  std::map<std::string, double> before;
  for (uint64_t round = 0; round < 3; ++round) {
    const engine::RequestId id = driver.Submit(RandomTokens(60, round % 2), Greedy(8));
    for (int i = 0; i < 4; ++i) driver.Step();
    if (round == 1) driver.engine().Cancel(id);
    while (driver.Step()) {
      for (const engine::Event& event : driver.events()) metrics.RequestFinished(event);
    }
    metrics.Update(driver.engine());
    const Exposition text(metrics.Render());
    for (const auto& [key, value] : text.samples()) {
      const auto type = text.types().find(key.substr(0, key.find('{')));
      if (type != text.types().end() && type->second == "gauge") continue;
      EXPECT_GE(value, before[key]) << key;
      before[key] = value;
    }
    EXPECT_EQ(text.Value("vllm:num_requests_running"), 0);
    EXPECT_EQ(text.Value("jointkv_kv_bytes{kind=\"running\"}"), 0);
  }
  EXPECT_EQ(before["vllm:prompt_tokens_total"], 180);
}

TEST(Metrics, TheDashboardAsksForWhatThereIs) {
  std::ifstream file(JOINTKV_DASHBOARD);
  const auto dashboard = nlohmann::json::parse(file);
  Metrics metrics(kModel);
  metrics.NameTenant(DomainId(0), "red");
  const Exposition text(metrics.Render());
  std::set<std::string> known;
  for (const auto& [key, value] : text.samples()) known.insert(key.substr(0, key.find('{')));
  const std::regex name("(vllm:|jointkv_)[a-z0-9_]+");
  std::set<std::string> asked;
  for (const auto& panel : dashboard["panels"]) {
    for (const auto& target : panel.value("targets", nlohmann::json::array())) {
      const std::string expression = target["expr"];
      for (std::sregex_iterator at(expression.begin(), expression.end(), name), end; at != end; ++at) {
        EXPECT_TRUE(known.contains(at->str())) << panel["title"] << " asks for " << at->str();
        asked.insert(at->str());
      }
    }
  }
  EXPECT_GT(asked.size(), 30u);
}

TEST(Metrics, CanBeRenderedWhileTheyChange) {
  Driver driver(TestOptions());
  Metrics metrics(kModel);
  std::atomic<bool> done = false;
  std::thread reader([&] {
    while (!done) EXPECT_FALSE(metrics.Render().empty());
  });
  driver.Submit(RandomTokens(100, 1), Greedy(50));
  while (driver.Step()) {
    metrics.Update(driver.engine());
    metrics.TokenEmitted(.01);
  }
  done = true;
  reader.join();
}

}  // namespace
}  // namespace jointkv::server
