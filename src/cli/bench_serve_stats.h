// What a run of requests against a server took, under the names that vLLM's `bench serve` gives to it.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "cli/bench_serve_stream.h"

namespace jointkv::cli {

// ttft, tpot, itl, e2el, client_queue_time or e2el_including_client_queue. Values in milliseconds.
struct ServeMetric {
  const char* name;
  const char* short_title;
  const char* title;
};
// Null for an unknown name.
const ServeMetric* FindServeMetric(const std::string& name);

struct ServeGoal {
  std::string metric;  // ttft, tpot or e2el
  double limit_ms = 0;
};

struct ServeStatsOptions {
  std::vector<std::string> metrics = {"ttft", "tpot", "itl"};
  std::vector<double> percentiles = {99};
  std::vector<ServeGoal> goals = {};  // of a good request; none: no goodput
  bool detailed = false;
  bool embeddings = false;  // no output is counted
};

struct ServeStats {
  double duration_s = 0;
  size_t completed = 0;
  size_t failed = 0;
  size_t good = 0;
  int64_t input_tokens = 0;
  int64_t cached_tokens = 0;
  int64_t output_tokens = 0;
  double output_tokens_per_s_max = 0;  // in one second of the run
  int concurrent_max = 0;
  std::vector<double> ttft_ms, tpot_ms, itl_ms, e2el_ms, queue_ms, e2el_with_queue_ms;  // of those completed

  const std::vector<double>& Values(const std::string& metric) const;
};

ServeStats ComputeServeStats(const std::vector<RequestOutcome>& outcomes, double duration_s,
                             const std::vector<ServeGoal>& goals);

// The fields of the result that the requests decide.
nlohmann::ordered_json ToJson(const ServeStats& stats, const std::vector<RequestOutcome>& outcomes,
                              const ServeStatsOptions& options);

struct ServeTableHead {
  std::optional<size_t> max_concurrency;
  std::optional<double> request_rate;
};
std::string ToTable(const ServeStats& stats, const ServeStatsOptions& options, const ServeTableHead& head);

}  // namespace jointkv::cli
