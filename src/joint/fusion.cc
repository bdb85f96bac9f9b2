#include "joint/fusion.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/clock.h"
#include "base/hash.h"
#include "joint/block_math.h"

namespace jointkv::joint {
namespace {

constexpr int kCandidatesMax = 8;   // representatives of one content that a block is tested against
constexpr int kSimilarMax = 4;      // of other contents, the nearest by sketch
constexpr double kSketchSlack = 2;  // a squared distance is rarely estimated beyond this times itself

Kind KindOf(int table) { return static_cast<Kind>(table % 2); }

}  // namespace

Fusion::Fusion(const FusionOptions& options, codec::Rounding rounding, std::vector<const dense::RopeTable*> rope,
               kv::KvCache& cache, ThreadPool& pool)
    : options_(options),
      rounding_(rounding),
      cache_(cache),
      pool_(pool),
      statistics_(cache.shape().layout, std::move(rope)),
      representatives_(cache.shape().n_tables(), cache.total_blocks(), RandomKey()),
      sketches_(cache.shape().layout, cache.shape().n_tables()),
      cosine_(options, cache, pool),
      inverse_energy_(cache.shape().n_tables()),
      scratch_(cache.shape().layout.block_bytes(codec::kBlockTokensMax) * pool.size()) {}

kv::BlockCutter CutterFor(const FusionOptions& options, std::vector<uint8_t> ends_block) {
  return options.policy == Policy::kCosine ? kv::BlockCutter::Grid(Cosine::kGridTokens)
                                           : kv::BlockCutter(std::move(ends_block));
}

void ShapeStore(const FusionOptions& options, kv::KvCache::Options& store) {
  store.absolute_keys = store.scales = options.policy == Policy::kCosine;
}

kv::KvCache::Sharing Fusion::SharingOf(bool request_allows) const {
  const bool lossy = (request_allows && enabled()) || rounding_ != codec::Rounding::kNone;
  return lossy ? kv::KvCache::Sharing::kLossy : kv::KvCache::Sharing::kExact;
}

void Fusion::DropReleased() {
  cache_.TakeReleased(released_);
  for (const BlockId block : released_) {
    if (options_.policy == Policy::kCosine) {
      cosine_.Remove(block);
      continue;
    }
    const Representative& record = representatives_[block];
    if (options_.similarity) sketches_.Remove(record.table, ShapeOf(record.group), block);
    representatives_.Remove(block);
  }
}

void Fusion::OnSealed(SequenceId sequence, kv::SealedRange range, Phase phase) {
  DropReleased();
  if (!cache_.lossy(sequence)) return;
  const double start_s = MonotonicSeconds();
  if (options_.policy == Policy::kCosine) {
    const bool meets = phase == Phase::kEntersDecode && options_.across_requests;
    if (enabled() && (range.first != range.last || meets)) cosine_.OnSealed(sequence, range, phase, stats_);
  } else if (range.first != range.last && (enabled() || rounding_ != codec::Rounding::kNone)) {
    EncodeBounded(sequence, range);
  }
  stats_.fusion_s += MonotonicSeconds() - start_s;
}

void Fusion::EncodeBounded(SequenceId sequence, kv::SealedRange range) {
  CollectSealed(sequence, range);
  const int n_tables = cache_.shape().n_tables();
  const size_t n = sealed_.size();
  decisions_.assign(n_tables * n, Decision());
  pool_.ParallelFor(n_tables, [&](int table, int thread) {
    std::byte* scratch = scratch_.data() + scratch_.size() / pool_.size() * thread;
    for (size_t i = 0; i < n; ++i) decisions_[table * n + i] = Decide(sequence, table, sealed_[i], scratch);
  });
  // All bytes are freed before those that stay are moved into the gaps.
  for (int table = 0; table < n_tables; ++table) {
    for (size_t i = 0; i < n; ++i) Redirect(sequence, table, sealed_[i], decisions_[table * n + i]);
  }
  for (int table = 0; table < n_tables; ++table) {
    for (size_t i = 0; i < n; ++i) Keep(sequence, table, sealed_[i], decisions_[table * n + i]);
  }
  for (const Sealed& sealed : sealed_) representatives_.Settle(sealed.group);
  for (int table = 0; table < n_tables; ++table) {
    if (inverse_energy_[table] > 0 || !statistics_.full(table)) continue;
    const double energy = statistics_.energy(table);
    inverse_energy_[table] = energy > 0 ? static_cast<float>(1 / energy) : std::numeric_limits<float>::max();
  }
}

void Fusion::CollectSealed(SequenceId sequence, kv::SealedRange range) {
  sealed_.clear();
  const auto blocks = cache_.blocks(sequence);
  const auto tokens = cache_.tokens(sequence);
  for (int index = range.first; index < range.last; ++index) {
    const kv::LogicalBlock& block = blocks[index];
    sealed_.push_back(
        {index, representatives_.Find(cache_.domain(sequence), tokens.subspan(block.start, block.tokens), block.cap)});
  }
}

Fusion::Decision Fusion::Decide(SequenceId sequence, int table, const Sealed& sealed, std::byte* scratch) {
  Decision decision;
  if (!cache_.Redirectable(sequence, table, sealed.index)) return decision;
  const kv::LogicalBlock& block = cache_.blocks(sequence)[sealed.index];
  const BlockId own = cache_.table(sequence, table / 2, KindOf(table))[sealed.index];
  if (cache_.watched(own)) return decision;  // a representative already: the sequence took a known block
  std::byte* data = cache_.data(own);
  if (!statistics_.full(table)) {
    statistics_.Add(table, KindOf(table), data, block.cap, block.start - block.base, block.start == 0 ? 1 : 0,
                    block.tokens);
  }
  if (enabled() && inverse_energy_[table] > 0) {
    decision = Join(table, sealed.group, data, block, scratch);
    if (decision.kind == Decision::Kind::kFuse) return decision;
  }
  decision.kind = Decision::Kind::kStay;
  if (rounding_ != codec::Rounding::kNone) {
    const size_t bytes = cache_.shape().layout.block_bytes(block.cap);
    std::memcpy(scratch, data, bytes);
    Round(table, data, block.cap, block.start - block.base, block.tokens);
    decision.bound = static_cast<float>(Between(table, scratch, data, block.cap, block.tokens));
  }
  representatives_.Add(sealed.group, table, own, decision.bound);
  if (options_.similarity) {
    const Sketches::Shape shape = ShapeOf(sealed.group);
    if (decision.sketch == Sketches::Sketch()) decision.sketch = sketches_.Of(KindOf(table), data, shape);
    sketches_.Add(table, shape, own, decision.sketch);
  }
  return decision;
}

double Fusion::Distance(int table, std::span<const float, codec::kBlockTokensMax> squares, int tokens) const {
  double sum = 0;
  for (int t = 0; t < tokens; ++t) sum += squares[t];
  return std::sqrt(sum / tokens * inverse_energy_[table]);
}

double Fusion::Between(int table, const std::byte* a, const std::byte* b, int cap, int tokens) const {
  float squares[codec::kBlockTokensMax];
  TokenDistances(cache_.shape().layout, KindOf(table), a, b, cap, tokens, squares);
  return Distance(table, squares, tokens);
}

void Fusion::Round(int table, std::byte* block, int cap, int base, int tokens) const {
  std::vector<float> mean;
  statistics_.Mean(table, KindOf(table), base, tokens, mean);
  codec::RoundBlock(cache_.shape().layout, KindOf(table), rounding_, mean, block, cap, tokens);
}

Sketches::Shape Fusion::ShapeOf(GroupId group) const {
  return {representatives_.domain(group), representatives_.cap(group),
          static_cast<int>(representatives_.tokens(group).size())};
}

double Fusion::Nearest(int table, GroupId group, const std::byte* data, const kv::LogicalBlock& block,
                       Decision& decision) const {
  const double limit = std::sqrt(static_cast<double>(options_.budget));
  double distance = limit;
  const auto test = [&](BlockId candidate) {
    const double d = Between(table, data, cache_.data(candidate), block.cap, block.tokens);
    // Written so that what is not a number never fits. A rounded block may be beyond the budget of its own original.
    if (!(d <= distance) || representatives_[candidate].bound > limit * (1 + 1e-6)) return;
    distance = d;
    decision.target = candidate;
  };
  int tried = 0;
  for (BlockId at = representatives_.first(group, table); at.valid() && tried < kCandidatesMax;
       at = representatives_[at].next, ++tried) {
    test(at);
  }
  decision.equal_tokens = decision.target.valid();
  if (options_.similarity && !decision.target.valid()) {
    const Sketches::Shape shape = ShapeOf(group);
    decision.sketch = sketches_.Of(KindOf(table), data, shape);
    const double square = limit * limit * block.tokens / inverse_energy_[table];
    for (const BlockId candidate : sketches_.Near(table, shape, decision.sketch, kSketchSlack * square, kSimilarMax)) {
      test(candidate);
      ++tried;
    }
  }
  decision.rejected = tried > 0 && !decision.target.valid();
  return distance;
}

// The nearest representative within the budget takes the block in, and moves towards it as far as the bound of its
// worst member allows: a step s takes every old member at most s farther away (triangle inequality), and brings the new
// one as much nearer.
Fusion::Decision Fusion::Join(int table, GroupId group, const std::byte* data, const kv::LogicalBlock& block,
                              std::byte* scratch) {
  const double limit = std::sqrt(static_cast<double>(options_.budget));
  const int cap = block.cap;
  const int tokens = block.tokens;
  Decision decision;
  const double distance = Nearest(table, group, data, block, decision);
  if (!decision.target.valid()) return decision;
  decision.kind = Decision::Kind::kFuse;

  Representative& record = representatives_[decision.target];
  ++record.weight;
  std::byte* mean = cache_.data(decision.target);
  double bound = std::max<double>(record.bound, distance);
  const double step = std::min(distance / record.weight, limit - record.bound);
  if (step > 0) {
    const auto weight = static_cast<float>(step / distance);
    Blend(cache_.shape().layout, mean, 1 - weight, data, weight, cap, scratch);
    if (rounding_ != codec::Rounding::kNone) Round(table, scratch, cap, block.start - block.base, tokens);
    // What was really done, after rounding to the codec.
    const double moved = Between(table, mean, scratch, cap, tokens);
    const double left = Between(table, data, scratch, cap, tokens);
    const double moved_bound = std::max(record.bound + moved, left);
    if (moved_bound <= limit) {
      std::memcpy(mean, scratch, cache_.shape().layout.block_bytes(cap));
      bound = moved_bound;
    }
  }
  record.bound = static_cast<float>(bound);
  decision.bound = record.bound;
  return decision;
}

void Fusion::Redirect(SequenceId sequence, int table, const Sealed& sealed, const Decision& decision) {
  if (decision.kind != Decision::Kind::kFuse) return;
  cache_.Redirect(sequence, table, sealed.index, decision.target);
  ++stats_.offered;
  ++stats_.fused;
  stats_.fused_equal_tokens += decision.equal_tokens;
  stats_.worst_nmse = std::max(stats_.worst_nmse, static_cast<double>(decision.bound) * decision.bound);
}

void Fusion::Keep(SequenceId sequence, int table, const Sealed& sealed, const Decision& decision) {
  if (decision.kind != Decision::Kind::kStay) return;
  ++stats_.offered;
  stats_.rejected += decision.rejected;
  BlockId own = cache_.table(sequence, table / 2, KindOf(table))[sealed.index];
  if (cache_.Redirectable(sequence, table, sealed.index)) {  // else a block of this very call was fused with it
    const BlockId moved = cache_.MoveDown(sequence, table, sealed.index);
    if (moved != own) {
      representatives_.Rename(own, moved);
      if (options_.similarity) sketches_.Rename(table, ShapeOf(sealed.group), own, moved);
    }
    own = moved;
  }
  cache_.Watch(own);
}

FusionStats Fusion::stats() const {
  FusionStats stats = stats_;
  const bool cosine = options_.policy == Policy::kCosine;
  stats.representatives = cosine ? cosine_.representatives() : representatives_.size();
  stats.metadata_bytes =
      cosine ? cosine_.metadata_bytes() : representatives_.metadata_bytes() + sketches_.metadata_bytes();
  return stats;
}

void Fusion::CheckIntegrity() const {
  cosine_.CheckIntegrity();
  const double limit = std::sqrt(static_cast<double>(options_.budget)) * (1 + 1e-6);
  int64_t listed = 0;
  representatives_.ForEach([&](BlockId block, const Representative& record) {
    ++listed;
    CHECK(record.weight == 1 || record.bound <= limit);
    CHECK(!cache_.watched(block) || cache_.sharers(block) > 0);
  });
  CHECK(listed == representatives_.size());
}

}  // namespace jointkv::joint
