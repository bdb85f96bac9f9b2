#include "engine/engine.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "base/bytes.h"
#include "base/clock.h"
#include "engine/stop_strings.h"
#include "text/detokenizer.h"

namespace jointkv::engine {

const char* FinishReasonName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone: return "none";
    case FinishReason::kStop: return "stop";
    case FinishReason::kLength: return "length";
    case FinishReason::kCancelled: return "cancelled";
    case FinishReason::kError: return "error";
  }
  return "?";
}

// What the choices of one request share.
struct Engine::RequestState {
  RequestId id;
  Request request;
  RequestTimes times;
  int cached_tokens = 0;
  int open_choices = 0;  // not finished yet
  bool started = false;
  bool cancelled = false;
};

// One choice of one request, waiting or running.
struct Engine::Sequence {
  RequestState* request = nullptr;
  int choice = 0;
  SequenceId kv;                // valid while running
  std::vector<TokenId> tokens;  // prompt, then output
  int computed = 0;             // tokens whose K and V are in the store
  int output_tokens = 0;
  Sampler sampler;
  text::StreamDetokenizer detokenizer;
  StopStringMatcher stops;
  bool forked = false;     // the other choices exist (or n is 1)
  bool finished = false;
  int planned_rows = 0;    // in the present step

  Sequence(RequestState* r, int c, Sampler s, const text::Tokenizer& tokenizer, StopStringMatcher m)
      : request(r), choice(c), sampler(std::move(s)), detokenizer(tokenizer), stops(std::move(m)) {}
  int Remaining() const { return static_cast<int>(tokens.size()) - computed; }
};

// Requests of one domain wait in order; domains take turns by what they were given so far.
struct Engine::Tenant {
  std::deque<std::unique_ptr<Sequence>> waiting;
  int64_t served_tokens = 0;  // prompts admitted and tokens given
};

Engine::Engine(const EngineOptions& options) : options_(options) {}
Engine::~Engine() = default;

Expected<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options) {
  std::unique_ptr<Engine> engine(new Engine(options));
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const int threads = options.threads == 0 ? cores : options.threads;
  if (threads < 1 || threads > 1024) return Status(StatusCode::kOutOfRange, "threads " + std::to_string(threads) + ": must be 1 to 1024");
  if (options.max_running < 1 || options.max_running > 4096) {
    return Status(StatusCode::kOutOfRange, "max-running " + std::to_string(options.max_running) + ": must be 1 to 4096");
  }
  if (options.step_tokens < 1 || options.step_tokens > 16384) {
    return Status(StatusCode::kOutOfRange, "step-tokens " + std::to_string(options.step_tokens) + ": must be 1 to 16384");
  }
  engine->pool_ = std::make_unique<ThreadPool>(threads);
  ASSIGN_OR_RETURN(gguf::GgufFile file, gguf::GgufFile::Open(options.model_path));
  engine->file_ = std::make_unique<gguf::GgufFile>(std::move(file));

  models::ModelOptions model_options;
  model_options.precision = options.precision;
  model_options.weights_memory = options.weights_memory;
  model_options.quantised_rows = options.quantised_rows;
  model_options.max_rows = std::max(options.step_tokens, options.max_running);
  model_options.deterministic = options.deterministic;
  model_options.progress = options.load_progress;
  ASSIGN_OR_RETURN(engine->model_, models::Model::Load(*engine->file_, model_options, *engine->pool_));
  ASSIGN_OR_RETURN(engine->tokenizer_, text::Tokenizer::Open(options.model_path));
  if (engine->tokenizer_->n_vocab() > engine->model_->n_vocab()) {
    return Status(StatusCode::kDataLoss, "tokenizer has " + std::to_string(engine->tokenizer_->n_vocab()) + " tokens, the model's output only " +
                                             std::to_string(engine->model_->n_vocab()));
  }
  const int trained = engine->model_->hyperparameters().context_length;
  if (options.max_context < 0 || options.max_context > trained) {
    return Status(StatusCode::kOutOfRange, "max-context " + std::to_string(options.max_context) + ": the model was trained for " + std::to_string(trained));
  }
  engine->max_context_ = options.max_context == 0 ? trained : options.max_context;

  std::vector<uint8_t> ends_block(engine->model_->n_vocab());
  for (TokenId token = 0; token < engine->tokenizer_->n_vocab(); ++token) {
    ends_block[token] = engine->tokenizer_->EndsLine(token) || engine->tokenizer_->IsMarkup(token);
    if (engine->tokenizer_->IsEndOfGeneration(token)) engine->end_tokens_.push_back(token);
  }
  const bool f32 = engine->model_->precision() == dense::Precision::kF32 && engine->file_->quantization() == "f32";
  const codec::Codec codec = options.kv_type.value_or(f32 ? codec::Codec::kF32 : codec::Codec::kBf16);
  kv::KvCache::Options kv_options;
  kv_options.cap_bytes = options.kv_bytes == 0 ? AvailableMemoryBytes() / 3 : options.kv_bytes;
  kv_options.prefix_cache = options.prefix_cache;
  ASSIGN_OR_RETURN(engine->cache_, kv::KvCache::Create(engine->model_->CacheShape(codec), kv::BlockCutter(std::move(ends_block)), kv_options));
  engine->model_->Bind(*engine->cache_);

  const int n_vocab = engine->model_->n_vocab();
  engine->logits_ = HugeBuffer(static_cast<size_t>(options.max_running) * n_vocab * sizeof(float));
  engine->scratch_ = SamplingScratch(n_vocab);
  engine->row_copy_.resize(n_vocab);
  engine->planned_.reserve(options.max_running);
  engine->step_tokens_.reserve(model_options.max_rows);
  engine->step_spans_.reserve(options.max_running);
  engine->logit_rows_.reserve(options.max_running);
  engine->logit_sequences_.reserve(options.max_running);
  engine->running_.reserve(options.max_running);
  return engine;
}

