#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "cli/batch.h"
#include "cli/commands.h"
#include "cli/engine_options.h"
#include "cli/eval_report.h"
#include "cli/eval_run.h"
#include "cli/output_files.h"
#include "cli/summary.h"
#include "cli/terminal.h"
#include "cli/workloads.h"
#include "text/chat_template.h"

namespace jointkv::cli {
namespace {

using engine::Engine;
using joint::Policy;

struct EvalFlags {
  engine::EngineOptions engine;
  WorkloadOptions workload;
  std::string workload_name;
  std::vector<std::string> policies = {"bounded"};
  std::vector<float> budgets;
  std::vector<float> thresholds;
  std::vector<std::string> kv_types = {"bf16"};
  joint::FusionOptions fusion;  // scope, and the defaults of the lists
  int continuation = 48;
  int seeds = 3;
  std::string task_name;
  int max_tokens = 0;
  std::string json_path;
  std::string plot_path;
  bool compute_given = false;
  bool max_running_given = false;
};

Status Bad(const std::string& message) { return {StatusCode::kInvalidArgument, message}; }

// Which settings the lists of the command line stand for.
std::vector<EvalSetting> SettingsOf(const EvalFlags& flags) {
  std::vector<EvalSetting> settings;
  for (const std::string& kv_name : flags.kv_types) {
    EvalSetting setting = {.fusion = flags.fusion, .kv_type = engine::ParseKvType(kv_name).value()};
    for (const std::string& policy : flags.policies) {
      setting.fusion.policy = joint::ParsePolicy(policy).value();
      const bool bounded = setting.fusion.policy == Policy::kBounded;
      const std::vector<float>& values = bounded ? flags.budgets : flags.thresholds;
      if (values.empty() || setting.fusion.policy == Policy::kOff) settings.push_back(setting);
      if (setting.fusion.policy == Policy::kOff) continue;
      for (const float value : values) {
        (bounded ? setting.fusion.budget : setting.fusion.threshold) = value;
        settings.push_back(setting);
      }
      setting.fusion.budget = flags.fusion.budget;
      setting.fusion.threshold = flags.fusion.threshold;
    }
  }
  return settings;
}

// The exact cache that a setting is held against: 16 bit but for f32.
codec::Codec ReferenceOf(const EvalSetting& setting) {
  return setting.kv_type.k == codec::Codec::kF32 ? codec::Codec::kF32 : codec::Codec::kBf16;
}

class Eval {
 public:
  explicit Eval(const EvalFlags& flags) : flags_(flags), options_(flags.engine), settings_(SettingsOf(flags)) {}
  int Run();

 private:
  Status Prepare();
  Status Measure();
  Status MeasureDraw(size_t draw, codec::Codec reference);
  Expected<EvalRun> RunOne(const EvalSetting& setting, size_t draw, const std::string& what, bool scored);
  Status MeasureTask();
  Status MeasureTaskDraw(size_t draw, std::vector<TaskRow>& rows);
  Status Encode(const Engine& engine, size_t draw);
  std::unique_ptr<Engine> Load(const EvalSetting& setting);
  int Report();

