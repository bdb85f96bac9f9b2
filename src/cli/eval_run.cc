#include "cli/eval_run.h"

#include <algorithm>
#include <map>
#include <utility>

#include "base/bytes.h"
#include "base/clock.h"
#include "cli/terminal.h"

namespace jointkv::cli {
namespace {

using engine::Engine;
using engine::RequestId;

// Every request has begun to decode once it has this many tokens.
constexpr size_t kTokensWhenDecoding = 2;

class ForcedRun {
 public:
  ForcedRun(Engine& engine, const std::vector<EncodedRequest>& requests, ExactLogits& exact, bool scored)
      : engine_(engine), requests_(requests), exact_(exact), scored_(scored), tokens_(requests.size()) {}

  Expected<EvalRun> Run(const EvalProgress& progress);

 private:
  // A row of logits, copied out of a step so that the step's time does not include the scoring.
  struct Row {
    size_t request = 0;
    size_t token = 0;  // of the continuation, which it predicts
    size_t index = 0;  // in rows_
  };

  Status SubmitAll();
  void TakeLogits(RequestId id, int position, std::span<const float> logits);
  void ScoreRows();
  void MeasureBytes();
  void CancelDone();
  Status Step();
  size_t continuation() const { return requests_.front().continuation.size(); }

  Engine& engine_;
  const std::vector<EncodedRequest>& requests_;
  ExactLogits& exact_;
  bool scored_;
  std::map<RequestId, size_t> index_;
  std::vector<size_t> tokens_;  // (requests) logits seen
  std::vector<Row> staged_;
  std::vector<float> rows_;  // (requests, n_vocab)
  std::vector<engine::Event> events_;
  size_t done_ = 0;
  bool some_ended_ = false;
  EvalRun run_;
};

Status ForcedRun::SubmitAll() {
  // Nobody leaves before all decode: whoever is done early goes on with tokens of its own.
  const auto n = static_cast<int>(requests_.size());
  int64_t prompt_tokens = 0;
  for (const EncodedRequest& request : requests_) prompt_tokens += static_cast<int64_t>(request.prompt.size());
  const int64_t prefill_steps = prompt_tokens / std::max(1, engine_.options().step_tokens - n) + 2 * n + 8;
  for (size_t i = 0; i < requests_.size(); ++i) {
    engine::Request request;
    request.prompt = requests_[i].prompt;
    request.forced = requests_[i].continuation;
    request.sampling.temperature = 0;
    request.sampling.ignore_eos = true;
    request.sampling.max_tokens = static_cast<int>(
        std::min<int64_t>(engine_.max_context(), static_cast<int64_t>(continuation()) + prefill_steps));
    if (request.prompt.size() + continuation() > static_cast<size_t>(engine_.max_context())) {
      return {StatusCode::kOutOfRange, "request " + std::to_string(i) + ": a prompt of " +
                                           std::to_string(request.prompt.size()) + " tokens and a continuation of " +
                                           std::to_string(continuation()) + " do not fit the context of " +
                                           std::to_string(engine_.max_context())};
    }
    ASSIGN_OR_RETURN(const RequestId id, engine_.Submit(std::move(request)));
    index_.emplace(id, i);
  }
  return Status::Ok();
}

void ForcedRun::TakeLogits(RequestId id, int position, std::span<const float> logits) {
  const size_t request = index_.at(id);
  const size_t token = static_cast<size_t>(position) + 1 - requests_[request].prompt.size();
  tokens_[request] = token + 1;
  if (token >= continuation()) return;
  const size_t index = staged_.size();
  rows_.resize(std::max(rows_.size(), (index + 1) * logits.size()));
  std::ranges::copy(logits, rows_.begin() + static_cast<std::ptrdiff_t>(index * logits.size()));
  staged_.push_back({request, token, index});
}

void ForcedRun::ScoreRows() {
  const auto n_vocab = static_cast<size_t>(engine_.model().n_vocab());
  for (const Row& row : staged_) {
    const std::span<const float> logits = std::span<const float>(rows_).subspan(row.index * n_vocab, n_vocab);
    const std::span<float> exact = exact_.at(row.request, row.token);
    if (scored_) {
      run_.scores.push_back(ScoreToken(exact, logits, requests_[row.request].continuation[row.token]));
    } else {
      std::ranges::copy(logits, exact.begin());
    }
    ++done_;
  }
  staged_.clear();
}

void ForcedRun::MeasureBytes() {
  Fullest& fullest = run_.fullest;
  if (fullest.all_resident) return;
  const bool resident = !some_ended_ && engine_.stats().running == static_cast<int>(requests_.size());
  const bool all = resident && std::ranges::all_of(tokens_, [](size_t n) { return n >= kTokensWhenDecoding; });
  // Nobody else will come for what is idle. In every step, as a full store would: dropped all at once, what left the
  // windows would leave slabs half empty.
  if (resident) engine_.DropPrefixCache();
  if (!all && engine_.cache().logical_bytes() <= fullest.logical_bytes) return;
  fullest = Fullest::Of(engine_);
  fullest.all_resident = all;
}

void ForcedRun::CancelDone() {
  const bool wait = !run_.fullest.all_resident && !some_ended_ && engine_.stats().preemptions == 0;
  if (wait) return;
  for (const auto& [id, request] : index_) {
    if (tokens_[request] >= continuation()) engine_.Cancel(id);
  }
}

Status ForcedRun::Step() {
  events_.clear();
  const double start_s = MonotonicSeconds();
  engine_.Step(events_);
  run_.step_s += MonotonicSeconds() - start_s;
  for (const engine::Event& event : events_) {
    if (event.finish == engine::FinishReason::kNone) continue;
    if (event.finish == engine::FinishReason::kError) return event.error;
    some_ended_ = true;
  }
  return Status::Ok();
}

Expected<EvalRun> ForcedRun::Run(const EvalProgress& progress) {
  RETURN_IF_ERROR(SubmitAll());
  engine_.ObserveLogits(
      [this](RequestId id, int, int position, std::span<const float> logits) { TakeLogits(id, position, logits); });
  Status status;
  while (status.ok() && !engine_.idle()) {
    if (Interrupted()) status = Status(StatusCode::kCancelled, "interrupted");
    if (status.ok()) status = Step();
    if (!status.ok()) break;
    ScoreRows();
    MeasureBytes();
    CancelDone();
    progress(done_, requests_.size() * continuation());
  }
  engine_.ObserveLogits(nullptr);
  RETURN_IF_ERROR(status);
  run_.fusion = engine_.fusion_stats();
  run_.engine = engine_.stats();
  return std::move(run_);
}

}  // namespace

Fullest Fullest::Of(const Engine& engine) {
  const kv::KvStats kv = engine.kv_stats();
  return {.logical_bytes = kv.logical_bytes,
          .held_bytes = kv.held_bytes - (kv.used_bytes - kv.running_bytes),
          .metadata_bytes = kv.metadata_bytes + engine.fusion_stats().metadata_bytes};
}

engine::EngineOptions EvalSetting::Apply(engine::EngineOptions options) const {
  options.fusion = fusion;
  options.kv_type = {{.type = kv_type}};
  return options;
}

Expected<ExactLogits> ExactLogits::Create(size_t requests, size_t tokens, size_t n_vocab) {
  const size_t bytes = requests * tokens * n_vocab * sizeof(float);
  const size_t limit = AvailableMemoryBytes() / 2;
  if (limit > 0 && bytes > limit) {
    return Status(StatusCode::kResourceExhausted,
                  "the exact logits of " + std::to_string(requests * tokens) + " tokens take " + FormatBytes(bytes) +
                      ", half of the free memory is " + FormatBytes(limit) +
                      ": take fewer --requests or a shorter --continuation, and more --seeds");
  }
  ExactLogits logits;
  logits.buffer_ = HugeBuffer(bytes);
  logits.tokens_ = tokens;
  logits.n_vocab_ = n_vocab;
  return logits;
}

Expected<EvalRun> RunForced(Engine& engine, const std::vector<EncodedRequest>& requests, ExactLogits& exact,
                            bool scored, const EvalProgress& progress) {
  return ForcedRun(engine, requests, exact, scored).Run(progress);
}

}  // namespace jointkv::cli
