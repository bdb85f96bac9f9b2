#include "cli/eval_stats.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "cli/summary.h"

namespace jointkv::cli {
namespace {

// log of the sum of exp of all logits.
double LogSumExp(std::span<const float> logits, float largest) {
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
  return largest + std::log(sum);
}

}  // namespace

TokenScore ScoreToken(std::span<const float> exact, std::span<const float> ours, TokenId forced) {
  CHECK(!exact.empty() && exact.size() == ours.size());
  CHECK(forced >= 0 && static_cast<size_t>(forced) < exact.size());
  const auto top_exact = std::ranges::max_element(exact);
  const auto top_ours = std::ranges::max_element(ours);
  const double sum_exact = LogSumExp(exact, *top_exact);
  const double sum_ours = LogSumExp(ours, *top_ours);
  double kl = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double log_p = exact[i] - sum_exact;
    const double p = std::exp(log_p);
    if (p > 0) kl += p * (log_p - (ours[i] - sum_ours));
  }
  const auto token = static_cast<size_t>(forced);
  return {.kl = std::max(0.0, kl),
          .nll_exact = sum_exact - exact[token],
          .nll_ours = sum_ours - ours[token],
          .same_top = top_exact - exact.begin() == top_ours - ours.begin()};
}

Quality QualityOf(std::span<const TokenScore> scores) {
  Quality quality;
  if (scores.empty()) return quality;
  std::vector<double> kl;
  double difference = 0;
  int64_t same = 0;
  for (const TokenScore& score : scores) {
    kl.push_back(score.kl);
    quality.kl_mean += score.kl;
    difference += score.nll_ours - score.nll_exact;
    same += score.same_top;
  }
  const auto n = static_cast<double>(scores.size());
  quality.tokens = static_cast<int64_t>(scores.size());
  quality.kl_mean /= n;
  quality.kl_p99 = Percentile(std::move(kl), 0.99);
  quality.top1 = static_cast<double>(same) / n;
  quality.ppl_ratio = std::exp(difference / n);
  return quality;
}

Spread SpreadOf(std::span<const double> values) {
  if (values.empty()) return {};
  Spread spread = {0, std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()};
  for (const double value : values) {
    spread.mean += value / static_cast<double>(values.size());
    spread.min = std::min(spread.min, value);
    spread.max = std::max(spread.max, value);
  }
  return spread;
}

}  // namespace jointkv::cli
