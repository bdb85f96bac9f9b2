#include "cli/bench_engine.h"

#include <algorithm>
#include <utility>

#include "base/clock.h"
#include "cli/model_size.h"
#include "cli/summary.h"
#include "cli/terminal.h"

namespace jointkv::cli {

using engine::Event;
using engine::FinishReason;

EngineBench::EngineBench(engine::Engine& engine, int repeat) : engine_(engine), repeat_(repeat) {
  const text::Tokenizer& tokenizer = engine.tokenizer();
  for (TokenId token = 0; token < tokenizer.n_vocab(); ++token) {
    if (!tokenizer.IsSpecial(token) && !tokenizer.IsEndOfGeneration(token)) ordinary_.push_back(token);
  }
  const MatrixSize matrices = MatricesOf(engine.file(), engine.model().precision());
  matrix_weights_ = static_cast<size_t>(matrices.elements);
  matrix_bytes_ = matrices.file_bytes;
}

Expected<std::vector<TokenId>> EngineBench::RandomPrompt(int length) {
  if (ordinary_.empty()) {
    return Status(StatusCode::kUnsupported, "bench: the vocabulary of " +
                                                std::to_string(engine_.tokenizer().n_vocab()) +
                                                " tokens has none that is neither special nor end of generation");
  }
  std::vector<TokenId> prompt(static_cast<size_t>(length));
  for (TokenId& token : prompt) {
    // xorshift64: any draw will do that never repeats a prompt.
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    token = ordinary_[static_cast<size_t>((random_ >> 20) % ordinary_.size())];
  }
  return prompt;
}

// Steps until nothing is left. Fails when a request did.
Status EngineBench::Drain(std::vector<Event>& events) {
  Status failed;
  while (!engine_.idle()) {
    events.clear();
    engine_.Step(events);
    for (const Event& event : events) {
      if (event.finish == FinishReason::kError) failed = event.error;
    }
  }
  return failed;
}

EngineBench::Run EngineBench::RunSince(const engine::EngineStats& start, double seconds) const {
  const engine::EngineStats now = engine_.stats();
  return {seconds, now.attention_s - start.attention_s, now.attention_plan_s - start.attention_plan_s};
}

Expected<EngineBench::Run> EngineBench::PrefillOnce(int length) {
  engine::Request request;
  ASSIGN_OR_RETURN(request.prompt, RandomPrompt(length));
  request.sampling.temperature = 0;
  request.sampling.ignore_eos = true;
  request.sampling.max_tokens = 1;
  const engine::EngineStats start = engine_.stats();
  const double start_s = MonotonicSeconds();
  RETURN_IF_ERROR(engine_.Submit(std::move(request)).status());
  std::vector<Event> events;
  RETURN_IF_ERROR(Drain(events));
  return RunSince(start, MonotonicSeconds() - start_s);
}

Expected<EngineBench::Run> EngineBench::DecodeOnce(int batch, int context, int tokens) {
  // While the last prompts are computed the first sequences decode already: one token a step, and not more steps than
  // the prompts would take if each began its own.
  const int step_tokens = engine_.options().step_tokens;
  const int64_t before = int64_t{batch} * (context / step_tokens + 2);
  const int64_t longest = context + before + tokens;
  if (longest > engine_.max_context()) {
    return Status(StatusCode::kOutOfRange, "bench: " + std::to_string(batch) + " sequences of " +
                                               std::to_string(context) + " tokens need a context of " +
                                               std::to_string(longest) + ", the limit is " +
                                               std::to_string(engine_.max_context()));
  }
  const int64_t preemptions = engine_.stats().preemptions;
  std::vector<engine::RequestId> ids;
  for (int i = 0; i < batch; ++i) {
    engine::Request request;
    ASSIGN_OR_RETURN(request.prompt, RandomPrompt(context));
    request.sampling.temperature = 0;
    request.sampling.ignore_eos = true;
    request.sampling.max_tokens = static_cast<int>(before) + tokens;
    ASSIGN_OR_RETURN(const engine::RequestId id, engine_.Submit(std::move(request)));
    ids.push_back(id);
  }
  std::vector<Event> events;
  engine::EngineStats start;
  double start_s = 0;
  Run run;
  int timed = -1;  // steps in which all decoded, after the first
  while (timed < tokens && !engine_.idle() && !Interrupted()) {
    events.clear();
    engine_.Step(events);
    const double end_s = MonotonicSeconds();
    if (events.size() == static_cast<size_t>(batch)) ++timed;
    if (timed == 0) {
      start = engine_.stats();
      start_s = end_s;
    }
    run = RunSince(start, end_s - start_s);
  }
  for (const engine::RequestId id : ids) engine_.Cancel(id);
  RETURN_IF_ERROR(Drain(events));
  if (Interrupted()) return Status(StatusCode::kCancelled, "bench: interrupted");
  if (timed < tokens || engine_.stats().preemptions != preemptions) {
    return Status(StatusCode::kResourceExhausted,
                  "bench: " + std::to_string(batch) + " sequences of " + std::to_string(longest) +
                      " tokens do not fit the KV memory together: give more with --kv-bytes");
  }
  return run;
}

Expected<BenchResult> EngineBench::Prefill(int length) {
  std::vector<Run> runs;
  for (int i = 0; i < repeat_; ++i) {
    if (Interrupted()) return Status(StatusCode::kCancelled, "bench: interrupted");
    ASSIGN_OR_RETURN(const Run run, PrefillOnce(length));
    runs.push_back(run);
  }
  return Median({.kind = "prefill", .batch = 1, .context = length, .tokens = length}, length, runs);
}

Expected<BenchResult> EngineBench::Decode(int batch, int context, int tokens) {
  std::vector<Run> runs;
  for (int i = 0; i < repeat_; ++i) {
    ASSIGN_OR_RETURN(const Run run, DecodeOnce(batch, context, tokens));
    runs.push_back(run);
  }
  return Median({.kind = "decode", .batch = batch, .context = context, .tokens = tokens},
                static_cast<double>(batch) * tokens, runs);
}

BenchResult EngineBench::Median(BenchResult result, double tokens, const std::vector<Run>& runs) const {
  std::vector<double> rates;
  Run sum;
  for (const Run& run : runs) {
    rates.push_back(tokens / run.seconds);
    sum.seconds += run.seconds;
    sum.attention_s += run.attention_s;
    sum.attention_plan_s += run.attention_plan_s;
  }
  result.tok_s = Percentile(rates, 0.5);
  result.tok_s_min = std::ranges::min(rates);
  result.tok_s_max = std::ranges::max(rates);
  result.attention_share = sum.attention_s / sum.seconds;
  result.attention_plan_share = sum.attention_plan_s / sum.seconds;
  AddTraffic(result);
  return result;
}

void EngineBench::AddTraffic(BenchResult& result) const {
  const models::Model& model = engine_.model();
  const gguf::Hyperparameters& hp = model.hyperparameters();
  const codec::Codec codec = engine_.cache().shape().layout.codec;
  const bool prefill = result.kind == "prefill";
  const int rows = prefill ? std::min(result.context, engine_.options().step_tokens) : result.batch;
  const size_t packed = model.packed_bytes() > 0 ? model.packed_bytes() : matrix_bytes_;
  const size_t weight_bytes = rows <= model.quantised_rows() ? matrix_bytes_ : packed;
  const double context = prefill ? result.context / 2.0 : result.context + result.tokens / 2.0;
  const double step_kv_bytes =
      prefill ? 0 : static_cast<double>(KvSequenceBytes(hp, codec, static_cast<int64_t>(context))) * rows;
  const double weights = static_cast<double>(matrix_weights_) - (prefill ? static_cast<double>(OutputElements(hp)) : 0);
  const double steps_s = result.tok_s / rows;
  result.gb_s = steps_s * (static_cast<double>(weight_bytes) + step_kv_bytes) / 1e9;
  const double attention_flops = AttentionFlops(hp, context);
  result.gflop_s = result.tok_s * (2 * weights + attention_flops) / 1e9;
  result.attention_gflop_s = result.tok_s * attention_flops / result.attention_share / 1e9;
}

}  // namespace jointkv::cli
