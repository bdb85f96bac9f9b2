#include "cli/rag_runs.h"

#include <spdlog/fmt/fmt.h>

#include <utility>

#include "cli/engine_options.h"
#include "cli/seed_option.h"
#include "cli/terminal.h"
#include "text/chat_template.h"

namespace jointkv::cli {
namespace {

// Room for five of the default model's requests, each on its own.
constexpr size_t kKvBytes = size_t{128} << 20;

}  // namespace

void AddRagFlags(CLI::App& app, RagFlags& flags) {
  const auto number = [&app](const char* flag, auto& value, int max, const char* help) {
    app.add_option(flag, value, help)->check(CLI::Range(1, max))->type_name("N")->capture_default_str();
  };
  number("--requests", flags.workload.requests, 1 << 16, "prompts");
  number("--pool", flags.workload.pool, 1 << 16, "documents that prompts draw from");
  number("--documents", flags.workload.documents, 1 << 10, "documents in each prompt");
  number("--output-tokens", flags.output_tokens, 1 << 16, "of each prompt");
  AddSeedFlag(app, flags.seed, "of the documents and their order");
  app.add_option("--docs", flags.workload.docs_path, "real documents: fields title, text, question, answers")
      ->type_name("FILE.jsonl");
  flags.engine.kv_bytes = kKvBytes;
  AddEngineFlags(app, flags.engine);
}

std::vector<NamedFile> InputsOf(const RagFlags& flags) {
  return {{"--docs", flags.workload.docs_path}, {"--model", flags.engine.model_path}};
}

std::vector<engine::EngineOptions> RagEngines(const RagFlags& flags) {
  std::vector<engine::EngineOptions> engines = {flags.engine};
  engines.front().fusion.policy = joint::Policy::kOff;
  const bool on = !flags.engine.deterministic && flags.engine.fusion.policy != joint::Policy::kOff;
  if (on) engines.push_back(flags.engine);
  return engines;
}

std::string RagTitle(const RagFlags& flags) {
  return fmt::format(
      "{} prompts, each a question about one of {} documents in random order, from a pool of {}; {} output tokens each",
      flags.workload.requests, flags.workload.documents, flags.workload.pool, flags.output_tokens);
}

Expected<std::vector<EncodedRequest>> EncodeRag(const RagFlags& flags, const WorkloadMaker& maker,
                                                const engine::Engine& engine) {
  ASSIGN_OR_RETURN(const auto chat_template, text::ChatTemplate::Create(engine.tokenizer()));
  if (!chat_template->warning().empty()) Complain(chat_template->warning());
  return EncodeWorkload(maker.Draw(flags.seed), engine.tokenizer(), *chat_template, 0);
}

Status SubmitRag(const RagFlags& flags, const std::vector<EncodedRequest>& requests, Batch& batch) {
  for (size_t i = 0; i < requests.size(); ++i) {
    engine::Request request;
    request.prompt = requests[i].prompt;
    request.forced = requests[i].continuation;
    request.sampling.temperature = 0;
    request.sampling.ignore_eos = true;
    request.sampling.max_tokens = flags.output_tokens;
    RETURN_IF_ERROR(batch.Submit(i, std::move(request)));
  }
  return Status::Ok();
}

}  // namespace jointkv::cli
