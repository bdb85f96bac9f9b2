#include "joint/statistics.h"

#include "codec/block_io.h"

namespace jointkv::joint {
namespace {

// Rotates the pairs of one token's keys (heads, pairs, 2) by `direction` (+1 or -1) times the table's angle. The
// table's magnitude is kept for +1 and undone for -1.
void Rotate(const dense::RopeTable& rope, int position, int direction, std::span<float> keys) {
  const float* cos = rope.cos(position);
  const float* sin = rope.sin(position);
  const size_t pairs = rope.n_pairs();
  for (size_t i = 0; i + 1 < keys.size(); i += 2) {
    const size_t pair = i / 2 % pairs;
    const float square = cos[pair] * cos[pair] + sin[pair] * sin[pair];
    const float scale = direction > 0 ? 1 : 1 / square;
    const float c = cos[pair] * scale;
    const float s = sin[pair] * scale * static_cast<float>(direction);
    const float x = keys[i];
    const float y = keys[i + 1];
    keys[i] = x * c - y * s;
    keys[i + 1] = x * s + y * c;
  }
}

}  // namespace

Statistics::Statistics(const codec::BlockLayout& layout, std::vector<const dense::RopeTable*> rope)
    : layout_(layout), rope_(std::move(rope)), tables_(2 * rope_.size()) {
  for (Table& table : tables_) table.sum.resize(static_cast<size_t>(layout.n_kv_heads) * layout.head_dim);
}

void Statistics::Add(int index, codec::Kind kind, const std::byte* block, int cap, int base, int first, int last) {
  Table& table = tables_[index];
  const dense::RopeTable* rope = kind == codec::Kind::kK ? rope_[index / 2] : nullptr;
  std::vector<float> values(table.sum.size());
  for (int token = first; token < last && table.tokens < kTokensMax; ++token, ++table.tokens) {
    codec::LoadToken(layout_, kind, block, cap, token, values);
    if (rope != nullptr) Rotate(*rope, base + token, -1, values);
    for (size_t i = 0; i < values.size(); ++i) {
      table.sum[i] += values[i];
      table.squares += static_cast<double>(values[i]) * values[i];
    }
  }
}

double Statistics::energy(int index) const {
  const Table& table = tables_[index];
  if (table.tokens == 0) return 0;
  double mean_squares = 0;
  for (const double sum : table.sum) mean_squares += sum / table.tokens * (sum / table.tokens);
  return table.squares / table.tokens - mean_squares;
}

void Statistics::Mean(int index, codec::Kind kind, int position, int tokens, std::vector<float>& out) const {
  const Table& table = tables_[index];
  const dense::RopeTable* rope = kind == codec::Kind::kK ? rope_[index / 2] : nullptr;
  const size_t channels = table.sum.size();
  out.assign(tokens * channels, 0);
  for (int token = 0; token < tokens && table.tokens > 0; ++token) {
    const auto row = std::span(out).subspan(token * channels, channels);
    for (size_t i = 0; i < channels; ++i) row[i] = static_cast<float>(table.sum[i] / table.tokens);
    if (rope != nullptr) Rotate(*rope, position + token, +1, row);
  }
}

}  // namespace jointkv::joint
