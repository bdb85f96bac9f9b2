#include "engine/sampling.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "base/checked.h"
#include "base/hash.h"
#include "text/grammar.h"

namespace jointkv::engine {
namespace {

constexpr int kBlock = SamplingScratch::kBlock;
constexpr float kInf = std::numeric_limits<float>::infinity();
// As in vLLM: a smaller temperature is greedy, and 1 / temperature stays far from overflow.
constexpr float kGreedyBelow = 1e-5f;
// A token this far below the likeliest one (in units of the scaled logit) weighs 1e-13 of it, and all of a vocabulary
// of 2^18 such tokens less than the rounding of the sum: its weight is 0.
constexpr float kNegligible = 30.0f;

std::string Number(double value) {
  std::string text = std::to_string(value);
  if (text.find('.') != std::string::npos) {
    text.erase(text.find_last_not_of('0') + 1);
    if (text.back() == '.') text.pop_back();
  }
  return text;
}

Status Invalid(const std::string& field, double value, const std::string& rule) {
  return Status(StatusCode::kInvalidArgument, "sampling: " + field + " is " + Number(value) + ", must be " + rule);
}

Status CheckRange(const char* field, double value, double lowest, double highest) {
  if (value >= lowest && value <= highest) return Status::Ok();
  return Invalid(field, value, "from " + Number(lowest) + " to " + Number(highest));
}

Status CheckCount(const char* field, size_t count, int limit) {
  if (count <= static_cast<size_t>(limit)) return Status::Ok();
  return Status(StatusCode::kOutOfRange, std::string("sampling: ") + field + " has " + std::to_string(count) +
                                             " entries, the limit is " + std::to_string(limit));
}

// SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection whose outputs on a counter pass as random.
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;

uint64_t StreamOf(uint64_t seed, int sample_index) {
  return Mix(Mix(seed + kGolden) + kGolden * static_cast<uint64_t>(sample_index));
}

// In [0, 1), 53 bits.
double Uniform(uint64_t stream, int index) {
  return static_cast<double>(Mix(stream + kGolden * (static_cast<uint64_t>(index) + 1)) >> 11) * 0x1p-53;
}

// Four floats at once: a float reduction or a clamp in plain loops keeps GCC 12 from vectorising them. The vectors are
// GCC's and clang's own, 16 bytes wide, which every x86-64 and every AArch64 has.
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr int kLanes = 4;

Floats Load(const float* x) {
  Floats out;
  __builtin_memcpy(&out, x, sizeof(out));
  return out;
}

void Store(Floats value, float* x) { __builtin_memcpy(x, &value, sizeof(value)); }

// The last elements of an array; `rest` fills the vector up.
Floats LoadTail(const float* x, int count, float rest) {
  Floats out = {rest, rest, rest, rest};
  for (int i = 0; i < count; ++i) out[i] = x[i];
  return out;
}

Floats Larger(Floats a, Floats b) { return a > b ? a : b; }  // b where a is NaN

// exp(x) for x in [-87, 0], relative error below 4e-7.
Floats FastExp(Floats x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits
  const Floats t = x * 1.44269504f;
  const Floats whole = (t + kRound) - kRound;
  const Floats f = t - whole;
  Floats p = 1.3333558e-3f * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return p * std::bit_cast<Floats>((__builtin_convertvector(whole, Ints) + 127) << 23);
}

// A comparison with NaN is false, so NaN never becomes the maximum.
float MaxOf(const float* x, int count) {
  Floats a = {-kInf, -kInf, -kInf, -kInf};
  Floats b = a;
  int i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    a = Larger(Load(x + i), a);
    b = Larger(Load(x + i + kLanes), b);
  }
  for (; i < count; i += kLanes) a = Larger(LoadTail(x + i, std::min(kLanes, count - i), -kInf), a);
  a = Larger(a, b);
  return std::max(std::max(a[0], a[1]), std::max(a[2], a[3]));
}

// out = exp((x - max) * scale) where x >= floor, else 0; returns the sum.
float WeighBlock(const float* x, int count, float max, float scale, float floor, float* out) {
  constexpr Floats kZero = {};
  const auto weigh = [=](Floats value) {
    const Floats z = Larger((value - max) * scale, kZero - kNegligible);
    return value >= floor ? FastExp(z < kZero ? z : kZero) : kZero;
  };
  Floats sum = kZero;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats weights = weigh(Load(x + i));
    Store(weights, out + i);
    sum += weights;
  }
  if (i < count) {
    const Floats weights = weigh(LoadTail(x + i, count - i, -kInf));
    for (int j = 0; i + j < count; ++j) out[i + j] = weights[j];
    sum += weights;
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Sum of the weights that are at least cut.
float MassAtLeast(const float* weights, int count, float cut) {
  constexpr Floats kZero = {};
  Floats a = kZero;
  Floats b = kZero;
  int i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Floats first = Load(weights + i);
    const Floats second = Load(weights + i + kLanes);
    a += first >= cut ? first : kZero;
    b += second >= cut ? second : kZero;
  }
  for (; i < count; ++i) {
    if (weights[i] >= cut) a[0] += weights[i];
  }
  a += b;
  return (a[0] + a[1]) + (a[2] + a[3]);
}

int BlockCount(int n_vocab) { return CeilDiv(n_vocab, kBlock); }
int BlockSize(int n_vocab, int block) { return std::min(kBlock, n_vocab - block * kBlock); }

// Lowest id among the largest logits; kNoToken if none is above -Inf.
TokenId ArgMax(std::span<const float> logits) {
  const int n = static_cast<int>(logits.size());
  const float max = MaxOf(logits.data(), n);
  if (max == -kInf) return Sampler::kNoToken;
  for (int start = 0; start < n; start += kBlock) {
    const int count = std::min(kBlock, n - start);
    int hits = 0;
    for (int i = 0; i < count; ++i) hits += logits[start + i] == max;
    if (hits == 0) continue;
    for (int i = 0; i < count; ++i) {
      if (logits[start + i] == max) return start + i;
    }
  }
  return Sampler::kNoToken;
}

// Fills block_max; returns the largest of all.
float BlockMaxima(std::span<const float> logits, SamplingScratch& scratch) {
  const int n = static_cast<int>(logits.size());
  const int n_blocks = BlockCount(n);
  for (int b = 0; b < n_blocks; ++b) scratch.block_max[b] = MaxOf(&logits[b * kBlock], BlockSize(n, b));
  return MaxOf(scratch.block_max.data(), n_blocks);
}

// The k-th largest logit (NaN excluded; -Inf if there are fewer than k others), given block_max. The k-th largest
// block maximum is a lower bound of it that few logits reach, so little is left to select from.
float KthLargest(std::span<const float> logits, int k, SamplingScratch& scratch) {
  const int n = static_cast<int>(logits.size());
  const int n_blocks = BlockCount(n);
  float bound = -kInf;
  if (k <= n_blocks) {
    std::copy_n(scratch.block_max.begin(), n_blocks, scratch.block_order.begin());
    auto kth = scratch.block_order.begin() + (k - 1);
    std::nth_element(scratch.block_order.begin(), kth, scratch.block_order.begin() + n_blocks, std::greater<>());
    bound = *kth;
  }
  int n_values = 0;
  for (int b = 0; b < n_blocks; ++b) {
    if (!(scratch.block_max[b] >= bound)) continue;
    for (int i = b * kBlock, end = i + BlockSize(n, b); i < end; ++i) {
      if (logits[i] >= bound) scratch.values[n_values++] = logits[i];
    }
  }
  if (n_values < k) return -kInf;
  auto kth = scratch.values.begin() + (k - 1);
  std::nth_element(scratch.values.begin(), kth, scratch.values.begin() + n_values, std::greater<>());
  return *kth;
}

// Mass of all tokens whose weight is at least cut. A block that weighs less as a whole has none.
double MassAtLeast(const SamplingScratch& scratch, int n_vocab, float cut) {
  double mass = 0;
  for (int b = 0; b < BlockCount(n_vocab); ++b) {
    if (scratch.block_mass[b] < cut) continue;
    mass += MassAtLeast(&scratch.weights[b * kBlock], BlockSize(n_vocab, b), cut);
  }
  return mass;
}

// Keeps the nucleus: the heaviest tokens up to and including the one that brings the mass to top_p of `total`; of equal
// ones the lowest ids. Returns the mass kept.
//
// The least weight kept is found by bisection over the bits of a float, which sort as positive floats do: at most 30
// passes, each over the blocks that can still matter, and none slower for a flat distribution or for ties.
double ApplyTopP(SamplingScratch& scratch, int n_vocab, float top_p, double total) {
  const double target = static_cast<double>(top_p) * total;
  // All tokens lighter than the start together weigh less than what may be left out. No weight is above 1.
  uint32_t keep = std::bit_cast<uint32_t>(static_cast<float>((total - target) / n_vocab));
  uint32_t above = std::bit_cast<uint32_t>(1.0f) + 1;
  double mass_above = 0;
  while (above - keep > 1) {
    const uint32_t middle = keep + (above - keep) / 2;
    const double mass = MassAtLeast(scratch, n_vocab, std::bit_cast<float>(middle));
    if (mass >= target) {
      keep = middle;
    } else {
      above = middle;
      mass_above = mass;
    }
  }

  const float cut = std::max(std::bit_cast<float>(keep), FLT_MIN);
  double ties = std::max(std::ceil((target - mass_above) / cut), 1.0);
  double kept = 0;
  for (int b = 0; b < BlockCount(n_vocab); ++b) {
    if (scratch.block_mass[b] < cut) {
      scratch.block_mass[b] = 0;
      continue;
    }
    float* weights = &scratch.weights[b * kBlock];
    const int count = BlockSize(n_vocab, b);
    for (int i = 0; i < count; ++i) {
      if (weights[i] > cut) continue;
      if (weights[i] < cut || ties-- < 1) weights[i] = 0.0f;
    }
    scratch.block_mass[b] = MassAtLeast(weights, count, cut);
    kept += scratch.block_mass[b];
  }
  return kept;
}

// The token at `point` of the cumulative mass in id order, point in [0, total mass). A rounded sum may put a point just
// past the end: it takes the last token of positive weight.
TokenId TokenAt(const SamplingScratch& scratch, int n_vocab, double point) {
  const int n_blocks = BlockCount(n_vocab);
  int block = -1;
  for (int b = 0; b < n_blocks; ++b) {
    const double mass = scratch.block_mass[b];
    if (mass == 0) continue;
    if (block >= 0) point -= scratch.block_mass[block];
    block = b;
    if (point < mass) break;
  }
  TokenId token = Sampler::kNoToken;
  if (block < 0) return token;
  for (int i = block * kBlock, end = i + BlockSize(n_vocab, block); i < end; ++i) {
    if (scratch.weights[i] == 0.0f) continue;
    token = i;
    if (point < scratch.weights[i]) break;
    point -= scratch.weights[i];
  }
  return token;
}

// Log of the sum of exp(logit - max), NaN excluded; uses block_max, overwrites weights and block_mass.
double LogSumExp(std::span<const float> logits, float max, SamplingScratch& scratch) {
  const int n = static_cast<int>(logits.size());
  double total = 0;
  for (int b = 0; b < BlockCount(n); ++b) {
    if (!(scratch.block_max[b] > max - kNegligible)) continue;
    const int start = b * kBlock;
    total += WeighBlock(&logits[start], BlockSize(n, b), max, 1.0f, max - kNegligible, &scratch.weights[start]);
  }
  return std::log(total);
}

// The k likeliest tokens of the model's own distribution into out->top; returns max + log-sum-exp, so that a token's
// logprob is its logit less that.
double RawLogprobs(std::span<const float> logits, int k, SamplingScratch& scratch, SampledLogprobs& out) {
  out.top.clear();
  const int n = static_cast<int>(logits.size());
  const float max = std::min(BlockMaxima(logits, scratch), FLT_MAX);
  if (max == -kInf) return 0;
  const double norm = max + LogSumExp(logits, max, scratch);
  k = std::min(k, n);
  if (k <= 0) return norm;
  const float kth = KthLargest(logits, k, scratch);
  const auto logprob = [norm](float logit) { return static_cast<float>(std::min(logit, FLT_MAX) - norm); };
  const auto gather = [&](auto&& wanted) {
    for (int b = 0; b < BlockCount(n); ++b) {
      if (!(scratch.block_max[b] >= kth)) continue;
      for (int i = b * kBlock, end = i + BlockSize(n, b); i < end; ++i) {
        if (static_cast<int>(out.top.size()) == k) return;
        if (wanted(logits[i])) out.top.push_back({i, logprob(logits[i])});
      }
    }
  };
  gather([kth](float logit) { return logit > kth; });
  gather([kth](float logit) { return logit == kth && logit > -kInf; });
  std::sort(out.top.begin(), out.top.end(), [](const TokenLogprob& a, const TokenLogprob& b) {
    return a.logprob != b.logprob ? a.logprob > b.logprob : a.token < b.token;
  });
  return norm;
}

}  // namespace

