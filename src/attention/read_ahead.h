// Ahead: asks for what later visits read, on the way through the present ones.
#pragma once

#include <cstddef>

#include "attention/kernels.h"

namespace jointkv::attention {

// Blocks lie anywhere in memory and are read too fast for the processor to guess what comes next. A line or two at a
// time, into the second cache: in a burst, or on their way into the first one, which is too small for the blocks of two
// calls, they would keep the present block's loads waiting.
class Ahead {
 public:
  explicit Ahead(const VisitArgs& args) {
    const int head_dim = args.layout->head_dim;
    for (int i = 0; i < args.n; ++i) {
      const Visit& visit = args.visits[i];
      const ptrdiff_t bytes = static_cast<ptrdiff_t>(visit.next_cap) * head_dim * 2;
      if (visit.next_k != nullptr) ranges_[n_++] = {visit.next_k, visit.next_k + bytes};
      if (visit.next_v != nullptr) ranges_[n_++] = {visit.next_v, visit.next_v + bytes};
    }
  }

  struct Range {
    const std::byte* at;
    const std::byte* end;

    __attribute__((always_inline)) void Step() {
      if (at >= end) return;
      __builtin_prefetch(at, 0, 2);
      at += 64;
    }
  };
  Range Take() {
    while (i_ < n_ && ranges_[i_].at >= ranges_[i_].end) ++i_;
    return i_ < n_ ? ranges_[i_] : Range{nullptr, nullptr};
  }
  void Return(const Range& range) {
    if (i_ < n_) ranges_[i_] = range;
  }

 private:
  Range ranges_[2 * kVisitsMax];
  int n_ = 0;
  int i_ = 0;
};

}  // namespace jointkv::attention
