#include "dense/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace jointkv::dense {
namespace {

// Dimension at which a wave makes `rotations` turns within the original context (YaRN, section 3.2).
double CorrectionDimension(const gguf::Rope& rope, double rotations) {
  return rope.n_rot * std::log(rope.n_ctx_orig / (rotations * 2 * std::numbers::pi)) /
         (2 * std::log(static_cast<double>(rope.freq_base)));
}

}  // namespace

RopeTable::RopeTable(const gguf::Rope& rope, std::span<const float> freq_factors) : magnitude_(rope.magnitude()) {
  const int n_pairs = rope.n_rot / 2;
  frequency_.resize(n_pairs);
  const double low = std::max(0.0, std::floor(CorrectionDimension(rope, rope.beta_fast)));
  const double high = std::min(rope.n_rot - 1.0, std::ceil(CorrectionDimension(rope, rope.beta_slow)));
  for (int i = 0; i < n_pairs; ++i) {
    double frequency = std::pow(static_cast<double>(rope.freq_base), -2.0 * i / rope.n_rot);
    if (!freq_factors.empty()) frequency /= freq_factors[i];
    double mix = 0;  // 1: unscaled, 0: scaled
    if (rope.ext_factor != 0) {
      const double ramp = std::clamp((i - low) / std::max(0.001, high - low), 0.0, 1.0);
      mix = (1 - ramp) * rope.ext_factor;
    }
    frequency_[i] = frequency * (rope.freq_scale * (1 - mix) + mix);
  }
}

void RopeTable::Ensure(int positions) {
  if (positions <= positions_) return;
  const int target = std::max(positions, std::max(512, positions_ + positions_ / 2));
  const size_t n_pairs = frequency_.size();
  table_.resize(static_cast<size_t>(target) * 2 * n_pairs);
  for (int p = positions_; p < target; ++p) {
    float* row = table_.data() + static_cast<size_t>(p) * 2 * n_pairs;
    for (size_t i = 0; i < n_pairs; ++i) {
      row[i] = static_cast<float>(std::cos(p * frequency_[i]) * magnitude_);
      row[n_pairs + i] = static_cast<float>(std::sin(p * frequency_[i]) * magnitude_);
    }
  }
  positions_ = target;
}

}  // namespace jointkv::dense
