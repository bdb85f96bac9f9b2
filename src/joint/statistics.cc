#include "joint/statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "codec/block_io.h"
#include "codec/quantised.h"

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
  for (Table& table : tables_) {
    table.sum.resize(static_cast<size_t>(layout.n_kv_heads) * layout.head_dim);
    table.squares.resize(table.sum.size());
  }
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
      table.squares[i] += static_cast<double>(values[i]) * values[i];
    }
  }
}

double Statistics::energy(int index) const {
  const std::vector<double> channels = variance(index);
  return std::accumulate(channels.begin(), channels.end(), 0.0);
}

std::vector<double> Statistics::variance(int index) const {
  const Table& table = tables_[index];
  std::vector<double> variance(table.sum.size());
  for (size_t i = 0; i < variance.size() && table.tokens > 0; ++i) {
    const double mean = table.sum[i] / table.tokens;
    variance[i] = table.squares[i] / table.tokens - mean * mean;
  }
  return variance;
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

std::vector<float> PairScales(std::span<const double> variance, std::span<const double> query_energy, int n_kv_heads) {
  constexpr double kLeastShare = 1e-3;
  CHECK(variance.size() == 2 * query_energy.size() && query_energy.size() % n_kv_heads == 0);
  const size_t pairs = query_energy.size() / n_kv_heads;
  std::vector<float> scales(query_energy.size(), 1.0F);
  std::vector<double> log_scale(pairs);
  for (size_t head = 0; head < query_energy.size(); head += pairs) {
    double v_mean = 0;
    double w_mean = 0;
    const auto v = [&](size_t pair) { return variance[2 * (head + pair)] + variance[2 * (head + pair) + 1]; };
    for (size_t pair = 0; pair < pairs; ++pair) {
      v_mean += v(pair) / static_cast<double>(pairs);
      w_mean += query_energy[head + pair] / static_cast<double>(pairs);
    }
    // Written so that what is not a number leaves all at 1.
    if (!(v_mean > 0 && w_mean > 0 && std::isfinite(v_mean) && std::isfinite(w_mean))) continue;
    double log_mean = 0;
    for (size_t pair = 0; pair < pairs; ++pair) {
      log_scale[pair] = std::log(std::max(v(pair) / v_mean, kLeastShare)) / 4 -
                        std::log(std::max(query_energy[head + pair] / w_mean, kLeastShare)) / 4;
      log_mean += log_scale[pair] / static_cast<double>(pairs);
    }
    for (size_t pair = 0; pair < pairs; ++pair) {
      scales[head + pair] = std::clamp(static_cast<float>(std::exp(log_scale[pair] - log_mean)),
                                       1 / codec::kPairScaleMax, codec::kPairScaleMax);
    }
  }
  return scales;
}

}  // namespace jointkv::joint
