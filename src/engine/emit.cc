// From a step's logits to events: sampling, forks, ends.
#include <algorithm>

#include "base/clock.h"
#include "engine/engine_state.h"

namespace jointkv::engine {
namespace {

Status WhyNoToken(const std::optional<text::GrammarState>& grammar) {
  if (!grammar || !grammar->constrains()) return {StatusCode::kInternal, "request: the model gave no finite logit"};
  RETURN_IF_ERROR(grammar->status());
  return {StatusCode::kInvalidArgument, "grammar: no token of the vocabulary goes on from here, or none is left to it"};
}

}  // namespace

void Engine::SampleRows(std::vector<Event>& events) {
  const int n_vocab = model_->n_vocab();
  auto* logits = reinterpret_cast<float*>(logits_.data());
  for (size_t i = 0; i < logit_uses_.size(); ++i) {
    Sequence& sequence = *logit_uses_[i].sequence;
    const std::span<float> row(logits + i * n_vocab, n_vocab);
    if (logit_uses_[i].prompt_position >= 0) {
      TakePromptLogprobs(*sequence.request, logit_uses_[i].prompt_position, row);
      continue;
    }
    if (sequence.request->request.sampling.max_tokens == 0) {
      EndSequence(sequence, FinishReason::kLength, Status::Ok(), events);
      continue;
    }
    if (sequence.forked) {
      SampleOne(sequence, row, events);
      continue;
    }
    // The prompt of several choices is done: they go on apart, from the same distribution.
    const size_t first_new = running_.size();
    ForkChoices(sequence);
    std::ranges::copy(row, row_copy_.begin());
    SampleOne(sequence, row, events);
    for (size_t j = first_new; j < running_.size(); ++j) {
      std::ranges::copy(row_copy_, row.begin());
      SampleOne(*running_[j], row, events);
    }
  }
}

void Engine::ForkChoices(Sequence& first) {
  first.forked = true;
  const Request& request = first.request->request;
  const int longest = static_cast<int>(request.prompt.size()) + request.sampling.max_tokens;
  for (int choice = 1; choice < request.sampling.n; ++choice) {
    Expected<StopStringMatcher> stops = StopStringMatcher::Create(request.sampling.stop);
    CHECK(stops.ok());
    auto sequence = std::make_unique<Sequence>(first.request, choice, *tokenizer_, std::move(stops).value());
    sequence->tokens.reserve(longest + 1);
    sequence->tokens.assign(first.tokens.begin(), first.tokens.end());
    sequence->computed = first.computed;
    sequence->decodes = true;
    sequence->sampler = first.sampler->Fork(choice);
    sequence->grammar = first.grammar;
    sequence->forked = true;
    sequence->kv = cache_->Fork(first.kv, longest);
    running_.push_back(std::move(sequence));
  }
}

void Engine::SampleOne(Sequence& sequence, std::span<float> logits, std::vector<Event>& events) {
  RequestState& request = *sequence.request;
  const SamplingParams& sampling = request.request.sampling;
  if (observer_) observer_(request.id, sequence.choice, static_cast<int>(sequence.tokens.size()) - 1, logits);
  Event event;
  event.request = request.id;
  event.choice = sequence.choice;
  DeliverPromptLogprobs(request, event);
  TokenId token = sequence.sampler->Sample(logits, scratch_, sampling.logprobs >= 0 ? &event.logprobs : nullptr,
                                           sequence.grammar ? &*sequence.grammar : nullptr);
  const auto& forced = request.request.forced;
  if (static_cast<size_t>(sequence.output_tokens) < forced.size()) token = forced[sequence.output_tokens];
  if (token == Sampler::kNoToken) {
    EndSequence(sequence, FinishReason::kError, WhyNoToken(sequence.grammar), events);
    return;
  }
  const double now_s = MonotonicSeconds();
  if (request.times.first_token_s == 0) request.times.first_token_s = now_s;
  event.token = token;
  sequence.tokens.push_back(token);
  sequence.sampler->ObserveOutput(token);
  ++sequence.output_tokens;
  if (!request.request.shadow) {
    ++stats_.output_tokens;
    ++tenants_[request.request.domain].served_tokens;
  }

  const bool ends = EndsWith(sequence, token);
  if (!ends) AppendText(sequence, token, event);
  if (sequence.grammar && !sequence.grammar->status().ok()) {
    event.error = sequence.grammar->status();
    FinishSequence(sequence, FinishReason::kError, event);
  } else if (ends || sequence.stops.stopped() || (sequence.grammar && sequence.grammar->finished())) {
    FinishSequence(sequence, FinishReason::kStop, event);
  } else if (sequence.output_tokens >= sampling.max_tokens) {
    FinishSequence(sequence, FinishReason::kLength, event);
  }
  events.push_back(std::move(event));
}

// Also moves the sequence on in its grammar.
bool Engine::EndsWith(Sequence& sequence, TokenId token) const {
  const SamplingParams& sampling = sequence.request->request.sampling;
  const bool end_of_text = tokenizer_->IsEndOfGeneration(token);
  bool ends = end_of_text && !sampling.ignore_eos;
  if (sequence.grammar) {
    ends = ends || (end_of_text && sequence.grammar->constrains());
    sequence.grammar->Accept(token);
  }
  return ends || std::ranges::find(sampling.stop_tokens, token) != sampling.stop_tokens.end();
}

void Engine::AppendText(Sequence& sequence, TokenId token, Event& event) {
  const auto& visible = sequence.request->request.visible_tokens;
  piece_.clear();
  if (std::ranges::find(visible, token) != visible.end()) {
    sequence.detokenizer.AppendBytes(tokenizer_->Piece(token), piece_);
  } else {
    sequence.detokenizer.Append(token, piece_);
  }
  event.text = sequence.stops.Feed(piece_);
}

// Ends a choice: the text that was held back, the counts, and its blocks.
void Engine::FinishSequence(Sequence& sequence, FinishReason reason, Event& event) {
  RequestState& request = *sequence.request;
  if (!sequence.stops.stopped()) {
    piece_.clear();
    sequence.detokenizer.Flush(piece_);
    event.text += sequence.stops.Feed(piece_);
    event.text += sequence.stops.Finish();
  }
  request.times.finished_s = MonotonicSeconds();
  event.request = request.id;
  event.choice = sequence.choice;
  event.finish = reason;
  event.prompt_tokens = static_cast<int>(request.request.prompt.size());
  event.cached_tokens = request.cached_tokens;
  event.output_tokens = sequence.output_tokens;
  event.times = request.times;
  if (sequence.kv.valid()) cache_->Free(sequence.kv);
  sequence.kv = SequenceId();
  sequence.finished = true;
  any_finished_ = true;
  --request.open_choices;
}

// Ends the choices that a sequence stands for without a token: its own, and before the fork those to come.
void Engine::EndSequence(Sequence& sequence, FinishReason reason, const Status& error, std::vector<Event>& events) {
  const int choices = sequence.forked ? 1 : sequence.request->request.sampling.n;
  for (int i = 0; i < choices; ++i) {
    Event event;
    event.error = error;
    FinishSequence(sequence, reason, event);
    event.choice += i;
    if (reason == FinishReason::kLength) DeliverPromptLogprobs(*sequence.request, event);
    events.push_back(std::move(event));
  }
}

void Engine::RemoveFinished() {
  if (!any_finished_) return;
  any_finished_ = false;
  std::erase_if(running_, [](const auto& sequence) { return sequence->finished; });
  std::erase_if(requests_, [](const auto& item) { return item.second->open_choices <= 0; });
}

}  // namespace jointkv::engine
