#include "engine/engine.h"

#include <algorithm>
#include <thread>

#include "base/bytes.h"
#include "base/clock.h"
#include "engine/engine_state.h"

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

namespace {

// Logical blocks: a thousand or two of tokens.
constexpr int kKeptWindowBlocks = 64;

Status ResolveFusion(EngineOptions& options) {
  joint::FusionOptions& fusion = options.fusion;
  if (options.deterministic) {
    // What a block is fused with depends on what else runs.
    fusion.policy = joint::Policy::kOff;
  }
  if (fusion.policy == joint::Policy::kBounded && !(fusion.budget > 0 && fusion.budget <= 1)) {
    return {StatusCode::kOutOfRange, "kv-budget " + std::to_string(fusion.budget) + ": must be more than 0, at most 1"};
  }
  if (fusion.policy == joint::Policy::kCosine && !(fusion.threshold > 0 && fusion.threshold <= 1)) {
    return {StatusCode::kOutOfRange,
            "kv-threshold " + std::to_string(fusion.threshold) + ": must be more than 0, at most 1"};
  }
  return Status::Ok();
}

}  // namespace

Engine::Engine(const EngineOptions& options) : options_(options) {}
Engine::~Engine() = default;

Expected<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options) {
  std::unique_ptr<Engine> engine(new Engine(options));
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const int threads = options.threads == 0 ? cores : options.threads;
  if (threads < 1 || threads > 1024)
    return Status(StatusCode::kOutOfRange, "threads " + std::to_string(threads) + ": must be 1 to 1024");
  if (options.max_running < 1 || options.max_running > 4096) {
    return Status(StatusCode::kOutOfRange,
                  "max-running " + std::to_string(options.max_running) + ": must be 1 to 4096");
  }
  if (options.step_tokens < 1 || options.step_tokens > 16384) {
    return Status(StatusCode::kOutOfRange,
                  "step-tokens " + std::to_string(options.step_tokens) + ": must be 1 to 16384");
  }
  RETURN_IF_ERROR(ResolveFusion(engine->options_));
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
    return Status(StatusCode::kDataLoss, "tokenizer has " + std::to_string(engine->tokenizer_->n_vocab()) +
                                             " tokens, the model's output only " +
                                             std::to_string(engine->model_->n_vocab()));
  }
  const int trained = engine->model_->hyperparameters().context_length;
  if (options.max_context < 0 || options.max_context > trained) {
    return Status(StatusCode::kOutOfRange, "max-context " + std::to_string(options.max_context) +
                                               ": the model was trained for " + std::to_string(trained));
  }
  engine->max_context_ = options.max_context == 0 ? trained : options.max_context;
  RETURN_IF_ERROR(engine->ReadPooling());

  std::vector<uint8_t> ends_block(engine->model_->n_vocab());
  size_t piece_bytes = 0;
  for (TokenId token = 0; token < engine->tokenizer_->n_vocab(); ++token) {
    ends_block[token] = engine->tokenizer_->EndsLine(token) || engine->tokenizer_->IsMarkup(token);
    if (engine->tokenizer_->IsEndOfGeneration(token)) engine->end_tokens_.push_back(token);
    piece_bytes = std::max(piece_bytes, engine->tokenizer_->Piece(token).size());
  }
  const bool f32 = engine->model_->precision() == dense::Precision::kF32 && engine->file_->quantization() == "f32";
  kv::KvShape shape = engine->model_->CacheShape(codec::Codec::kBf16);
  ASSIGN_OR_RETURN(KvCodecs codecs,
                   ResolveKvTypes(options.kv_type, shape.n_layers(), f32 ? codec::Codec::kF32 : codec::Codec::kBf16));
  if (!codecs.sealed.empty() && (options.deterministic || options.fusion.policy == joint::Policy::kCosine)) {
    // Scales and means come from whatever ran first, and rows that read a block before it is encoded from the schedule.
    return Status(StatusCode::kUnsupported, std::string("kv-type: q8 and q4 cannot be used with ") +
                                                (options.deterministic ? "deterministic" : "kv-fusion cosine"));
  }
  shape.layout.codec = codecs.written;
  shape.sealed = std::move(codecs.sealed);
  kv::KvCache::Options kv_options;
  kv_options.cap_bytes = options.kv_bytes == 0 ? AvailableMemoryBytes() / 3 : options.kv_bytes;
  kv_options.prefix_cache = options.prefix_cache;
  joint::ShapeStore(engine->options_.fusion, shape.layout, kv_options);
  ASSIGN_OR_RETURN(engine->cache_,
                   kv::KvCache::Create(std::move(shape),
                                       joint::CutterFor(engine->options_.fusion, std::move(ends_block)), kv_options));
  engine->model_->Bind(*engine->cache_);
  std::vector<const dense::RopeTable*> rope;
  for (int layer = 0; layer < engine->cache_->shape().n_layers(); ++layer) {
    rope.push_back(&engine->model_->RopeOfLayer(layer));
  }
  engine->kept_share_ = KeptShare(kKeptWindowBlocks * engine->cache_->shape().n_tables());
  engine->fusion_ =
      std::make_unique<joint::Fusion>(engine->options_.fusion, std::move(rope), *engine->cache_, *engine->pool_,
                                      [&model = *engine->model_](int layer) { return model.query_energy(layer); });

  const int n_vocab = engine->model_->n_vocab();
  const int logit_rows_max = options.max_running + kPromptLogitRows;
  engine->logits_ = HugeBuffer(static_cast<size_t>(logit_rows_max) * n_vocab * sizeof(float));
  engine->hidden_ = HugeBuffer(static_cast<size_t>(model_options.max_rows) * engine->model_->hyperparameters().d_model *
                               sizeof(float));
  engine->scratch_ = SamplingScratch(n_vocab);
  engine->row_copy_.resize(n_vocab);
  engine->piece_.reserve(3 * (piece_bytes + 4));  // each byte may become U+FFFD
  engine->planned_.reserve(options.max_running);
  engine->step_tokens_.reserve(model_options.max_rows);
  engine->step_spans_.reserve(options.max_running);
  engine->logit_rows_.reserve(logit_rows_max);
  engine->logit_uses_.reserve(logit_rows_max);
  engine->hidden_rows_.reserve(model_options.max_rows);
  engine->running_.reserve(options.max_running);
  return engine;
}

