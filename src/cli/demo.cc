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
#include "cli/demo_report.h"
#include "cli/engine_options.h"
#include "cli/output_files.h"
#include "cli/rag_runs.h"
#include "cli/terminal.h"

namespace jointkv::cli {
namespace {

// Of logits that each run keeps to be compared.
constexpr size_t kLogitsBytesMax = size_t{256} << 20;

struct DemoFlags {
  RagFlags rag;
  std::string summary_path;
};

// The same requests, first with fusion off and then on. The second run is made to give the output of the first, so that
// both compute the same tokens and their logits can be compared.
class Demo {
 public:
  Demo(const DemoFlags& flags, const WorkloadMaker& maker) : flags_(flags), maker_(maker) {}
  int Run();

 private:
  Status RunOne(engine::Engine& engine);
  Status KeepLogits(const engine::Engine& engine);
  Quality Compare();
  int Report();

  const DemoFlags& flags_;
  const WorkloadMaker& maker_;
  std::vector<EncodedRequest> requests_;  // their continuations are the first run's output
  std::vector<ExactLogits> logits_;       // by run, of the first tokens of the first requests
  size_t kept_requests_ = 0;
  size_t kept_tokens_ = 0;  // of each
  std::vector<DemoRun> runs_;
  bool all_ok_ = true;
};

Status Demo::KeepLogits(const engine::Engine& engine) {
  const auto n_vocab = static_cast<size_t>(engine.model().n_vocab());
  const size_t rows = std::min(kLogitsBytesMax, AvailableMemoryBytes() / 8) / (n_vocab * sizeof(float));
  kept_tokens_ = std::clamp<size_t>(rows / requests_.size(), 1, static_cast<size_t>(flags_.rag.output_tokens));
  kept_requests_ = std::min(requests_.size(), rows / kept_tokens_);
  ASSIGN_OR_RETURN(ExactLogits logits, ExactLogits::Create(kept_requests_, kept_tokens_, n_vocab));
  logits_.push_back(std::move(logits));
  return Status::Ok();
}

Status Demo::RunOne(engine::Engine& engine) {
  const bool first = runs_.empty();
  if (first) {
    ASSIGN_OR_RETURN(requests_, EncodeRag(flags_.rag, maker_, engine));
  }
  RETURN_IF_ERROR(KeepLogits(engine));
  DemoRun run;
  run.policy = engine.options().fusion.policy;
  Batch batch(engine);
  RETURN_IF_ERROR(SubmitRag(flags_.rag, requests_, batch));
  Batch::Observer observer;
  observer.on_end = [&](const Choice& choice) {
    if (first) requests_[choice.request].continuation = choice.tokens;
  };
  observer.on_step = [&] {
    if (engine.cache().logical_bytes() > run.fullest.logical_bytes) run.fullest = Fullest::Of(engine);
  };
  observer.on_logits = [&](size_t request, int position, std::span<const float> logits) {
    const size_t token = static_cast<size_t>(position) + 1 - requests_[request].prompt.size();
    if (request < kept_requests_ && token < kept_tokens_) {
      std::ranges::copy(logits, logits_.back().at(request, token).begin());
    }
  };
  batch.Run(observer);
  run.summary = batch.summary();
  run.fusion = engine.fusion_stats();
  all_ok_ = all_ok_ && batch.all_ok();
  if (!first && all_ok_ && !Interrupted()) run.quality = Compare();
  runs_.push_back(std::move(run));
  return Status::Ok();
}

Quality Demo::Compare() {
  std::vector<TokenScore> scores;
  for (size_t request = 0; request < kept_requests_; ++request) {
    for (size_t token = 0; token < kept_tokens_; ++token) {
      scores.push_back(ScoreToken(logits_[0].at(request, token), logits_[1].at(request, token),
                                  requests_[request].continuation[token]));
    }
  }
  return QualityOf(scores);
}

int Demo::Report() {
  fmt::print("\n{}", ToTable(runs_));
  std::fflush(stdout);
  if (!flags_.summary_path.empty()) {
    if (const Status status = WriteTextFile(flags_.summary_path, ToJson(runs_).dump(2) + "\n"); !status.ok()) {
      Complain("--summary " + status.message());
      return kExitFailed;
    }
  }
  if (Interrupted()) return kExitInterrupted;
  return all_ok_ ? kExitOk : kExitFailed;
}

int Demo::Run() {
  std::optional<int> quantised_rows = flags_.rag.engine.quantised_rows;
  for (engine::EngineOptions options : RagEngines(flags_.rag)) {
    options.quantised_rows = quantised_rows;
    int exit_code = kExitOk;
    const auto engine = LoadEngine(options, exit_code);
    if (engine == nullptr) return exit_code;
    // What the first engine measured on the machine holds for both, or they would differ in more than the cache.
    quantised_rows = engine->model().quantised_rows();
    if (runs_.empty()) {
      fmt::print("{}, in {} of KV memory\n", RagTitle(flags_.rag), FormatBytes(engine->kv_stats().capacity_bytes));
      std::fflush(stdout);
      ArmInterrupt();
    }
    if (const Status status = RunOne(*engine); !status.ok()) {
      Complain(status.message());
      return kExitFailed;
    }
    if (Interrupted()) break;
  }
  return Report();
}

int RunDemo(const DemoFlags& flags) {
  const Status outputs = CheckOutputs(InputsOf(flags.rag), {{"--summary", flags.summary_path}});
  const Expected<WorkloadMaker> maker =
      outputs.ok() ? WorkloadMaker::Create(flags.rag.workload) : Expected<WorkloadMaker>(outputs);
  if (!maker.ok()) {
    Complain(maker.status().message());
    return kExitUsage;
  }
  return Demo(flags, *maker).Run();
}

}  // namespace

void AddDemo(CLI::App& app, Command& run) {
  const auto flags = std::make_shared<DemoFlags>();
  CLI::App* command =
      app.add_subcommand("demo", "a finite batch of prompts over shared documents, with fusion off and on");
  AddRagFlags(*command, flags->rag);
  command->add_option("--summary", flags->summary_path, "write the summary as JSON; - for standard output")
      ->type_name("FILE");
  command->callback([&run, flags] { run = [flags] { return RunDemo(*flags); }; });
}

}  // namespace jointkv::cli
