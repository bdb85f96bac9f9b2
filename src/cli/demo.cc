#include <spdlog/fmt/fmt.h>

#include <cstdio>
#include <memory>
#include <string>

#include "base/bytes.h"
#include "cli/batch.h"
#include "cli/commands.h"
#include "cli/engine_options.h"
#include "cli/terminal.h"
#include "cli/workloads.h"
#include "text/chat_template.h"

namespace jointkv::cli {
namespace {

struct DemoFlags {
  engine::EngineOptions engine;
  WorkloadOptions workload;  // rag-pool
  int output_tokens = 64;
  uint64_t seed = 1;
  std::string summary_path;
};

Status SubmitAll(const DemoFlags& flags, const WorkloadMaker& maker, engine::Engine& engine, Batch& batch) {
  ASSIGN_OR_RETURN(const auto chat_template, text::ChatTemplate::Create(engine.tokenizer()));
  if (!chat_template->warning().empty()) Complain(chat_template->warning());
  size_t index = 0;
  for (const WorkloadRequest& drawn : maker.Draw(flags.seed)) {
    engine::Request request;
    ASSIGN_OR_RETURN(request.prompt, chat_template->EncodeChat(drawn.messages));
    request.sampling.temperature = 0;
    request.sampling.ignore_eos = true;
    request.sampling.max_tokens = flags.output_tokens;
    RETURN_IF_ERROR(batch.Submit(index++, std::move(request)));
  }
  return Status::Ok();
}

int RunDemo(const DemoFlags& flags) {
  const Expected<WorkloadMaker> maker = WorkloadMaker::Create(flags.workload);
  if (!maker.ok()) {
    Complain(maker.status().message());
    return kExitUsage;
  }
  int exit_code = kExitOk;
  const auto engine = LoadEngine(flags.engine, exit_code);
  if (engine == nullptr) return exit_code;

  fmt::print(
      "{} prompts, each a question about one of {} documents in random order, from a pool of {}; {} output tokens "
      "each\n",
      flags.workload.requests, flags.workload.documents, flags.workload.pool, flags.output_tokens);
  std::fflush(stdout);
  ArmInterrupt();
  Batch batch(*engine);
  if (const Status status = SubmitAll(flags, *maker, *engine, batch); !status.ok()) {
    Complain(status.message());
    return kExitFailed;
  }
  batch.Run({});
  const Summary summary = batch.summary();
  fmt::print("\n{}{:<22}{}\n", ToTable(summary), "resident memory", FormatBytes(ResidentBytes()));
  std::fflush(stdout);
  if (!flags.summary_path.empty()) {
    if (const Status status = WriteTextFile(flags.summary_path, ToJson(summary).dump(2) + "\n"); !status.ok()) {
      Complain("--summary " + status.message());
      return kExitFailed;
    }
  }
  if (Interrupted()) return kExitInterrupted;
  return batch.all_ok() ? kExitOk : kExitFailed;
}

}  // namespace

void AddDemo(CLI::App& app, Command& run) {
  const auto flags = std::make_shared<DemoFlags>();
  CLI::App* command = app.add_subcommand("demo", "a finite batch of prompts over shared documents, and what it took");
  const auto number = [command](const char* flag, auto& value, int max, const char* help) {
    command->add_option(flag, value, help)->check(CLI::Range(1, max))->type_name("N")->capture_default_str();
  };
  number("--requests", flags->workload.requests, 1 << 16, "prompts");
  number("--pool", flags->workload.pool, 1 << 16, "documents that prompts draw from");
  number("--documents", flags->workload.documents, 1 << 10, "documents in each prompt");
  number("--output-tokens", flags->output_tokens, 1 << 16, "of each prompt");
  command->add_option("--seed", flags->seed, "of the documents and their order")->capture_default_str();
  command->add_option("--docs", flags->workload.docs_path, "real documents: fields title, text, question, answers")
      ->type_name("FILE.jsonl");
  command->add_option("--summary", flags->summary_path, "write the summary as JSON; - for standard output")
      ->type_name("FILE");
  AddEngineFlags(*command, flags->engine);
  command->callback([&run, flags] { run = [flags] { return RunDemo(*flags); }; });
}

}  // namespace jointkv::cli
