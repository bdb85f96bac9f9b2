// ggml's RoPE rules in plain double, as its CPU operator writes them: the judge of RopeTable and of attention.
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>
#include <span>

#include "gguf/hyperparameters.h"

namespace jointkv::dense {

struct PlainRope {
  gguf::Rope rope;
  std::span<const float> freq_factors = {};

  // Angle of one pair at one position, in radians.
  double Theta(int pair, int position) const {
    const double theta_scale = std::pow(static_cast<double>(rope.freq_base), -2.0 / rope.n_rot);
    double theta_extrap = position;
    for (int i = 0; i < pair; ++i) theta_extrap *= theta_scale;
    if (!freq_factors.empty()) theta_extrap /= freq_factors[pair];
    const double theta_interp = rope.freq_scale * theta_extrap;
    if (rope.ext_factor == 0) return theta_interp;
    const double start = std::max(0.0, std::floor(CorrectionDimension(rope.beta_fast)));
    const double end = std::min(rope.n_rot - 1.0, std::ceil(CorrectionDimension(rope.beta_slow)));
    const double y = (pair - start) / std::max(0.001, end - start);
    const double ramp_mix = (1 - std::min(1.0, std::max(0.0, y))) * rope.ext_factor;
    return theta_interp * (1 - ramp_mix) + theta_extrap * ramp_mix;
  }
  double Magnitude() const {
    return rope.attn_factor * (rope.ext_factor == 0 ? 1 : 1 + 0.1 * std::log(1 / static_cast<double>(rope.freq_scale)));
  }

 private:
  double CorrectionDimension(double turns) const {
    return rope.n_rot * std::log(rope.n_ctx_orig / (turns * 2 * std::numbers::pi)) /
           (2 * std::log(static_cast<double>(rope.freq_base)));
  }
};

}  // namespace jointkv::dense