Status Validate(const SamplingParams& params, int n_vocab, const SamplingLimits& limits) {
  RETURN_IF_ERROR(CheckRange("temperature", params.temperature, 0, limits.temperature_max));
  RETURN_IF_ERROR(CheckRange("top_k", params.top_k, 0, std::numeric_limits<int>::max()));
  if (!(params.top_p > 0 && params.top_p <= 1)) return Invalid("top_p", params.top_p, "above 0 and at most 1");
  RETURN_IF_ERROR(CheckRange("min_p", params.min_p, 0, 1));
  if (!(params.repetition_penalty > 0 && params.repetition_penalty <= limits.repetition_penalty_max)) {
    return Invalid("repetition_penalty", params.repetition_penalty,
                   "above 0 and at most " + Number(limits.repetition_penalty_max));
  }
  const double additive = limits.additive_penalty_max;
  RETURN_IF_ERROR(CheckRange("presence_penalty", params.presence_penalty, -additive, additive));
  RETURN_IF_ERROR(CheckRange("frequency_penalty", params.frequency_penalty, -additive, additive));
  RETURN_IF_ERROR(CheckCount("logit_bias", params.logit_bias.size(), limits.logit_bias_tokens_max));
  for (const auto& [token, bias] : params.logit_bias) {
    RETURN_IF_ERROR(CheckRange("logit_bias token", token, 0, n_vocab - 1));
    const std::string field = "logit_bias of token " + std::to_string(token);
    RETURN_IF_ERROR(CheckRange(field.c_str(), bias, -limits.logit_bias_max, limits.logit_bias_max));
  }
  RETURN_IF_ERROR(CheckCount("stop", params.stop.size(), limits.stop_strings_max));
  for (size_t i = 0; i < params.stop.size(); ++i) {
    const std::string field = "length in bytes of stop[" + std::to_string(i) + "]";
    RETURN_IF_ERROR(
        CheckRange(field.c_str(), static_cast<double>(params.stop[i].size()), 1, limits.stop_string_bytes_max));
  }
  RETURN_IF_ERROR(CheckCount("stop_tokens", params.stop_tokens.size(), limits.stop_tokens_max));
  for (TokenId token : params.stop_tokens) RETURN_IF_ERROR(CheckRange("stop_tokens token", token, 0, n_vocab - 1));
  RETURN_IF_ERROR(CheckRange("max_tokens", params.max_tokens, 1, limits.max_tokens_max));
  if (params.min_tokens < 0 || params.min_tokens > params.max_tokens) {
    return Invalid("min_tokens", params.min_tokens, "from 0 to max_tokens (" + std::to_string(params.max_tokens) + ")");
  }
  RETURN_IF_ERROR(CheckRange("n", params.n, 1, limits.n_max));
  return CheckRange("logprobs", params.logprobs, -1, limits.logprobs_max);
}

