// Which rows of which sequences the next step computes: cancel, admission, planning, preemption.
#include <algorithm>

#include "base/clock.h"
#include "engine/engine_state.h"

namespace jointkv::engine {

namespace {

// Where memory is short, prompts that fuse or are encoded go on by so many rows at a time: each step's rows lie as
// they were written until then.
constexpr int kRowsWhereShort = 64;

// Block table slots that are looked at to see who holds how much: about a millisecond.
constexpr int64_t kSlotsPerPreemption = int64_t{1} << 16;

}  // namespace

void Engine::DropCancelled(std::vector<Event>& events) {
  if (!any_cancelled_) return;
  any_cancelled_ = false;
  const auto end = [&](Sequence& sequence) {
    if (sequence.request->cancelled) EndSequence(sequence, FinishReason::kCancelled, Status::Ok(), events);
  };
  for (auto& sequence : running_) end(*sequence);
  for (auto& [domain, tenant] : tenants_) {
    for (auto& sequence : tenant.waiting) end(*sequence);
    std::erase_if(tenant.waiting, [](const auto& sequence) { return sequence->finished; });
  }
  RemoveFinished();
}

bool Engine::Fuses(const Sequence& sequence) const { return fusion_->enabled() && sequence.request->request.kv_fusion; }

// Bytes that the rest of a prompt will take and keep. Rows of the next step, `private_rows` of which older prompts
// left, lie private and not encoded before fusion sees them; of the others fusion will leave as much as it did of
// earlier prompts. A prompt that gets no row of that step, were it as short as it may be, counts as private: by the
// time it does, more is known. Of a sequence that was preempted it is known already.
size_t Engine::ExpectedBytes(const Sequence& sequence, int tokens, int& private_rows) const {
  const int first = std::min(tokens, private_rows);
  private_rows -= first;
  const double kept = first > 0 && Fuses(sequence) ? sequence.kept_share.value_or(kept_share_.value()) : 1;
  const size_t not_encoded_yet = cache_->WrittenBytes(first) - cache_->MinimumBytes(first);
  return not_encoded_yet + static_cast<size_t>(kept * static_cast<double>(cache_->MinimumBytes(tokens)) +
                                               (1 - kept) * static_cast<double>(cache_->MinimumBytes(first)));
}

Engine::Tenant* Engine::NextTenant() {
  Tenant* next = nullptr;
  for (auto& [domain, tenant] : tenants_) {
    if (tenant.waiting.empty()) continue;
    if (next == nullptr || tenant.served_tokens < next->served_tokens) next = &tenant;
  }
  return next;
}

void Engine::Admit() {
  while (AdmitNext()) {
  }
}

bool Engine::AdmitNext() {
  Tenant* tenant = NextTenant();
  if (tenant == nullptr) return false;
  Sequence& sequence = *tenant->waiting.front();
  const SamplingParams& sampling = sequence.request->request.sampling;
  const int slots = sequence.forked ? 1 : sampling.n;
  int running = 0;
  for (const auto& other : running_) running += other->forked ? 1 : other->request->request.sampling.n;
  if (running + slots > options_.max_running) return false;
  // Reserve: every running sequence may open another block before anything ends.
  size_t expected = cache_->WrittenBytes(codec::kBlockTokensMax) * (running + slots);
  int private_rows = std::min(options_.step_tokens, kRowsWhereShort);
  for (const auto& other : running_) {
    expected += ExpectedBytes(*other, std::max(0, other->Remaining() - 1), private_rows);
  }
  expected += ExpectedBytes(sequence, static_cast<int>(sequence.tokens.size()), private_rows);
  while (!running_.empty() && !cache_->HasRoomFor(0, expected)) {
    if (!FuseEarly()) return false;
  }

  const int longest = static_cast<int>(sequence.request->request.prompt.size()) + sampling.max_tokens;
  sequence.kv = cache_->Create(sequence.request->request.domain, longest,
                               fusion_->SharingOf(sequence.request->request.kv_fusion));
  sequence.computed = cache_->AdoptPrefix(sequence.kv, sequence.tokens, !sequence.request->NeedsWholePrompt());
  RequestState& request = *sequence.request;
  if (!request.started) {
    request.started = true;
    sequence.tokens.reserve(longest + 1);
    sequence.sampler.emplace(sampling, model_->n_vocab(), end_tokens_, 0);
    sequence.sampler->ObservePrompt(request.request.prompt);
    request.times.started_s = MonotonicSeconds();
    request.cached_tokens = sequence.computed;
    CountStart(sequence, *tenant);
  }
  running_.push_back(std::move(tenant->waiting.front()));
  tenant->waiting.pop_front();
  return true;
}

void Engine::CountStart(const Sequence& sequence, Tenant& tenant) {
  const Request& request = sequence.request->request;
  const auto prompt_tokens = static_cast<int64_t>(request.prompt.size());
  if (request.shadow) {
    shadow_query_tokens_ += prompt_tokens;
    shadow_hit_tokens_ += sequence.computed;
    return;
  }
  stats_.prompt_tokens += prompt_tokens;
  stats_.prefix_cached_tokens += sequence.computed;
  fair_clock_ = std::max(fair_clock_, tenant.served_tokens);
  tenant.served_tokens += prompt_tokens;
}

// Chooses this step's rows and reserves their slots. Decoding sequences first, oldest first, then prompts.
void Engine::Plan() {
  planned_.clear();
  for (auto& sequence : running_) sequence->planned_rows = 0;
  for (plan_next_ = 0; plan_next_ < running_.size();) {
    Sequence& sequence = *running_[plan_next_++];
    if (sequence.Remaining() == 1) Reserve(sequence, 1);
  }
  int decoding = 0;
  for (const auto& sequence : running_) decoding += sequence->planned_rows;
  // Prompts go on by a row also where decoding takes the whole budget.
  int budget = std::max(1, options_.step_tokens - decoding);
  int prompt_logit_rows = kPromptLogitRows;
  for (plan_next_ = 0; plan_next_ < running_.size() && budget > 0;) {
    Sequence& sequence = *running_[plan_next_++];
    if (sequence.planned_rows > 0 || sequence.Remaining() <= 1) continue;
    int rows = RowsWithinLogits(sequence, std::min(budget, sequence.Remaining()), prompt_logit_rows);
    if (rows == 0) continue;
    // A rest of one row would count as decoding next time, before older prompts: take one row less instead.
    if (sequence.Remaining() - rows == 1 && rows > 1) --rows;
    budget -= Reserve(sequence, rows);
  }
  step_tokens_.clear();
  step_spans_.clear();
  logit_rows_.clear();
  logit_uses_.clear();
  hidden_rows_.clear();
  for (auto& sequence : running_) {
    if (sequence->planned_rows == 0) continue;
    const attention::RowSpan span = {sequence->kv, static_cast<int>(step_tokens_.size()), sequence->planned_rows,
                                     sequence->computed};
    const auto first = sequence->tokens.begin() + sequence->computed;
    step_tokens_.insert(step_tokens_.end(), first, first + span.rows);
    step_spans_.push_back(span);
    planned_.push_back({sequence.get(), span, sequence->decodes});
    PlanPromptOutputs(*sequence, span);
    if (span.rows == sequence->Remaining() && !sequence->request->request.embed) {
      logit_rows_.push_back(span.first_row + span.rows - 1);
      logit_uses_.push_back({sequence.get(), -1});
    }
  }
}

// Reserves slots for the next rows of a sequence and returns how many: where they do not fit, what waits is fused or
// encoded, a prompt of which some will be takes fewer rows, and sequences are preempted, in this order. 0 when the
// sequence itself had to go, or stands alone and not one row fits (alone, any prompt takes fewer: sliding windows may
// give back blocks between shorter steps).
int Engine::Reserve(Sequence& sequence, int rows) {
  const auto tokens = std::span<const TokenId>(sequence.tokens).subspan(sequence.computed);
  while (rows > 0 && !cache_->Append(sequence.kv, tokens.first(rows))) {
    if (FuseEarly()) continue;
    if (rows > kRowsWhereShort && (Fuses(sequence) || fusion_->encodes())) {
      rows = std::max(rows / 2, kRowsWhereShort);
      continue;
    }
    if (Sequence* victim = Victim()) {
      Preempt(*victim);
      if (victim == &sequence) return 0;
    } else {
      rows /= 2;
    }
  }
  sequence.planned_rows = rows;
  return rows;
}

// Who gives way: the youngest sequence of the domain that holds the most bytes, which is at least a fair share; where
// two hold the same, the youngest. Never the oldest of all, so that one always proceeds. Null: there is no other.
Engine::Sequence* Engine::Victim() const {
  if (running_.size() < 2) return nullptr;
  const auto domain_of = [](const auto& sequence) { return sequence->request->request.domain; };
  const DomainId first = domain_of(running_.front());
  if (std::ranges::all_of(running_, [&](const auto& sequence) { return domain_of(sequence) == first; })) {
    return running_.back().get();
  }
  const std::map<DomainId, double> held = cache_->sharing_stats(kSlotsPerPreemption).domain_bytes;
  Sequence* victim = nullptr;
  double most = -1;
  for (size_t i = running_.size() - 1; i > 0; --i) {
    const double bytes = held.at(domain_of(running_[i]));
    if (bytes <= most) continue;
    most = bytes;
    victim = running_[i].get();
  }
  return victim;
}

// Back to the head of its queue: it will be computed again, from the prefix cache as far as that still reaches.
void Engine::Preempt(Sequence& sequence) {
  const auto before = static_cast<double>(cache_->running_bytes());
  cache_->Free(sequence.kv);
  if (sequence.computed > 0) {
    const double freed = before - static_cast<double>(cache_->running_bytes());
    sequence.kept_share = std::min(1.0, freed / static_cast<double>(cache_->MinimumBytes(sequence.computed)));
  }
  sequence.kv = SequenceId();
  sequence.computed = 0;
  sequence.unfused = {};
  sequence.decodes = false;
  sequence.planned_rows = 0;
  const auto found = std::ranges::find_if(running_, [&](const auto& s) { return s.get() == &sequence; });
  CHECK(found != running_.end());
  if (static_cast<size_t>(found - running_.begin()) < plan_next_) --plan_next_;
  auto& waiting = tenants_[sequence.request->request.domain].waiting;
  waiting.push_front(std::move(*found));
  running_.erase(found);
  ++stats_.preemptions;
}

}  // namespace jointkv::engine
