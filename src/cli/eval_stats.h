// Quality of a model's output under an approximate cache, token by token against the exact one.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"

namespace jointkv::cli {

// One scored position. Natural logarithms.
struct TokenScore {
  double kl = 0;         // KL(exact || ours)
  double nll_exact = 0;  // of the token that was forced
  double nll_ours = 0;
  bool same_top = false;  // the most likely token is the same
};

// Logits (n_vocab) of the same position under both caches. Sums are in f64: a vocabulary of 262,144 leaves f32 two
// digits of a KL of 0.001.
TokenScore ScoreToken(std::span<const float> exact, std::span<const float> ours, TokenId forced);

struct Quality {
  int64_t tokens = 0;
  double kl_mean = 0;
  double kl_p99 = 0;
  double top1 = 0;       // share of positions with the same most likely token
  double ppl_ratio = 1;  // perplexity of the forced tokens under ours / under exact
};

Quality QualityOf(std::span<const TokenScore> scores);

// Mean, and the least and largest value.
struct Spread {
  double mean = 0;
  double min = 0;
  double max = 0;
};

Spread SpreadOf(std::span<const double> values);

}  // namespace jointkv::cli