void TokenLogprobs(std::span<const float> logits, TokenId token, int k, SamplingScratch& scratch,
                   SampledLogprobs& out) {
  const double norm = RawLogprobs(logits, k, scratch, out);
  out.chosen = static_cast<float>(std::min(logits[token], FLT_MAX) - norm);
}

SamplingScratch::SamplingScratch(int n_vocab)
    : weights(n_vocab),
      values(n_vocab),
      raw_logits(n_vocab),
      block_max(BlockCount(n_vocab)),
      block_order(BlockCount(n_vocab)),
      block_mass(BlockCount(n_vocab)) {}

Sampler::Sampler(const SamplingParams& params, int n_vocab, std::span<const TokenId> end_tokens, int sample_index)
    : params_(params),
      n_vocab_(n_vocab),
      seed_(params.seed.value_or(RandomKey())),
      stream_(StreamOf(seed_, sample_index)) {
  CHECK(n_vocab > 0);
  held_off_ = params.stop_tokens;
  held_off_.insert(held_off_.end(), end_tokens.begin(), end_tokens.end());
  std::erase_if(held_off_, [n_vocab](TokenId token) { return token < 0 || token >= n_vocab; });
  if (params.repetition_penalty != 1 || params.presence_penalty != 0 || params.frequency_penalty != 0) {
    output_count_.assign(n_vocab, -1);
    seen_.reserve(n_vocab);
  }
}

