// Ahead: asks memory for what later visits read, on the way through the present ones.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace jointkv::attention {

// Blocks lie anywhere in memory and are read too fast for the processor to guess what comes next. Lines are asked for a
// few at a time, spread over what is computed meanwhile: a processor drops what it is asked for in a burst, once its
// buffers for outstanding lines are full. They go into the second cache; the first one is too small to hold them so
// long.
//
// Threads: one. Owns: nothing, and never reads what it asks for. Fails how: what does not fit the queue is not asked
// for.
class Ahead {
 public:
  // bytes > 0. What was pushed a moment ago is not asked for again.
  void Push(const std::byte* data, size_t bytes) {
    constexpr unsigned kRecent = 16;
    for (unsigned i = 1; i <= kRecent; ++i) {
      if (ranges_[(last_ - i) % kRanges].data == data) return;
    }
    if (last_ - first_ == kRanges) return;
    const std::byte* line = data - reinterpret_cast<uintptr_t>(data) % kLine;
    ranges_[last_++ % kRanges] = {data, line, data + bytes};
  }

  // Lines still to be asked for.
  ptrdiff_t lines() const {
    ptrdiff_t lines = 0;
    for (unsigned i = first_; i != last_; ++i) {
      const Pushed& range = ranges_[i % kRanges];
      if (range.at < range.end) lines += (range.end - range.at + kLine - 1) / kLine;
    }
    return lines;
  }

  // Forgets what has not been asked for.
  void Clear() {
    for (; first_ != last_; ++first_) ranges_[first_ % kRanges] = {};
  }

  // Whether a step asks for two lines, or for one.
  void set_fast(bool fast) { step_ = fast ? 2 * kLine : kLine; }

  struct Range {
    const std::byte* at;
    const std::byte* end;
    ptrdiff_t step;

    __attribute__((always_inline)) void Step() {
      if (at >= end) return;
      __builtin_prefetch(at, 0, 2);
      if (step > kLine && at + kLine < end) __builtin_prefetch(at + kLine, 0, 2);
      at += step;
    }
  };
  Range Take() {
    while (first_ != last_ && ranges_[first_ % kRanges].at >= ranges_[first_ % kRanges].end) ++first_;
    if (first_ == last_) return {nullptr, nullptr, step_};
    return {ranges_[first_ % kRanges].at, ranges_[first_ % kRanges].end, step_};
  }
  void Return(const Range& range) {
    if (first_ != last_) ranges_[first_ % kRanges].at = range.at;
  }

 private:
  static constexpr ptrdiff_t kLine = 64;
  static constexpr unsigned kRanges = 128;  // a power of two: counters wrap

  struct Pushed {
    const std::byte* data = nullptr;
    const std::byte* at = nullptr;
    const std::byte* end = nullptr;
  };

  std::array<Pushed, kRanges> ranges_;
  unsigned first_ = 0;
  unsigned last_ = 0;
  ptrdiff_t step_ = kLine;
};

}  // namespace jointkv::attention
