#include "joint/cosine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "base/hash.h"
#include "joint/block_math.h"

namespace jointkv::joint {
namespace {

double Angle(double product, double norm_a, double norm_b) {
  return norm_a > 0 && norm_b > 0 ? std::acos(std::clamp(product / (norm_a * norm_b), -1.0, 1.0)) : 0;
}

}  // namespace

Cosine::Cosine(const FusionOptions& options, kv::KvCache& cache, ThreadPool& pool)
    : options_(options),
      cache_(cache),
      pool_(pool),
      limit_(std::acos(static_cast<double>(options.threshold))),
      layers_(cache.shape().n_layers()) {
  for (Layer& layer : layers_) layer.scratch.resize(cache.shape().layout.block_bytes(kGridTokens));
}

// a . b of two blocks of the grid, flattened.
double Cosine::Product(Kind kind, BlockId a, const std::byte* b) const {
  float products[codec::kBlockTokensMax];
  TokenProducts(cache_.shape().layout, kind, cache_.data(a), b, kGridTokens, kGridTokens, products);
  return std::accumulate(std::begin(products), std::end(products), 0.0);
}

void Cosine::OnSealed(SequenceId sequence, kv::SealedRange sealed, Phase phase, FusionStats& stats) {
  const int n = cache_.shape().n_layers();
  const int first = kExemptLayers;
  const int layers = n - 2 * kExemptLayers;
  pool_.ParallelFor(layers, [&](int task, int) {
    SealLayer(sequence, sealed, phase, first + task);
    if (phase == Phase::kEntersDecode && options_.across_requests) EnterDecode(sequence, first + task);
  });
  for (int layer = first; layer < first + layers; ++layer) Land(sequence, layer, stats);
  // What stays private moves into the gaps that the prompt's fused blocks left.
  if (phase != Phase::kEntersDecode) return;
  for (int layer = first; layer < first + layers; ++layer) MoveDown(sequence, layer);
}

void Cosine::SealLayer(SequenceId sequence, kv::SealedRange sealed, Phase phase, int index) {
  Layer& layer = layers_[index];
  layer.landings.clear();
  layer.added.clear();
  layer.offered = layer.rejected = 0;
  const auto blocks = cache_.blocks(sequence);
  const auto tokens = cache_.tokens(sequence);
  for (int i = sealed.first; i < sealed.last; ++i) {
    if (blocks[i].tokens != kGridTokens || blocks[i].cap != kGridTokens) continue;
    const int table = kv::TableIndex(index, Kind::kK);
    if (!cache_.Redirectable(sequence, table, i) || !cache_.Redirectable(sequence, table + 1, i)) continue;
    Record own;
    own.k = cache_.table(sequence, index, Kind::kK)[i];
    own.v = cache_.table(sequence, index, Kind::kV)[i];
    if (cache_.watched(own.k)) continue;
    own.domain = cache_.domain(sequence);
    own.serial = cache_.serial(sequence);
    own.chunk = blocks[i].start / options_.chunk_tokens;
    own.index = i;
    own.decodes = phase == Phase::kDecode;
    own.content = HashSpan(tokens.subspan(blocks[i].start, blocks[i].tokens), 0);
    layer.offered += 2;
    const bool within = !own.decodes && options_.across_chunks;
    const bool across = own.decodes && options_.across_requests;
    const bool paired = Pair(index, own, i, [&](const Record& other) {
      if (other.serial == own.serial) return within && !other.decodes && other.chunk != own.chunk;
      return across && other.decodes;
    });
    if (paired) continue;
    layer.records.push_back(own);
    layer.added.push_back(i);
  }
}

// The blocks of a sequence that has ended its prefill meet those of the requests that decode, and stay for later ones.
void Cosine::EnterDecode(SequenceId sequence, int index) {
  Layer& layer = layers_[index];
  const int64_t serial = cache_.serial(sequence);
  std::vector<Record> own;
  std::erase_if(layer.records, [&](const Record& record) {
    if (record.serial != serial || record.decodes) return false;
    own.push_back(record);
    return true;
  });
  for (Record& record : own) {
    const bool paired =
        Pair(index, record, -1, [&](const Record& other) { return other.serial != serial && other.decodes; });
    if (paired) continue;
    record.decodes = true;
    layer.records.push_back(record);
  }
}

// Lets `from` give way to the most similar suitable record. False when there is none within the threshold.
bool Cosine::Pair(int index, const Record& from, int block, auto&& suits) {
  Layer& layer = layers_[index];
  const std::byte* keys = cache_.data(from.k);
  const double norm = std::sqrt(Product(Kind::kK, from.k, keys));
  if (norm == 0) return false;
  Record* nearest = nullptr;
  double best = options_.threshold;
  bool any = false;
  for (Record& record : layer.records) {
    if (record.domain != from.domain || !suits(record)) continue;
    any = true;
    const double other = std::sqrt(Product(Kind::kK, record.k, cache_.data(record.k)));
    if (other == 0) continue;
    const double cosine = Product(Kind::kK, record.k, keys) / (norm * other);
    if (!(cosine >= best)) continue;  // nor what is not a number
    best = cosine;
    nearest = &record;
  }
  Landing landing;
  landing.index = block;
  landing.k = from.k;
  landing.v = from.v;
  if (nearest != nullptr && Merge(index, from, *nearest, best, landing)) {
    layer.landings.push_back(landing);
    return true;
  }
  layer.rejected += any;
  return false;
}

// out = the direction between both, by weight, at the norm of `to`. Returns that of `from` over that of `to`.
double Cosine::BlendDirections(Kind kind, const Record& from, const Record& to, std::byte* out) const {
  const BlockId a = kind == Kind::kK ? to.k : to.v;
  const BlockId b = kind == Kind::kK ? from.k : from.v;
  const double norm_a = std::sqrt(Product(kind, a, cache_.data(a)));
  const double norm_b = std::sqrt(Product(kind, b, cache_.data(b)));
  const double cosine = norm_a > 0 && norm_b > 0 ? Product(kind, a, cache_.data(b)) / (norm_a * norm_b) : 0;
  const double wa = to.weight;
  const double wb = from.weight;
  const double length = std::sqrt(wa * wa + wb * wb + 2 * wa * wb * cosine);
  if (norm_a == 0 || norm_b == 0 || length == 0) {
    std::memcpy(out, cache_.data(a), cache_.shape().layout.block_bytes(kGridTokens));
    return norm_a > 0 ? norm_b / norm_a : 1;
  }
  Blend(cache_.shape().layout, cache_.data(a), static_cast<float>(wa / length), cache_.data(b),
        static_cast<float>(wb / length * norm_a / norm_b), kGridTokens, out);
  return norm_b / norm_a;
}

bool Cosine::Merge(int index, const Record& from, Record& to, double cosine, Landing& landing) {
  std::byte* scratch = layers_[index].scratch.data();
  const size_t bytes = cache_.shape().layout.block_bytes(kGridTokens);
  const double apart = std::acos(std::min(cosine, 1.0));
  landing.k_scale = BlendDirections(Kind::kK, from, to, scratch);
  // Triangle inequality of angles, with what was really done after rounding to the codec.
  const double length = std::sqrt(Product(Kind::kK, to.k, cache_.data(to.k)));
  float products[codec::kBlockTokensMax];
  TokenProducts(cache_.shape().layout, Kind::kK, scratch, scratch, kGridTokens, kGridTokens, products);
  const double mean_length = std::sqrt(std::accumulate(std::begin(products), std::end(products), 0.0));
  const double from_length = std::sqrt(Product(Kind::kK, from.k, cache_.data(from.k)));
  const double moved = std::max(to.angle + Angle(Product(Kind::kK, to.k, scratch), length, mean_length),
                                from.angle + Angle(Product(Kind::kK, from.k, scratch), from_length, mean_length));
  const double stayed = std::max(to.angle, from.angle + apart);
  if (!(moved <= limit_) && !(stayed <= limit_)) return false;
  landing.target_k = to.k;
  landing.target_v = to.v;
  landing.equal_tokens = from.content == to.content;
  if (moved <= limit_) {
    // The mean's norm after rounding is a little off: the slots' factors stay right to that precision.
    std::memcpy(cache_.data(to.k), scratch, bytes);
    landing.v_scale = BlendDirections(Kind::kV, from, to, scratch);
    std::memcpy(cache_.data(to.v), scratch, bytes);
    to.weight += from.weight;
    to.angle = moved;
  } else {
    const double norm_v = std::sqrt(Product(Kind::kV, to.v, cache_.data(to.v)));
    const double from_v = std::sqrt(Product(Kind::kV, from.v, cache_.data(from.v)));
    landing.v_scale = norm_v > 0 ? from_v / norm_v : 1;
    to.angle = stayed;
  }
  landing.angle = to.angle;
  return true;
}

void Cosine::Land(SequenceId sequence, int index, FusionStats& stats) {
  Layer& layer = layers_[index];
  const int table = kv::TableIndex(index, Kind::kK);
  stats.offered += layer.offered;
  stats.rejected += 2 * layer.rejected;
  // Before the landings: one of them may already give way again.
  for (const int i : layer.added) {
    const BlockId k = cache_.table(sequence, index, Kind::kK)[i];
    cache_.Watch(k);
    layer_of_[k] = index;
  }
  for (const Landing& landing : layer.landings) {
    // In this order: what a block was paired with may itself give way later in the same call.
    Forget(landing.k);
    if (!cache_.RedirectAll(table, landing.k, landing.target_k, static_cast<float>(landing.k_scale))) continue;
    CHECK(cache_.RedirectAll(table + 1, landing.v, landing.target_v, static_cast<float>(landing.v_scale)));
    stats.fused += 2;
    stats.fused_equal_tokens += landing.equal_tokens ? 2 : 0;
    stats.worst_nmse = std::max(stats.worst_nmse, 2 - 2 * std::cos(landing.angle));
  }
}

void Cosine::MoveDown(SequenceId sequence, int index) {
  const int table = kv::TableIndex(index, Kind::kK);
  for (Record& record : layers_[index].records) {
    if (record.serial != cache_.serial(sequence)) continue;
    if (!cache_.Redirectable(sequence, table, record.index) ||
        !cache_.Redirectable(sequence, table + 1, record.index) ||
        cache_.table(sequence, index, Kind::kK)[record.index] != record.k) {
      continue;
    }
    Forget(record.k);
    record.v = cache_.MoveDown(sequence, table + 1, record.index);
    record.k = cache_.MoveDown(sequence, table, record.index);
    cache_.Watch(record.k);
    layer_of_[record.k] = index;
  }
}

// Its bytes may be free, and another block's, before the store would report it.
void Cosine::Forget(BlockId block) {
  cache_.Unwatch(block);
  layer_of_.erase(block);
}

void Cosine::Remove(BlockId block) {
  const auto found = layer_of_.find(block);
  if (found == layer_of_.end()) return;
  std::erase_if(layers_[found->second].records, [&](const Record& record) { return record.k == block; });
  layer_of_.erase(found);
}

size_t Cosine::metadata_bytes() const {
  size_t bytes = layer_of_.size() * (sizeof(BlockId) + sizeof(int) + 3 * sizeof(void*));
  for (const Layer& layer : layers_) bytes += layer.records.capacity() * sizeof(Record);
  return bytes;
}

void Cosine::CheckIntegrity() const {
  for (const Layer& layer : layers_) {
    for (const Record& record : layer.records) {
      CHECK(cache_.sharers(record.k) == cache_.sharers(record.v));
      CHECK(record.weight == 1 || record.angle <= limit_ * (1 + 1e-9));
    }
  }
}

}  // namespace jointkv::joint
