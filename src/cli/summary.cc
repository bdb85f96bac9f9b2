#include "cli/summary.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "base/bytes.h"
#include "cli/terminal.h"

namespace jointkv::cli {
namespace {

double Rate(int64_t count, double seconds) { return seconds > 0 ? static_cast<double>(count) / seconds : 0; }

Percentiles PercentilesOf(const std::vector<double>& values) {
  return {Percentile(values, 0.5), Percentile(values, 0.95)};
}

std::string Row(const char* name, const std::string& value) { return fmt::format("{:<22}{}\n", name, value); }

}  // namespace

double Percentile(std::vector<double> values, double p) {
  if (values.empty()) return 0;
  std::ranges::sort(values);
  const double at = std::clamp(p, 0.0, 1.0) * static_cast<double>(values.size() - 1);
  const auto below = static_cast<size_t>(at);
  const size_t above = std::min(below + 1, values.size() - 1);
  return std::lerp(values[below], values[above], at - static_cast<double>(below));
}

double QueueMs(const engine::RequestTimes& times) {
  return times.started_s > 0 ? (times.started_s - times.submitted_s) * 1e3 : 0;
}

double TtftMs(const engine::RequestTimes& times) {
  return times.first_token_s > 0 ? (times.first_token_s - times.submitted_s) * 1e3 : 0;
}

double TpotMs(const engine::RequestTimes& times, int output_tokens) {
  return output_tokens > 1 ? (times.finished_s - times.first_token_s) * 1e3 / (output_tokens - 1) : 0;
}

void SummaryBuilder::Add(const engine::Event& event) {
  const bool finished = event.finish == engine::FinishReason::kStop || event.finish == engine::FinishReason::kLength;
  if (!finished) return;
  if (event.choice == 0) {
    ++requests_;
    ttft_ms_.push_back(TtftMs(event.times));
  }
  if (event.output_tokens > 1) tpot_ms_.push_back(TpotMs(event.times, event.output_tokens));
}

Summary SummaryBuilder::Build(const engine::EngineStats& stats, double wall_s) const {
  Summary summary;
  summary.requests = requests_;
  summary.prompt_tokens = stats.prompt_tokens;
  summary.output_tokens = stats.output_tokens;
  summary.wall_s = wall_s;
  summary.req_s = Rate(requests_, wall_s);
  summary.prefill_tok_s = Rate(stats.prefill_tokens, stats.prefill_s);
  summary.decode_tok_s = Rate(stats.decode_tokens, stats.decode_s);
  summary.ttft_ms = PercentilesOf(ttft_ms_);
  summary.tpot_ms = PercentilesOf(tpot_ms_);
  summary.kv_bytes_peak = static_cast<int64_t>(stats.kv_bytes_peak);
  summary.kv_bytes_logical_peak = static_cast<int64_t>(stats.kv_bytes_logical_peak);
  summary.running_peak = stats.running_peak;
  summary.preemptions = stats.preemptions;
  summary.prefix_cached_tokens = stats.prefix_cached_tokens;
  return summary;
}

nlohmann::ordered_json ToJson(const Summary& s) {
  const auto percentiles = [](const Percentiles& p) { return nlohmann::ordered_json{{"p50", p.p50}, {"p95", p.p95}}; };
  return {{"requests", s.requests},
          {"prompt_tokens", s.prompt_tokens},
          {"output_tokens", s.output_tokens},
          {"wall_s", s.wall_s},
          {"req_s", s.req_s},
          {"prefill_tok_s", s.prefill_tok_s},
          {"decode_tok_s", s.decode_tok_s},
          {"ttft_ms", percentiles(s.ttft_ms)},
          {"tpot_ms", percentiles(s.tpot_ms)},
          {"kv_bytes_peak", s.kv_bytes_peak},
          {"kv_bytes_logical_peak", s.kv_bytes_logical_peak},
          {"running_peak", s.running_peak},
          {"preemptions", s.preemptions},
          {"prefix_cached_tokens", s.prefix_cached_tokens}};
}

std::string ToTable(const Summary& s) {
  std::string table;
  table += Row("requests", fmt::format("{} in {:.2f} s, {:.2f} a second", s.requests, s.wall_s, s.req_s));
  table += Row("prompt tokens", fmt::format("{}, {} from the prefix cache", s.prompt_tokens, s.prefix_cached_tokens));
  table += Row("output tokens", fmt::format("{}", s.output_tokens));
  table += Row("prefill", fmt::format("{:.0f} tok/s", s.prefill_tok_s));
  table += Row("decode", fmt::format("{:.0f} tok/s", s.decode_tok_s));
  table += Row("time to first token", fmt::format("{:.0f} ms p50, {:.0f} ms p95", s.ttft_ms.p50, s.ttft_ms.p95));
  table += Row("time per output token", fmt::format("{:.1f} ms p50, {:.1f} ms p95", s.tpot_ms.p50, s.tpot_ms.p95));
  table += Row("KV memory, peak", fmt::format("{}; the same tokens private in 16 bit: {}", FormatBytes(s.kv_bytes_peak),
                                              FormatBytes(s.kv_bytes_logical_peak)));
  table += Row("running, peak", fmt::format("{} sequences, {} preemptions", s.running_peak, s.preemptions));
  return table;
}

Status WriteTextFile(const std::string& path, const std::string& text) {
  std::FILE* file = path == "-" ? stdout : std::fopen(path.c_str(), "w");
  if (file == nullptr) return {StatusCode::kIo, "'" + path + "': " + std::strerror(errno)};
  bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  written = (path == "-" ? std::fflush(file) : std::fclose(file)) == 0 && written;
  if (!written) return {StatusCode::kIo, "'" + path + "': " + std::strerror(errno)};
  return Status::Ok();
}

int WriteResults(const std::string& json_path, const nlohmann::ordered_json& json, const std::string& plot_path,
                 const std::string& svg) {
  const auto write = [](const char* flag, const std::string& path, const std::string& text) {
    const Status status = path.empty() ? Status::Ok() : WriteTextFile(path, text);
    if (!status.ok()) Complain(std::string(flag) + " " + status.message());
    return status.ok();
  };
  const bool written = write("--json", json_path, json.dump(2) + "\n");
  return write("--plot", plot_path, svg) && written ? kExitOk : kExitFailed;
}

}  // namespace jointkv::cli