Expected<RequestId> Engine::Submit(Request request) {
  RETURN_IF_ERROR(Validate(request.sampling, model_->n_vocab(), options_.sampling_limits));
  if (request.prompt.empty()) return Status(StatusCode::kInvalidArgument, "prompt: is empty");
  for (const TokenId token : request.prompt) {
    if (token < 0 || token >= model_->n_vocab()) {
      return Status(StatusCode::kOutOfRange, "prompt: token " + std::to_string(token) + " is not in the vocabulary of " + std::to_string(model_->n_vocab()));
    }
  }
  const int prompt_tokens = static_cast<int>(request.prompt.size());
  if (prompt_tokens >= max_context_) {
    return Status(StatusCode::kOutOfRange, "prompt: " + std::to_string(prompt_tokens) + " tokens leave no room in a context of " + std::to_string(max_context_));
  }
  if (request.sampling.n > options_.max_running) {
    return Status(StatusCode::kOutOfRange, "n: " + std::to_string(request.sampling.n) + " is more than max-running " + std::to_string(options_.max_running));
  }
  request.sampling.max_tokens = std::min(request.sampling.max_tokens, max_context_ - prompt_tokens);
  const int longest = prompt_tokens + request.sampling.max_tokens;
  const size_t capacity = cache_->stats().capacity_bytes;
  if (cache_->MinimumBytes(longest) > capacity) {
    return Status(StatusCode::kResourceExhausted, "request: " + std::to_string(longest) + " tokens of prompt and output need at least " +
                                                      FormatBytes(cache_->MinimumBytes(longest)) + " of KV memory, kv-bytes is " + FormatBytes(capacity));
  }
  ASSIGN_OR_RETURN(StopStringMatcher stops, StopStringMatcher::Create(request.sampling.stop));

  auto state = std::make_unique<RequestState>();
  state->id = RequestId(next_request_++);
  state->request = std::move(request);
  state->times.submitted_s = MonotonicSeconds();
  state->open_choices = state->request.sampling.n;
  auto sequence = std::make_unique<Sequence>(state.get(), 0, Sampler(state->request.sampling, model_->n_vocab(), end_tokens_, 0), *tokenizer_, std::move(stops));
  sequence->tokens.reserve(longest + 1);
  sequence->tokens = state->request.prompt;
  sequence->tokens.reserve(longest + 1);
  sequence->sampler.ObservePrompt(state->request.prompt);
  sequence->forked = state->request.sampling.n == 1;
  model_->EnsurePositions(longest + 1);
  const RequestId id = state->id;
  Tenant& tenant = tenants_[state->request.domain];
  if (tenant.waiting.empty()) tenant.served_tokens = std::max(tenant.served_tokens, fair_clock_);
  tenant.waiting.push_back(std::move(sequence));
  requests_.emplace(id, std::move(state));
  return id;
}

void Engine::Cancel(RequestId id) {
  const auto found = requests_.find(id);
  if (found == requests_.end()) return;
  found->second->cancelled = true;
  any_cancelled_ = true;
}

bool Engine::idle() const { return requests_.empty(); }

