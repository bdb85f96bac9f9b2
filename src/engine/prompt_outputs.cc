// What the pass over a prompt gives besides the first token: logprobs of its tokens, or one vector for all of it.
#include <algorithm>

#include "engine/engine_state.h"

namespace jointkv::engine {

Status Engine::ReadPooling() {
  // GGUF's numbers: 0 none, 1 mean, 2 first token, 3 last token, 4 rank. Most decoders name none.
  const std::string key = gguf::ArchitectureName(model_->hyperparameters().architecture) + std::string(".pooling_type");
  ASSIGN_OR_RETURN(const uint32_t type, file_->GetU32Or(key, 0));
  pooling_ = type <= 1 ? Pooling::kMean : type == 3 ? Pooling::kLast : Pooling::kOther;
  return Status::Ok();
}

Status Engine::CheckPromptOutputs(const Request& request) const {
  const int limit = options_.sampling_limits.logprobs_max;
  if (request.prompt_logprobs < -1 || request.prompt_logprobs > limit) {
    return {StatusCode::kOutOfRange, "prompt_logprobs: " + std::to_string(request.prompt_logprobs) +
                                         ", must be from -1 to " + std::to_string(limit)};
  }
  if (!request.embed) return Status::Ok();
  if (pooling_ == Pooling::kOther) {
    return {StatusCode::kUnsupported, "embed: the model's pooling is neither mean nor last token"};
  }
  if (request.sampling.max_tokens != 0 || request.sampling.n != 1 || request.prompt_logprobs >= 0) {
    return {StatusCode::kInvalidArgument, "embed: max_tokens must be 0, n 1 and prompt_logprobs off"};
  }
  return Status::Ok();
}

// Of `rows` next rows, as many as the step's room for prompt logits allows.
int Engine::RowsWithinLogits(const Sequence& sequence, int rows, int& logit_rows_left) const {
  const RequestState& request = *sequence.request;
  if (!request.NeedsPromptLogprobs()) return rows;
  // Row i gives the logprob of token i + 1; the last one gives none.
  const int first = std::max(request.known_logprobs - 1, 0);
  const int without = std::max(0, first - sequence.computed);
  rows = std::min(rows, without + logit_rows_left);
  logit_rows_left -= std::max(0, rows - without);
  return rows;
}

void Engine::PlanPromptOutputs(Sequence& sequence, const attention::RowSpan& span) {
  const RequestState& request = *sequence.request;
  const int prompt = static_cast<int>(request.request.prompt.size());
  const int first = sequence.computed;
  if (request.NeedsPromptLogprobs()) {
    for (int i = std::max(first, request.known_logprobs - 1); i < std::min(first + span.rows, prompt - 1); ++i) {
      logit_rows_.push_back(span.first_row + i - first);
      logit_uses_.push_back({&sequence, i});
    }
  }
  if (!request.request.embed) return;
  const int from = pooling_ == Pooling::kLast ? prompt - 1 : request.pooled_rows;
  for (int i = std::max(first, from); i < first + span.rows; ++i) hidden_rows_.push_back(span.first_row + i - first);
}

void Engine::TakePromptLogprobs(RequestState& request, int position, std::span<const float> logits) {
  auto& known = request.prompt_logprobs;
  if (known.empty()) {
    known.reserve(request.request.prompt.size());
    known.emplace_back();
  }
  CHECK(position + 1 == static_cast<int>(known.size()));
  TokenLogprobs(logits, request.request.prompt[position + 1], request.request.prompt_logprobs, scratch_,
                known.emplace_back());
  request.known_logprobs = static_cast<int>(known.size());
}

void Engine::DeliverPromptLogprobs(RequestState& request, Event& event) {
  if (request.request.prompt_logprobs < 0 || event.choice != 0 || request.prompt_logprobs_delivered) return;
  request.prompt_logprobs_delivered = true;
  if (request.prompt_logprobs.empty()) request.prompt_logprobs.emplace_back();  // a prompt of one token
  request.known_logprobs = static_cast<int>(request.prompt_logprobs.size());
  event.prompt_logprobs = std::move(request.prompt_logprobs);
}

void Engine::PoolHidden(std::vector<Event>& events) {
  if (hidden_rows_.empty()) return;
  const auto d_model = static_cast<size_t>(model_->hyperparameters().d_model);
  const auto* hidden = reinterpret_cast<const float*>(hidden_.data());
  size_t next = 0;  // of hidden_rows_
  for (const PlannedSpan& planned : planned_) {
    Sequence& sequence = *planned.sequence;
    RequestState& request = *sequence.request;
    const int end = planned.span.first_row + planned.span.rows;
    if (!request.request.embed) continue;
    request.pooled.resize(d_model);
    for (; next < hidden_rows_.size() && hidden_rows_[next] < end; ++next, ++request.pooled_rows) {
      for (size_t i = 0; i < d_model; ++i) request.pooled[i] += static_cast<double>(hidden[next * d_model + i]);
    }
    if (sequence.Remaining() > 0) continue;
    Event event;
    event.embedding.resize(d_model);
    for (size_t i = 0; i < d_model; ++i) {
      event.embedding[i] = static_cast<float>(request.pooled[i] / request.pooled_rows);
    }
    FinishSequence(sequence, FinishReason::kLength, event);
    events.push_back(std::move(event));
  }
}

}  // namespace jointkv::engine
