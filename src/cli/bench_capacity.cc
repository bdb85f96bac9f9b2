#include "cli/bench_capacity.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>

#include <nlohmann/json.hpp>

#include "base/bytes.h"
#include "cli/batch.h"
#include "cli/engine_options.h"
#include "cli/model_size.h"
#include "cli/output_files.h"
#include "cli/rag_runs.h"
#include "cli/summary.h"
#include "cli/terminal.h"

namespace jointkv::cli {

void CapacityMeter::AfterStep() {
  const engine::EngineStats stats = engine_.stats();
  if (stats.preemptions == 0) held_ = stats.running_peak;
  const bool only_decodes = stats.steps > last_.steps && stats.prefill_tokens == last_.prefill_tokens;
  if (only_decodes) {
    steps_.push_back({.requests = static_cast<double>(stats.decode_tokens - last_.decode_tokens),
                      .seconds = stats.decode_s - last_.decode_s,
                      .attention_s = stats.attention_s - last_.attention_s,
                      .attention_plan_s = stats.attention_plan_s - last_.attention_plan_s,
                      .kv_bytes = static_cast<double>(engine_.cache().running_bytes()),
                      .attention_flops = StepFlops(static_cast<double>(stats.decode_tokens - last_.decode_tokens))});
  }
  last_ = stats;
}

// Of `queries`, each of which sees as much as the sequences that run hold on average.
double CapacityMeter::StepFlops(double queries) const {
  const kv::KvCache& cache = engine_.cache();
  const double tokens = static_cast<double>(cache.logical_bytes()) / cache.shape().logical_token_bytes();
  const int running = std::max(1, engine_.stats().running);
  return queries * AttentionFlops(engine_.model().hyperparameters(), tokens / running);
}

CapacityMeter::Decoding CapacityMeter::decoding() const {
  Decoding mean;
  double n = 0;
  for (const Decoding& step : steps_) {
    if (10 * step.requests < 9 * held_) continue;
    ++n;
    // Running means.
    mean.requests += (step.requests - mean.requests) / n;
    mean.seconds += (step.seconds - mean.seconds) / n;
    mean.attention_s += (step.attention_s - mean.attention_s) / n;
    mean.attention_plan_s += (step.attention_plan_s - mean.attention_plan_s) / n;
    mean.kv_bytes += (step.kv_bytes - mean.kv_bytes) / n;
    mean.attention_flops += (step.attention_flops - mean.attention_flops) / n;
  }
  return mean;
}

namespace {

struct CapacityFlags {
  RagFlags rag;
  std::string json_path;
};

struct CapacityResult {
  joint::Policy policy = joint::Policy::kOff;
  int held = 0;
  CapacityMeter::Decoding decoding;
  double fusion_share = 0;  // of the time of all steps
  Summary summary;
};

double Ratio(double value, double base) { return base > 0 ? value / base : 0; }

nlohmann::ordered_json ToJson(const CapacityFlags& flags, size_t kv_bytes, const std::vector<CapacityResult>& results) {
  nlohmann::ordered_json json = {
      {"model", flags.rag.engine.model_path},      {"kv_bytes", kv_bytes},
      {"requests", flags.rag.workload.requests},   {"pool", flags.rag.workload.pool},
      {"documents", flags.rag.workload.documents}, {"output_tokens", flags.rag.output_tokens},
      {"results", nlohmann::ordered_json::array()}};
  for (const CapacityResult& result : results) {
    json["results"].push_back({{"policy", joint::PolicyName(result.policy)},
                               {"held", result.held},
                               {"held_ratio", Ratio(result.held, results.front().held)},
                               {"decode_requests", result.decoding.requests},
                               {"decode_tok_s", result.decoding.tok_s()},
                               {"decode_ratio", Ratio(result.decoding.tok_s(), results.front().decoding.tok_s())},
                               {"decode_step_s", result.decoding.seconds},
                               {"attention_s", result.decoding.attention_s},
                               {"attention_plan_s", result.decoding.attention_plan_s},
                               {"kv_bytes_read", result.decoding.kv_bytes},
                               {"attention_gb_s", result.decoding.attention_gb_s()},
                               {"attention_gflop_s", result.decoding.attention_gflop_s()},
                               {"fusion_share", result.fusion_share},
                               {"summary", ToJson(result.summary)}});
  }
  return json;
}

void PrintRow(std::FILE* out, const CapacityResult& result, const CapacityResult& base) {
  const CapacityMeter::Decoding& decoding = result.decoding;
  fmt::print(
      out,
      "{:<9}{:>6}{:>8.2f}{:>14.1f}{:>10.0f}{:>8.2f}{:>13.1f}{:>11.1f}{:>9.1f}{:>7.1f}{:>9.1f}{:>10.2f}{:>13}{:>9.1f}\n",
      joint::PolicyName(result.policy), result.held, Ratio(result.held, base.held), decoding.requests, decoding.tok_s(),
      Ratio(decoding.tok_s(), base.decoding.tok_s()), 1e3 * decoding.attention_s, 1e3 * decoding.seconds,
      decoding.kv_bytes / 1e6, decoding.attention_gb_s(), decoding.attention_gflop_s(), result.summary.req_s,
      result.summary.preemptions, 100 * result.fusion_share);
  std::fflush(out);
}

Expected<CapacityResult> RunOne(const CapacityFlags& flags, const WorkloadMaker& maker, engine::Engine& engine) {
  ASSIGN_OR_RETURN(const std::vector<EncodedRequest> requests, EncodeRag(flags.rag, maker, engine));
  Batch batch(engine);
  RETURN_IF_ERROR(SubmitRag(flags.rag, requests, batch));
  CapacityMeter meter(engine);
  Status failed;
  Batch::Observer observer;
  observer.on_step = [&] { meter.AfterStep(); };
  observer.on_end = [&](const Choice& choice) {
    if (choice.end.finish == engine::FinishReason::kError) failed = choice.end.error;
  };
  batch.Run(observer);
  if (Interrupted()) return Status(StatusCode::kCancelled, "interrupted");
  RETURN_IF_ERROR(failed);
  const engine::EngineStats stats = engine.stats();
  return CapacityResult{.policy = engine.options().fusion.policy,
                        .held = meter.held(),
                        .decoding = meter.decoding(),
                        .fusion_share = Ratio(engine.fusion_stats().fusion_s, stats.prefill_s + stats.decode_s),
                        .summary = batch.summary()};
}

int RunCapacity(const CapacityFlags& flags) {
  const Status outputs = CheckOutputs(InputsOf(flags.rag), {{"--json", flags.json_path}});
  const Expected<WorkloadMaker> maker =
      outputs.ok() ? WorkloadMaker::Create(flags.rag.workload) : Expected<WorkloadMaker>(outputs);
  if (!maker.ok()) {
    Complain(maker.status().message());
    return kExitUsage;
  }
  std::FILE* out = flags.json_path == "-" ? stderr : stdout;
  std::vector<CapacityResult> results;
  size_t kv_bytes = 0;
  std::optional<int> quantised_rows = flags.rag.engine.quantised_rows;
  for (engine::EngineOptions options : RagEngines(flags.rag)) {
    options.quantised_rows = quantised_rows;
    int exit_code = kExitOk;
    const auto engine = LoadEngine(options, exit_code);
    if (engine == nullptr) return exit_code;
    quantised_rows = engine->model().quantised_rows();
    kv_bytes = engine->kv_stats().capacity_bytes;
    if (results.empty()) {
      ArmInterrupt();
      fmt::print(
          out,
          "{}, in {} of KV memory\n\n{:<9}{:>6}{:>8}{:>14}{:>10}{:>8}{:>13}{:>11}{:>9}{:>7}{:>9}{:>10}{:>13}{:>9}\n",
          RagTitle(flags.rag), FormatBytes(kv_bytes), "fusion", "held", "ratio", "decoding then", "tok/s", "ratio",
          "attention ms", "of step ms", "KV MB", "GB/s", "GFLOP/s", "req/s", "preemptions", "fusing %");
      std::fflush(out);
    }
    const Expected<CapacityResult> result = RunOne(flags, *maker, *engine);
    if (!result.ok()) {
      Complain(result.status().message());
      return result.status().code() == StatusCode::kCancelled ? kExitInterrupted : kExitFailed;
    }
    results.push_back(*result);
    PrintRow(out, results.back(), results.front());
  }
  return WriteResults(flags.json_path, ToJson(flags, kv_bytes, results), "", "");
}

}  // namespace

void AddBenchCapacity(CLI::App& bench, Command& run) {
  const auto flags = std::make_shared<CapacityFlags>();
  CLI::App* command = bench.add_subcommand(
      "capacity", "how many requests over shared documents the KV memory holds at once, with fusion off and on");
  flags->rag.workload.requests = 64;
  AddRagFlags(*command, flags->rag);
  command->add_option("--json", flags->json_path, "write the results as JSON; - for standard output")
      ->type_name("FILE");
  command->callback([&run, flags] { run = [flags] { return RunCapacity(*flags); }; });
}

}  // namespace jointkv::cli
