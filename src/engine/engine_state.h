// What the engine keeps of requests. Private to engine/.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "engine/stop_strings.h"
#include "text/detokenizer.h"

namespace jointkv::engine {

// What the choices of one request share.
struct Engine::RequestState {
  RequestId id;
  Request request;
  RequestTimes times;
  int cached_tokens = 0;
  int open_choices = 0;  // not finished yet
  bool started = false;
  bool cancelled = false;

  // What the pass over the prompt gives besides K and V; kept when the sequence is preempted.
  std::vector<SampledLogprobs> prompt_logprobs;  // of the tokens so far
  int known_logprobs = 0;                        // their number, also when they have been delivered
  bool prompt_logprobs_delivered = false;
  std::vector<double> pooled;  // (d_model) sum of the hidden states so far
  int pooled_rows = 0;

  bool NeedsPromptLogprobs() const {
    return request.prompt_logprobs >= 0 && known_logprobs < static_cast<int>(request.prompt.size());
  }
  // What the prefix cache holds would be missing.
  bool NeedsWholePrompt() const { return request.embed || NeedsPromptLogprobs(); }
};

// One choice of one request, waiting or running.
struct Engine::Sequence {
  RequestState* request = nullptr;
  int choice = 0;
  SequenceId kv;                // valid while running
  std::vector<TokenId> tokens;  // prompt, then output
  int computed = 0;             // tokens whose K and V are in the store
  int output_tokens = 0;
  std::optional<Sampler> sampler;  // from the first admission on: its counts are as large as the vocabulary
  std::optional<text::GrammarState> grammar;
  text::StreamDetokenizer detokenizer;
  StopStringMatcher stops;
  kv::SealedRange unfused;  // blocks of its prompt that fusion has not been offered yet
  bool decodes = false;     // its prompt is computed
  bool forked = false;      // the other choices exist (or n is 1)
  bool finished = false;
  std::optional<double> kept_share;  // once preempted: bytes that this freed, of what it would take private
  int planned_rows = 0;              // in the present step

  Sequence(RequestState* r, int c, const text::Tokenizer& tokenizer, StopStringMatcher m)
      : request(r), choice(c), detokenizer(tokenizer), stops(std::move(m)) {}
  int Remaining() const { return static_cast<int>(tokens.size()) - computed; }
};

// Requests of one domain wait in order; domains take turns by what they were given so far.
struct Engine::Tenant {
  std::deque<std::unique_ptr<Sequence>> waiting;
  int64_t served_tokens = 0;  // prompts admitted and tokens given
};

}  // namespace jointkv::engine