Sampler Sampler::Fork(int sample_index) const {
  Sampler fork = *this;
  fork.seen_.reserve(seen_.capacity());  // a copied vector keeps only its size
  fork.stream_ = StreamOf(seed_, sample_index);
  return fork;
}

void Sampler::ObservePrompt(std::span<const TokenId> tokens) {
  if (output_count_.empty()) return;
  for (TokenId token : tokens) {
    if (token < 0 || token >= n_vocab_ || output_count_[token] >= 0) continue;
    output_count_[token] = 0;
    seen_.push_back(token);
  }
}

void Sampler::ObserveOutput(TokenId token) {
  ++n_output_;
  if (output_count_.empty() || token < 0 || token >= n_vocab_) return;
  if (output_count_[token] < 0) {
    output_count_[token] = 0;
    seen_.push_back(token);
  }
  ++output_count_[token];
}

bool Sampler::greedy() const { return params_.temperature < kGreedyBelow; }

void Sampler::ApplyPenalties(std::span<float> logits) const {
  for (TokenId token : seen_) {
    float& logit = logits[token];
    logit = logit > 0 ? logit / params_.repetition_penalty : logit * params_.repetition_penalty;
    const int count = output_count_[token];
    if (count > 0) {
      logit -= params_.frequency_penalty * static_cast<float>(count);
      logit -= params_.presence_penalty;
    }
  }
  for (const auto& [token, bias] : params_.logit_bias) logits[token] += bias;
  if (n_output_ < params_.min_tokens) {
    for (TokenId token : held_off_) logits[token] = -kInf;
  }
}

