// Sketches: near neighbours among blocks of other tokens.
//
// A block's values are folded into kWidth sums with random signs (the count sketch of Charikar, Chen and Farach-Colton
// 2002 as a Johnson-Lindenstrauss transform): |s(a) - s(b)|^2 is an unbiased estimate of |a - b|^2 with a relative
// standard deviation of at most sqrt(2 / kWidth) = 0.25. So what lies within a bound is nearly always estimated within
// twice that, and every hit is then measured on the real values.
//
// Threads: calls for different tables may run at once. Owns: the sketches. Fails how: never.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "base/ids.h"
#include "codec/layout.h"

namespace jointkv::joint {

class Sketches {
 public:
  static constexpr int kWidth = 32;
  using Sketch = std::array<float, kWidth>;

  // Blocks that may be compared: of one domain, class and number of tokens.
  struct Shape {
    DomainId domain;
    int cap = 0;
    int tokens = 0;
    auto operator<=>(const Shape&) const = default;
  };

  Sketches(const codec::BlockLayout& layout, int n_tables) : layout_(layout), tables_(n_tables) {}

  Sketch Of(codec::Kind kind, const std::byte* block, const Shape& shape) const;

  void Add(int table, const Shape& shape, BlockId block, const Sketch& sketch);
  void Rename(int table, const Shape& shape, BlockId from, BlockId to);
  void Remove(int table, const Shape& shape, BlockId block);
  // The nearest by estimate, nearest first, at most `most` and none beyond the squared distance.
  std::vector<BlockId> Near(int table, const Shape& shape, const Sketch& sketch, double distance_squared,
                            int most) const;

  size_t metadata_bytes() const;

 private:
  struct Entry {
    BlockId block;
    Sketch sketch;
  };
  using Table = std::map<Shape, std::vector<Entry>>;

  codec::BlockLayout layout_;
  std::vector<Table> tables_;
};

}  // namespace jointkv::joint