  const EvalFlags& flags_;
  engine::EngineOptions options_;
  std::vector<EvalSetting> settings_;
  std::optional<Task> task_;
  std::optional<WorkloadMaker> maker_;
  EvalContext context_;
  std::vector<EvalResult> results_;  // (settings)
  std::vector<TaskRow> tasks_;       // (settings), sums over the draws until they are reported
  size_t draws_ = 0;                 // measured with all settings
  std::optional<ExactLogits> exact_;
  std::vector<EncodedRequest> requests_;  // of the present draw
  int exit_code_ = kExitOk;               // of a load that failed
  std::string warning_;                   // of the chat template
};

Status Eval::Prepare() {
  WorkloadOptions workload = flags_.workload;
  if (!flags_.task_name.empty()) task_ = flags_.task_name == TaskName(Task::kGsm8k) ? Task::kGsm8k : Task::kNq;
  const char* implied = task_ == Task::kGsm8k ? "few-shot" : "rag-pool";
  const std::string name = flags_.workload_name.empty() ? implied : flags_.workload_name;
  if (task_.has_value() && name != implied) {
    return Bad(fmt::format("--workload {}: the task {} asks with {}", name, TaskName(*task_), implied));
  }
  if (task_.has_value() && !flags_.plot_path.empty()) return Bad("--plot: not with --task, which has no KL");
  if (!task_.has_value() && flags_.max_tokens > 0) return Bad("--max-tokens: only with --task");
  const auto has = [this](const char* policy) { return std::ranges::count(flags_.policies, policy) > 0; };
  if (!flags_.budgets.empty() && !has("bounded")) return Bad("--kv-budget: --policy has no bounded");
  if (!flags_.thresholds.empty() && !has("cosine")) return Bad("--kv-threshold: --policy has no cosine");
  if (options_.deterministic && (has("bounded") || has("cosine"))) {
    return Bad("--deterministic: only with --policy off, for what a block is fused with depends on what else runs");
  }
  if (!task_.has_value() && flags_.max_running_given && options_.max_running < static_cast<int>(workload.requests)) {
    return Bad(fmt::format("--max-running {}: all {} requests run at once, but for --task", options_.max_running,
                           workload.requests));
  }
  RETURN_IF_ERROR(CheckOutputs({{"--docs", workload.docs_path}, {"--model", options_.model_path}},
                               {{"--json", flags_.json_path}, {"--plot", flags_.plot_path}}));
  workload.workload = ParseWorkload(name).value();
  Expected<WorkloadMaker> maker = WorkloadMaker::Create(workload);
  if (!maker.ok()) return {maker.status().code(), "--workload " + name + ": " + maker.status().message()};
  maker_ = std::move(maker).value();

  context_ = {.workload = name,
              .docs = workload.docs_path,
              .model = options_.model_path,
              .requests = workload.requests,
              .pool = workload.pool,
              .documents = workload.documents,
              .continuation = static_cast<size_t>(flags_.continuation)};
  for (int seed = 1; seed <= flags_.seeds; ++seed) context_.seeds.push_back(static_cast<uint64_t>(seed));
  for (const EvalSetting& setting : settings_) {
    results_.push_back({.setting = setting});
    tasks_.push_back({.setting = setting});
  }
  // Two caches that differ a little also round activations to 8 bits in their own ways, and the KL would show that.
  if (!flags_.compute_given && !options_.quantised_rows.has_value()) options_.quantised_rows = 0;
  if (!task_.has_value()) options_.max_running = std::max(options_.max_running, static_cast<int>(workload.requests));
  return Status::Ok();
}

std::unique_ptr<Engine> Eval::Load(const EvalSetting& setting) {
  auto engine = LoadEngine(setting.Apply(options_), exit_code_);
  if (engine == nullptr) return nullptr;
  if (!flags_.compute_given && engine->model().precision() == dense::Precision::kInt8) {
    options_.precision = dense::NativePrecision();
    engine.reset();
    return Load(setting);
  }
  // What the first engine measured on the machine holds for all, or they would differ in more than the cache.
  options_.quantised_rows = engine->model().quantised_rows();
  options_.kv_bytes = engine->kv_stats().capacity_bytes;
  context_.head_dim = engine->model().hyperparameters().head_dim;
  context_.threads = engine->threads();
  context_.compute = dense::PrecisionName(engine->model().precision());
  return engine;
}

Status Eval::Encode(const Engine& engine, size_t draw) {
  ASSIGN_OR_RETURN(const auto chat_template, text::ChatTemplate::Create(engine.tokenizer()));
  if (chat_template->warning() != warning_) {
    warning_ = chat_template->warning();
    Complain(warning_);
  }
  const size_t tokens = task_.has_value() ? 0 : context_.continuation;
  ASSIGN_OR_RETURN(requests_,
                   EncodeWorkload(maker_->Draw(context_.seeds[draw]), engine.tokenizer(), *chat_template, tokens));
  return Status::Ok();
}

Expected<EvalRun> Eval::RunOne(const EvalSetting& setting, size_t draw, const std::string& what, bool scored) {
  const auto engine = Load(setting);
  if (engine == nullptr) return Status(StatusCode::kInternal, "");
  if (!scored) {
    RETURN_IF_ERROR(Encode(*engine, draw));
    const auto n_vocab = static_cast<size_t>(engine->model().n_vocab());
    if (!exact_.has_value()) {
      ASSIGN_OR_RETURN(exact_, ExactLogits::Create(requests_.size(), context_.continuation, n_vocab));
    }
  }
  ProgressLine line;
  const auto show = [&](size_t done, size_t total) {
    if (!line.due()) return;
    constexpr size_t kWidth = 30;
    line.Show(fmt::format("draw {}/{}, {} [{:<{}}] {}/{} tokens", draw + 1, context_.seeds.size(), what,
                          std::string(done * kWidth / total, '#'), kWidth, done, total));
  };
  return RunForced(*engine, requests_, *exact_, scored, show);
}

// The settings that are held against one exact cache, on one draw of the workload.
Status Eval::MeasureDraw(size_t draw, codec::Codec reference) {
  const auto concerns = [reference](const EvalSetting& setting) { return ReferenceOf(setting) == reference; };
  if (std::ranges::none_of(settings_, concerns)) return Status::Ok();
  EvalSetting exact;
  exact.fusion.policy = Policy::kOff;
  exact.kv_type = {reference, reference};
  ASSIGN_OR_RETURN(const EvalRun exact_run, RunOne(exact, draw, "exact cache", false));
  const double exact_ratio = exact_run.fullest.ratio() / exact.kv_type.factor(context_.head_dim);
  for (size_t i = 0; i < settings_.size(); ++i) {
    if (!concerns(settings_[i])) continue;
    const std::string what = fmt::format("setting {}/{}, {} {}", i + 1, settings_.size(), SettingName(settings_[i]),
                                         settings_[i].kv_type.name());
    ASSIGN_OR_RETURN(EvalRun run, RunOne(settings_[i], draw, what, true));
    results_[i].runs.push_back(std::move(run));
    results_[i].exact_ratios.push_back(exact_ratio);
  }
  return Status::Ok();
}

Status Eval::Measure() {
  for (; draws_ < context_.seeds.size(); ++draws_) {
    RETURN_IF_ERROR(MeasureDraw(draws_, codec::Codec::kBf16));
    RETURN_IF_ERROR(MeasureDraw(draws_, codec::Codec::kF32));
  }
  return Status::Ok();
}

Status Eval::MeasureTask() {
  for (; draws_ < context_.seeds.size(); ++draws_) {
    std::vector<TaskRow> rows = tasks_;
    RETURN_IF_ERROR(MeasureTaskDraw(draws_, rows));
    tasks_ = std::move(rows);
  }
  return Status::Ok();
}

// Adds one draw to the rows of all settings.
Status Eval::MeasureTaskDraw(size_t draw, std::vector<TaskRow>& rows) {
  const int max_tokens = flags_.max_tokens > 0 ? flags_.max_tokens : *task_ == Task::kGsm8k ? 256 : 32;
  for (TaskRow& row : rows) {
    const auto engine = Load(row.setting);
    if (engine == nullptr) return {StatusCode::kInternal, ""};
    RETURN_IF_ERROR(Encode(*engine, draw));
    Batch batch(*engine);
    for (size_t i = 0; i < requests_.size(); ++i) {
      if (requests_[i].answers.empty()) return Bad("--docs: there are no answers to hold the output against");
      engine::Request request;
      request.prompt = requests_[i].prompt;
      request.sampling.temperature = 0;
      request.sampling.max_tokens = max_tokens;
      request.sampling.stop = {"\nProblem:", "\nQuestion:"};  // a model that goes on with a problem of its own
      RETURN_IF_ERROR(batch.Submit(i, std::move(request)));
    }
    Status failed;
    batch.Run({.on_text = {}, .on_end = [&](const Choice& choice) {
                 if (choice.end.finish == engine::FinishReason::kError) failed = choice.end.error;
                 row.right += IsRight(*task_, choice.text, requests_[choice.request].answers);
                 ++row.questions;
               }});
    if (Interrupted()) return {StatusCode::kCancelled, "interrupted"};
    RETURN_IF_ERROR(failed);
    const Summary summary = batch.summary();
    row.compression += static_cast<double>(summary.kv_bytes_logical_peak) /
                       static_cast<double>(std::max<int64_t>(1, summary.kv_bytes_peak));
    row.decode_tok_s += summary.decode_tok_s;
  }
  return Status::Ok();
}

// Of all draws that were measured with every setting.
int Eval::Report() {
  std::FILE* out = flags_.json_path == "-" || flags_.plot_path == "-" ? stderr : stdout;
  context_.seeds.resize(draws_);
  if (task_.has_value()) {
    for (TaskRow& row : tasks_) {
      row.compression /= static_cast<double>(draws_);
      row.decode_tok_s /= static_cast<double>(draws_);
    }
    fmt::print(out, "{}", ToTable(context_, *task_, tasks_));
    return WriteResults(flags_.json_path, ToJson(context_, *task_, tasks_), "", "");
  }
  std::vector<EvalRow> rows;
  int64_t preemptions = 0;
  for (EvalResult& result : results_) {
    result.runs.resize(draws_);
    result.exact_ratios.resize(draws_);
    rows.push_back(RowOf(result, context_));
    preemptions += rows.back().preemptions;
  }
  fmt::print(out, "{}", ToTable(context_, rows));
  std::fflush(out);
  if (preemptions > 0) {
    Complain(fmt::format("{} preemptions: the bytes held say little, give more memory with --kv-bytes", preemptions));
  }
  const std::string title =
      fmt::format("{}, {} requests: compression and quality", context_.workload, context_.requests);
  return WriteResults(flags_.json_path, ToJson(context_, rows), flags_.plot_path, ParetoSvg(title, CurvesOf(rows)));
}

int Eval::Run() {
  if (const Status status = Prepare(); !status.ok()) {
    Complain(status.message());
    return kExitUsage;
  }
  ArmInterrupt();
  const Status status = task_.has_value() ? MeasureTask() : Measure();
  if (status.ok()) return Report();
  if (exit_code_ == kExitOk) Complain(status.message());  // else LoadEngine has said why
  // What was measured before a Ctrl-C, or before a draw that failed, counts.
  if (draws_ > 0) {
    Complain(fmt::format("results of {} of {} draws", draws_, context_.seeds.size()));
    if (const int code = Report(); code != kExitOk) return code;
  }
  if (exit_code_ != kExitOk) return exit_code_;
  if (status.code() == StatusCode::kCancelled) return kExitInterrupted;
  const bool usage = status.code() == StatusCode::kOutOfRange || status.code() == StatusCode::kInvalidArgument;
  return usage ? kExitUsage : kExitFailed;
}

}  // namespace

void AddEval(CLI::App& app, Command& run) {
  const auto flags = std::make_shared<EvalFlags>();
  CLI::App* command =
      app.add_subcommand("eval", "compression and quality of KV cache settings against the exact cache");
  const auto number = [command](const char* flag, auto& value, int max, const char* help) {
    command->add_option(flag, value, help)->check(CLI::Range(1, max))->type_name("N")->capture_default_str();
  };
  const auto words = [command](const char* flag, std::vector<std::string>& values, std::vector<std::string> known,
                               const char* type, const char* help) {
    command->add_option(flag, values, help)
        ->delimiter(',')
        ->allow_extra_args(false)
        ->check(CLI::IsMember(std::move(known)).description(""))
        ->type_name(type)
        ->capture_default_str();
  };
  const auto shares = [command](const char* flag, std::vector<float>& values, float shown_default, const char* help) {
    command->add_option(flag, values, help)
        ->delimiter(',')
        ->allow_extra_args(false)
        ->check(CLI::Range(1e-6F, 1.0F))
        ->type_name("X,X,...")
        ->default_str(fmt::format("{}", shown_default));
  };
  command->add_option("--workload", flags->workload_name, "what the requests look like")
      ->check(CLI::IsMember({"rag-pool", "unique", "few-shot", "system-prompt", "wiki", "samples"}).description(""))
      ->type_name("rag-pool|unique|few-shot|system-prompt|wiki|samples")
      ->default_str("rag-pool");
  command
      ->add_option("--docs", flags->workload.docs_path,
                   "real documents, else they are made up: JSONL with title, text, question, answers; with question, "
                   "answer for few-shot; plain text for wiki")
      ->type_name("FILE");
  number("--requests", flags->workload.requests, 4096, "requests at once");
  number("--pool", flags->workload.pool, 1 << 16, "documents or problems that prompts draw from");
  number("--documents", flags->workload.documents, 1 << 10, "documents or problems in each prompt");
  words("--policy", flags->policies, {"off", "bounded", "cosine"}, "off|bounded|cosine,...", "how blocks are fused");
  shares("--kv-budget", flags->budgets, flags->fusion.budget, "bounded: error budgets");
  shares("--kv-threshold", flags->thresholds, flags->fusion.threshold, "cosine: least cosines of key blocks");
  AddFusionScopeFlags(*command, flags->fusion);
  command
      ->add_option("--kv-type", flags->kv_types, "how keys and values are stored: bf16, f16, f32, q8, q4, or K/V apart")
      ->delimiter(',')
      ->type_name("K[/V],...")
      ->default_str("bf16")
      ->check([](const std::string& text) {
        const Expected<engine::KvType> type = engine::ParseKvType(text);
        return type.ok() ? std::string() : type.status().message();
      });
  number("--continuation", flags->continuation, 1 << 16, "forced and scored tokens of each request");
  number("--seeds", flags->seeds, 1000, "draws of the workload");
  command->add_option("--task", flags->task_name, "score generated answers instead: gsm8k (few-shot) or nq (rag-pool)")
      ->check(CLI::IsMember({"gsm8k", "nq"}).description(""))
      ->type_name("gsm8k|nq");
  command->add_option("--max-tokens", flags->max_tokens, "of each answer of a task")
      ->check(CLI::Range(1, 1 << 16))
      ->type_name("N")
      ->default_str("256 for gsm8k, 32 for nq");
  command->add_option("--json", flags->json_path, "write the results as JSON; - for standard output")
      ->type_name("FILE");
  command->add_option("--plot", flags->plot_path, "write compression against KL as a picture")->type_name("OUT.svg");
  AddEngineFlagsButKv(*command, flags->engine);
  command->get_option("--compute")
      ->description(
          "precision of matrix products; auto, when asked for: as for the other commands, which may round "
          "activations to 8 bits: a noise of about 0.002 in the KL")
      ->default_str("auto without int8");
  command->get_option("--quantised-rows")->default_str("0; with --compute measured at load");
  command->callback([&run, flags, command] {
    flags->compute_given = command->count("--compute") > 0;
    flags->max_running_given = command->count("--max-running") > 0;
    run = [flags] { return Eval(*flags).Run(); };
  });
}

}  // namespace jointkv::cli
