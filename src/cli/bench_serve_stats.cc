#include "cli/bench_serve_stats.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "base/check.h"
#include "cli/summary.h"

namespace jointkv::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array<ServeMetric, 6> kMetrics = {
    {{"ttft", "TTFT", "Time to First Token"},
     {"tpot", "TPOT", "Time per Output Token (excl. 1st token)"},
     {"itl", "ITL", "Inter-token Latency"},
     {"e2el", "E2EL", "End-to-end Latency"},
     {"client_queue_time", "Client Queue Time", "Client-side Queueing"},
     {"e2el_including_client_queue", "E2EL incl. Client Queue", "Queue-inclusive End-to-end Latency"}}};

double Mean(const std::vector<double>& values) {
  if (values.empty()) return 0;
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// Of the whole population, as numpy's default.
double StandardDeviation(const std::vector<double>& values) {
  const double mean = Mean(values);
  double sum = 0;
  for (const double value : values) sum += (value - mean) * (value - mean);
  return values.empty() ? 0 : std::sqrt(sum / static_cast<double>(values.size()));
}

double Rate(double count, double seconds) { return seconds > 0 ? count / seconds : 0; }

double TpotOf(const RequestOutcome& outcome) {
  if (outcome.output_tokens <= 1) return 0;
  return (outcome.latency_s - outcome.ttft_s) * 1e3 / static_cast<double>(outcome.output_tokens - 1);
}

bool IsGood(const RequestOutcome& outcome, const std::vector<ServeGoal>& goals) {
  return std::ranges::all_of(goals, [&](const ServeGoal& goal) {
    if (goal.metric == "ttft") return outcome.ttft_s * 1e3 <= goal.limit_ms;
    if (goal.metric == "tpot") return TpotOf(outcome) <= goal.limit_ms;
    CHECK(goal.metric == "e2el");
    return outcome.latency_s * 1e3 <= goal.limit_ms;
  });
}

// Events with text in the fullest second, counted from the first request's start.
double FullestSecond(const std::vector<const RequestOutcome*>& done) {
  double first = INFINITY;
  for (const RequestOutcome* outcome : done) first = std::min(first, outcome->start_s);
  std::vector<size_t> seconds;
  for (const RequestOutcome* outcome : done) {
    double at = outcome->start_s + outcome->ttft_s - first;
    for (size_t i = 0; i <= outcome->itl_s.size(); ++i) {
      if (i > 0) at += outcome->itl_s[i - 1];
      seconds.push_back(static_cast<size_t>(std::max(at, 0.0)));
    }
  }
  std::ranges::sort(seconds);
  size_t fullest = 0;
  for (auto begin = seconds.begin(); begin != seconds.end();) {
    const auto end = std::upper_bound(begin, seconds.end(), *begin);
    fullest = std::max(fullest, static_cast<size_t>(end - begin));
    begin = end;
  }
  return static_cast<double>(fullest);
}

int MostAtOnce(const std::vector<const RequestOutcome*>& done) {
  std::vector<std::pair<double, int>> changes;  // an end sorts before a start at the same time
  for (const RequestOutcome* outcome : done) {
    changes.emplace_back(outcome->start_s, 1);
    changes.emplace_back(outcome->start_s + outcome->latency_s, -1);
  }
  std::ranges::sort(changes);
  int now = 0;
  int most = 0;
  for (const auto& [time, change] : changes) most = std::max(most, now += change);
  return most;
}

std::string PercentileName(double percentile) {
  return percentile == std::floor(percentile) ? fmt::format("{:.0f}", percentile) : fmt::format("{}", percentile);
}

// An entry for each request. vLLM writes latencies and queue times without --save-detailed too.
void AddRequests(const std::vector<RequestOutcome>& outcomes, const ServeStatsOptions& options, Json& json) {
  const auto add = [&](const char* key, bool wanted, const auto& value_of) {
    if (!wanted) return;
    json[key] = Json::array();
    for (const RequestOutcome& outcome : outcomes) json[key].push_back(value_of(outcome));
  };
  const bool outputs = options.detailed && !options.embeddings;
  add("input_lens", options.detailed, [](const RequestOutcome& o) { return o.prompt_tokens; });
  add("output_lens", outputs, [](const RequestOutcome& o) { return o.success ? o.output_tokens : 0; });
  add("ttfts", outputs, [](const RequestOutcome& o) { return o.ttft_s; });
  add("itls", outputs, [](const RequestOutcome& o) { return o.itl_s; });
  add("latencies", true, [](const RequestOutcome& o) { return o.latency_s; });
  add("start_times", options.detailed, [](const RequestOutcome& o) { return o.start_s; });
  add("queue_times", true, [](const RequestOutcome& o) { return o.start_s - o.arrival_s; });
  add("generated_texts", outputs, [](const RequestOutcome& o) { return o.text; });
  add("errors", options.detailed, [](const RequestOutcome& o) { return o.error; });
}

std::string Row(const std::string& name, double value) { return fmt::format("{:<40} {:<10.2f}\n", name, value); }
std::string Row(const std::string& name, int64_t value) { return fmt::format("{:<40} {:<10}\n", name, value); }

}  // namespace

const ServeMetric* FindServeMetric(const std::string& name) {
  const auto found = std::ranges::find_if(kMetrics, [&](const ServeMetric& metric) { return name == metric.name; });
  return found == kMetrics.end() ? nullptr : &*found;
}

const std::vector<double>& ServeStats::Values(const std::string& metric) const {
  if (metric == "ttft") return ttft_ms;
  if (metric == "tpot") return tpot_ms;
  if (metric == "itl") return itl_ms;
  if (metric == "e2el") return e2el_ms;
  if (metric == "client_queue_time") return queue_ms;
  CHECK(metric == "e2el_including_client_queue");
  return e2el_with_queue_ms;
}

