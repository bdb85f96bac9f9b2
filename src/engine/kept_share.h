// KeptShare: which share of the blocks of recent prompts fusion left with bytes of their own.
//
// Threads: one. Owns: two sums that fade, so that what was sealed a window ago counts half. Fails how: never.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace jointkv::engine {

class KeptShare {
 public:
  // It begins as if a window of blocks had all been kept.
  explicit KeptShare(int window_blocks = 1) : window_(window_blocks), offered_(window_blocks), kept_(window_blocks) {}

  // Of one prompt's step; a policy that fuses late gives blocks of earlier steps up as well.
  void Add(int64_t offered, int64_t fused) {
    const double fade = std::exp2(-static_cast<double>(offered) / window_);
    offered_ = offered_ * fade + static_cast<double>(offered);
    kept_ = std::max(0.0, kept_ * fade + static_cast<double>(offered - fused));
  }

  double value() const { return std::min(1.0, kept_ / offered_); }

 private:
  double window_;
  double offered_;  // blocks
  double kept_;
};

}  // namespace jointkv::engine
