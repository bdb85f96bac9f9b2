#include <spdlog/fmt/fmt.h>

#include <cstdio>
#include <memory>
#include <string>

#include "base/cpu.h"
#include "cli/analyze_report.h"
#include "cli/analyze_run.h"
#include "cli/commands.h"
#include "cli/engine_options.h"
#include "cli/output_files.h"
#include "cli/seed_option.h"
#include "cli/summary.h"
#include "cli/terminal.h"
#include "cli/workloads.h"
#include "text/chat_template.h"

namespace jointkv::cli {
namespace {

struct AnalyzeFlags {
  engine::EngineOptions engine;
  WorkloadOptions workload = {.requests = 8};
  AnalysisOptions analysis;
  bool all_layers = false;
  std::string json_path;
  std::string plot_path;
};

Expected<Analysis> Analyse(const AnalyzeFlags& flags, const WorkloadMaker& maker) {
  engine::EngineOptions options = flags.engine;
  ProgressLine line;
  options.load_progress = LoadProgress(line);
  ASSIGN_OR_RETURN(const auto prompts, ResidentPrompts::Create(options));
  ASSIGN_OR_RETURN(const auto chat_template, text::ChatTemplate::Create(prompts->tokenizer()));
  if (!chat_template->warning().empty()) Complain(chat_template->warning());
  ASSIGN_OR_RETURN(const auto requests,
                   EncodeWorkload(maker.Draw(flags.analysis.seed), prompts->tokenizer(), *chat_template, 0));
  size_t done = 0;
  for (const EncodedRequest& request : requests) {
    if (Interrupted()) return Status(StatusCode::kCancelled, "interrupted");
    if (line.due()) line.Show(fmt::format("{}/{} prompts", done, requests.size()));
    RETURN_IF_ERROR(prompts->Add(request.prompt));
    ++done;
  }
  if (line.due()) line.Show("comparing blocks");
  return prompts->Analyse(flags.analysis);
}

int RunAnalyze(const AnalyzeFlags& flags) {
  const Expected<WorkloadMaker> maker = WorkloadMaker::Create(flags.workload);
  Status status = CheckOutputs({{"--docs", flags.workload.docs_path}, {"--model", flags.engine.model_path}},
                               {{"--json", flags.json_path}, {"--plot", flags.plot_path}});
  if (status.ok()) status = maker.status();
  if (status.ok()) status = CheckModelFile(flags.engine.model_path);
  if (!status.ok()) {
    Complain(status.message());
    return kExitUsage;
  }
  ArmInterrupt();
  const Expected<Analysis> analysis = Analyse(flags, *maker);
  if (!analysis.ok()) {
    status = analysis.status();
    Complain(status.message());
    if (status.code() == StatusCode::kCancelled) return kExitInterrupted;
    const bool usage = status.code() == StatusCode::kInvalidArgument || status.code() == StatusCode::kOutOfRange;
    return usage ? kExitUsage : kExitFailed;
  }
  const AnalysisContext context = {.model = flags.engine.model_path,
                                   .docs = flags.workload.docs_path,
                                   .requests = flags.workload.requests,
                                   .options = flags.analysis};
  std::FILE* out = flags.json_path == "-" || flags.plot_path == "-" ? stderr : stdout;
  fmt::print(out, "{}", ToTable(context, *analysis, flags.all_layers));
  std::fflush(out);
  return WriteResults(flags.json_path, ToJson(context, *analysis), flags.plot_path, ToSvg(context, *analysis));
}

}  // namespace

void AddAnalyze(CLI::App& app, Command& run) {
  const auto flags = std::make_shared<AnalyzeFlags>();
  CLI::App* command = app.add_subcommand(
      "analyze", "how alike KV blocks with equal and with random tokens are, layer by layer, in an exact cache");
  const auto number = [command](const char* flag, size_t& value, int max, const char* help) {
    command->add_option(flag, value, help)->check(CLI::Range(1, max))->type_name("N")->capture_default_str();
  };
  command->add_option("--docs", flags->workload.docs_path, "real documents: fields title, text, question; else made up")
      ->type_name("FILE.jsonl");
  number("--requests", flags->workload.requests, 4096, "prompts over shared documents");
  number("--pool", flags->workload.pool, 1 << 16, "documents that prompts draw from");
  number("--documents", flags->workload.documents, 1 << 10, "documents in each prompt");
  number("--pairs", flags->analysis.pairs, 20000, "pairs of blocks, of each sort in each layer");
  AddSeedFlag(*command, flags->analysis.seed, "of the documents, their order and the pairs");
  command->add_flag("--all-layers", flags->all_layers, "a row for each layer in the table");
  command->add_option("--json", flags->json_path, "write the distributions as JSON; - for standard output")
      ->type_name("FILE");
  command->add_option("--plot", flags->plot_path, "write them as a picture")->type_name("OUT.svg");
  AddModelFlags(*command, flags->engine);
  command->callback([&run, flags] { run = [flags] { return RunAnalyze(*flags); }; });
}

}  // namespace jointkv::cli
