// Engine: continuous batching over one model and one block store.
//
// A step is: plan (which rows of which sequences; preempts when the store is full) -> forward -> commit (seal blocks)
// -> sample -> emit. Decoding sequences take one row each, prompts share what is left of the step's token budget.
//
// Threads: one thread calls everything; the work inside a step runs on the engine's own pool.
// Owns: model file, weights, tokenizer, block store, requests. Fails how: Create and Submit return a Status; a request
// that fails later ends with an event of FinishReason::kError, the others go on.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "base/thread_pool.h"
#include "engine/block_map.h"
#include "engine/kept_share.h"
#include "engine/kv_type.h"
#include "engine/request.h"
#include "gguf/gguf_file.h"
#include "joint/fusion.h"
#include "kv/kv_cache.h"
#include "models/model.h"
#include "text/tokenizer.h"

namespace jointkv::engine {

struct EngineOptions {
  std::string model_path;
  int threads = 0;                  // 0: one per available core
  size_t kv_bytes = 0;              // 0: a third of the memory that is free after loading
  std::vector<KvTypeRule> kv_type;  // none: f32 for an f32 model, else bf16
  bool prefix_cache = true;
  joint::FusionOptions fusion;
  int max_running = 64;   // sequences decoding or prefilling at once
  int step_tokens = 512;  // rows of one step
  int max_context = 0;    // tokens of one sequence; 0: what the model was trained for
  bool deterministic = false;
  std::optional<dense::Precision> precision;
  std::optional<int> quantised_rows;
  dense::WeightsMemory weights_memory = dense::WeightsMemory::kPacked;
  SamplingLimits sampling_limits;
  std::function<void(int done, int total)> load_progress;
};

class Engine {
 public:
  static Expected<std::unique_ptr<Engine>> Create(const EngineOptions& options);
  ~Engine();

  // Checks and queues. kInvalidArgument or kOutOfRange: a parameter; kResourceExhausted: the request could not fit even
  // alone. max_tokens is cut to what the context leaves.
  Expected<RequestId> Submit(Request request);
  // Ends a request; its blocks are free after the next Step. Unknown ids are ignored: it may just have finished.
  void Cancel(RequestId request);

  // One step. Appends what happened to `events`; each choice of a request gets one event with a finish reason. False
  // when there was nothing to do, and no event.
  bool Step(std::vector<Event>& events);
  bool idle() const;

  EngineStats stats() const;
  std::map<DomainId, DomainStats> domain_stats() const;
  // Which blocks the running sequences hold, of one domain or of all, as far as `limits` go.
  BlockMap block_map(const BlockMapLimits& limits, std::optional<DomainId> domain = {}) const;
  kv::KvStats kv_stats() const;
  kv::SharingStats sharing_stats(int64_t slots_max) const;
  joint::FusionStats fusion_stats() const { return fusion_->stats(); }
  // Off: no block is fused from now on, and new requests take exact blocks only.
  void set_fusion(bool enabled) { fusion_->set_enabled(enabled); }
  // Drops every block that no running request uses.
  void DropPrefixCache() { cache_->DropPrefixCache(); }
  const text::Tokenizer& tokenizer() const { return *tokenizer_; }
  const models::Model& model() const { return *model_; }
  const gguf::GgufFile& file() const { return *file_; }
  const kv::KvCache& cache() const { return *cache_; }
  int max_context() const { return max_context_; }
  int threads() const { return pool_->size(); }
  const EngineOptions& options() const { return options_; }

  // Called with the raw logits of each sampled row, before sampling: for evaluations and tests.
  using LogitsObserver =
      std::function<void(RequestId request, int choice, int position, std::span<const float> logits)>;
  void ObserveLogits(LogitsObserver observer) { observer_ = std::move(observer); }

 private:
  struct Sequence;
  struct RequestState;
  struct Tenant;

  // Prompt rows of one step whose logits are wanted for their logprobs: bounds the memory.
  static constexpr int kPromptLogitRows = 64;
  enum class Pooling { kMean, kLast, kOther };