Status Engine::CheckRequest(const Request& request) const {
  RETURN_IF_ERROR(CheckPromptOutputs(request));
  if (request.sampling.max_tokens == 0 && (request.embed || request.prompt_logprobs >= 0)) {
    SamplingParams without_output = request.sampling;
    without_output.max_tokens = 1;
    RETURN_IF_ERROR(Validate(without_output, model_->n_vocab(), options_.sampling_limits));
  } else {
    RETURN_IF_ERROR(Validate(request.sampling, model_->n_vocab(), options_.sampling_limits));
  }
  if (request.prompt.empty()) return {StatusCode::kInvalidArgument, "prompt: is empty"};
  const auto check = [&](const char* name, const std::vector<TokenId>& tokens) {
    for (const TokenId token : tokens) {
      if (token >= 0 && token < model_->n_vocab()) continue;
      return Status(StatusCode::kOutOfRange, std::string(name) + ": token " + std::to_string(token) +
                                                 " is not in the vocabulary of " + std::to_string(model_->n_vocab()));
    }
    return Status::Ok();
  };
  RETURN_IF_ERROR(check("prompt", request.prompt));
  RETURN_IF_ERROR(check("forced", request.forced));
  if (request.grammar != nullptr && !request.forced.empty()) {
    return {StatusCode::kInvalidArgument, "forced: cannot be combined with a grammar"};
  }
  const int prompt_tokens = static_cast<int>(request.prompt.size());
  if (prompt_tokens >= max_context_) {
    return {StatusCode::kOutOfRange, "prompt: " + std::to_string(prompt_tokens) +
                                         " tokens leave no room in a context of " + std::to_string(max_context_)};
  }
  if (request.sampling.n > options_.max_running) {
    return {StatusCode::kOutOfRange, "n: " + std::to_string(request.sampling.n) + " is more than max-running " +
                                         std::to_string(options_.max_running)};
  }
  return Status::Ok();
}