TokenId Sampler::Draw(std::span<const float> logits, SamplingScratch& scratch) const {
  const float max = std::min(BlockMaxima(logits, scratch), FLT_MAX);
  if (max == -kInf) return kNoToken;

  const float temperature = params_.temperature;
  float floor = std::max(max - kNegligible * temperature, -FLT_MAX);
  if (params_.min_p > 0) floor = std::max(floor, max + temperature * std::log(params_.min_p));
  if (params_.top_k > 0 && params_.top_k < n_vocab_) {
    floor = std::max(floor, std::min(KthLargest(logits, params_.top_k, scratch), FLT_MAX));
  }

  const float scale = 1 / temperature;
  double total = 0;
  for (int b = 0; b < BlockCount(n_vocab_); ++b) {
    const int start = b * kBlock;
    scratch.block_mass[b] = 0;
    if (!(scratch.block_max[b] >= floor)) continue;
    scratch.block_mass[b] =
        WeighBlock(&logits[start], BlockSize(n_vocab_, b), max, scale, floor, &scratch.weights[start]);
    total += scratch.block_mass[b];
  }
  if (params_.top_p < 1) total = ApplyTopP(scratch, n_vocab_, params_.top_p, total);
  return TokenAt(scratch, n_vocab_, Uniform(stream_, n_output_) * total);
}

TokenId Sampler::Sample(std::span<float> logits, SamplingScratch& scratch, SampledLogprobs* out,
                        const text::GrammarState* grammar) const {
  CHECK(static_cast<int>(logits.size()) == n_vocab_ && scratch.weights.size() == logits.size());
  const bool wanted = out != nullptr && params_.logprobs >= 0;
  double norm = 0;
  if (wanted) {
    norm = RawLogprobs(logits, params_.logprobs, scratch, *out);
    std::copy(logits.begin(), logits.end(), scratch.raw_logits.begin());
  }
  const bool constrained = grammar != nullptr && grammar->constrains();
  if (constrained && !greedy()) grammar->Mask(logits);
  ApplyPenalties(logits);
  TokenId token = greedy() ? ArgMax(logits) : Draw(logits, scratch);
  if (constrained && greedy() && token != kNoToken && !grammar->Allows(token)) {
    grammar->Mask(logits);
    token = ArgMax(logits);
  }
  if (wanted) {
    out->chosen = token == kNoToken ? -kInf : static_cast<float>(std::min(scratch.raw_logits[token], FLT_MAX) - norm);
  }
  return token;
}

}  // namespace jointkv::engine
