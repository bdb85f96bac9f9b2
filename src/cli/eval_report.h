// What an evaluation found, as table, JSON and plot.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "cli/eval_run.h"
#include "cli/eval_tasks.h"
#include "cli/pareto_svg.h"

namespace jointkv::cli {

// What all settings of one evaluation have in common.
struct EvalContext {
  std::string workload;
  std::string docs;  // empty: made up
  std::string model;
  size_t requests = 0;
  size_t pool = 0;
  size_t documents = 0;
  size_t continuation = 0;
  std::vector<uint64_t> seeds = {};
  int head_dim = 0;
  int threads = 0;
  std::string compute = {};  // precision of matrix products
};

// One setting, over all seeds.
struct EvalResult {
  EvalSetting setting;
  std::vector<EvalRun> runs = {};         // by seed
  std::vector<double> exact_ratios = {};  // by seed: 16-bit bytes / bytes kept by the exact run
};

// The figures of one setting. Means over the seeds, with their spread where it says so.
struct EvalRow {
  EvalSetting setting;
  Quality quality;  // over the tokens of all seeds
  Spread kl_mean;
  Spread compression;
  double exact_factor = 1;
  double fusion_factor = 1;
  double codec_factor = 1;
  double bytes_held = 0;
  double metadata_bytes = 0;
  double logical_bytes = 0;
  int64_t prompt_tokens = 0;
  bool all_resident = true;
  std::optional<double> equal_token_share;  // none: nothing was fused
  double worst_nmse = 0;
  double blocks_offered = 0;
  double blocks_fused = 0;
  double blocks_residual = 0;
  double blocks_rejected = 0;
  double fusion_s = 0;
  double step_s = 0;
  double prefill_tok_s = 0;
  double decode_tok_s = 0;
  int64_t preemptions = 0;
};

EvalRow RowOf(const EvalResult& result, const EvalContext& context);

// "bounded 0.05", "cosine 0.7 bff", "off"
std::string SettingName(const EvalSetting& setting);

nlohmann::ordered_json ToJson(const EvalContext& context, const std::vector<EvalRow>& rows);
std::string ToTable(const EvalContext& context, const std::vector<EvalRow>& rows);
// A curve per policy and KV type.
std::vector<ParetoSeries> CurvesOf(const std::vector<EvalRow>& rows);

// One setting on a task.
struct TaskRow {
  EvalSetting setting;
  int64_t questions = 0;
  int64_t right = 0;
  double compression = 0;  // peak of resident 16-bit bytes / peak of bytes kept
  double decode_tok_s = 0;

  double accuracy() const { return questions > 0 ? static_cast<double>(right) / static_cast<double>(questions) : 0; }
};

nlohmann::ordered_json ToJson(const EvalContext& context, Task task, const std::vector<TaskRow>& rows);
std::string ToTable(const EvalContext& context, Task task, const std::vector<TaskRow>& rows);

}  // namespace jointkv::cli
