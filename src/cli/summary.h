// What a run took: the table at the end, and the same as JSON.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "base/status.h"
#include "engine/engine.h"

namespace jointkv::cli {

// The value below which a share `p` (0 to 1) of the values lies, linear between neighbours: of n sorted values the one
// at index p * (n - 1), as numpy's default. 0 when there are none.
double Percentile(std::vector<double> values, double p);

double QueueMs(const engine::RequestTimes& times);
double TtftMs(const engine::RequestTimes& times);  // from submission, so time in the queue counts
// Mean time of the output tokens after the first; 0 when there was none.
double TpotMs(const engine::RequestTimes& times, int output_tokens);

struct Percentiles {
  double p50 = 0;
  double p95 = 0;
};

struct Summary {
  int64_t requests = 0;  // finished: neither failed nor cancelled
  int64_t prompt_tokens = 0;
  int64_t output_tokens = 0;
  double wall_s = 0;
  double req_s = 0;
  // The seconds of a step that does both are divided by their rows, although one row beside many costs a little more.
  double prefill_tok_s = 0;  // computed prompt tokens / seconds of prefill
  double decode_tok_s = 0;   // output tokens after each first one / seconds of decode
  Percentiles ttft_ms;
  Percentiles tpot_ms;
  int64_t kv_bytes_peak = 0;          // blocks that running sequences refer to
  int64_t kv_bytes_logical_peak = 0;  // the same tokens as private 16-bit K and V
  int running_peak = 0;
  int64_t preemptions = 0;
  int64_t prefix_cached_tokens = 0;
};

// Collects what events say. Threads: one at a time. Owns: a few numbers per request. Fails how: never.
class SummaryBuilder {
 public:
  // An event with `finish` set.
  void Add(const engine::Event& event);
  Summary Build(const engine::EngineStats& stats, double wall_s) const;

 private:
  int64_t requests_ = 0;
  std::vector<double> ttft_ms_;  // of requests
  std::vector<double> tpot_ms_;  // of choices
};

// Fields in the order and with the names of Summary.
nlohmann::ordered_json ToJson(const Summary& summary);
std::string ToTable(const Summary& summary);

// "-" is standard output.
Status WriteTextFile(const std::string& path, const std::string& text);
// What --json and --plot ask for; empty paths are left out. Complains when a file cannot be written. The exit code.
int WriteResults(const std::string& json_path, const nlohmann::ordered_json& json, const std::string& plot_path,
                 const std::string& svg);

}  // namespace jointkv::cli