EngineStats Engine::stats() const {
  EngineStats stats = stats_;
  stats.running = static_cast<int>(running_.size());
  for (const auto& [domain, tenant] : tenants_) stats.waiting += static_cast<int>(tenant.waiting.size());
  return stats;
}

bool Engine::Step(std::vector<Event>& events) {
  const size_t events_before = events.size();
  DropCancelled(events);
  if (requests_.empty()) return events.size() != events_before;
  const double start_s = MonotonicSeconds();
  Admit();
  Plan();
  if (step_tokens_.empty()) {
    // Nothing could be planned: the oldest sequence does not fit although it is alone.
    CHECK(running_.size() <= 1);
    for (auto& sequence : running_) {
      EndSequence(*sequence, FinishReason::kError,
                  Status(StatusCode::kResourceExhausted, "request: KV memory of " + FormatBytes(cache_->stats().capacity_bytes) + " is full at " +
                                                             std::to_string(sequence->tokens.size()) + " tokens"),
                  events);
    }
    RemoveFinished();
    return true;
  }
  Forward();
  UpdatePeaks();
  SampleRows(events);
  RemoveFinished();

  const double step_s = MonotonicSeconds() - start_s;
  int decode_rows = 0;
  for (const PlannedSpan& planned : planned_) decode_rows += planned.span.rows == 1;
  const double decode_share = static_cast<double>(decode_rows) / static_cast<double>(step_tokens_.size());
  stats_.decode_s += step_s * decode_share;
  stats_.prefill_s += step_s * (1 - decode_share);
  stats_.prefill_tokens += static_cast<int64_t>(step_tokens_.size()) - decode_rows;
  ++stats_.steps;
  return true;
}

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

// Bytes that admitted prompts will still take.
size_t Engine::PendingBytes() const {
  int pending = 0;
  for (const auto& sequence : running_) pending += std::max(0, sequence->Remaining() - 1);
  return cache_->MinimumBytes(pending);
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
  const size_t reserve = PendingBytes() + cache_->MinimumBytes(codec::kBlockTokensMax) * (running_.size() + slots);
  if (!running_.empty() && !cache_->HasRoomFor(static_cast<int>(sequence.tokens.size()), reserve)) return false;

  const int longest = static_cast<int>(sequence.request->request.prompt.size()) + sampling.max_tokens;
  sequence.kv = cache_->Create(sequence.request->request.domain, longest);
  sequence.computed = cache_->AdoptPrefix(sequence.kv, sequence.tokens);
  RequestState& request = *sequence.request;
  if (!request.started) {
    request.started = true;
    request.times.started_s = MonotonicSeconds();
    request.cached_tokens = sequence.computed;
    stats_.prompt_tokens += static_cast<int64_t>(request.request.prompt.size());
    stats_.prefix_cached_tokens += sequence.computed;
    fair_clock_ = std::max(fair_clock_, tenant->served_tokens);
    tenant->served_tokens += static_cast<int64_t>(request.request.prompt.size());
  }
  running_.push_back(std::move(tenant->waiting.front()));
  tenant->waiting.pop_front();
  return true;
}

// Chooses this step's rows and reserves their slots. Decoding sequences first, oldest first, then prompts.
void Engine::Plan() {
  planned_.clear();
  for (auto& sequence : running_) sequence->planned_rows = 0;
  int decoding = 0;
  for (size_t i = 0; i < running_.size(); ++i) {
    if (running_[i]->Remaining() == 1) decoding += Reserve(*running_[i], 1);
  }
  // Prompts go on by a row also where decoding takes the whole budget.
  int budget = std::max(1, options_.step_tokens - decoding);
  for (size_t i = 0; i < running_.size() && budget > 0; ++i) {
    Sequence& sequence = *running_[i];
    if (sequence.planned_rows > 0 || sequence.Remaining() <= 1) continue;
    int rows = std::min(budget, sequence.Remaining());
    // A rest of one row would count as decoding next time, before older prompts: take one row less instead.
    if (sequence.Remaining() - rows == 1 && rows > 1) --rows;
    rows = Reserve(sequence, rows);
    if (rows == 0) break;
    budget -= rows;
  }
  step_tokens_.clear();
  step_spans_.clear();
  logit_rows_.clear();
  logit_sequences_.clear();
  for (auto& sequence : running_) {
    if (sequence->planned_rows == 0) continue;
    const attention::RowSpan span = {sequence->kv, static_cast<int>(step_tokens_.size()), sequence->planned_rows, sequence->computed};
    const auto first = sequence->tokens.begin() + sequence->computed;
    step_tokens_.insert(step_tokens_.end(), first, first + span.rows);
    step_spans_.push_back(span);
    planned_.push_back({sequence.get(), span});
    if (span.rows == sequence->Remaining()) {
      logit_rows_.push_back(span.first_row + span.rows - 1);
      logit_sequences_.push_back(sequence.get());
    }
  }
}

