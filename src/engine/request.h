// What enters and leaves the engine: requests, events, counters.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "engine/sampling.h"
#include "text/grammar.h"

namespace jointkv::engine {

using RequestId = Id<struct RequestTag>;

struct Request {
  std::vector<TokenId> prompt;
  SamplingParams sampling;
  DomainId domain{0};           // tenant: nothing is shared with another, and admission takes turns among them
  bool kv_fusion = true;        // false: exact blocks only, and its own are never fused
  std::vector<TokenId> forced;  // evaluations: the first output tokens, whatever the logits say
  // Constrains the output of all choices, which share it with nothing else. None: free text. Once it is complete a
  // choice ends with kStop, also before min_tokens and with ignore_eos.
  std::shared_ptr<text::Grammar> grammar;
  // -1: off. k: of each prompt token but the first, the logprob and the k likeliest tokens in its place. max_tokens may
  // then be 0.
  int prompt_logprobs = -1;
  // The prompt as one vector, pooled as the model file says; no output: max_tokens must be 0 and n 1.
  bool embed = false;
  // A run beside the clients' (ShadowCheck): no figure counts it and no map shows it. It must be alone: submitted to an
  // idle engine, cancelled when another request comes.
  bool shadow = false;
  std::vector<TokenId> visible_tokens;  // control tokens that give their text in events, where others give none
};

enum class FinishReason { kNone, kStop, kLength, kCancelled, kError };
const char* FinishReasonName(FinishReason reason);

struct RequestTimes {
  double submitted_s = 0;  // monotonic clock
  double started_s = 0;    // first admitted
  double first_token_s = 0;
  double finished_s = 0;
};

// One token of one choice, its end, or both.
struct Event {
  RequestId request;
  int choice = 0;            // 0 .. n - 1
  TokenId token = -1;        // -1: no token (the end of a choice that was cancelled or failed)
  std::string text;          // whole UTF-8 characters; what stop strings may still claim is held back
  SampledLogprobs logprobs;  // filled when asked for
  std::vector<SampledLogprobs> prompt_logprobs;  // with choice 0's first event; one per prompt token, the first empty
  std::vector<float> embedding;                  // (d_model) with the finish of a request that asked for it
  FinishReason finish = FinishReason::kNone;

  // With `finish` only:
  Status error;
  int prompt_tokens = 0;
  int cached_tokens = 0;  // of the prompt, taken from the prefix cache
  int output_tokens = 0;
  RequestTimes times;
};

struct EngineStats {
  int running = 0;
  int waiting = 0;
  int running_peak = 0;
  int64_t steps = 0;
  int64_t prompt_tokens = 0;   // of admitted requests, cached or computed
  int64_t prefill_tokens = 0;  // computed, recomputation after preemption included
  int64_t output_tokens = 0;
  int64_t decode_tokens = 0;  // of those, all but the first of each choice
  int64_t prefix_cached_tokens = 0;
  int64_t preemptions = 0;
  double prefill_s = 0;  // steps with prefill rows, by share of rows
  double decode_s = 0;
  double attention_s = 0;  // of both
  double attention_plan_s = 0;
  size_t kv_bytes_peak = 0;          // blocks that running sequences refer to
  size_t kv_bytes_logical_peak = 0;  // the same tokens as private 16-bit K and V
};

// Of one domain, now. A request that waits counts once, one that runs once for each choice.
struct DomainStats {
  int running = 0;
  int waiting = 0;
};

}  // namespace jointkv::engine
