// The bounded policy on blocks made by hand.
//
// Every sequence of a test has a place on a line: its K and V are a function of table and token, plus its place times
// one direction whose length is such that two sequences at places x and y differ by an NMSE of (x - y)^2. So a budget
// of 0.04 is a reach of 0.2, and where a representative stands can be read off its bytes.
#include "joint/fusion.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "codec/block_io.h"
#include "kv/test_content.h"

namespace jointkv::joint {
namespace {

using codec::BlockLayout;
using codec::Codec;
using codec::Kind;
using kv::KvCache;
using Tokens = std::vector<TokenId>;
using Sharing = KvCache::Sharing;

constexpr DomainId kA(0);
constexpr DomainId kB(1);
constexpr DomainId kOther(7);  // whose tokens fill the statistics
constexpr TokenId kLineEnd = 0;
constexpr float kBudget = 0.04F;
constexpr double kTolerance = 1e-4;

// n tokens, the last of them a line's end: exactly one block while n < 16.
Tokens Line(TokenId first, int n) {
  Tokens tokens;
  for (int i = 0; i < n - 1; ++i) tokens.push_back(1 + (first * 31 + i) % 1000);
  tokens.push_back(kLineEnd);
  return tokens;
}

Tokens operator+(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

FusionOptions Bounded(float budget = kBudget) {
  FusionOptions options;
  options.policy = Policy::kBounded;
  options.budget = budget;
  return options;
}

struct Place {
  double k = 0;
  double v = 0;
};

struct WorldOptions {
  FusionOptions fusion = Bounded();
  std::optional<Codec> sealed = {};  // with bf16
  std::vector<int> window = {0};
  int slabs = 64;
  bool prefix_cache = true;
  bool measured = true;  // the statistics are full
  Codec codec = Codec::kF32;
  bool residuals = false;  // with bf16
};

class World {
 public:
  explicit World(const WorldOptions& options = {})
      : layout_{1, 16, options.sealed.has_value() || options.residuals ? Codec::kBf16 : options.codec} {
    KvCache::Options store;
    store.cap_bytes = static_cast<size_t>(options.slabs * kv::kSlabGranules) * layout_.granule_bytes();
    store.prefix_cache = options.prefix_cache;
    store.residuals = options.residuals;
    kv::KvShape shape = {layout_, options.window};
    if (options.sealed.has_value()) shape.sealed.assign(shape.n_tables(), *options.sealed);
    auto cache = KvCache::Create(std::move(shape), kv::BlockCutter({1}), store);
    CHECK(cache.ok());
    cache_ = std::move(cache).value();
    fusion_ = std::make_unique<Fusion>(options.fusion, std::vector<const dense::RopeTable*>(options.window.size()),
                                       *cache_, pool_);
    if (options.measured) Measure();
  }

  KvCache* operator->() { return cache_.get(); }
  Fusion& fusion() { return *fusion_; }
  const BlockLayout& layout() const { return layout_; }
  int n_tables() const { return cache_->shape().n_tables(); }

  SequenceId Create(DomainId domain, Place place, bool allows = true) {
    const SequenceId id = cache_->Create(domain, 64, fusion_->SharingOf(allows));
    places_[id] = place;
    return id;
  }
  SequenceId Fork(SequenceId source) {
    const SequenceId id = cache_->Fork(source, 64);
    places_[id] = places_[source];
    return id;
  }
  bool Append(SequenceId id, const Tokens& tokens) {
    const int from = cache_->length(id);
    if (!cache_->Append(id, tokens)) return false;
    Write(id, from);
    return true;
  }
  void Commit(SequenceId id) {
    fusion_->OnSealed(id, cache_->Commit(id), Phase::kPrefill);
    Check();
  }
  bool Step(SequenceId id, const Tokens& tokens) {
    if (!Append(id, tokens)) return false;
    Commit(id);
    return true;
  }
  // A new sequence with these tokens, of which it adopts what it may.
  SequenceId Run(const Tokens& tokens, Place place, DomainId domain = kA, bool allows = true) {
    const SequenceId id = Create(domain, place, allows);
    const int adopted = cache_->AdoptPrefix(id, tokens);
    EXPECT_TRUE(Step(id, Tokens(tokens.begin() + adopted, tokens.end())));
    return id;
  }
  void Free(SequenceId id) {
    cache_->Free(id);
    fusion_->DropReleased();
    Check();
  }
  void Check() {
    cache_->CheckIntegrity();
    fusion_->CheckIntegrity();
  }
  // Nothing is left but what no sequence uses, and nothing at all once that is dropped.
  void ExpectEmpty() {
    cache_->DropPrefixCache();
    fusion_->DropReleased();
    Check();
    EXPECT_EQ(cache_->stats().used_bytes, 0u);
    EXPECT_EQ(cache_->stats().held_bytes, 0u);
    EXPECT_EQ(fusion_->stats().representatives, 0);
  }

  BlockId Block(SequenceId id, int index, int table = 0) {
    return cache_->table(id, table / 2, static_cast<Kind>(table % 2))[index];
  }
  bool Shared(SequenceId a, SequenceId b, int index, int table = 0) {
    return Block(a, index, table) == Block(b, index, table);
  }
  // Where the stored block stands on the line, from all of its values.
  double Position(SequenceId id, int index, int table = 0) {
    double position = 0;
    ForEachValue(id, index, table,
                 [&](float stored, float plain, int n) { position += (stored - plain) / (Direction(table) * n); });
    return position;
  }
  // The NMSE of a stored block against what the sequence wrote.
  double Nmse(SequenceId id, int index, int table) {
    double squares = 0;
    const Place place = places_[id];
    const double own = (table % 2 == 0 ? place.k : place.v) * Direction(table);
    const kv::LogicalBlock& block = cache_->blocks(id)[static_cast<size_t>(index)];
    ForEachValue(id, index, table,
                 [&](float stored, float plain, int) { squares += std::pow(stored - (plain + own), 2); });
    return squares / (block.tokens * fusion_->energy(table));
  }
  // What it wrote, bit for bit.
  bool Exact(SequenceId id) {
    bool exact = true;
    for (int table = 0; table < n_tables(); ++table) {
      for (int index = 0; index < static_cast<int>(cache_->blocks(id).size()); ++index) {
        if (!Block(id, index, table).valid()) continue;
        const Place place = places_[id];
        const double own = (table % 2 == 0 ? place.k : place.v) * Direction(table);
        ForEachValue(id, index, table, [&](float stored, float plain, int) {
          exact = exact && stored == static_cast<float>(plain + own);
        });
      }
    }
    return exact;
  }
  // Since the statistics are full.
  int64_t offered() const { return fusion_->stats().offered - offered_before_; }
  // Bytes of one logical block of `cap` tokens.
  size_t Bytes(int cap) const { return static_cast<size_t>(cache_->shape().n_tables()) * layout_.block_bytes(cap); }

 private:
  static constexpr size_t kWidth = 16;

  float Plain(TokenId token, int table, size_t channel) const {
    std::vector<float> values(kWidth);
    kv::FillContent(kv::MixContent(17, static_cast<uint32_t>(token)), table, values);
    return values[channel] / 64;
  }
  // Length of a step of 1 along the line, per channel. Before the statistics are full any value serves.
  double Direction(int table) const {
    const double energy = measured_ ? fusion_->energy(table) : 1;
    return std::sqrt(energy / static_cast<double>(kWidth));
  }

  void Write(SequenceId id, int from) {
    std::vector<float> values(kWidth);
    const auto blocks = cache_->blocks(id);
    const auto tokens = cache_->tokens(id);
    for (int table = 0; table < n_tables(); ++table) {
      const Place place = places_[id];
      const double own = (table % 2 == 0 ? place.k : place.v) * Direction(table);
      for (size_t i = 0; i < blocks.size(); ++i) {
        for (int t = std::max(0, from - blocks[i].start); t < blocks[i].tokens; ++t) {
          const TokenId token = tokens[static_cast<size_t>(blocks[i].start + t)];
          for (size_t c = 0; c < kWidth; ++c) values[c] = static_cast<float>(Plain(token, table, c) + own);
          codec::StoreToken(layout_, static_cast<Kind>(table % 2), cache_->data(Block(id, static_cast<int>(i), table)),
                            blocks[i].cap, t, values);
        }
      }
    }
  }

  template <typename F>
  void ForEachValue(SequenceId id, int index, int table, F&& f) {
    const kv::LogicalBlock block = cache_->blocks(id)[static_cast<size_t>(index)];
    std::vector<float> values(kWidth);
    const std::vector<std::byte> stored =
        kv::StoredBlock(*cache_, table, Block(id, index, table), block.cap, block.tokens);
    for (int t = 0; t < block.tokens; ++t) {
      codec::LoadToken(layout_, static_cast<Kind>(table % 2), stored.data(), block.cap, t, values);
      const TokenId token = cache_->tokens(id)[static_cast<size_t>(block.start + t)];
      for (size_t c = 0; c < kWidth; ++c) f(values[c], Plain(token, table, c), block.tokens * static_cast<int>(kWidth));
    }
  }

  void Measure() {
    for (int i = 0; i < 2 * Statistics::kTokensMin / 15; ++i) {
      const SequenceId id = Create(kOther, {});
      CHECK(Step(id, Line(100 + i, 15)));
      Free(id);
    }
    measured_ = true;
    cache_->DropPrefixCache();
    fusion_->DropReleased();
    offered_before_ = fusion_->stats().offered;
  }

  BlockLayout layout_;
  ThreadPool pool_{2};
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<Fusion> fusion_;
  std::map<SequenceId, Place> places_;
  bool measured_ = false;
  int64_t offered_before_ = 0;
};

// Different first lines: no prefix is shared, so what follows meets only in fusion.
Tokens Prompt(int who, const Tokens& text) { return Line(500 + who, 6) + text; }
const Tokens kText = Line(1, 10);
constexpr int kTextIndex = 1;  // of kText in Prompt

TEST(Fusion, AMemberWithinTheBudgetJoins) {
  World world;
  const SequenceId a = world.Run(Prompt(0, kText), {0, 0});
  EXPECT_EQ(world.fusion().stats().fused, 0);
  const SequenceId b = world.Run(Prompt(1, kText), {0.15, 0.1});
  for (int table = 0; table < 2; ++table) {
    EXPECT_TRUE(world.Shared(a, b, kTextIndex, table));
    EXPECT_FALSE(world.Shared(a, b, 0, table));
  }
  EXPECT_NEAR(world.Position(a, kTextIndex, 0), 0.075, kTolerance);
  EXPECT_NEAR(world.Position(a, kTextIndex, 1), 0.05, kTolerance);
  const FusionStats stats = world.fusion().stats();
  EXPECT_EQ(stats.fused, 2);
  EXPECT_EQ(stats.fused_equal_tokens, 2);
  EXPECT_EQ(stats.rejected, 0);
  EXPECT_EQ(world.offered(), 8);
  EXPECT_EQ(stats.representatives, 6);
  EXPECT_NEAR(stats.worst_nmse, 0.075 * 0.075, kTolerance);
}

TEST(Fusion, OneOutsideTheBudgetStaysAndStandsForOthers) {
  World world;
  const SequenceId a = world.Run(Prompt(0, kText), {0, 0});
  const SequenceId b = world.Run(Prompt(1, kText), {0.21, 0.21});
  EXPECT_FALSE(world.Shared(a, b, kTextIndex));
  EXPECT_EQ(world.fusion().stats().rejected, 2);
  EXPECT_TRUE(world.Exact(a) && world.Exact(b));
  // The nearer of the two takes the third.
  const SequenceId c = world.Run(Prompt(2, kText), {0.15, 0.02});
  EXPECT_TRUE(world.Shared(b, c, kTextIndex, 0));
  EXPECT_TRUE(world.Shared(a, c, kTextIndex, 1));
  EXPECT_NEAR(world.Position(c, kTextIndex, 0), 0.18, kTolerance);
  EXPECT_NEAR(world.Position(c, kTextIndex, 1), 0.01, kTolerance);
}

TEST(Fusion, KeysAndValuesAreDecidedApart) {
  World world({.window = {0, 0}});
  const SequenceId a = world.Run(Prompt(0, kText), {0, 0});
  const SequenceId b = world.Run(Prompt(1, kText), {0.1, 0.3});
  for (int layer = 0; layer < 2; ++layer) {
    EXPECT_TRUE(world.Shared(a, b, kTextIndex, 2 * layer));
    EXPECT_FALSE(world.Shared(a, b, kTextIndex, 2 * layer + 1));
  }
}

TEST(Fusion, TheRepresentativeIsTheMeanWhileTheBoundAllows) {
  World world;
  const double places[] = {0, 0.1, 0.04, -0.02, 0.08};
  double sum = 0;
  int n = 0;
  SequenceId first;
  for (const double place : places) {
    const SequenceId id = world.Run(Prompt(n, kText), {place, 0});
    if (n++ == 0) first = id;
    sum += place;
    EXPECT_TRUE(world.Shared(first, id, kTextIndex));
    EXPECT_NEAR(world.Position(id, kTextIndex), sum / n, kTolerance) << n;
  }
}

// 0 -> 0.095 -> 0.16 -> nearly 0.2, and no farther: the first member at 0 must stay within 0.2.
TEST(Fusion, MovingTheMeanNeverTakesAnOldMemberBeyondTheBudget) {
  World world;
  const double places[] = {0, 0.19, 0.29, 0.35, 0.39};
  const double means[] = {0, 0.095, 0.16, 0.16 + 0.98 * 0.04, 0.2 - 0.02 * 0.02 * 0.04};
  std::vector<SequenceId> members;
  for (int i = 0; i < 5; ++i) {
    members.push_back(world.Run(Prompt(i, kText), {places[i], 0}));
    EXPECT_TRUE(world.Shared(members[0], members.back(), kTextIndex)) << i;
    EXPECT_NEAR(world.Position(members[0], kTextIndex), means[i], kTolerance) << i;
    for (const SequenceId member : members) EXPECT_LE(world.Nmse(member, kTextIndex, 0), kBudget * (1 + 1e-4));
  }
  const SequenceId outside = world.Run(Prompt(9, kText), {0.41, 0});
  EXPECT_FALSE(world.Shared(members[0], outside, kTextIndex));
  EXPECT_LE(world.fusion().stats().worst_nmse, kBudget * (1 + 1e-6));
  EXPECT_NEAR(world.Nmse(members[0], kTextIndex, 0), kBudget, 1e-3);
}

TEST(Fusion, EveryMemberStaysWithinTheBudgetWhateverTheOrder) {
  for (const Codec codec : {Codec::kBf16, Codec::kF16, Codec::kF32}) {
    World world({.window = {0, 0}, .slabs = 300, .codec = codec});
    std::mt19937 random(3);
    std::uniform_real_distribution<double> place(-0.6, 0.6);
    std::vector<SequenceId> all;
    for (int i = 0; i < 120; ++i) all.push_back(world.Run(Prompt(i, kText), {place(random), place(random)}));
    double worst = 0;
    for (const SequenceId id : all) {
      for (int table = 0; table < world.n_tables(); ++table) {
        worst = std::max(worst, world.Nmse(id, kTextIndex, table));
      }
    }
    // What was written is itself rounded to the codec.
    EXPECT_LE(worst, kBudget * 1.02);
    EXPECT_GT(worst, kBudget / 2);
    EXPECT_GT(world.fusion().stats().fused, 300);
    EXPECT_GT(world.fusion().stats().rejected, 10);
    for (const SequenceId id : all) world.Free(id);
    world.ExpectEmpty();
  }
}

TEST(Fusion, NothingFusesBeforeTheScaleIsKnown) {
  World world({.measured = false});
  const SequenceId a = world.Run(Prompt(0, kText), {});
  const SequenceId b = world.Run(Prompt(1, kText), {});
  EXPECT_FALSE(world.Shared(a, b, kTextIndex));
  EXPECT_EQ(world.fusion().stats().fused, 0);
  for (int i = 2; world.fusion().stats().fused == 0; ++i) {
    ASSERT_LT(i, 200);
    world.Run(Prompt(i, kText), {});
  }
  // What was sealed before stands for what comes after.
  const SequenceId late = world.Run(Prompt(300, kText), {});
  EXPECT_GT(world->sharers(world.Block(late, kTextIndex)), 2);
  EXPECT_FALSE(world.Shared(a, b, kTextIndex));
}

TEST(Fusion, DomainsNeverFuse) {
  World world;
  const SequenceId a = world.Run(Prompt(0, kText), {});
  const SequenceId b = world.Run(Prompt(1, kText), {}, kB);
  const SequenceId c = world.Run(Prompt(2, kText), {}, kB);
  EXPECT_FALSE(world.Shared(a, b, kTextIndex));
  EXPECT_TRUE(world.Shared(b, c, kTextIndex));
}

TEST(Fusion, OtherTokensNeverFuseWithoutSimilarity) {
  World world;
  const SequenceId a = world.Run(Prompt(0, Line(1, 10)), {});
  const SequenceId b = world.Run(Prompt(1, Line(1, 11)), {});
  const SequenceId c = world.Run(Prompt(2, Line(2, 10)), {});
  EXPECT_FALSE(world.Shared(a, b, kTextIndex));
  EXPECT_FALSE(world.Shared(a, c, kTextIndex));
  EXPECT_EQ(world.fusion().stats().rejected, 0);
}

// A block that found no slab of its class keeps a larger one, and meets only blocks of that.
TEST(Fusion, SizeClassesNeverFuse) {
  World world({.slabs = 24, .prefix_cache = false});
  const Tokens nine(kText.begin(), kText.end() - 1);
  const SequenceId large = world.Create(kA, {});
  ASSERT_TRUE(world.Step(large, nine));
  std::vector<SequenceId> fillers;
  while (world->stats().held_bytes < world->stats().capacity_bytes) {
    fillers.push_back(world.Create(kB, {}));
    ASSERT_TRUE(world.Step(fillers.back(), nine));
  }
  ASSERT_TRUE(world.Step(large, {kLineEnd}));
  ASSERT_EQ(world->blocks(large)[0].cap, 16);
  for (const SequenceId filler : fillers) world.Free(filler);
  const SequenceId small = world.Run(kText, {});
  ASSERT_EQ(world->blocks(small)[0].cap, 10);
  EXPECT_FALSE(world.Shared(large, small, 0));
  const SequenceId other = world.Run(Prompt(0, kText), {});
  EXPECT_EQ(world.Block(other, kTextIndex), world.Block(small, 0));
}

TEST(Fusion, OwnBytesAreFreedAtOnce) {
  World world({.prefix_cache = false});
  world.Run(Prompt(0, kText), {});
  const size_t before = world->stats().used_bytes;
  EXPECT_EQ(before, world.Bytes(6) + world.Bytes(10));
  const SequenceId b = world.Create(kA, {0.1, 0.1});
  ASSERT_TRUE(world.Append(b, Prompt(1, kText)));
  EXPECT_EQ(world->stats().used_bytes, 2 * before);
  world.Commit(b);
  EXPECT_EQ(world->stats().used_bytes, before + world.Bytes(6));
  EXPECT_EQ(world->stats().running_bytes, world->stats().used_bytes);
}

TEST(Fusion, TextThatRepeatsInOnePromptIsStoredOnce) {
  World world({.prefix_cache = false});
  const SequenceId id = world.Run(Prompt(0, kText + kText + kText), {});
  EXPECT_EQ(world.Block(id, 1), world.Block(id, 2));
  EXPECT_EQ(world.Block(id, 1), world.Block(id, 3));
  EXPECT_EQ(world->stats().used_bytes, world.Bytes(6) + world.Bytes(10));
  EXPECT_TRUE(world.Exact(id));
  world.Free(id);
  world.ExpectEmpty();
}

TEST(Fusion, TheFirstMembersEndLeavesTheRepresentativeToTheOthers) {
  for (const bool prefix_cache : {false, true}) {
    World world({.prefix_cache = prefix_cache});
    const SequenceId a = world.Run(Prompt(0, kText), {0, 0});
    const SequenceId b = world.Run(Prompt(1, kText), {0.1, 0.1});
    const SequenceId c = world.Run(Prompt(2, kText), {0.05, 0.05});
    const BlockId representative = world.Block(a, kTextIndex);
    world.Free(a);
    world->DropPrefixCache();
    EXPECT_EQ(world.Block(b, kTextIndex), representative);
    EXPECT_EQ(world.Block(c, kTextIndex), representative);
    EXPECT_NEAR(world.Position(b, kTextIndex), 0.05, kTolerance);
    EXPECT_EQ(world->stats().used_bytes, 2 * world.Bytes(6) + world.Bytes(10));
    // It still takes members in.
    const SequenceId d = world.Run(Prompt(3, kText), {0.05, 0.05});
    EXPECT_EQ(world.Block(d, kTextIndex), representative);
    for (const SequenceId id : {b, c}) world.Free(id);
    EXPECT_NEAR(world.Position(d, kTextIndex), 0.05, kTolerance);
    world.Free(d);
    world.ExpectEmpty();
  }
}

TEST(Fusion, TheLastOwnersEndFreesTheRepresentativeAndTheTableForgetsIt) {
  World world({.prefix_cache = false});
  const SequenceId a = world.Run(Prompt(0, kText), {0, 0});
  const SequenceId b = world.Run(Prompt(1, kText), {0.1, 0.1});
  world.Free(a);
  world.Free(b);
  EXPECT_EQ(world->stats().used_bytes, 0u);
  EXPECT_EQ(world.fusion().stats().representatives, 0);
  // Nothing of the old content is left: the next of this text stands where it is itself.
  const SequenceId c = world.Run(Prompt(2, kText), {0.19, 0.19});
  EXPECT_EQ(world.fusion().stats().rejected, 0);
  EXPECT_TRUE(world.Exact(c));
}

// Ids of freed representatives are used again before fusion hears of their end.
TEST(Fusion, AReusedBlockIsNotTakenForTheOldRepresentative) {
  World world({.prefix_cache = false});
  const SequenceId a = world.Run(Prompt(0, kText), {});
  const BlockId old = world.Block(a, kTextIndex);
  world->Free(a);  // without DropReleased: OnSealed does it
  const SequenceId b = world.Create(kA, {});
  ASSERT_TRUE(world.Append(b, Line(700, 6) + Line(70, 10)));
  EXPECT_EQ(world.Block(b, 1), old);
  world.Commit(b);
  const SequenceId c = world.Run(Prompt(2, kText), {});
  EXPECT_NE(world.Block(c, kTextIndex), world.Block(b, 1));
  const SequenceId d = world.Run(Prompt(3, Line(70, 10)), {});
  EXPECT_EQ(world.Block(d, kTextIndex), world.Block(b, 1));
}

TEST(Fusion, AForkSharesFusedBlocksAndCopiesOnlyWhatItWrites) {
  World world({.prefix_cache = false});
  const SequenceId a = world.Run(Prompt(0, kText), {0, 0});
  const SequenceId b = world.Run(Prompt(1, kText) + Tokens{1, 2, 3}, {0.1, 0.1});
  const size_t before = world->stats().used_bytes;
  const SequenceId child = world.Fork(b);
  EXPECT_EQ(world->stats().used_bytes, before);
  EXPECT_TRUE(world.Shared(a, child, kTextIndex));
  EXPECT_EQ(world->sharers(world.Block(a, kTextIndex)), 3);
  const double position = world.Position(a, kTextIndex);
  ASSERT_TRUE(world.Step(child, {4}));
  EXPECT_EQ(world->stats().copies_on_write, 1);
  EXPECT_EQ(world->stats().used_bytes, before + world.Bytes(8));
  EXPECT_FALSE(world.Shared(b, child, 2));
  EXPECT_TRUE(world.Shared(a, child, kTextIndex));
  EXPECT_EQ(world.Position(a, kTextIndex), position);
  // What the two say the same from here on meets again.
  ASSERT_TRUE(world.Step(child, {5, kLineEnd}));
  ASSERT_TRUE(world.Step(b, {4, 5, kLineEnd}));
  EXPECT_TRUE(world.Shared(b, child, 2));
  world.Free(b);
  world.Free(a);
  EXPECT_EQ(world.Position(child, kTextIndex), position);
  world.Free(child);
  world.ExpectEmpty();
}

TEST(Fusion, OpenBlocksAreLeftAlone) {
  World world;
  const Tokens open(kText.begin(), kText.end() - 1);
  const SequenceId a = world.Run(Prompt(0, open), {});
  const SequenceId b = world.Run(Prompt(1, open), {});
  EXPECT_FALSE(world.Shared(a, b, kTextIndex));
  ASSERT_TRUE(world.Step(a, {kLineEnd}));
  EXPECT_FALSE(world.Shared(a, b, kTextIndex));
  ASSERT_TRUE(world.Step(b, {kLineEnd}));
  EXPECT_TRUE(world.Shared(a, b, kTextIndex));
}

TEST(Fusion, CancelBetweenAppendAndCommitFusesNothing) {
  World world;
  const SequenceId a = world.Run(Prompt(0, kText), {0, 0});
  const SequenceId b = world.Create(kA, {0.1, 0.1});
  ASSERT_TRUE(world.Append(b, Prompt(1, kText)));
  world.Free(b);
  EXPECT_TRUE(world.Exact(a));
  EXPECT_EQ(world.fusion().stats().fused, 0);
  world.Free(a);
  world.ExpectEmpty();
}

TEST(Fusion, AKnownPrefixIsTakenWithItsRepresentatives) {
  World world;
  const SequenceId a = world.Run(Prompt(0, kText), {0, 0});
  const SequenceId b = world.Run(Prompt(1, kText) + Tokens{1}, {0.1, 0.1});
  const int64_t offered = world.offered();
  const SequenceId again = world.Run(Prompt(1, kText) + Tokens{1}, {0.1, 0.1});
  EXPECT_EQ(world.offered(), offered);
  EXPECT_TRUE(world.Shared(a, again, kTextIndex));
  // Computed beside the known one instead of adopted: taken as it is, and not offered again.
  const SequenceId beside = world.Create(kA, {0.1, 0.1});
  ASSERT_TRUE(world.Step(beside, Prompt(1, kText) + Tokens{1}));
  EXPECT_TRUE(world.Shared(a, beside, kTextIndex));
  EXPECT_TRUE(world.Shared(b, beside, 0));
  EXPECT_EQ(world.offered(), offered);
  EXPECT_NEAR(world.Position(a, kTextIndex), 0.05, kTolerance);
}

TEST(Fusion, OptOutTakesExactBlocksOnlyAndGivesNone) {
  World world;
  const SequenceId lossy = world.Run(Prompt(0, kText) + Tokens{1}, {0, 0});
  const SequenceId other = world.Run(Prompt(1, kText) + Tokens{1}, {0.1, 0.1});
  ASSERT_TRUE(world.Shared(lossy, other, kTextIndex));
  // The same prompt as `other`, which the lossy tree knows.
  const SequenceId exact = world.Create(kA, {0.12, 0.12}, false);
  EXPECT_EQ(world->AdoptPrefix(exact, Prompt(1, kText) + Tokens{1}), 0);
  ASSERT_TRUE(world.Step(exact, Prompt(1, kText) + Tokens{1}));
  EXPECT_FALSE(world->lossy(exact));
  EXPECT_TRUE(world.Exact(exact));
  for (int index = 0; index < 2; ++index) EXPECT_FALSE(world.Shared(other, exact, index));
  // Exact ones share among themselves, and stay what they are while lossy ones of the same text come and go.
  const SequenceId friendly = world.Create(kA, {0.12, 0.12}, false);
  EXPECT_EQ(world->AdoptPrefix(friendly, Prompt(1, kText) + Tokens{1}), 16);
  EXPECT_TRUE(world.Shared(friendly, exact, kTextIndex));
  const SequenceId third = world.Run(Prompt(2, kText) + Tokens{1}, {0.12, 0.12});
  EXPECT_TRUE(world.Shared(lossy, third, kTextIndex));
  EXPECT_FALSE(world.Shared(exact, third, kTextIndex));
  EXPECT_TRUE(world.Exact(exact));
  // Nor does a lossy one adopt from an exact one.
  world.Run(Prompt(3, kText) + Tokens{1}, {}, kA, false);
  const SequenceId late = world.Create(kA, {});
  EXPECT_EQ(world->AdoptPrefix(late, Prompt(3, kText) + Tokens{1}), 0);
  // A fork is what its source is.
  EXPECT_FALSE(world->lossy(world.Fork(exact)));
  EXPECT_TRUE(world->lossy(world.Fork(third)));
}

TEST(Fusion, SwitchedOffNothingMoreFusesAndOnAgainItDoes) {
  World world;
  const SequenceId a = world.Run(Prompt(0, kText), {0, 0});
  const SequenceId b = world.Run(Prompt(1, kText), {0.1, 0.1});
  const SequenceId early = world.Create(kA, {0.1, 0.1});  // lossy, still without tokens
  world.fusion().set_enabled(false);
  EXPECT_FALSE(world.fusion().enabled());
  const int64_t offered = world.offered();
  ASSERT_TRUE(world.Step(early, Prompt(2, kText)));
  EXPECT_FALSE(world.Shared(a, early, kTextIndex));
  const SequenceId off = world.Run(Prompt(3, kText), {0.1, 0.1});
  EXPECT_FALSE(world->lossy(off));
  EXPECT_TRUE(world.Exact(early) && world.Exact(off));
  EXPECT_EQ(world.offered(), offered);
  EXPECT_TRUE(world.Shared(a, b, kTextIndex));  // what is fused stays so
  EXPECT_NEAR(world.Position(a, kTextIndex), 0.05, kTolerance);
  world.Free(b);  // also while it is off, the table forgets
  world.fusion().set_enabled(true);
  const SequenceId c = world.Run(Prompt(4, kText), {0.05, 0.05});
  EXPECT_TRUE(world.Shared(a, c, kTextIndex));
  EXPECT_TRUE(world.Exact(off));
  for (const SequenceId id : {a, early, off, c}) world.Free(id);
  world.ExpectEmpty();
}

TEST(Fusion, PolicyOffKeepsEverythingExact) {
  FusionOptions off;
  off.policy = Policy::kOff;
  World world({.fusion = off, .measured = false});
  const SequenceId a = world.Run(Prompt(0, kText), {0, 0});
  const SequenceId b = world.Run(Prompt(1, kText), {0, 0});
  EXPECT_FALSE(world.Shared(a, b, kTextIndex));
  world.fusion().set_enabled(true);  // the switch cannot bring a policy
  EXPECT_FALSE(world.fusion().enabled());
  EXPECT_EQ(world.fusion().stats().offered, 0);
  EXPECT_EQ(world.fusion().stats().representatives, 0);
}

// The store is too small: representatives are evicted with the entries that name them, in use they stay.
TEST(Fusion, EvictionMeetsRepresentatives) {
  World world({.slabs = 20});
  const SequenceId keeper = world.Run(Prompt(0, kText), {0, 0});
  const BlockId representative = world.Block(keeper, kTextIndex);
  for (int i = 1; i < 400; ++i) {
    const SequenceId id = world.Run(Prompt(i, kText) + Line(1000 + i, 12), {0.1, 0.1});
    ASSERT_EQ(world.Block(id, kTextIndex), representative) << i;
    world.Free(id);
  }
  EXPECT_GT(world->stats().evicted_blocks, 100);
  EXPECT_LE(world.Nmse(keeper, kTextIndex, 0), kBudget * (1 + 1e-4));
  // Without a runner the entries keep it, as long as they last.
  world.Free(keeper);
  world->DropPrefixCache();
  EXPECT_EQ(world->stats().used_bytes, 0u);
  world.ExpectEmpty();
}

TEST(Fusion, DropPrefixCacheLeavesRunningRepresentativesOnly) {
  World world;
  const SequenceId a = world.Run(Prompt(0, kText), {0, 0});
  const SequenceId b = world.Run(Prompt(1, kText), {0.1, 0.1});
  world.Free(a);
  EXPECT_GT(world->stats().used_bytes, world->stats().running_bytes);
  world->DropPrefixCache();
  world.fusion().DropReleased();
  world.Check();
  EXPECT_EQ(world->stats().used_bytes, world->stats().running_bytes);
  EXPECT_EQ(world.fusion().stats().representatives, 4);
  EXPECT_NEAR(world.Position(b, kTextIndex), 0.05, kTolerance);
}

TEST(Fusion, AWindowReleasesItsShareOfAFusedBlock) {
  for (const bool prefix_cache : {false, true}) {
    World world({.window = {0, 12}, .prefix_cache = prefix_cache});
    constexpr int kWindowKeys = 2;
    const SequenceId a = world.Run(Prompt(0, kText), {0, 0});
    const SequenceId b = world.Run(Prompt(1, kText), {0.1, 0.1});
    ASSERT_TRUE(world.Shared(a, b, kTextIndex, kWindowKeys));
    const BlockId representative = world.Block(a, kTextIndex, kWindowKeys);
    ASSERT_TRUE(world.Step(a, Line(50, 14)));  // 30 tokens: the window begins at 19, after the text
    EXPECT_FALSE(world.Block(a, kTextIndex, kWindowKeys).valid());
    EXPECT_TRUE(world.Block(a, kTextIndex, 0).valid());
    EXPECT_EQ(world.Block(b, kTextIndex, kWindowKeys), representative);
    EXPECT_NEAR(world.Position(b, kTextIndex, kWindowKeys), 0.05, kTolerance);
    world->DropPrefixCache();
    world.Check();
    EXPECT_EQ(world.Block(b, kTextIndex, kWindowKeys), representative);
    const SequenceId c = world.Run(Prompt(2, kText), {0.05, 0.05});
    EXPECT_EQ(world.Block(c, kTextIndex, kWindowKeys), representative);
    world.Free(b);
    world.Free(c);
    world->DropPrefixCache();
    world.fusion().DropReleased();
    world.Check();
    EXPECT_EQ(world->stats().used_bytes, world->stats().running_bytes);
    world.Free(a);
    world.ExpectEmpty();
  }
}

// A block of a full layer that sealed when its window twin had already gone.
TEST(Fusion, BlocksThatLeftTheWindowBeforeTheySealAreSkipped) {
  World world({.window = {0, 12}, .prefix_cache = false});
  const SequenceId a = world.Run(Prompt(0, kText) + Line(50, 14), {});
  const SequenceId b = world.Run(Prompt(1, kText) + Line(50, 14), {});
  EXPECT_TRUE(world.Shared(a, b, kTextIndex, 0));
  EXPECT_FALSE(world.Block(b, kTextIndex, 2).valid());
  EXPECT_TRUE(world.Shared(a, b, 2, 2));
  world.Free(a);
  world.Free(b);
  world.ExpectEmpty();
}

TEST(Fusion, StayingBlocksMoveToTheBottomOfTheArena) {
  World world({.prefix_cache = false});
  std::vector<SequenceId> early;
  for (int i = 0; i < 80; ++i) early.push_back(world.Run(Line(2000 + i, 10), {}));
  const SequenceId late = world.Create(kA, {});
  ASSERT_TRUE(world.Append(late, Line(3000, 10)));
  const BlockId high = world.Block(late, 0);
  world.Free(early[0]);
  world.Commit(late);
  EXPECT_LT(world.Block(late, 0).value, high.value);
  EXPECT_TRUE(world.Exact(late));
  // As a representative it is found where it lies now.
  const SequenceId other = world.Run(Prompt(1, Line(3000, 10)), {});
  EXPECT_EQ(world.Block(other, kTextIndex), world.Block(late, 0));
}

FusionOptions Off() {
  FusionOptions options;
  options.policy = Policy::kOff;
  return options;
}

// Without fusion: sealed blocks are what the codec makes of them, and take its bytes. Open ones stay as they are.
TEST(Fusion, SealedBlocksAreEncodedWithoutFusionToo) {
  for (const Codec to : {Codec::kQ8, Codec::kQ4}) {
    World world({.fusion = Off(), .sealed = to});
    const SequenceId id = world.Run(Prompt(0, Line(1, 11)) + Tokens{1, 2, 3}, {});
    ASSERT_EQ(world->blocks(id).size(), 3U);
    ASSERT_EQ(world->blocks(id)[1].tokens, 11);
    const codec::BlockLayout encoded{world.layout().n_kv_heads, world.layout().head_dim, to};
    for (int table = 0; table < 2; ++table) {
      EXPECT_EQ(world->codec(world.Block(id, 0, table)), Codec::kQ8) << "the sequence's first token";
      EXPECT_EQ(world->codec(world.Block(id, 1, table)), to);
      EXPECT_EQ(world->codec(world.Block(id, 2, table)), Codec::kBf16);
      EXPECT_EQ(world->block_bytes(world.Block(id, 1, table)), encoded.block_bytes(11));
      EXPECT_GT(world.Nmse(id, 1, table), 0);
      EXPECT_LT(world.Nmse(id, 1, table), to == Codec::kQ8 ? 1e-3 : 0.04);
    }
    EXPECT_EQ(world.fusion().stats().representatives, 0);
    EXPECT_EQ(world.fusion().stats().unencoded, 0);
    EXPECT_EQ(world->stats().used_bytes, world->stats().running_bytes);
    world.Free(id);
    world.ExpectEmpty();
  }
}

// A request that opts out of fusion has its blocks encoded all the same, from its own values alone.
TEST(Fusion, AnExactSequenceIsEncodedAndNeverFused) {
  World world({.sealed = Codec::kQ8});
  const SequenceId a = world.Run(Prompt(0, kText), {0, 0});
  const SequenceId b = world.Run(Prompt(1, kText), {0.1, 0.1}, kA, false);
  EXPECT_FALSE(world.Shared(a, b, kTextIndex));
  EXPECT_EQ(world->codec(world.Block(b, kTextIndex)), Codec::kQ8);
  EXPECT_LT(world.Nmse(b, kTextIndex, 0), 1e-3);
}

// Forks and those that adopted a block before it was encoded come along.
TEST(Fusion, AllWhoShareABlockFollowItsEncoding) {
  World world({.fusion = Off(), .sealed = Codec::kQ4});
  const Tokens tokens = Prompt(0, kText) + Tokens{1, 2, 3};
  const SequenceId a = world.Create(kA, {});
  ASSERT_TRUE(world.Append(a, tokens));
  const kv::SealedRange sealed = world->Commit(a);
  const SequenceId fork = world.Fork(a);
  const SequenceId adopter = world.Create(kA, {});
  ASSERT_GT(world->AdoptPrefix(adopter, tokens), 0);
  world.fusion().OnSealed(a, sealed, Phase::kEntersDecode);
  world.Check();
  for (const SequenceId other : {fork, adopter}) {
    for (int table = 0; table < 2; ++table) EXPECT_TRUE(world.Shared(a, other, kTextIndex, table));
  }
  EXPECT_EQ(world->codec(world.Block(a, kTextIndex)), Codec::kQ4);
  for (const SequenceId id : {a, fork, adopter}) world.Free(id);
  world.ExpectEmpty();
}

// A full store cannot encode: blocks stay where they are, with the values that the codec left.
TEST(Fusion, WithoutRoomBlocksStayUnencoded) {
  World world({.fusion = Off(), .sealed = Codec::kQ4, .prefix_cache = false});
  std::vector<SequenceId> all;
  while (true) {
    const SequenceId id = world.Create(kA, {});
    if (!world.Append(id, Prompt(static_cast<int>(all.size()), kText))) break;
    all.push_back(id);
  }
  for (const SequenceId id : all) world.Commit(id);
  EXPECT_GT(world.fusion().stats().encoded, 0);
  int unencoded = 0;
  for (const SequenceId id : all) {
    for (int table = 0; table < 2; ++table) {
      unencoded += world->codec(world.Block(id, kTextIndex, table)) == Codec::kBf16;
      EXPECT_LT(world.Nmse(id, kTextIndex, table), 0.04);
    }
  }
  EXPECT_EQ(unencoded > 0, world.fusion().stats().unencoded > 0);
}

// Members stay within the budget of the encoded representative.
TEST(Fusion, EncodingCountsAgainstTheBudget) {
  World world({.sealed = Codec::kQ8, .slabs = 200, .prefix_cache = false});
  std::mt19937 random(5);
  std::uniform_real_distribution<double> place(-0.3, 0.3);
  std::vector<SequenceId> all;
  for (int i = 0; i < 60; ++i) all.push_back(world.Run(Prompt(i, kText), {place(random), place(random)}));
  EXPECT_GT(world.fusion().stats().fused, 80);
  for (const SequenceId id : all) {
    // bf16: what the sequence wrote is itself rounded by 2^-9.
    for (int table = 0; table < 2; ++table) EXPECT_LE(world.Nmse(id, kTextIndex, table), kBudget * 1.01);
  }
}

// A block whose own encoding takes it beyond the budget stands for nobody, however near another comes to it.
TEST(Fusion, ABlockEncodedBeyondTheBudgetStandsForNobody) {
  double nmse = 0;
  double nearest = 0;
  {
    World world({.fusion = Bounded(1), .sealed = Codec::kQ4});
    const SequenceId id = world.Run(Prompt(0, kText), {});
    nmse = world.Nmse(id, kTextIndex, 0);
    nearest = world.Position(id, kTextIndex, 0);
  }
  const double budget = nmse - nearest * nearest / 2;
  ASSERT_LT(budget, nmse * 0.9999);
  World world({.fusion = Bounded(static_cast<float>(budget)), .sealed = Codec::kQ4});
  const SequenceId a = world.Run(Prompt(0, kText), {});
  const SequenceId b = world.Run(Prompt(1, kText), {nearest, 0});
  EXPECT_FALSE(world.Shared(a, b, kTextIndex));
  EXPECT_LE(world.fusion().stats().worst_nmse, budget * (1 + 1e-6));
}

// The fewest bits that do: 1 and 4 leave about 0.36 and 0.01 of the difference.
TEST(Fusion, ABlockBeyondTheBudgetIsKeptAsADifference) {
  for (const std::optional<Codec> sealed : {std::optional<Codec>(), std::optional(Codec::kQ8)}) {
    World world({.sealed = sealed, .residuals = true});
    const SequenceId a = world.Run(Prompt(0, kText), {});
    const BlockId of = world.Block(a, kTextIndex);
    int who = 1;
    for (const auto& [place, codec] : {std::pair{1.0, Codec::kQ4}, {0.25, Codec::kQ1}}) {
      const SequenceId b = world.Run(Prompt(who++, kText), {place, 0});
      const BlockId difference = world.Block(b, kTextIndex);
      ASSERT_EQ(world->base(difference), of) << place;
      EXPECT_EQ(world->codec(difference), codec);
      EXPECT_LE(world.Nmse(b, kTextIndex, 0), kBudget);
      EXPECT_EQ(world->state(b, 0, kTextIndex), kv::SlotState::kFused);
      EXPECT_FALSE(world->base(world.Block(b, kTextIndex, 1)).valid()) << "values are where the others' are";
    }
    EXPECT_EQ(world.fusion().stats().residuals, 2);
    EXPECT_LE(world.fusion().stats().worst_nmse, kBudget * (1 + 1e-6));
    const SequenceId far = world.Run(Prompt(who, kText), {3, 0});
    EXPECT_FALSE(world->base(world.Block(far, kTextIndex)).valid()) << "not even four bits do";
    EXPECT_LT(world.Nmse(far, kTextIndex, 0), 1e-3);
  }
}

// Both are then within the budget of what lies between; with one kept as a difference it could not move any more.
TEST(Fusion, ABlockBeyondTheBudgetIsMetHalfWayWhereDifferencesAreKept) {
  for (const bool residuals : {false, true}) {
    World world({.residuals = residuals});
    const SequenceId a = world.Run(Prompt(0, kText), {});
    const SequenceId b = world.Run(Prompt(1, kText), {0.25, 0});
    EXPECT_EQ(world.Shared(a, b, kTextIndex), residuals);
    if (!residuals) continue;
    for (const SequenceId id : {a, b}) {
      EXPECT_GT(world.Nmse(id, kTextIndex, 0), 0.1 * kBudget);
      EXPECT_LE(world.Nmse(id, kTextIndex, 0), kBudget);
    }
    EXPECT_EQ(world.fusion().stats().residuals, 0);
    EXPECT_EQ(world.fusion().stats().rejected, 0);
    EXPECT_LE(world.fusion().stats().worst_nmse, kBudget * (1 + 1e-6));
    const SequenceId c = world.Run(Prompt(2, kText), {-0.25, 0});  // too far from b for one to stand for both
    EXPECT_TRUE(world->base(world.Block(c, kTextIndex)).valid());
    EXPECT_LE(world.Nmse(c, kTextIndex, 0), kBudget);
  }
}

TEST(Fusion, WhatDiffersFromARepresentativeStaysWithinTheBudget) {
  World world({.slabs = 200, .residuals = true});
  std::mt19937 random(6);
  std::uniform_real_distribution<double> place(-0.5, 0.5);
  std::vector<SequenceId> all;
  for (int i = 0; i < 60; ++i) {
    all.push_back(world.Run(Prompt(i, kText), {place(random), place(random)}));
    for (const SequenceId id : all) {
      for (int table = 0; table < 2; ++table) ASSERT_LE(world.Nmse(id, kTextIndex, table), kBudget * 1.0001);
    }
  }
  EXPECT_GT(world.fusion().stats().residuals, 20);
  EXPECT_GT(world.fusion().stats().fused, 20);
  for (const SequenceId id : all) world.Free(id);
  world.ExpectEmpty();
}

// A representative lives as long as a difference from it, running or idle.
TEST(Fusion, ADifferenceHoldsWhatItIsFrom) {
  World world({.residuals = true});
  const SequenceId a = world.Run(Prompt(0, kText), {});
  const Tokens tokens = Prompt(1, kText) + Tokens{1, 2, 3};
  const SequenceId b = world.Run(tokens, {0.5, 0.5});
  const BlockId of = world.Block(a, kTextIndex);
  ASSERT_EQ(world->base(world.Block(b, kTextIndex)), of);
  EXPECT_EQ(world->readers(of), 2);
  world.Free(a);
  EXPECT_EQ(world->readers(of), 1);
  EXPECT_LE(world.Nmse(b, kTextIndex, 0), kBudget);
  const SequenceId fork = world.Fork(b);
  const SequenceId adopter = world.Create(kA, {0.5, 0.5});
  ASSERT_GT(world->AdoptPrefix(adopter, tokens), 0);
  EXPECT_EQ(world->readers(of), 1) << "of one difference, that three read";
  for (const SequenceId id : {b, fork}) world.Free(id);
  EXPECT_LE(world.Nmse(adopter, kTextIndex, 0), kBudget);
  world.Free(adopter);
  EXPECT_EQ(world->running_bytes(), 0U);
  EXPECT_EQ(world->readers(of), 0);
  EXPECT_GT(world->sharers(of), 0);
  const SequenceId again = world.Create(kA, {0.5, 0.5});
  ASSERT_GT(world->AdoptPrefix(again, tokens), 0);
  EXPECT_EQ(world->readers(of), 1);
  EXPECT_LE(world.Nmse(again, kTextIndex, 1), kBudget);
  world.Free(again);
  world.ExpectEmpty();
}

TEST(Fusion, AnExactSequenceIsNeverADifference) {
  World world({.residuals = true});
  world.Run(Prompt(0, kText), {});
  const SequenceId exact = world.Run(Prompt(1, kText), {0.5, 0.5}, kA, false);
  const SequenceId elsewhere = world.Run(Prompt(2, kText), {0.5, 0.5}, kB);
  for (const SequenceId id : {exact, elsewhere}) EXPECT_FALSE(world->base(world.Block(id, kTextIndex)).valid());
  EXPECT_EQ(world.fusion().stats().residuals, 0);
}

// A full store: the block stays where it is, with the values that its difference left.
TEST(Fusion, WithoutRoomForADifferenceTheBlockStays) {
  World world({.slabs = 10, .prefix_cache = false, .residuals = true});
  std::vector<SequenceId> all;
  while (true) {
    const SequenceId id = world.Create(kA, {all.empty() ? 0 : 0.5, 0});
    if (!world.Append(id, Prompt(static_cast<int>(all.size()), kText))) break;
    all.push_back(id);
  }
  for (const SequenceId id : all) world.Commit(id);
  EXPECT_GT(world.fusion().stats().unencoded, 0);
  for (const SequenceId id : all) EXPECT_LE(world.Nmse(id, kTextIndex, 0), kBudget);
}

// The first traffic may be one token over and over: then its vectors have no energy, and nothing is near anything.
TEST(Fusion, WithoutAScaleOnlyEqualBlocksFuse) {
  World world({.measured = false});
  const Tokens same(32, 5);
  for (int i = 0; i < 2 * Statistics::kTokensMin / 31; ++i) {
    const SequenceId id = world.Create(kOther, {});
    ASSERT_TRUE(world.Step(id, same));
    world->Free(id);
    world->DropPrefixCache();
  }
  ASSERT_NEAR(world.fusion().energy(0), 0, 1e-9);
  const SequenceId a = world.Run(Prompt(0, kText), {0, 0});
  const SequenceId b = world.Run(Prompt(1, kText), {3, 3});
  EXPECT_FALSE(world.Shared(a, b, kTextIndex, 0));
  EXPECT_FALSE(world.Shared(a, b, kTextIndex, 1));
  EXPECT_TRUE(world.Exact(a) && world.Exact(b));
}

// f16 overflows to infinity, and the distance of two infinities is not a number.
TEST(Fusion, WhatIsNotFiniteFusesWithNothing) {
  for (const double huge : {1e9, std::numeric_limits<double>::quiet_NaN()}) {
    World world({.codec = Codec::kF16});
    const SequenceId bad = world.Run(Prompt(0, kText), {huge, 0});
    const SequenceId good = world.Run(Prompt(1, kText), {0, 0});
    const SequenceId more = world.Run(Prompt(2, kText), {huge, 0});
    EXPECT_FALSE(world.Shared(bad, good, kTextIndex));
    EXPECT_FALSE(world.Shared(bad, more, kTextIndex));
    EXPECT_FALSE(world.Shared(good, more, kTextIndex));
    EXPECT_LT(world.Nmse(good, kTextIndex, 0), 1e-3);
  }
}

TEST(Policy, NamesAreReadBack) {
  for (const Policy policy : {Policy::kOff, Policy::kBounded, Policy::kCosine}) {
    EXPECT_EQ(ParsePolicy(PolicyName(policy)), policy);
  }
  EXPECT_EQ(ParsePolicy("lossless"), std::nullopt);
}

}  // namespace
}  // namespace jointkv::joint
