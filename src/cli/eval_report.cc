#include "cli/eval_report.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>

#include "base/bytes.h"
#include "base/check.h"

namespace jointkv::cli {
namespace {

using Json = nlohmann::ordered_json;
using joint::Policy;

double Rate(int64_t count, double seconds) { return seconds > 0 ? static_cast<double>(count) / seconds : 0; }

const char* ScopeName(const joint::FusionOptions& fusion) {
  if (fusion.across_requests && fusion.across_chunks) return "both";
  return fusion.across_requests ? "bff" : "cff";
}

// Shortest digits that read back as the same float: 0.05F is "0.05".
double Plain(float value) { return std::stod(fmt::format("{}", value)); }

Json SettingJson(const EvalContext& context, const EvalSetting& setting) {
  const joint::FusionOptions& fusion = setting.fusion;
  const bool bounded = fusion.policy == Policy::kBounded;
  const bool cosine = fusion.policy == Policy::kCosine;
  return {{"workload", context.workload},
          {"model", context.model},
          {"policy", joint::PolicyName(fusion.policy)},
          {"budget", bounded ? Json(Plain(fusion.budget)) : Json()},
          {"similarity", bounded ? Json(fusion.similarity) : Json()},
          {"residuals", bounded ? Json(fusion.residuals) : Json()},
          {"threshold", cosine ? Json(Plain(fusion.threshold)) : Json()},
          {"cosine_scope", cosine ? Json(ScopeName(fusion)) : Json()},
          {"kv_type", setting.kv_type.name()},
          {"requests", context.requests}};
}

Json RowJson(const EvalContext& context, const EvalRow& row) {
  Json json = SettingJson(context, row.setting);
  const auto spread = [](const Spread& s) { return Json{s.min, s.max}; };
  json.update({{"tokens", row.quality.tokens},
               {"prompt_tokens", row.prompt_tokens},
               {"seeds", context.seeds},
               {"compression", row.compression.mean},
               {"compression_spread", spread(row.compression)},
               {"exact_factor", row.exact_factor},
               {"fusion_factor", row.fusion_factor},
               {"codec_factor", row.codec_factor},
               {"bytes_held", row.bytes_held},
               {"metadata_bytes", row.metadata_bytes},
               {"logical_bytes", row.logical_bytes},
               {"all_resident", row.all_resident},
               {"kl_mean", row.quality.kl_mean},
               {"kl_mean_spread", spread(row.kl_mean)},
               {"kl_p99", row.quality.kl_p99},
               {"top1", row.quality.top1},
               {"ppl_ratio", row.quality.ppl_ratio},
               {"equal_token_share", row.equal_token_share ? Json(*row.equal_token_share) : Json()},
               {"worst_nmse", row.worst_nmse},
               {"blocks_offered", row.blocks_offered},
               {"blocks_fused", row.blocks_fused},
               {"blocks_residual", row.blocks_residual},
               {"blocks_rejected", row.blocks_rejected},
               {"fusion_s", row.fusion_s},
               {"fusion_share", row.step_s > 0 ? row.fusion_s / row.step_s : 0},
               {"prefill_tok_s", row.prefill_tok_s},
               {"decode_tok_s", row.decode_tok_s},
               {"preemptions", row.preemptions}});
  return json;
}

Json ContextJson(const EvalContext& context) {
  return {{"engine", "jointkv"},
          {"version", JOINTKV_VERSION},
          {"model", context.model},
          {"threads", context.threads},
          {"compute", context.compute},
          {"workload", context.workload},
          {"docs", context.docs.empty() ? Json() : Json(context.docs)},
          {"requests", context.requests},
          {"pool", context.pool},
          {"documents", context.documents},
          {"seeds", context.seeds}};
}

}  // namespace

EvalRow RowOf(const EvalResult& result, const EvalContext& context) {
  CHECK(!result.runs.empty() && result.runs.size() == result.exact_ratios.size());
  EvalRow row;
  row.setting = result.setting;
  row.codec_factor = result.setting.kv_type.factor(context.head_dim);
  const double seeds = static_cast<double>(result.runs.size());
  std::vector<TokenScore> scores;
  std::vector<double> kl_means;
  std::vector<double> compressions;
  int64_t fused = 0;
  int64_t fused_equal = 0;
  engine::EngineStats total;
  for (const EvalRun& run : result.runs) {
    scores.insert(scores.end(), run.scores.begin(), run.scores.end());
    kl_means.push_back(QualityOf(run.scores).kl_mean);
    compressions.push_back(run.fullest.ratio());
    row.bytes_held += static_cast<double>(run.fullest.held_bytes) / seeds;
    row.metadata_bytes += static_cast<double>(run.fullest.metadata_bytes) / seeds;
    row.logical_bytes += static_cast<double>(run.fullest.logical_bytes) / seeds;
    row.all_resident = row.all_resident && run.fullest.all_resident;
    row.worst_nmse = std::max(row.worst_nmse, run.fusion.worst_nmse);
    row.blocks_offered += static_cast<double>(run.fusion.offered) / seeds;
    row.blocks_fused += static_cast<double>(run.fusion.fused) / seeds;
    row.blocks_residual += static_cast<double>(run.fusion.residuals) / seeds;
    row.blocks_rejected += static_cast<double>(run.fusion.rejected) / seeds;
    row.fusion_s += run.fusion.fusion_s / seeds;
    row.step_s += run.step_s / seeds;
    row.preemptions += run.engine.preemptions;
    row.prompt_tokens += run.engine.prompt_tokens;
    fused += run.fusion.fused;
    fused_equal += run.fusion.fused_equal_tokens;
    total.prefill_tokens += run.engine.prefill_tokens;
    total.prefill_s += run.engine.prefill_s;
    total.decode_tokens += run.engine.decode_tokens;
    total.decode_s += run.engine.decode_s;
  }
  row.quality = QualityOf(scores);
  row.kl_mean = SpreadOf(kl_means);
  row.compression = SpreadOf(compressions);
  row.exact_factor = SpreadOf(result.exact_ratios).mean;
  row.fusion_factor = row.compression.mean / (row.exact_factor * row.codec_factor);
  if (fused > 0) row.equal_token_share = static_cast<double>(fused_equal) / static_cast<double>(fused);
  row.prefill_tok_s = Rate(total.prefill_tokens, total.prefill_s);
  row.decode_tok_s = Rate(total.decode_tokens, total.decode_s);
  return row;
}

std::string SettingName(const EvalSetting& setting) {
  const joint::FusionOptions& fusion = setting.fusion;
  switch (fusion.policy) {
    case Policy::kOff: return "off";
    case Policy::kBounded:
      return fmt::format("bounded {}{}{}", fusion.budget, fusion.similarity ? " similarity" : "",
                         fusion.residuals ? " residuals" : "");
    case Policy::kCosine: return fmt::format("cosine {} {}", fusion.threshold, ScopeName(fusion));
  }
  return "?";
}

nlohmann::ordered_json ToJson(const EvalContext& context, const std::vector<EvalRow>& rows) {
  Json json = ContextJson(context);
  json["continuation"] = context.continuation;
  json["results"] = Json::array();
  for (const EvalRow& row : rows) json["results"].push_back(RowJson(context, row));
  return json;
}

std::string ToTable(const EvalContext& context, const std::vector<EvalRow>& rows) {
  std::string table = fmt::format(
      "{}: {} requests, {} draws, {} tokens scored\n\n{:<24}{:>6}{:>8}{:>8}{:>8}{:>8}{:>10}{:>19}{:>9}{:>8}{:>8}"
      "{:>7}{:>8}{:>8}{:>9}{:>8}\n",
      context.workload, context.requests, context.seeds.size(), rows.empty() ? 0 : rows.front().quality.tokens,
      "policy", "kv", "x", "exact", "fusion", "codec", "held MiB", "KL mean (spread)", "KL p99", "top-1", "ppl",
      "equal", "worst", "fuse %", "prefill", "decode");
  for (const EvalRow& row : rows) {
    const Quality& q = row.quality;
    const std::string name = row.setting.kv_type.name();
    const std::string kl = fmt::format("{:.4f} ({:.4f}-{:.4f})", q.kl_mean, row.kl_mean.min, row.kl_mean.max);
    const std::string equal = row.equal_token_share ? fmt::format("{:.3f}", *row.equal_token_share) : "-";
    const double share = row.step_s > 0 ? 100 * row.fusion_s / row.step_s : 0;
    table += fmt::format(
        "{:<24}{:>6}{:>8.2f}{:>8.2f}{:>8.2f}{:>8.2f}{:>10.1f}{:>25}{:>9.3f}{:>8.3f}{:>8.4f}{:>7}{:>8.3f}{:>8.2f}{:>9."
        "0f}"
        "{:>8.0f}\n",
        SettingName(row.setting), name, row.compression.mean, row.exact_factor, row.fusion_factor, row.codec_factor,
        row.bytes_held / (1 << 20), kl, q.kl_p99, q.top1, q.ppl_ratio, equal, row.worst_nmse, share, row.prefill_tok_s,
        row.decode_tok_s);
  }
  if (std::ranges::any_of(rows, [](const EvalRow& row) { return !row.all_resident; })) {
    table += "\nnot all requests were resident at once: bytes are those of the step with the most resident tokens\n";
  }
  return table;
}

std::vector<ParetoSeries> CurvesOf(const std::vector<EvalRow>& rows) {
  std::vector<ParetoSeries> curves;
  for (const EvalRow& row : rows) {
    const joint::FusionOptions& fusion = row.setting.fusion;
    const bool bounded = fusion.policy == Policy::kBounded;
    const bool cosine = fusion.policy == Policy::kCosine;
    const std::string scope = cosine ? std::string(" ") + ScopeName(fusion) : "";
    std::string name = joint::PolicyName(fusion.policy) + scope + ", " + row.setting.kv_type.name();
    const auto same = [&name](const ParetoSeries& curve) { return curve.name == name; };
    auto curve = std::ranges::find_if(curves, same);
    if (curve == curves.end()) curve = curves.insert(curves.end(), {.name = std::move(name), .points = {}});
    curve->points.push_back({.compression = row.compression.mean,
                             .kl = row.quality.kl_mean,
                             .kl_min = row.kl_mean.min,
                             .kl_max = row.kl_mean.max,
                             .label = bounded  ? fmt::format("{}", fusion.budget)
                                      : cosine ? fmt::format("{}", fusion.threshold)
                                               : ""});
  }
  return curves;
}

nlohmann::ordered_json ToJson(const EvalContext& context, Task task, const std::vector<TaskRow>& rows) {
  Json json = ContextJson(context);
  json["task"] = TaskName(task);
  json["results"] = Json::array();
  for (const TaskRow& row : rows) {
    Json next = SettingJson(context, row.setting);
    next.update({{"task", TaskName(task)},
                 {"questions", row.questions},
                 {"right", row.right},
                 {"accuracy", row.accuracy()},
                 {"standard_error", BinomialError(row.accuracy(), row.questions)},
                 {"compression", row.compression},
                 {"decode_tok_s", row.decode_tok_s}});
    json["results"].push_back(std::move(next));
  }
  return json;
}

std::string ToTable(const EvalContext& context, Task task, const std::vector<TaskRow>& rows) {
  std::string table = fmt::format("{} as {}: {} questions in {} draws\n\n{:<24}{:>6}{:>8}{:>20}{:>9}\n", TaskName(task),
                                  context.workload, rows.empty() ? 0 : rows.front().questions, context.seeds.size(),
                                  "policy", "kv", "x", "right", "decode");
  for (const TaskRow& row : rows) {
    const double error = BinomialError(row.accuracy(), row.questions);
    table += fmt::format("{:<24}{:>6}{:>8.2f}{:>20}{:>9.0f}\n", SettingName(row.setting), row.setting.kv_type.name(),
                         row.compression, fmt::format("{:.1f} % +- {:.1f}", 100 * row.accuracy(), 100 * error),
                         row.decode_tok_s);
  }
  return table;
}

}  // namespace jointkv::cli