  explicit Engine(const EngineOptions& options);
  Status ReadPooling();
  void Admit();
  bool AdmitNext();
  void CountStart(const Sequence& sequence, Tenant& tenant);
  Tenant* NextTenant();
  void Plan();
  int Reserve(Sequence& sequence, int rows);
  Sequence* Victim() const;
  void Preempt(Sequence& sequence);
  void Forward();
  // Offers the blocks of `unfused` to fusion.
  void Fuse(Sequence& sequence, joint::Phase phase);
  // Memory is short: what waits for the end of its prompt is offered now. False: nothing waited.
  bool FuseEarly();
  void SampleRows(std::vector<Event>& events);
  void ForkChoices(Sequence& first);
  void SampleOne(Sequence& sequence, std::span<float> logits, std::vector<Event>& events);
  Status CheckRequest(const Request& request) const;
  bool EndsWith(Sequence& sequence, TokenId token) const;
  void AppendText(Sequence& sequence, TokenId token, Event& event);
  void FinishSequence(Sequence& sequence, FinishReason reason, Event& event);
  void EndSequence(Sequence& sequence, FinishReason reason, const Status& error, std::vector<Event>& events);
  void RemoveFinished();
  void DropCancelled(std::vector<Event>& events);
  bool Fuses(const Sequence& sequence) const;
  bool RunsShadow() const;
  size_t ExpectedBytes(const Sequence& sequence, int tokens, int& private_rows) const;
  void UpdatePeaks();
  void CountStep(double step_s);
  // Prompt logprobs and embeddings, in prompt_outputs.cc.
  Status CheckPromptOutputs(const Request& request) const;
  int RowsWithinLogits(const Sequence& sequence, int rows, int& logit_rows_left) const;
  void PlanPromptOutputs(Sequence& sequence, const attention::RowSpan& span);
  void TakePromptLogprobs(RequestState& request, int position, std::span<const float> logits);
  void DeliverPromptLogprobs(RequestState& request, Event& event);
  void PoolHidden(std::vector<Event>& events);

  EngineOptions options_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<gguf::GgufFile> file_;
  std::unique_ptr<text::Tokenizer> tokenizer_;
  std::unique_ptr<models::Model> model_;
  std::unique_ptr<kv::KvCache> cache_;
  std::unique_ptr<joint::Fusion> fusion_;
  std::vector<TokenId> end_tokens_;
  int max_context_ = 0;
  Pooling pooling_ = Pooling::kMean;

  std::map<DomainId, Tenant> tenants_;
  std::map<RequestId, std::unique_ptr<RequestState>> requests_;
  std::vector<std::unique_ptr<Sequence>> running_;  // in order of admission
  int32_t next_request_ = 0;
  int64_t fair_clock_ =
      0;  // served_tokens of the domain admitted last: who was idle starts from here, not from the past
  KeptShare kept_share_;
  int64_t shadow_query_tokens_ = 0;  // of the store's counters: what shadow requests looked up and found
  int64_t shadow_hit_tokens_ = 0;
  bool any_cancelled_ = false;
  bool any_finished_ = false;

  // The present step.
  struct PlannedSpan {
    Sequence* sequence = nullptr;
    attention::RowSpan span;
    bool decodes = false;  // its prompt was computed before
  };
  size_t plan_next_ = 0;  // of running_, while planning
  std::vector<PlannedSpan> planned_;
  std::vector<TokenId> step_tokens_;
  std::vector<attention::RowSpan> step_spans_;
  std::vector<int> logit_rows_;
  struct LogitRow {
    Sequence* sequence = nullptr;
    int prompt_position = -1;  // -1: to sample from
  };
  std::vector<LogitRow> logit_uses_;  // of logit_rows_
  HugeBuffer logits_;                 // (max_running + kPromptLogitRows, n_vocab) f32
  std::vector<int> hidden_rows_;
  HugeBuffer hidden_;  // (rows of the largest step, d_model) f32
  SamplingScratch scratch_{1};
  std::string piece_;
  std::vector<float> row_copy_;  // (n_vocab) for choices that sample from the same row
  LogitsObserver observer_;
  EngineStats stats_;
};

}  // namespace jointkv::engine
