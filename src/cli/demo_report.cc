#include "cli/demo_report.h"

#include <spdlog/fmt/fmt.h>

#include <functional>

#include "base/bytes.h"

namespace jointkv::cli {
namespace {

double FusedShare(const joint::FusionStats& fusion) {
  return fusion.offered > 0 ? static_cast<double>(fusion.fused) / static_cast<double>(fusion.offered) : 0;
}

size_t HeldBytes(const DemoRun& run) { return run.fullest.held_bytes + run.fullest.metadata_bytes; }

nlohmann::ordered_json RunJson(const DemoRun& run) {
  nlohmann::ordered_json json = ToJson(run.summary);
  json["kv_bytes_held"] = HeldBytes(run);
  json["kv_bytes_logical"] = run.fullest.logical_bytes;
  json["compression"] = run.fullest.ratio();
  json["fused_share"] = FusedShare(run.fusion);
  json["worst_nmse"] = run.fusion.worst_nmse;
  if (run.quality.tokens > 0) {
    json["kl_tokens"] = run.quality.tokens;
    json["kl_mean"] = run.quality.kl_mean;
    json["kl_p99"] = run.quality.kl_p99;
    json["top1"] = run.quality.top1;
  }
  return json;
}

}  // namespace

std::string ToTable(std::span<const DemoRun> runs) {
  std::string table;
  const auto row = [&](const std::string& name, const std::function<std::string(const DemoRun&)>& value) {
    table += fmt::format("{:<27}", name);
    for (const DemoRun& run : runs) table += fmt::format("{:>18}", value(run));
    table += "\n";
  };
  row("fusion of KV blocks", [](const DemoRun& run) { return joint::PolicyName(run.policy); });
  row("requests", [](const DemoRun& run) { return fmt::format("{}", run.summary.requests); });
  row("prompt tokens", [](const DemoRun& run) { return fmt::format("{}", run.summary.prompt_tokens); });
  row("  from the prefix cache",
      [](const DemoRun& run) { return fmt::format("{}", run.summary.prefix_cached_tokens); });
  row("output tokens", [](const DemoRun& run) { return fmt::format("{}", run.summary.output_tokens); });
  row("seconds", [](const DemoRun& run) { return fmt::format("{:.2f}", run.summary.wall_s); });
  row("requests a second", [](const DemoRun& run) { return fmt::format("{:.2f}", run.summary.req_s); });
  row("prefill, tok/s", [](const DemoRun& run) { return fmt::format("{:.0f}", run.summary.prefill_tok_s); });
  row("decode, tok/s", [](const DemoRun& run) { return fmt::format("{:.0f}", run.summary.decode_tok_s); });
  row("first token, ms: p50, p95", [](const DemoRun& run) {
    return fmt::format("{:.0f}, {:.0f}", run.summary.ttft_ms.p50, run.summary.ttft_ms.p95);
  });
  row("output token, ms: p50, p95", [](const DemoRun& run) {
    return fmt::format("{:.1f}, {:.1f}", run.summary.tpot_ms.p50, run.summary.tpot_ms.p95);
  });
  row("running at once, peak", [](const DemoRun& run) { return fmt::format("{}", run.summary.running_peak); });
  row("preemptions", [](const DemoRun& run) { return fmt::format("{}", run.summary.preemptions); });
  row("KV memory, fullest", [](const DemoRun& run) { return FormatBytes(HeldBytes(run)); });
  row("  private in 16 bit", [](const DemoRun& run) { return FormatBytes(run.fullest.logical_bytes); });
  row("  compression", [](const DemoRun& run) { return fmt::format("{:.2f}", run.fullest.ratio()); });
  row("blocks fused", [](const DemoRun& run) { return fmt::format("{:.0f} %", 100 * FusedShare(run.fusion)); });
  if (runs.empty() || runs.back().quality.tokens == 0) return table;
  const auto scored = [](const DemoRun& run, const std::string& text) { return run.quality.tokens > 0 ? text : "-"; };
  row("KL against off, mean", [&](const DemoRun& r) { return scored(r, fmt::format("{:.4f}", r.quality.kl_mean)); });
  row("same most likely token",
      [&](const DemoRun& r) { return scored(r, fmt::format("{:.1f} %", 100 * r.quality.top1)); });
  row("  tokens compared", [&](const DemoRun& r) { return scored(r, fmt::format("{}", r.quality.tokens)); });
  return table;
}

nlohmann::ordered_json ToJson(std::span<const DemoRun> runs) {
  nlohmann::ordered_json json = ToJson(runs.back().summary);
  for (const DemoRun& run : runs) json[joint::PolicyName(run.policy)] = RunJson(run);
  return json;
}

}  // namespace jointkv::cli