ServeStats ComputeServeStats(const std::vector<RequestOutcome>& outcomes, double duration_s,
                             const std::vector<ServeGoal>& goals) {
  ServeStats stats;
  stats.duration_s = duration_s;
  std::vector<const RequestOutcome*> done;
  for (const RequestOutcome& outcome : outcomes) {
    if (!outcome.success) {
      ++stats.failed;
      continue;
    }
    done.push_back(&outcome);
    if (!goals.empty() && IsGood(outcome, goals)) ++stats.good;
    stats.input_tokens += outcome.prompt_tokens;
    stats.cached_tokens += outcome.cached_tokens;
    stats.output_tokens += outcome.output_tokens;
    const double queue_s = outcome.start_s - outcome.arrival_s;
    stats.ttft_ms.push_back(outcome.ttft_s * 1e3);
    if (outcome.output_tokens > 1) stats.tpot_ms.push_back(TpotOf(outcome));
    for (const double itl_s : outcome.itl_s) stats.itl_ms.push_back(itl_s * 1e3);
    stats.e2el_ms.push_back(outcome.latency_s * 1e3);
    stats.queue_ms.push_back(queue_s * 1e3);
    stats.e2el_with_queue_ms.push_back((outcome.latency_s + queue_s) * 1e3);
  }
  stats.completed = done.size();
  stats.output_tokens_per_s_max = FullestSecond(done);
  stats.concurrent_max = MostAtOnce(done);
  return stats;
}

nlohmann::ordered_json ToJson(const ServeStats& stats, const std::vector<RequestOutcome>& outcomes,
                              const ServeStatsOptions& options) {
  const auto rate = [&](auto count) { return Rate(static_cast<double>(count), stats.duration_s); };
  Json json = {{"duration", stats.duration_s},
               {"completed", stats.completed},
               {"failed", stats.failed},
               {"total_input_tokens", stats.input_tokens}};
  if (options.embeddings) {
    json["total_input_sequences"] = stats.completed;
    json["request_throughput"] = rate(stats.completed);
    json["input_sequence_throughput"] = rate(stats.completed);
  } else {
    json["total_cached_tokens"] = stats.cached_tokens;
    json["total_output_tokens"] = stats.output_tokens;
    json["request_throughput"] = rate(stats.completed);
    json["request_goodput"] = options.goals.empty() ? Json() : Json(rate(stats.good));
    json["output_throughput"] = rate(stats.output_tokens);
  }
  json["total_token_throughput"] = rate(stats.input_tokens + stats.output_tokens);
  AddRequests(outcomes, options, json);
  if (!options.embeddings) {
    json["max_output_tokens_per_s"] = stats.output_tokens_per_s_max;
    json["max_concurrent_requests"] = stats.concurrent_max;
    json["rtfx"] = 0.0;  // of seconds of audio
  }
  for (const std::string& metric : options.metrics) {
    const std::vector<double>& values = stats.Values(metric);
    json["mean_" + metric + "_ms"] = Mean(values);
    json["median_" + metric + "_ms"] = Percentile(values, 0.5);
    json["std_" + metric + "_ms"] = StandardDeviation(values);
    for (const double percentile : options.percentiles) {
      json["p" + PercentileName(percentile) + "_" + metric + "_ms"] = Percentile(values, percentile / 100);
    }
  }
  return json;
}

std::string ToTable(const ServeStats& stats, const ServeStatsOptions& options, const ServeTableHead& head) {
  const auto rate = [&](auto count) { return Rate(static_cast<double>(count), stats.duration_s); };
  std::string table = fmt::format("{:=^50}\n", " Serving Benchmark Result ");
  table += Row("Successful requests:", static_cast<int64_t>(stats.completed));
  table += Row("Failed requests:", static_cast<int64_t>(stats.failed));
  if (head.max_concurrency) {
    table += Row("Maximum request concurrency:", static_cast<int64_t>(*head.max_concurrency));
  }
  if (head.request_rate) table += Row("Request rate configured (RPS):", *head.request_rate);
  table += Row("Benchmark duration (s):", stats.duration_s);
  table += Row("Total input tokens:", stats.input_tokens);
  if (stats.cached_tokens > 0) table += Row("Input tokens from the prefix cache:", stats.cached_tokens);
  if (!options.embeddings) table += Row("Total generated tokens:", stats.output_tokens);
  table += Row("Request throughput (req/s):", rate(stats.completed));
  if (!options.goals.empty()) table += Row("Request goodput (req/s):", rate(stats.good));
  if (options.embeddings) {
    table += Row("Input throughput (inputs/s):", rate(stats.completed));
  } else {
    table += Row("Output token throughput (tok/s):", rate(stats.output_tokens));
    table += Row("Peak output token throughput (tok/s):", stats.output_tokens_per_s_max);
    table += Row("Peak concurrent requests:", static_cast<double>(stats.concurrent_max));
  }
  table += Row("Total token throughput (tok/s):", rate(stats.input_tokens + stats.output_tokens));
  for (const std::string& name : options.metrics) {
    const ServeMetric* metric = FindServeMetric(name);
    CHECK(metric != nullptr);
    const std::vector<double>& values = stats.Values(name);
    table += fmt::format("{:-^50}\n", metric->title);
    table += Row(fmt::format("Mean {} (ms):", metric->short_title), Mean(values));
    table += Row(fmt::format("Median {} (ms):", metric->short_title), Percentile(values, 0.5));
    for (const double percentile : options.percentiles) {
      table += Row(fmt::format("P{} {} (ms):", PercentileName(percentile), metric->short_title),
                   Percentile(values, percentile / 100));
    }
  }
  return table + std::string(50, '=') + "\n";
}

}  // namespace jointkv::cli
