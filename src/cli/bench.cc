#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "cli/bench_capacity.h"
#include "cli/bench_engine.h"
#include "cli/bench_serve.h"
#include "cli/commands.h"
#include "cli/engine_options.h"
#include "cli/machine_peaks.h"
#include "cli/output_files.h"
#include "cli/summary.h"
#include "cli/terminal.h"

namespace jointkv::cli {
namespace {

struct BenchFlags {
  engine::EngineOptions engine;
  BenchOptions bench;
  std::string json_path;
};

struct Peaks {
  double read_gb_s = 0;
  double bf16_gflop_s = 0;
  double f32_gflop_s = 0;
};

// All that some layer has, in the order of layers.
std::string KvTypeNames(const kv::KvShape& shape) {
  std::vector<std::string> names;
  for (int layer = 0; layer < shape.n_layers(); ++layer) {
    const engine::KvType type = {shape.sealed_codec(2 * layer), shape.sealed_codec(2 * layer + 1)};
    if (std::ranges::find(names, type.name()) == names.end()) names.push_back(type.name());
  }
  return fmt::format("{}", fmt::join(names, ", "));
}

double Share(double value, double peak) { return peak > 0 ? value / peak : 0; }

nlohmann::ordered_json ToJson(const engine::Engine& engine, const Peaks& peaks,
                              const std::vector<BenchResult>& results) {
  nlohmann::ordered_json json = {
      {"engine", "jointkv"},
      {"version", JOINTKV_VERSION},
      {"model", engine.file().path()},
      {"threads", engine.threads()},
      {"compute", dense::PrecisionName(engine.model().precision())},
      {"quantised_rows", engine.model().quantised_rows()},
      {"kv_type", KvTypeNames(engine.cache().shape())},
      {"step_tokens", engine.options().step_tokens},
      {"deterministic", engine.options().deterministic},
      {"machine",
       {{"read_gb_s", peaks.read_gb_s}, {"bf16_gflop_s", peaks.bf16_gflop_s}, {"f32_gflop_s", peaks.f32_gflop_s}}},
      {"results", nlohmann::ordered_json::array()}};
  for (const BenchResult& r : results) {
    json["results"].push_back({{"kind", r.kind},
                               {"batch", r.batch},
                               {"context", r.context},
                               {"tokens", r.tokens},
                               {"tok_s", r.tok_s},
                               {"tok_s_min", r.tok_s_min},
                               {"tok_s_max", r.tok_s_max},
                               {"gb_s", r.gb_s},
                               {"gflop_s", r.gflop_s},
                               {"attention_share", r.attention_share},
                               {"attention_plan_share", r.attention_plan_share},
                               {"attention_gflop_s", r.attention_gflop_s}});
  }
  return json;
}

void PrintHeader(std::FILE* out, const Peaks& peaks) {
  fmt::print(out, "machine: reads {:.0f} GB/s", peaks.read_gb_s);
  if (peaks.bf16_gflop_s > 0) fmt::print(out, ", bf16 {:.0f} GFLOP/s", peaks.bf16_gflop_s);
  if (peaks.f32_gflop_s > 0) fmt::print(out, ", f32 {:.0f} GFLOP/s", peaks.f32_gflop_s);
  fmt::print(out, "\n{:<8}{:>6}{:>9}{:>10}{:>18}{:>14}{:>17}{:>13}{:>9}\n", "kind", "batch", "context", "tok/s",
             "min-max", "GB/s (share)", "GFLOP/s (share)", "attention %", "GFLOP/s");
}

void PrintRow(std::FILE* out, const Peaks& peaks, const BenchResult& r, bool show_share) {
  const std::string range = fmt::format("{:.1f}-{:.1f}", r.tok_s_min, r.tok_s_max);
  const std::string bytes = fmt::format("{:.1f} ({:.0f} %)", r.gb_s, 100 * Share(r.gb_s, peaks.read_gb_s));
  std::string flops = fmt::format("{:.0f}", r.gflop_s);
  if (show_share) flops += fmt::format(" ({:.0f} %)", 100 * Share(r.gflop_s, peaks.bf16_gflop_s));
  fmt::print(out, "{:<8}{:>6}{:>9}{:>10.1f}{:>18}{:>14}{:>17}{:>13.1f}{:>9.0f}\n", r.kind, r.batch, r.context, r.tok_s,
             range, bytes, flops, 100 * r.attention_share, r.attention_gflop_s);
  std::fflush(out);
}

Status RunCases(EngineBench& bench, const BenchOptions& options, const std::function<void(const BenchResult&)>& take) {
  RETURN_IF_ERROR(bench.Prefill(options.prompt_lengths.front()).status());  // warms up caches and clock
  for (const int length : options.prompt_lengths) {
    ASSIGN_OR_RETURN(const BenchResult result, bench.Prefill(length));
    take(result);
  }
  for (const int context : options.contexts) {
    for (const int batch : options.batches) {
      ASSIGN_OR_RETURN(const BenchResult result, bench.Decode(batch, context, options.decode_tokens));
      take(result);
    }
  }
  return Status::Ok();
}

int RunBench(const BenchFlags& flags) {
  const Status outputs = CheckOutputs({{"--model", flags.engine.model_path}}, {{"--json", flags.json_path}});
  if (!outputs.ok()) {
    Complain(outputs.message());
    return kExitUsage;
  }
  engine::EngineOptions options = flags.engine;
  options.prefix_cache = false;
  options.max_running = std::max(options.max_running, *std::ranges::max_element(flags.bench.batches));
  int exit_code = kExitOk;
  const auto engine = LoadEngine(options, exit_code);
  if (engine == nullptr) return exit_code;

  std::FILE* out = flags.json_path == "-" ? stderr : stdout;
  const Peaks peaks = {ReadBandwidthGbS(engine->threads()), Bf16PeakGflopS(engine->threads()),
                       F32PeakGflopS(engine->threads())};
  const bool show_share = engine->model().precision() != dense::Precision::kF32 && peaks.bf16_gflop_s > 0;
  EngineBench bench(*engine, flags.bench.repeat);
  std::vector<BenchResult> results;
  ArmInterrupt();
  PrintHeader(out, peaks);
  const Status status = RunCases(bench, flags.bench, [&](const BenchResult& result) {
    PrintRow(out, peaks, result, show_share);
    results.push_back(result);
  });
  if (!status.ok()) Complain(status.message());
  // What was measured before a Ctrl-C, or before a case that does not fit, counts.
  if (!flags.json_path.empty() && !results.empty()) {
    const std::string json = ToJson(*engine, peaks, results).dump(2) + "\n";
    if (const Status written = WriteTextFile(flags.json_path, json); !written.ok()) {
      Complain("--json " + written.message());
      return kExitFailed;
    }
  }
  switch (status.code()) {
    case StatusCode::kOk: return kExitOk;
    case StatusCode::kCancelled: return kExitInterrupted;
    case StatusCode::kOutOfRange: return kExitUsage;
    default: return kExitFailed;
  }
}

}  // namespace

void AddBench(CLI::App& app, Command& run) {
  const auto flags = std::make_shared<BenchFlags>();
  CLI::App* bench = app.add_subcommand("bench", "measure speed");
  bench->require_subcommand(1);
  CLI::App* command = bench->add_subcommand("engine", "prefill and decode speed over prompt lengths and batch sizes");
  const auto list = [command](const char* flag, std::vector<int>& values, int max, const char* help) {
    command->add_option(flag, values, help)
        ->delimiter(',')
        ->allow_extra_args(false)
        ->check(CLI::Range(1, max))
        ->type_name("N,N,...")
        ->capture_default_str();
  };
  list("--prompt-lengths", flags->bench.prompt_lengths, 1 << 20, "prompts to prefill, one at a time");
  list("--batches", flags->bench.batches, 4096, "sequences to decode at once");
  list("--context", flags->bench.contexts, 1 << 20, "prompt tokens of each sequence that decodes");
  command->add_option("--decode-tokens", flags->bench.decode_tokens, "timed decode steps")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str();
  command->add_option("--repeat", flags->bench.repeat, "runs of each case; the median counts")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_option("--json", flags->json_path, "write the results as JSON; - for standard output")
      ->type_name("FILE");
  AddEngineFlags(*command, flags->engine);
  // No prompt comes twice, and as many sequences run as --batches says.
  for (const char* without_effect : {"--no-prefix-cache", "--max-running"}) {
    command->remove_option(command->get_option(without_effect));
  }
  command->callback([&run, flags] { run = [flags] { return RunBench(*flags); }; });
  AddBenchCapacity(*bench, run);
  AddBenchServe(*bench, run);
}

}  // namespace jointkv::cli
