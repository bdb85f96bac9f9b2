#include "joint/fusion.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/clock.h"
#include "base/hash.h"
#include "codec/block_io.h"
#include "codec/quantised.h"
#include "joint/block_math.h"

namespace jointkv::joint {
namespace {

constexpr int kCandidatesMax = 8;    // representatives of one content that a block is tested against
constexpr int kSimilarMax = 4;       // of other contents, the nearest by sketch
constexpr double kStepShare = 0.98;  // of what a representative may move: rounding to its codec moves it a little more
constexpr double kStepWorthEncoding = 0.15;  // share of the limit that an encoded representative moves at least
constexpr double kNear = 1.15;               // what is expected of a codec may be so far beyond the budget to be tried
constexpr double kSketchSlack = 2;           // a squared distance is rarely estimated beyond this times itself

Kind KindOf(int table) { return static_cast<Kind>(table % 2); }

}  // namespace

Fusion::Fusion(const FusionOptions& options, std::vector<const dense::RopeTable*> rope, kv::KvCache& cache,
               ThreadPool& pool, QueryEnergy query_energy)
    : options_(options),
      cache_(cache),
      pool_(pool),
      query_energy_(std::move(query_energy)),
      written_(cache.shape().layout.codec),
      statistics_(cache.shape().layout, std::move(rope)),
      representatives_(cache.shape().n_tables(), cache.total_blocks(), RandomKey()),
      sketches_(cache.shape().layout, cache.shape().n_tables()),
      cosine_(options, cache, pool),
      inverse_energy_(cache.shape().n_tables()),
      scratch_(3 * cache.shape().layout.block_bytes(codec::kBlockTokensMax) * pool.size()) {
  for (const codec::Codec codec : cache.shape().sealed) encodes_ = encodes_ || codec != written_;
}

kv::BlockCutter CutterFor(const FusionOptions& options, std::vector<uint8_t> ends_block) {
  return options.policy == Policy::kCosine ? kv::BlockCutter::Grid(Cosine::kGridTokens)
                                           : kv::BlockCutter(std::move(ends_block));
}

void ShapeStore(const FusionOptions& options, const codec::BlockLayout& layout, kv::KvCache::Options& store) {
  store.absolute_keys = store.scales = options.policy == Policy::kCosine;
  store.residuals = options.policy == Policy::kBounded && options.residuals && layout.codec == codec::Codec::kBf16 &&
                    layout.head_dim % 8 == 0 && layout.head_dim <= codec::kQuantisedHeadDimMax;
}

kv::KvCache::Sharing Fusion::SharingOf(bool request_allows) const {
  return request_allows && enabled() ? kv::KvCache::Sharing::kLossy : kv::KvCache::Sharing::kExact;
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
  fuses_ = enabled() && cache_.lossy(sequence);
  const double start_s = MonotonicSeconds();
  if (options_.policy == Policy::kCosine) {
    const bool meets = phase == Phase::kEntersDecode && options_.across_requests;
    if (fuses_ && (range.first != range.last || meets)) cosine_.OnSealed(sequence, range, phase, stats_);
  } else if (range.first != range.last && (fuses_ || encodes_)) {
    EncodeBounded(sequence, range);
  }
  stats_.fusion_s += MonotonicSeconds() - start_s;
}

void Fusion::EncodeBounded(SequenceId sequence, kv::SealedRange range) {
  CollectSealed(sequence, range);
  const int n_tables = cache_.shape().n_tables();
  const size_t n = sealed_.size();
  decisions_.assign(n_tables * n, Decision());
  pool_.ParallelFor(n_tables, [&](int table, int) { Measure(sequence, table); });
  FixScales();
  pool_.ParallelFor(n_tables, [&](int table, int thread) {
    const size_t bytes = scratch_.size() / pool_.size() / 3;
    std::byte* first = scratch_.data() + 3 * bytes * thread;
    const Scratch scratch = {first, first + bytes, first + 2 * bytes};
    for (size_t i = 0; i < n; ++i) decisions_[table * n + i] = Decide(sequence, table, sealed_[i], scratch);
  });
  // All bytes are freed before those that stay are moved into the gaps. Only a difference from one of these waits: its
  // base could not be moved any more.
  const auto for_each = [&](auto&& land) {
    for (int table = 0; table < n_tables; ++table) {
      for (size_t i = 0; i < n; ++i) land(table, sealed_[i], decisions_[table * n + i]);
    }
  };
  for_each(
      [&](int table, const Sealed& sealed, const Decision& decision) { Redirect(sequence, table, sealed, decision); });
  for_each([&](int table, const Sealed& sealed, Decision& decision) {
    if (decision.kind == Decision::Kind::kDiffer && cache_.watched(decision.target)) {
      KeepDifference(sequence, table, sealed, decision);
      decision.kind = Decision::Kind::kLeave;
    }
  });
  for_each([&](int table, const Sealed& sealed, const Decision& decision) { Keep(sequence, table, sealed, decision); });
  for_each([&](int table, const Sealed& sealed, const Decision& decision) {
    KeepDifference(sequence, table, sealed, decision);
  });
  for (const Sealed& sealed : sealed_) {
    if (sealed.group.valid()) representatives_.Settle(sealed.group);
  }
}

bool Fusion::Known(BlockId block) const {
  return cache_.watched(block) || cache_.settled(block) || cache_.codec(block) != cache_.shape().layout.codec;
}

void Fusion::Measure(SequenceId sequence, int table) {
  if (inverse_energy_[table] > 0) return;
  for (const Sealed& sealed : sealed_) {
    if (!cache_.Owned(sequence, table, sealed.index)) continue;
    const kv::LogicalBlock& block = cache_.blocks(sequence)[sealed.index];
    const BlockId own = cache_.table(sequence, table / 2, KindOf(table))[sealed.index];
    if (Known(own)) continue;
    statistics_.Add(table, KindOf(table), cache_.data(own), block.cap, block.start - block.base,
                    block.start == 0 ? 1 : 0, block.tokens);
  }
}

void Fusion::FixScales() {
  for (int table = 0; table < cache_.shape().n_tables(); ++table) {
    if (inverse_energy_[table] > 0 || !statistics_.enough(table)) continue;
    const double energy = statistics_.energy(table);
    inverse_energy_[table] = energy > 0 ? static_cast<float>(1 / energy) : std::numeric_limits<float>::max();
    if (KindOf(table) == Kind::kK && cache_.shape().sealed_codec(table) != written_) FixKeyReference(table);
  }
}

void Fusion::FixKeyReference(int table) {
  const codec::BlockLayout& layout = cache_.shape().layout;
  std::vector<float> mean;
  statistics_.Mean(table, Kind::kK, 0, codec::kBlockTokensMax, mean);
  std::vector<std::byte> block(layout.block_bytes(codec::kBlockTokensMax));
  const size_t width = mean.size() / codec::kBlockTokensMax;
  for (int token = 0; token < codec::kBlockTokensMax; ++token) {
    codec::StoreToken(layout, Kind::kK, block.data(), codec::kBlockTokensMax, token,
                      std::span(mean).subspan(token * width, width));
  }
  std::vector<float> pair_scales;
  if (query_energy_ != nullptr) {
    const std::span<const double> energy = query_energy_(table / 2);
    if (!energy.empty()) pair_scales = PairScales(statistics_.variance(table), energy, layout.n_kv_heads);
  }
  cache_.SetKeyReference(table / 2, std::move(block), std::move(pair_scales));
}

void Fusion::CollectSealed(SequenceId sequence, kv::SealedRange range) {
  sealed_.clear();
  const auto blocks = cache_.blocks(sequence);
  const auto tokens = cache_.tokens(sequence);
  for (int index = range.first; index < range.last; ++index) {
    const kv::LogicalBlock& block = blocks[index];
    const auto content = tokens.subspan(block.start, block.tokens);
    sealed_.push_back({index, fuses_ ? representatives_.Find(cache_.domain(sequence), content, block.cap) : GroupId()});
  }
}

Fusion::Decision Fusion::Decide(SequenceId sequence, int table, const Sealed& sealed, const Scratch& scratch) {
  Decision decision;
  if (!cache_.Owned(sequence, table, sealed.index)) return decision;
  const kv::LogicalBlock& block = cache_.blocks(sequence)[sealed.index];
  const BlockId own = cache_.table(sequence, table / 2, KindOf(table))[sealed.index];
  if (Known(own)) return decision;
  std::byte* data = cache_.data(own);
  if (fuses_ && inverse_energy_[table] > 0) {
    decision = Join(table, sealed.group, data, block, scratch);
    if (decision.kind != Decision::Kind::kLeave) return decision;
  }
  decision.kind = Decision::Kind::kStay;
  decision.listed = fuses_;
  const Sketches::Shape shape = fuses_ && options_.similarity ? ShapeOf(sealed.group) : Sketches::Shape();
  if (fuses_ && options_.similarity && decision.sketch == Sketches::Sketch()) {
    decision.sketch = sketches_.Of(KindOf(table), data, shape);
  }
  decision.codec = CodecOf(table, block);
  if (decision.codec != written_) {
    Encode(table, decision.codec, data, block.cap, block.tokens, scratch.encoded);
    if (decision.listed) {
      Decode(table, decision.codec, scratch.encoded, block.cap, block.tokens, scratch.blend);
      decision.bound = static_cast<float>(Between(table, data, scratch.blend, block.cap, block.tokens));
    }
    std::memcpy(data, scratch.encoded, BytesIn(decision.codec, block.cap, block.tokens));
  }
  if (!decision.listed) return decision;
  representatives_.Add(sealed.group, table, own, decision.bound, decision.codec);
  if (options_.similarity) sketches_.Add(table, shape, own, decision.sketch);
  return decision;
}

// Many models park huge values at a sequence's first token, on which all later ones rest: its block never takes the
// coarsest codec.
codec::Codec Fusion::CodecOf(int table, const kv::LogicalBlock& block) const {
  const codec::Codec codec = cache_.shape().sealed_codec(table);
  if (codec == written_ || !(inverse_energy_[table] > 0)) return written_;
  return block.start == 0 && codec == codec::Codec::kQ4 ? codec::Codec::kQ8 : codec;
}

size_t Fusion::BytesIn(codec::Codec codec, int cap, int tokens) const {
  codec::BlockLayout layout = cache_.shape().layout;
  layout.codec = codec;
  return layout.block_bytes(codec == written_ ? cap : tokens);
}

codec::Reference Fusion::ReferenceOf(int table) const {
  return KindOf(table) == Kind::kK ? cache_.key_reference(table / 2) : codec::Reference();
}

void Fusion::Encode(int table, codec::Codec to, const std::byte* block, int cap, int tokens, std::byte* out) const {
  codec::EncodeBlock(cache_.shape().layout, KindOf(table), to, block, cap, tokens, ReferenceOf(table), out);
}

void Fusion::Decode(int table, codec::Codec from, const std::byte* encoded, int cap, int tokens, std::byte* out) const {
  codec::DecodeBlock(cache_.shape().layout, KindOf(table), from, encoded, cap, tokens, ReferenceOf(table), out);
}

const std::byte* Fusion::Values(int table, BlockId representative, int cap, int tokens, std::byte* scratch) const {
  const std::byte* data = cache_.data(representative);
  const codec::Codec codec = representatives_[representative].codec;
  if (codec == written_) return data;
  Decode(table, codec, data, cap, tokens, scratch);
  return scratch;
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

Sketches::Shape Fusion::ShapeOf(GroupId group) const {
  return {representatives_.domain(group), representatives_.cap(group),
          static_cast<int>(representatives_.tokens(group).size())};
}

Fusion::Candidate Fusion::Nearest(int table, GroupId group, const std::byte* data, const kv::LogicalBlock& block,
                                  const Scratch& scratch, Decision& decision) const {
  const double limit = std::sqrt(static_cast<double>(options_.budget));
  Candidate nearest = {BlockId(), std::numeric_limits<double>::infinity()};
  const auto test = [&](BlockId candidate) {
    const std::byte* values = Values(table, candidate, block.cap, block.tokens, scratch.candidate);
    const double d = Between(table, data, values, block.cap, block.tokens);
    // Written so that what is not a number never fits. An encoded block may be beyond the budget of its own original.
    if (!(d < nearest.distance) || representatives_[candidate].bound > limit * (1 + 1e-6)) return;
    nearest = {candidate, d};
  };
  int tried = 0;
  for (BlockId at = representatives_.first(group, table); at.valid() && tried < kCandidatesMax;
       at = representatives_[at].next, ++tried) {
    test(at);
  }
  const BlockId of_equal_tokens = nearest.block;
  if (options_.similarity && !(nearest.distance <= limit)) {
    const Sketches::Shape shape = ShapeOf(group);
    decision.sketch = sketches_.Of(KindOf(table), data, shape);
    const double square = limit * limit * block.tokens / inverse_energy_[table];
    for (const BlockId candidate : sketches_.Near(table, shape, decision.sketch, kSketchSlack * square, kSimilarMax)) {
      test(candidate);
      ++tried;
    }
  }
  decision.equal_tokens = nearest.block == of_equal_tokens;
  decision.rejected = tried > 0 && !(nearest.distance <= limit);
  return nearest;
}

// The nearest representative within the budget takes the block in, and moves towards it as far as the bound of its
// worst member allows: a step s takes every old member at most s farther away (triangle inequality), and brings the new
// one as much nearer. Where else a difference would be kept, one that stands beyond the budget is met half way, if some
// step leaves all within it.
Fusion::Decision Fusion::Join(int table, GroupId group, std::byte* data, const kv::LogicalBlock& block,
                              const Scratch& scratch) {
  const double limit = std::sqrt(static_cast<double>(options_.budget));
  const int cap = block.cap;
  const int tokens = block.tokens;
  Decision decision;
  const auto [nearest, distance] = Nearest(table, group, data, block, scratch, decision);
  if (!nearest.valid()) return decision;
  decision.target = nearest;
  Representative& record = representatives_[nearest];
  const bool beyond = !(distance <= limit);
  const double room = record.fixed ? 0 : kStepShare * (limit - record.bound);
  const double least = beyond ? distance - kStepShare * limit : 0;
  if (beyond && !(cache_.residuals() && least <= room)) return Differ(table, distance, data, block, scratch, decision);

  const std::byte* mean = Values(table, nearest, cap, tokens, scratch.candidate);
  double bound = std::max<double>(record.bound, distance);
  const double step = std::max(least, std::min(distance / (record.weight + 1), room));
  if (step > (record.codec == written_ ? 0 : kStepWorthEncoding * limit)) {
    const auto weight = static_cast<float>(step / distance);
    Blend(cache_.shape().layout, mean, 1 - weight, data, weight, cap, scratch.blend);
    const std::byte* stored = scratch.blend;
    if (record.codec != written_) {
      Encode(table, record.codec, scratch.blend, cap, tokens, scratch.encoded);
      Decode(table, record.codec, scratch.encoded, cap, tokens, scratch.blend);
      stored = scratch.encoded;
    }
    // What was really done, after rounding to the codec.
    const double moved = Between(table, mean, scratch.blend, cap, tokens);
    const double left = Between(table, data, scratch.blend, cap, tokens);
    const double moved_bound = std::max(record.bound + moved, left);
    if (moved_bound <= limit) {
      std::memcpy(cache_.data(nearest), stored, BytesIn(record.codec, cap, tokens));
      bound = moved_bound;
    }
  }
  if (beyond && bound > limit) return Differ(table, distance, data, block, scratch, decision);
  ++record.weight;
  record.bound = static_cast<float>(bound);
  decision.kind = Decision::Kind::kFuse;
  decision.bound = record.bound;
  return decision;
}

// The fewest bits that do, of those for which a difference of Gaussian values would come near.
Fusion::Decision Fusion::Differ(int table, double distance, std::byte* data, const kv::LogicalBlock& block,
                                const Scratch& scratch, Decision decision) {
  if (!cache_.residuals()) return decision;
  const double limit = std::sqrt(static_cast<double>(options_.budget));
  const codec::BlockLayout& layout = cache_.shape().layout;
  const std::byte* from = Values(table, decision.target, block.cap, block.tokens, scratch.candidate);
  for (const codec::Codec codec : kv::kResidualCodecs) {
    if (BytesIn(codec, block.cap, block.tokens) >= BytesIn(CodecOf(table, block), block.cap, block.tokens)) break;
    if (distance * distance * codec::GaussianLoss(codec) > kNear * options_.budget) continue;
    const codec::Reference reference = {from, block.cap};
    codec::EncodeBlock(layout, KindOf(table), codec, data, block.cap, block.tokens, reference, scratch.encoded);
    codec::DecodeBlock(layout, KindOf(table), codec, scratch.encoded, block.cap, block.tokens, reference,
                       scratch.blend);
    const double left = Between(table, data, scratch.blend, block.cap, block.tokens);
    if (!(left <= limit)) continue;
    std::memcpy(data, scratch.encoded, BytesIn(codec, block.cap, block.tokens));
    Representative& record = representatives_[decision.target];
    record.bound = std::max(record.bound, static_cast<float>(left));
    record.fixed = true;
    decision.kind = Decision::Kind::kDiffer;
    decision.codec = codec;
    decision.bound = record.bound;
    return decision;
  }
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
  stats_.offered += decision.listed;
  stats_.rejected += decision.rejected;
  if (decision.codec != written_) {
    const BlockId moved = MoveEncoded(sequence, table, sealed, decision);
    if (decision.listed) cache_.Watch(moved);
    return;
  }
  if (!decision.listed) return;
  BlockId own = cache_.table(sequence, table / 2, KindOf(table))[sealed.index];
  if (cache_.Redirectable(sequence, table, sealed.index)) {  // else a block of this very call was fused with it
    const BlockId moved = cache_.MoveDown(sequence, table, sealed.index);
    if (moved != own) Rename(table, sealed, own, moved);
    own = moved;
  }
  cache_.Watch(own);
}

// A block that holds its encoded form moves to a place of that size. Without one it is decoded again and stays.
BlockId Fusion::MoveEncoded(SequenceId sequence, int table, const Sealed& sealed, const Decision& decision) {
  const BlockId own = cache_.table(sequence, table / 2, KindOf(table))[sealed.index];
  std::byte* data = cache_.data(own);
  const kv::LogicalBlock& block = cache_.blocks(sequence)[sealed.index];
  const int cap = block.cap;
  const BlockId moved = cache_.Encode(sequence, table, sealed.index, decision.codec, data);
  if (!moved.valid()) {
    ++stats_.unencoded;
    Decode(table, decision.codec, data, cap, block.tokens, scratch_.data());
    std::memcpy(data, scratch_.data(), cache_.shape().layout.block_bytes(cap));
    if (decision.listed) representatives_[own].codec = written_;
    cache_.Settle(own);
    return own;
  }
  ++stats_.encoded;
  if (decision.listed) Rename(table, sealed, own, moved);
  return moved;
}

// Also for the differences of this call that have not been moved yet.
void Fusion::Rename(int table, const Sealed& sealed, BlockId from, BlockId to) {
  representatives_.Rename(from, to);
  if (options_.similarity) sketches_.Rename(table, ShapeOf(sealed.group), from, to);
  const size_t n = sealed_.size();
  for (Decision& decision : std::span(decisions_).subspan(table * n, n)) {
    if (decision.kind == Decision::Kind::kDiffer && decision.target == from) decision.target = to;
  }
}

// Without a place for it, a difference is added up again, and its block stays as that.
void Fusion::KeepDifference(SequenceId sequence, int table, const Sealed& sealed, const Decision& decision) {
  if (decision.kind != Decision::Kind::kDiffer) return;
  ++stats_.offered;
  stats_.worst_nmse = std::max(stats_.worst_nmse, static_cast<double>(decision.bound) * decision.bound);
  const BlockId own = cache_.table(sequence, table / 2, KindOf(table))[sealed.index];
  std::byte* data = cache_.data(own);
  if (cache_.Encode(sequence, table, sealed.index, decision.codec, data, decision.target).valid()) {
    ++stats_.residuals;
    return;
  }
  ++stats_.rejected;
  ++stats_.unencoded;
  const codec::BlockLayout& layout = cache_.shape().layout;
  const kv::LogicalBlock& block = cache_.blocks(sequence)[sealed.index];
  const int cap = block.cap;
  const size_t bytes = layout.block_bytes(cap);
  const std::byte* from = Values(table, decision.target, cap, block.tokens, scratch_.data() + bytes);
  codec::DecodeBlock(layout, KindOf(table), decision.codec, data, cap, block.tokens, {from, cap}, scratch_.data());
  std::memcpy(data, scratch_.data(), bytes);
  cache_.Settle(own);
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
