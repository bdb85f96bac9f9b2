#include "joint/sketches.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "codec/block_io.h"

namespace jointkv::joint {

Sketches::Sketch Sketches::Of(codec::Kind kind, const std::byte* block, const Shape& shape) const {
  Sketch sketch = {};
  std::vector<float> values(static_cast<size_t>(layout_.n_kv_heads) * layout_.head_dim);
  uint32_t state = 0;
  for (int token = 0; token < shape.tokens; ++token) {
    codec::LoadToken(layout_, kind, block, shape.cap, token, values);
    for (const float value : values) {
      state += 0x9e3779b9U;  // a Weyl sequence, mixed (the finaliser of MurmurHash3)
      uint32_t hash = state ^ (state >> 16);
      hash *= 0x85ebca6bU;
      hash ^= hash >> 13;
      sketch[hash % kWidth] += (hash >> 31) != 0 ? value : -value;
    }
  }
  return sketch;
}

void Sketches::Add(int table, const Shape& shape, BlockId block, const Sketch& sketch) {
  tables_[table][shape].push_back({block, sketch});
}

void Sketches::Rename(int table, const Shape& shape, BlockId from, BlockId to) {
  for (Entry& entry : tables_[table][shape]) {
    if (entry.block == from) entry.block = to;
  }
}

void Sketches::Remove(int table, const Shape& shape, BlockId block) {
  const auto found = tables_[table].find(shape);
  CHECK(found != tables_[table].end());
  std::erase_if(found->second, [&](const Entry& entry) { return entry.block == block; });
  if (found->second.empty()) tables_[table].erase(found);
}

std::vector<BlockId> Sketches::Near(int table, const Shape& shape, const Sketch& sketch, double distance_squared,
                                    int most) const {
  std::vector<std::pair<float, BlockId>> near;
  const auto found = tables_[table].find(shape);
  if (found == tables_[table].end()) return {};
  for (const Entry& entry : found->second) {
    float estimate = 0;
    for (int i = 0; i < kWidth; ++i) estimate += (entry.sketch[i] - sketch[i]) * (entry.sketch[i] - sketch[i]);
    if (estimate <= distance_squared) near.emplace_back(estimate, entry.block);
  }
  std::ranges::sort(near);
  std::vector<BlockId> blocks;
  for (const auto& [estimate, block] : near) {
    if (static_cast<int>(blocks.size()) == most) break;
    blocks.push_back(block);
  }
  return blocks;
}

size_t Sketches::metadata_bytes() const {
  size_t bytes = 0;
  for (const Table& table : tables_) {
    for (const auto& [shape, entries] : table) bytes += sizeof(Shape) + entries.capacity() * sizeof(Entry) + 48;
  }
  return bytes;
}

}  // namespace jointkv::joint
