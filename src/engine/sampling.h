// From logits to the next token: what a request may ask for, and the sampler of one sequence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/ids.h"
#include "base/status.h"

namespace jointkv::text {
class GrammarState;
}

namespace jointkv::engine {

// Names, ranges and order of effect as in vLLM and the OpenAI API.
struct SamplingParams {
  float temperature = 1;         // 0 = greedy
  int top_k = 0;                 // 0 = off
  float top_p = 1;               // 1 = off
  float min_p = 0;               // 0 = off; least probability relative to the likeliest token's
  float repetition_penalty = 1;  // 1 = off; once per distinct token of prompt and output
  float presence_penalty = 0;    // once per distinct output token
  float frequency_penalty = 0;   // per occurrence in the output
  std::vector<std::pair<TokenId, float>> logit_bias;
  std::optional<uint64_t> seed;  // empty = a new random stream
  std::vector<std::string> stop;
  std::vector<TokenId> stop_tokens;
  int max_tokens = 256;
  int min_tokens = 0;  // stop tokens cannot be drawn before
  bool ignore_eos = false;
  int n = 1;
  int logprobs = -1;  // -1 = off, 0 = the chosen token's only, k = also the k likeliest
};

struct SamplingLimits {
  float temperature_max = 100;        // beyond, every distribution is uniform in float
  float repetition_penalty_max = 10;  // beyond, one application already decides
  float additive_penalty_max = 2;     // presence and frequency, either sign; OpenAI's range
  float logit_bias_max = 100;         // either sign; OpenAI's range, already a ban or a must
  int logit_bias_tokens_max = 1024;
  int stop_strings_max = 16;
  int stop_string_bytes_max = 256;  // text held back while a stop string may be starting
  int stop_tokens_max = 128;
  int max_tokens_max = 1 << 20;
  int n_max = 128;
  int logprobs_max = 20;  // OpenAI's limit
};

// Fails with kInvalidArgument or kOutOfRange; the message names the field, its value and the limit.
Status Validate(const SamplingParams& params, int n_vocab, const SamplingLimits& limits = {});

struct TokenLogprob {
  TokenId token;
  float logprob;
};

// Natural-log probabilities of the model's own distribution: before penalties, bias, temperature and filters.
struct SampledLogprobs {
  float chosen = 0;
  std::vector<TokenLogprob> top;  // likeliest first, equal ones by id; allocates only until it has held `logprobs`
};

struct SamplingScratch;

// Of `token` and of the k likeliest under these logits.
void TokenLogprobs(std::span<const float> logits, TokenId token, int k, SamplingScratch& scratch, SampledLogprobs& out);

// Work space of Sampler::Sample, reusable by any number of samplers of the same vocabulary, one call at a time.
// Threads: one at a time. Owns: its buffers, about 12 bytes per vocabulary entry. Fails how: never.
struct SamplingScratch {
  static constexpr int kBlock = 64;  // vocabulary entries that share one maximum and one sum

  explicit SamplingScratch(int n_vocab);

  std::vector<float> weights;      // (n_vocab) exp((logit - max) / temperature), 0 where filtered
  std::vector<float> values;       // (n_vocab) candidates of a selection
  std::vector<float> raw_logits;   // (n_vocab) as the model gave them, while logprobs are asked for
  std::vector<float> block_max;    // (n_vocab / kBlock, rounded up) largest logit
  std::vector<float> block_order;  // same shape, for selection among block_max
  std::vector<float> block_mass;   // same shape, sum of weights
};

// Draws the tokens of one sequence: penalties, then bias, temperature, min-p, top-k, top-p, and the draw.
// Threads: one at a time. Owns: the random stream and the penalty counts (8 bytes per vocabulary entry, only when a
// penalty is on); after construction nothing allocates. Fails how: a NaN logit counts as -Inf and +Inf as the largest
// float; when no logit is above -Inf, Sample returns kNoToken and the caller ends the request.
//
// Draw i of a stream depends on seed, sample index and i = number of output tokens observed, and on nothing else: a
// sequence that is preempted and recomputed goes on with the same draws.
class Sampler {
 public:
  static constexpr TokenId kNoToken = -1;

  // `params` has passed Validate. `end_tokens` are the model's end-of-text tokens, which min_tokens holds off together
  // with params.stop_tokens. `sample_index` tells the n samples of one request apart.
  Sampler(const SamplingParams& params, int n_vocab, std::span<const TokenId> end_tokens = {}, int sample_index = 0);

  // Same parameters and counts, another stream: for sample `sample_index` of the same request.
  Sampler Fork(int sample_index) const;

  // Ids outside the vocabulary are not counted as seen.
  void ObservePrompt(std::span<const TokenId> tokens);
  void ObserveOutput(TokenId token);

  // `logits` (n_vocab) are modified in place. `out` may be null; it is filled when params.logprobs >= 0. With a grammar
  // the tokens that it forbids are gone before penalties and filters see the rest; for greedy sampling only when the
  // token without it is forbidden, which comes to the same.
  TokenId Sample(std::span<float> logits, SamplingScratch& scratch, SampledLogprobs* out = nullptr,
                 const text::GrammarState* grammar = nullptr) const;

  bool greedy() const;
  int output_tokens() const { return n_output_; }

 private:
  void ApplyPenalties(std::span<float> logits) const;
  TokenId Draw(std::span<const float> logits, SamplingScratch& scratch) const;

  SamplingParams params_;
  int n_vocab_;
  std::vector<TokenId> held_off_;  // not drawn before min_tokens
  uint64_t seed_;
  uint64_t stream_;
  int n_output_ = 0;
  std::vector<int32_t> output_count_;  // (n_vocab) or empty; -1 = never seen, 0 = in the prompt only
  std::vector<TokenId> seen_;          // distinct tokens with output_count_ >= 0
};

}  // namespace jointkv::engine
