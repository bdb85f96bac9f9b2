#include "cli/bench_serve.h"

#include <spdlog/fmt/fmt.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "cli/bench_serve_dataset.h"
#include "cli/bench_serve_http.h"
#include "cli/bench_serve_load.h"
#include "cli/bench_serve_options.h"
#include "cli/bench_serve_report.h"
#include "cli/bench_serve_stats.h"
#include "cli/output_files.h"
#include "cli/summary.h"
#include "cli/terminal.h"

namespace jointkv::cli {
namespace {

constexpr size_t kErrorsShown = 10;
constexpr double kAskTimeoutS = 10;

// Waits until the first of these paths that the server knows says yes.
Status AwaitReady(const HttpServer& server, const HttpHeaders& headers, double timeout_s) {
  const double end_s = MonotonicSeconds() + timeout_s;
  std::string last;
  while (!Interrupted()) {
    for (const char* path : {"/ready", "/health", "/v1/models"}) {
      const Expected<HttpAnswer> answer = HttpGet(server, path, headers, kAskTimeoutS);
      if (answer.ok() && answer->status == 200) return Status::Ok();
      last = answer.ok() ? fmt::format("{}: HTTP {}", path, answer->status) : answer.status().message();
      if (!answer.ok() || answer->status != 404) break;
    }
    if (MonotonicSeconds() >= end_s) {
      return {StatusCode::kIo, fmt::format("the server was not ready within {} s: {}", timeout_s, last)};
    }
    usleep(100'000);
  }
  return {StatusCode::kCancelled, "interrupted"};
}

Expected<std::string> FirstModel(const HttpServer& server, const HttpHeaders& headers) {
  const std::string path = "/v1/models";
  ASSIGN_OR_RETURN(const HttpAnswer answer, HttpGet(server, path, headers, kAskTimeoutS));
  if (answer.status != 200) return Status(StatusCode::kIo, path + ": " + ErrorMessage(answer.status, answer.body));
  const std::string model = FirstModelId(answer.body);
  if (model.empty()) return Status(StatusCode::kDataLoss, path + " names no model; name one with --model");
  return model;
}

class Progress {
 public:
  Progress(bool show, size_t total) : show_(show), total_(total) {}

  bool operator()(const LoadState& now) {
    if (show_ && line_.due()) {
      line_.Show(fmt::format("{}/{} done, {} failed, {} running", now.completed + now.failed, total_, now.failed,
                             now.running));
    }
    return !Interrupted();
  }

 private:
  bool show_;
  size_t total_;
  ProgressLine line_;
};

LoadResult Run(const ServeFlags& flags, const HttpServer& server, const std::vector<std::string>& bodies,
               const std::vector<double>& arrivals_s, const std::string& request_id_prefix) {
  LoadOptions options;
  options.max_concurrency = flags.max_concurrency.value_or(0);
  options.path = flags.endpoint;
  options.headers = flags.headers;
  options.request_id_prefix = request_id_prefix;
  options.timeout_s = flags.request_timeout_s;
  options.embeddings = flags.stats.embeddings;
  Progress progress(!flags.disable_progress, bodies.size());
  return RunLoad(server, options, bodies, arrivals_s, [&](const LoadState& now) { return progress(now); });
}

Status WarmUp(const ServeFlags& flags, const HttpServer& server, const std::string& body) {
  if (flags.num_warmups == 0) return Status::Ok();
  const std::vector<std::string> bodies(flags.num_warmups, body);
  const LoadResult result = Run(flags, server, bodies, std::vector<double>(bodies.size(), 0.0), "");
  if (result.interrupted) return {StatusCode::kCancelled, "interrupted"};
  for (const RequestOutcome& outcome : result.outcomes) {
    if (!outcome.success) return {StatusCode::kIo, "warming up: " + outcome.error};
  }
  return Status::Ok();
}

void ShowErrors(const std::vector<RequestOutcome>& outcomes) {
  size_t failed = 0;
  for (const RequestOutcome& outcome : outcomes) {
    if (outcome.success) continue;
    if (failed++ < kErrorsShown) Complain("a request failed: " + outcome.error);
  }
  if (failed > kErrorsShown) Complain(fmt::format("and {} more", failed - kErrorsShown));
}

Expected<int> RunBenchServe(ServeFlags flags) {
  RETURN_IF_ERROR(CheckOutputs({{"--dataset-path", flags.dataset.path}, {"--tokenizer", flags.dataset.tokenizer_path}},
                               {{"--save-dataset", flags.save_dataset_path}}));
  if (flags.save_dataset_path.empty()) {
    RETURN_IF_ERROR(PrepareServeResult(flags));
    for (const std::string& flag : flags.ignored) Complain(flag + " does nothing without --save-result");
  }
  ASSIGN_OR_RETURN(const std::vector<ServeRequest> requests, MakeDataset(flags.dataset));
  if (!flags.save_dataset_path.empty()) {
    RETURN_IF_ERROR(WriteTextFile(flags.save_dataset_path, ToRows(requests)));
    return kExitOk;
  }
  const std::string base_url =
      flags.base_url.empty() ? fmt::format("http://{}:{}", flags.host, flags.port) : flags.base_url;
  ASSIGN_OR_RETURN(const HttpServer server, HttpServer::Resolve(base_url, flags.tls_check));
  ArmInterrupt();
  if (flags.ready_check_timeout_s > 0) {
    RETURN_IF_ERROR(AwaitReady(server, flags.headers, flags.ready_check_timeout_s));
  }
  if (flags.body.model.empty()) {
    ASSIGN_OR_RETURN(flags.body.model, FirstModel(server, flags.headers));
  }
  std::vector<std::string> bodies;
  bodies.reserve(requests.size());
  for (const ServeRequest& request : requests) bodies.push_back(ToBody(request, flags.body));
  RETURN_IF_ERROR(WarmUp(flags, server, bodies.front()));

  const std::vector<double> arrivals_s = ArrivalTimes(bodies.size(), flags.arrival);
  const auto start = std::chrono::system_clock::now();
  const LoadResult result = Run(flags, server, bodies, arrivals_s, flags.request_id_prefix);
  ShowErrors(result.outcomes);
  const ServeStats stats = ComputeServeStats(result.outcomes, result.duration_s, flags.stats.goals);
  fmt::print("{}", ToTable(stats, flags.stats, TableHead(flags)));
  std::fflush(stdout);
  nlohmann::ordered_json metrics = ToJson(stats, result.outcomes, flags.stats);
  if (flags.arrival.ramp_up) {
    std::vector<RateChange> changes = RateChanges(*flags.arrival.ramp_up, arrivals_s);
    std::erase_if(changes, [&](const RateChange& change) { return change.at_s > result.duration_s; });
    metrics["rps_change_events"] = RateChangesJson(changes, start);
  }
  RETURN_IF_ERROR(SaveServeResult(flags, metrics, result.interrupted));
  if (result.interrupted) return kExitInterrupted;
  return stats.failed == 0 ? kExitOk : kExitFailed;
}

int ExitCode(const Expected<int>& exit_code) {
  if (exit_code.ok()) return *exit_code;
  Complain(exit_code.status().message());
  switch (exit_code.status().code()) {
    case StatusCode::kCancelled: return kExitInterrupted;
    case StatusCode::kInvalidArgument:
    case StatusCode::kOutOfRange:
    case StatusCode::kUnsupported:
    case StatusCode::kNotFound: return kExitUsage;
    default: return kExitFailed;
  }
}

}  // namespace

void AddBenchServe(CLI::App& bench, Command& run) {
  const auto flags = std::make_shared<ServeFlags>();
  CLI::App* command =
      bench.add_subcommand("serve", "load on an OpenAI server; options and result as vLLM's `bench serve`");
  AddServeFlags(*command, *flags);
  command->callback([&run, flags] { run = [flags] { return ExitCode(RunBenchServe(*flags)); }; });
}

}  // namespace jointkv::cli