Expected<RequestId> Engine::Submit(Request request) {
  RETURN_IF_ERROR(CheckRequest(request));
  const int prompt_tokens = static_cast<int>(request.prompt.size());
  request.sampling.max_tokens = std::min(request.sampling.max_tokens, max_context_ - prompt_tokens);
  const int longest = prompt_tokens + request.sampling.max_tokens;
  const size_t capacity = cache_->stats().capacity_bytes;
  const bool fuses = fusion_->enabled() && request.kv_fusion;
  const size_t least =
      fuses ? cache_->MinimumBytes(longest) : cache_->LeastBytes(request.prompt, request.sampling.max_tokens);
  if (least > capacity) {
    return Status(StatusCode::kResourceExhausted,
                  "request: " + std::to_string(longest) + " tokens of prompt and output need at least " +
                      FormatBytes(least) + " of KV memory, kv-bytes is " + FormatBytes(capacity));
  }
  if (request.shadow && !idle()) return Status(StatusCode::kUnsupported, "shadow: the engine is not idle");
  ASSIGN_OR_RETURN(StopStringMatcher stops, StopStringMatcher::Create(request.sampling.stop));

  auto state = std::make_unique<RequestState>();
  state->id = RequestId(next_request_++);
  state->request = std::move(request);
  state->times.submitted_s = MonotonicSeconds();
  state->open_choices = state->request.sampling.n;
  auto sequence = std::make_unique<Sequence>(state.get(), 0, *tokenizer_, std::move(stops));
  sequence->tokens = state->request.prompt;
  if (state->request.grammar != nullptr) sequence->grammar.emplace(state->request.grammar);
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

bool Engine::RunsShadow() const { return !running_.empty() && running_.front()->request->request.shadow; }

EngineStats Engine::stats() const {
  EngineStats stats = stats_;
  for (const auto& [domain, of_domain] : domain_stats()) {
    stats.running += of_domain.running;
    stats.waiting += of_domain.waiting;
  }
  return stats;
}

std::map<DomainId, DomainStats> Engine::domain_stats() const {
  std::map<DomainId, DomainStats> stats;
  for (const auto& [domain, tenant] : tenants_) {
    stats[domain].waiting = static_cast<int>(
        std::ranges::count_if(tenant.waiting, [](const auto& sequence) { return !sequence->request->request.shadow; }));
  }
  for (const auto& sequence : running_) {
    if (!sequence->request->request.shadow) ++stats[sequence->request->request.domain].running;
  }
  return stats;
}

kv::KvStats Engine::kv_stats() const {
  kv::KvStats stats = cache_->stats();
  stats.prefix_query_tokens -= shadow_query_tokens_;
  stats.prefix_hit_tokens -= shadow_hit_tokens_;
  if (RunsShadow()) stats.running_bytes = stats.logical_bytes = 0;
  return stats;
}

kv::SharingStats Engine::sharing_stats(int64_t slots_max) const {
  return RunsShadow() ? kv::SharingStats() : cache_->sharing_stats(slots_max);
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
                  Status(StatusCode::kResourceExhausted,
                         "request: KV memory of " + FormatBytes(cache_->stats().capacity_bytes) + " is full at " +
                             std::to_string(sequence->tokens.size()) + " tokens"),
                  events);
    }
    RemoveFinished();
    return true;
  }
  const bool shadow = RunsShadow();
  Forward();
  if (!shadow) UpdatePeaks();
  SampleRows(events);
  PoolHidden(events);
  RemoveFinished();

  if (!shadow) CountStep(MonotonicSeconds() - start_s);
#ifdef JOINTKV_CHECK_EACH_STEP
  cache_->CheckIntegrity();
#endif
  return true;
}

void Engine::CountStep(double step_s) {
  int decode_rows = 0;
  for (const PlannedSpan& planned : planned_) decode_rows += planned.decodes;
  const double decode_share = static_cast<double>(decode_rows) / static_cast<double>(step_tokens_.size());
  stats_.decode_s += step_s * decode_share;
  stats_.prefill_s += step_s * (1 - decode_share);
  stats_.attention_s = model_->attention_times().run_s;
  stats_.attention_plan_s = model_->attention_times().plan_s;
  stats_.prefill_tokens += static_cast<int64_t>(step_tokens_.size()) - decode_rows;
  stats_.decode_tokens += decode_rows;
  ++stats_.steps;
}

void Engine::Forward() {
  const models::StepInput input = {step_tokens_, step_spans_, logit_rows_, hidden_rows_,
                                   reinterpret_cast<float*>(hidden_.data())};
  model_->Forward(input, *cache_, reinterpret_cast<float*>(logits_.data()));
  for (const PlannedSpan& planned : planned_) {
    Sequence& sequence = *planned.sequence;
    sequence.computed += planned.span.rows;
    auto phase = joint::Phase::kDecode;
    if (!sequence.decodes) {
      sequence.decodes = sequence.Remaining() == 0;
      phase = sequence.decodes ? joint::Phase::kEntersDecode : joint::Phase::kPrefill;
    }
    const kv::SealedRange sealed = cache_->Commit(sequence.kv);
    if (sequence.unfused.empty()) sequence.unfused.first = sealed.first;
    sequence.unfused.last = sealed.last;
    if (phase != joint::Phase::kPrefill || !fusion_->waits_for_prompt()) Fuse(sequence, phase);
  }
}

void Engine::Fuse(Sequence& sequence, joint::Phase phase) {
  const joint::FusionStats before = fusion_->counters();
  fusion_->OnSealed(sequence.kv, sequence.unfused, phase);
  sequence.unfused = {};
  if (phase == joint::Phase::kDecode) return;
  const joint::FusionStats& after = fusion_->counters();
  kept_share_.Add(after.offered - before.offered, after.fused - before.fused);
}

bool Engine::FuseEarly() {
  bool any = false;
  for (auto& sequence : running_) {
    if (sequence->unfused.empty()) continue;
    Fuse(*sequence, joint::Phase::kPrefill);
    any = true;
  }
  return any;
}

void Engine::UpdatePeaks() {
  stats_.running_peak = std::max(stats_.running_peak, static_cast<int>(running_.size()));
  stats_.kv_bytes_peak = std::max(stats_.kv_bytes_peak, cache_->running_bytes());
  stats_.kv_bytes_logical_peak = std::max(stats_.kv_bytes_logical_peak, cache_->logical_bytes());
}

}  // namespace jointkv::engine