// Reserves slots for the next rows of a sequence, preempting younger ones until they fit, and returns how many rows. 0
// when the sequence itself had to go, or stands alone and not one fits; fewer than asked only when it stands alone
// (sliding windows may give back blocks between shorter steps).
int Engine::Reserve(Sequence& sequence, int rows) {
  const auto tokens = std::span<const TokenId>(sequence.tokens).subspan(sequence.computed);
  while (rows > 0 && !cache_->Append(sequence.kv, tokens.first(rows))) {
    if (PreemptYoungest(sequence)) continue;
    if (running_.size() > 1) {
      Preempt(sequence);
      return 0;
    }
    rows /= 2;
  }
  sequence.planned_rows = rows;
  return rows;
}

// Preempts the youngest running sequence that is younger than `keep`.
bool Engine::PreemptYoungest(const Sequence& keep) {
  if (running_.back().get() == &keep) return false;
  Preempt(*running_.back());
  return true;
}

// Back to the head of its queue: it will be computed again, from the prefix cache as far as that still reaches.
void Engine::Preempt(Sequence& sequence) {
  cache_->Free(sequence.kv);
  sequence.kv = SequenceId();
  sequence.computed = 0;
  sequence.planned_rows = 0;
  const auto found = std::ranges::find_if(running_, [&](const auto& s) { return s.get() == &sequence; });
  CHECK(found != running_.end());
  auto& waiting = tenants_[sequence.request->request.domain].waiting;
  waiting.push_front(std::move(*found));
  running_.erase(found);
  ++stats_.preemptions;
}

void Engine::Forward() {
  const models::StepInput input = {step_tokens_, step_spans_, logit_rows_};
  model_->Forward(input, *cache_, reinterpret_cast<float*>(logits_.data()));
  for (const PlannedSpan& planned : planned_) {
    cache_->Commit(planned.span.sequence);
    planned.sequence->computed += planned.span.rows;
  }
}

void Engine::UpdatePeaks() {
  stats_.running_peak = std::max(stats_.running_peak, static_cast<int>(running_.size()));
  stats_.kv_bytes_peak = std::max(stats_.kv_bytes_peak, cache_->running_bytes());
  stats_.kv_bytes_logical_peak = std::max(stats_.kv_bytes_logical_peak, cache_->logical_bytes());
}

void Engine::SampleRows(std::vector<Event>& events) {
  const int n_vocab = model_->n_vocab();
  auto* logits = reinterpret_cast<float*>(logits_.data());
  for (size_t i = 0; i < logit_sequences_.size(); ++i) {
    Sequence& sequence = *logit_sequences_[i];
    const std::span<float> row(logits + i * n_vocab, n_vocab);
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
    auto sequence = std::make_unique<Sequence>(first.request, choice, first.sampler.Fork(choice), *tokenizer_, std::move(stops).value());
    sequence->tokens.reserve(longest + 1);
    sequence->tokens.assign(first.tokens.begin(), first.tokens.end());
    sequence->computed = first.computed;
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
  const TokenId token = sequence.sampler.Sample(logits, scratch_, sampling.logprobs >= 0 ? &event.logprobs : nullptr);
  if (token == Sampler::kNoToken) {
    EndSequence(sequence, FinishReason::kError, Status(StatusCode::kInternal, "request: the model gave no finite logit"), events);
    return;
  }
  const double now_s = MonotonicSeconds();
  if (request.times.first_token_s == 0) request.times.first_token_s = now_s;
  event.token = token;
  sequence.tokens.push_back(token);
  sequence.sampler.ObserveOutput(token);
  ++sequence.output_tokens;
  ++stats_.output_tokens;
  tenants_[request.request.domain].served_tokens += 1;

  const bool ends = (!sampling.ignore_eos && tokenizer_->IsEndOfGeneration(token)) || std::ranges::find(sampling.stop_tokens, token) != sampling.stop_tokens.end();
  if (!ends) {
    piece_.clear();
    sequence.detokenizer.Append(token, piece_);
    event.text = sequence.stops.Feed(piece_);
  }
  if (ends || sequence.stops.stopped()) {
    FinishSequence(sequence, FinishReason::kStop, event);
  } else if (sequence.output_tokens >= sampling.max_tokens) {
    FinishSequence(sequence, FinishReason::kLength, event);
  }
  events.push_back(std::move(event));
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
