#include "kv/kv_cache.h"

#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "kv/test_content.h"

namespace jointkv::kv {
namespace {

using Tokens = std::vector<TokenId>;
using Sharing = KvCache::Sharing;

constexpr DomainId kA(0);
constexpr DomainId kB(1);
constexpr TokenId kLineEnd = 0;
constexpr size_t kGranule = 64;  // one head of 4 channels in bf16, padded to a cache line
constexpr size_t kSlab = kGranule * kSlabGranules;

// Of physical blocks with room for so many tokens.
constexpr size_t BytesOf(int cap) { return kGranule * static_cast<size_t>(cap) / codec::kClassStep; }

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

class Store {
 public:
  explicit Store(std::vector<int> window = {0, 0}, int slabs = 16, bool prefix_cache = true, bool absolute_keys = false,
                 bool scales = false) {
    std::vector<uint8_t> ends(1, 1);
    auto cache = KvCache::Create({{1, 4, codec::Codec::kBf16}, std::move(window)}, BlockCutter(std::move(ends)),
                                 {slabs * kSlab, prefix_cache, absolute_keys, scales});
    EXPECT_TRUE(cache.ok()) << cache.status().ToString();
    cache_ = std::move(cache).value();
  }

  KvCache* operator->() { return cache_.get(); }

  SequenceId Create(DomainId domain, int max_tokens = 64, Sharing sharing = Sharing::kExact) {
    const SequenceId id = cache_->Create(domain, max_tokens, sharing);
    domains_[id] = domain;
    return id;
  }
  SequenceId Fork(SequenceId source) {
    const SequenceId id = cache_->Fork(source, 64);
    domains_[id] = domains_[source];
    Check(id);
    return id;
  }

  // One step of one sequence: append, write, commit.
  bool Step(SequenceId id, const Tokens& tokens) {
    if (!Append(id, tokens)) return false;
    Finish(id);
    return true;
  }
  bool Append(SequenceId id, const Tokens& tokens) {
    written_[id] = cache_->length(id);
    const bool appended = cache_->Append(id, tokens);
    cache_->CheckIntegrity();
    return appended;
  }
  void Finish(SequenceId id) {
    WriteContent(*cache_, id, Histories(domains_[id], cache_->tokens(id)), written_[id]);
    Commit(id);
  }
  void Commit(SequenceId id) {
    cache_->Commit(id);
    Check(id);
  }
  // A new sequence that adopts what it can of `prompt` and computes the rest.
  SequenceId Run(DomainId domain, const Tokens& prompt, int expected_hit, Sharing sharing = Sharing::kExact) {
    const SequenceId id = Create(domain, 64, sharing);
    EXPECT_EQ(Adopt(id, prompt), expected_hit);
    EXPECT_TRUE(Step(id, Tokens(prompt.begin() + cache_->length(id), prompt.end())));
    return id;
  }
  int Adopt(SequenceId id, const Tokens& prompt) {
    const int hit = cache_->AdoptPrefix(id, prompt);
    Check(id);
    return hit;
  }
  void Free(SequenceId id) {
    cache_->Free(id);
    cache_->CheckIntegrity();
  }
  void Check(SequenceId id) {
    cache_->CheckIntegrity();
    EXPECT_EQ(WrongContent(*cache_, id, Histories(domains_[id], cache_->tokens(id)), cache_->length(id)), 0);
  }
  BlockId Block(SequenceId id, int layer, int index) { return cache_->table(id, layer, Kind::kK)[index]; }

 private:
  std::unique_ptr<KvCache> cache_;
  std::map<SequenceId, DomainId> domains_;
  std::map<SequenceId, int> written_;
};

TEST(KvCache, CreateRefusesACapBelowOneSlab) {
  const auto cache = KvCache::Create({{1, 4, codec::Codec::kBf16}, {0}}, BlockCutter({}), {kSlab - 1, true});
  ASSERT_FALSE(cache.ok());
  EXPECT_EQ(cache.status().code(), StatusCode::kInvalidArgument);
}

TEST(KvCache, AKnownEndTakesItsSizeClassAtOnce) {
  Store store;
  const SequenceId id = store.Create(kA);
  ASSERT_TRUE(store.Append(id, Line(1, 10) + Line(2, 5)));
  const auto blocks = store->blocks(id);
  ASSERT_EQ(blocks.size(), 2u);
  EXPECT_EQ(blocks[0].cap, 10);
  EXPECT_EQ(blocks[1].cap, 6);
  EXPECT_EQ(blocks[1].start, 10);
  EXPECT_TRUE(blocks[0].complete && !blocks[0].sealed);
  EXPECT_EQ(store->stats().used_bytes, 4 * BytesOf(10 + 6));
  store.Finish(id);
  EXPECT_TRUE(store->blocks(id)[0].sealed && store->blocks(id)[1].sealed);
}

// `length` tokens of which none ends a block.
Tokens OpenTokens(Store& store, int length) {
  Tokens tokens = {1};
  while (static_cast<int>(tokens.size()) < length) {
    TokenId next = 1;
    while (store->cutter().EndsAfter(static_cast<int>(tokens.size()) + 1, tokens.back(), next)) ++next;
    tokens.push_back(next);
  }
  return tokens;
}

TEST(KvCache, AnOpenBlockDoublesAndMovesToItsClassWhenSealed) {
  Store store;
  const SequenceId id = store.Create(kA);
  const Tokens line = Line(1, 11);
  for (size_t i = 0; i < line.size(); ++i) {
    ASSERT_TRUE(store.Append(id, {line[i]}));
    EXPECT_EQ(store->blocks(id)[0].cap, i < 8 ? 8 : 16);
    EXPECT_EQ(store->blocks(id)[0].complete, i + 1 == line.size());
    store.Finish(id);
  }
  EXPECT_EQ(store->blocks(id)[0].cap, 12);
  EXPECT_TRUE(store->blocks(id)[0].sealed);
  EXPECT_EQ(store->stats().used_bytes, 4 * BytesOf(12));
}

TEST(KvCache, TablesGrowPastTheirReservation) {
  Store store;
  const SequenceId id = store.Create(kA, 1);
  Tokens tokens;
  for (int i = 0; i < 40; ++i) tokens = tokens + Line(i, 6);
  ASSERT_TRUE(store.Step(id, tokens));
  EXPECT_EQ(store->blocks(id).size(), 40u);
}

TEST(KvCache, AppendOfNothingChangesNothing) {
  Store store;
  const SequenceId id = store.Create(kA);
  EXPECT_TRUE(store.Append(id, {}));
  EXPECT_EQ(store->length(id), 0);
  store.Commit(id);
}

TEST(KvCache, APrefixIsSharedNotCopied) {
  Store store;
  const Tokens prompt = Line(1, 10) + Line(2, 8) + Tokens{5, 6};
  const SequenceId first = store.Run(kA, prompt, 0);
  const size_t before = store->stats().used_bytes;
  const SequenceId second = store.Create(kA);
  EXPECT_EQ(store.Adopt(second, prompt), 18);
  EXPECT_EQ(store->stats().used_bytes, before);
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(store.Block(first, 1, i), store.Block(second, 1, i));
    EXPECT_EQ(store->sharers(store.Block(first, 1, i)), 3);  // two tables and the index
  }
  EXPECT_EQ(store->stats().prefix_hit_tokens, 18);
  EXPECT_EQ(store->stats().prefix_query_tokens, 40);
}

TEST(KvCache, APartlyKnownPromptSharesItsKnownBlocks) {
  Store store;
  store.Run(kA, Line(1, 10) + Line(2, 8) + Line(3, 8), 0);
  store.Run(kA, Line(1, 10) + Line(4, 8) + Line(3, 8), 10);  // the third block follows another chain
  store.Run(kA, Line(4, 10) + Line(2, 8), 0);
}

TEST(KvCache, TheLastTokenIsNeverAdopted) {
  Store store;
  const Tokens prompt = Line(1, 10) + Line(2, 8);
  store.Run(kA, prompt, 0);
  store.Run(kA, prompt, 10);
  store.Run(kA, Line(1, 10), 0);
  const SequenceId empty = store.Create(kA);
  EXPECT_EQ(store.Adopt(empty, {}), 0);
}

TEST(KvCache, OpenBlocksAreNotAdopted) {
  Store store;
  store.Run(kA, Line(1, 10) + Tokens{1, 2, 3, 4, 5}, 0);
  store.Run(kA, Line(1, 10) + Tokens{1, 2, 3, 4, 5, 6}, 10);
}

TEST(KvCache, DomainsNeverShare) {
  Store store;
  const Tokens prompt = Line(1, 10) + Line(2, 8) + Tokens{5};
  const SequenceId a = store.Run(kA, prompt, 0);
  const SequenceId b = store.Run(kB, prompt, 0);
  for (int i = 0; i < 2; ++i) EXPECT_NE(store.Block(a, 0, i), store.Block(b, 0, i));
  store.Free(a);
  store.Run(kB, prompt, 18);
  store.Run(kA, prompt, 18);
}

TEST(KvCache, EqualBlocksComputedTwiceAreKeptOnce) {
  Store store;
  const SequenceId first = store.Create(kA);
  const SequenceId second = store.Create(kA);
  const Tokens prompt = Line(1, 10) + Line(2, 8);
  ASSERT_TRUE(store.Append(first, prompt));
  ASSERT_TRUE(store.Append(second, prompt));
  const size_t both = store->stats().used_bytes;
  store.Finish(first);
  store.Finish(second);
  EXPECT_EQ(store->stats().used_bytes, both / 2);
  EXPECT_EQ(store.Block(first, 0, 1), store.Block(second, 0, 1));
}

TEST(KvCache, WithoutPrefixCacheNothingOutlivesItsSequence) {
  Store store({0, 0}, 16, false);
  const Tokens prompt = Line(1, 10) + Line(2, 8);
  const SequenceId first = store.Run(kA, prompt, 0);
  const SequenceId second = store.Run(kA, prompt, 0);
  EXPECT_EQ(store->sharers(store.Block(first, 0, 0)), 1);
  store.Free(first);
  store.Free(second);
  EXPECT_EQ(store->stats().used_bytes, 0u);
}

TEST(KvCache, AForkSharesAllAndCopiesItsOpenBlockOnWrite) {
  Store store;
  const SequenceId parent = store.Run(kA, Line(1, 10) + Tokens{1, 2, 3}, 0);
  const size_t before = store->stats().used_bytes;
  const SequenceId child = store.Fork(parent);
  EXPECT_EQ(store->stats().used_bytes, before);
  EXPECT_EQ(store->length(child), 13);
  EXPECT_EQ(store->sharers(store.Block(parent, 0, 1)), 2);
  EXPECT_EQ(store->stats().copies_on_write, 0);

  ASSERT_TRUE(store.Step(child, {7}));
  EXPECT_EQ(store->stats().copies_on_write, 1);
  EXPECT_EQ(store.Block(parent, 0, 0), store.Block(child, 0, 0));
  EXPECT_NE(store.Block(parent, 0, 1), store.Block(child, 0, 1));
  store.Check(parent);

  ASSERT_TRUE(store.Step(parent, {8}));  // alone again: no copy
  EXPECT_EQ(store->stats().copies_on_write, 1);
  store.Check(child);
}

TEST(KvCache, AForkOutlivesItsParent) {
  Store store;
  const SequenceId parent = store.Run(kA, Line(1, 10) + Tokens{1, 2, 3}, 0);
  const SequenceId child = store.Fork(parent);
  store.Free(parent);
  store.Check(child);
  ASSERT_TRUE(store.Step(child, {4}));
  EXPECT_EQ(store->stats().copies_on_write, 0);
}

TEST(KvCache, ForksThatSayTheSameShareAgainOnceSealed) {
  Store store;
  const SequenceId parent = store.Run(kA, Tokens{1, 2, 3}, 0);
  const SequenceId child = store.Fork(parent);
  ASSERT_TRUE(store.Step(parent, {4, kLineEnd}));
  ASSERT_TRUE(store.Step(child, {4}));
  EXPECT_NE(store.Block(parent, 0, 0), store.Block(child, 0, 0));
  ASSERT_TRUE(store.Step(child, {kLineEnd}));
  EXPECT_EQ(store.Block(parent, 0, 0), store.Block(child, 0, 0));
}

TEST(KvCache, CancelBetweenAppendAndCommitPublishesNothing) {
  Store store;
  const SequenceId id = store.Create(kA);
  ASSERT_TRUE(store.Append(id, Line(1, 10) + Line(2, 8)));
  store.Free(id);
  EXPECT_EQ(store->stats().used_bytes, 0u);
  store.Run(kA, Line(1, 10) + Tokens{5}, 0);
}

TEST(KvCache, SlidingWindowsGiveBackWhatNoQueryCanSee) {
  Store store({0, 12}, 16, false);
  const SequenceId id = store.Run(kA, Line(1, 10), 0);
  EXPECT_TRUE(store.Block(id, 1, 0).valid());
  ASSERT_TRUE(store.Step(id, Line(2, 10)));  // next query at 20 sees 9..19: the first block's last token
  EXPECT_TRUE(store.Block(id, 1, 0).valid());
  ASSERT_TRUE(store.Step(id, {1}));  // at 21: 10..20
  EXPECT_FALSE(store.Block(id, 1, 0).valid());
  EXPECT_TRUE(store.Block(id, 0, 0).valid());
  EXPECT_EQ(store->stats().used_bytes, 2 * BytesOf(10 + 10 + 8) + 2 * BytesOf(10 + 8));
}

// 5 x 8 tokens; a window of 12 at position 40 looks back to 29: blocks 0..2 leave the second layer.
Tokens FiveLines() { return Line(1, 8) + Line(2, 8) + Line(3, 8) + Line(4, 8) + Line(5, 8); }

TEST(KvCache, AWindowModelAdoptsOnlyWhatItsWindowsNeed) {
  Store store({0, 12});
  store.Free(store.Run(kA, FiveLines(), 0));
  const SequenceId id = store.Run(kA, FiveLines() + Tokens{1}, 40);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(store.Block(id, 1, i).valid(), i >= 3) << i;
  store.Run(kA, Line(1, 8) + Line(2, 8) + Tokens{1}, 16);  // nothing was stripped: any depth can be adopted
}

TEST(KvCache, StrippedEntriesServeOnlyDepthsThatStillHaveTheirWindow) {
  Store store({0, 12});
  const SequenceId id = store.Run(kA, FiveLines(), 0);
  const size_t before = store->stats().used_bytes;
  store->DropPrefixCache();  // the running sequence has moved past blocks 0..2 in the second layer
  store->CheckIntegrity();
  EXPECT_EQ(store->stats().used_bytes, before - 3 * 2 * BytesOf(8));
  EXPECT_EQ(store->stats().used_bytes, store->stats().running_bytes);
  store.Check(id);
  const SequenceId deep = store.Run(kA, FiveLines() + Tokens{1}, 40);
  EXPECT_EQ(store.Block(deep, 0, 0), store.Block(id, 0, 0));
  // At 32 the window reaches back to 21, into a stripped block; no shallower depth is whole either.
  const SequenceId shallow = store.Create(kA);
  EXPECT_EQ(store.Adopt(shallow, Line(1, 8) + Line(2, 8) + Line(3, 8) + Line(4, 8) + Tokens{1}), 0);
}

TEST(KvCache, AStrippedEntryBecomesWholeAgain) {
  Store store({0, 12});
  const SequenceId id = store.Run(kA, FiveLines(), 0);
  store->DropPrefixCache();
  const SequenceId again = store.Create(kA);
  ASSERT_TRUE(store.Step(again, Line(1, 8)));
  EXPECT_EQ(store.Block(again, 0, 0), store.Block(id, 0, 0));  // full layers share what the index still has
  EXPECT_FALSE(store.Block(id, 1, 0).valid());
  EXPECT_TRUE(store.Block(again, 1, 0).valid());
  store.Run(kA, Line(1, 8) + Tokens{1}, 8);
}

// Whoever leaves last, blocks that nobody refers to can be reclaimed while their entry is in use.
TEST(KvCache, WindowBlocksOfUsedEntriesAreAlwaysReclaimable) {
  Store store({0, 12});
  const SequenceId far = store.Run(kA, FiveLines(), 0);
  const SequenceId near = store.Run(kA, Line(1, 8) + Tokens{1}, 8);  // still sees block 0
  store->DropPrefixCache();
  EXPECT_TRUE(store.Block(near, 1, 0).valid());
  store.Free(near);
  store->DropPrefixCache();
  EXPECT_EQ(store->stats().used_bytes, store->stats().running_bytes);
  store.Free(far);

  store->DropPrefixCache();
  store.Free(store.Run(kA, FiveLines(), 0));
  store.Run(kA, FiveLines() + Tokens{1}, 40);  // adopts entries whose first blocks it cannot see
  store->DropPrefixCache();
  EXPECT_EQ(store->stats().used_bytes, store->stats().running_bytes);
}

// Strips take from entries in use; what nobody uses stays whole until its turn to be evicted.
TEST(KvCache, StripsLeaveUnusedEntriesWhole) {
  Store store({0, 12}, 1);
  store.Free(store.Run(kA, FiveLines(), 0));
  const SequenceId filler = store.Create(kA);
  for (int i = 0; i < 11; ++i) ASSERT_TRUE(store.Step(filler, Line(10 + i, 8)));  // 60 blocks of 8 tokens fit
  EXPECT_EQ(store->stats().evicted_blocks, 0);
  const SequenceId shallow = store.Create(kA);
  EXPECT_EQ(store.Adopt(shallow, Line(1, 8) + Line(2, 8) + Tokens{1}), 16);
  const SequenceId stripped = store.Create(kA);
  EXPECT_EQ(store.Adopt(stripped, Line(10, 8) + Tokens{1}), 0);
}

TEST(KvCache, EvictsTheLeastRecentlyUsedLeafFirst) {
  Store store({0, 0}, 1);
  const Tokens old_chain = Line(1, 8) + Line(2, 8);
  const Tokens new_chain = Line(3, 8) + Line(4, 8);
  store.Free(store.Run(kA, old_chain, 0));
  store.Free(store.Run(kA, new_chain, 0));
  // 60 blocks of 8 tokens fit, 15 logical ones; 4 are there: the 12th new one evicts one.
  const SequenceId filler = store.Create(kA);
  for (int i = 0; i < 12; ++i) ASSERT_TRUE(store.Step(filler, Line(10 + i, 8)));
  EXPECT_EQ(store->stats().evicted_blocks, 1);
  const SequenceId probe = store.Create(kA);
  EXPECT_EQ(store.Adopt(probe, old_chain + Tokens{1}), 8);  // its leaf went, its root is known; now the newest
  store.Free(probe);
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(store.Step(filler, Line(30 + i, 8)));
  EXPECT_EQ(store->stats().evicted_blocks, 3);
  EXPECT_EQ(store.Adopt(store.Create(kA), new_chain + Tokens{1}), 0);
  EXPECT_EQ(store.Adopt(store.Create(kA), old_chain + Tokens{1}), 8);
}

TEST(KvCache, EntriesInUseAreNotEvicted) {
  Store store({0, 0}, 1);
  const Tokens prompt = Line(1, 8) + Line(2, 8);
  const SequenceId user = store.Run(kA, prompt, 0);
  const SequenceId other = store.Create(kA);
  int steps = 0;
  while (store.Step(other, Line(10 + steps, 8))) ++steps;
  EXPECT_GT(steps, 5);
  store.Check(user);
  EXPECT_EQ(store->stats().evicted_blocks, 0);
}

TEST(KvCache, AFailedAppendChangesNothing) {
  Store store({0, 0}, 1);
  const SequenceId id = store.Create(kA);
  for (int i = 0; i < 7; ++i) ASSERT_TRUE(store.Step(id, Line(i, 8)));
  store.Free(store.Run(kA, Line(50, 8), 0));
  const KvStats before = store->stats();
  Tokens much;
  for (int i = 0; i < 9; ++i) much = much + Line(20 + i, 8);
  EXPECT_FALSE(store.Append(id, much));
  const KvStats after = store->stats();
  EXPECT_EQ(after.used_bytes, before.used_bytes);
  EXPECT_EQ(after.running_bytes, before.running_bytes);
  EXPECT_EQ(after.logical_bytes, before.logical_bytes);
  EXPECT_EQ(after.evicted_blocks, 0);  // what runs leaves too little, so no eviction could have helped
  EXPECT_EQ(store->length(id), 56);
  EXPECT_EQ(store->blocks(id).size(), 7u);
  store.Check(id);
  much.resize(8 * 8);
  EXPECT_TRUE(store.Step(id, much));
  EXPECT_EQ(store->stats().evicted_blocks, 1);
}

TEST(KvCache, AFailedCopyOnWriteLeavesTheForkShared) {
  Store store({0, 0}, 1);
  const Tokens tokens = OpenTokens(store, 20);
  const SequenceId parent = store.Run(kA, tokens, 0);  // 4 blocks of the largest class: 15 fit
  std::vector<SequenceId> children;
  for (int i = 0; i < 3; ++i) children.push_back(store.Fork(parent));
  ASSERT_TRUE(store.Step(children[0], {4}));
  ASSERT_TRUE(store.Step(children[1], {5}));
  EXPECT_FALSE(store.Append(children[2], {6}));
  EXPECT_EQ(store.Block(children[2], 0, 0), store.Block(parent, 0, 0));
  EXPECT_EQ(store->length(children[2]), 20);
  store.Check(parent);
  store.Free(children[0]);
  EXPECT_TRUE(store.Step(children[2], {6}));
  store.Check(parent);
}

// A block that cannot move to its class for want of a slab stays where it is, and works all the same.
TEST(KvCache, ASealedBlockWithoutASlabForItsClassKeepsItsOwn) {
  Store store({0, 0}, 1);
  const Tokens nine = OpenTokens(store, 9);
  const SequenceId id = store.Run(kA, nine, 0);
  ASSERT_TRUE(store.Step(id, {kLineEnd}));
  EXPECT_TRUE(store->blocks(id)[0].sealed);
  EXPECT_EQ(store->blocks(id)[0].cap, 16);
  const SequenceId sharer = store.Run(kA, nine + Tokens{kLineEnd} + nine, 10);
  EXPECT_EQ(store.Block(sharer, 0, 0), store.Block(id, 0, 0));
}

// A chain whose stripped entry has another size class can be neither shared nor mended: the sequence stays private.
TEST(KvCache, AStrippedEntryOfAnotherClassIsLeftAlone) {
  Store store({0, 12}, 2);
  const SequenceId far = store.Create(kA);
  const Tokens eleven = OpenTokens(store, 11);
  const SequenceId blocker = store.Run(kB, eleven, 0);
  ASSERT_TRUE(store.Step(far, eleven));
  std::vector<SequenceId> extra;  // fill both slabs with the class of 16
  while (store->stats().held_bytes < 2 * kSlab) {
    extra.push_back(store.Create(kB));
    ASSERT_TRUE(store.Step(extra.back(), eleven));
  }
  ASSERT_TRUE(store.Step(far, {kLineEnd}));
  ASSERT_EQ(store->blocks(far)[0].cap, 16);
  for (const SequenceId id : extra) store.Free(id);
  store.Free(blocker);
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(store.Step(far, Line(20 + i, 12)));
  store->DropPrefixCache();
  EXPECT_FALSE(store.Block(far, 1, 0).valid());

  const SequenceId near = store.Create(kA);
  ASSERT_TRUE(store.Step(near, eleven + Tokens{kLineEnd}));
  EXPECT_EQ(store->blocks(near)[0].cap, 12);
  EXPECT_EQ(store->sharers(store.Block(near, 0, 0)), 1);
  store.Free(far);
  store->DropPrefixCache();
  EXPECT_EQ(store->stats().used_bytes, store->stats().running_bytes);
  store.Check(near);
}

TEST(KvCache, DropPrefixCacheKeepsWhatRuns) {
  Store store;
  const SequenceId id = store.Run(kA, Line(1, 10), 0);
  store.Free(store.Run(kA, Line(1, 10) + Line(2, 8), 10));
  store->DropPrefixCache();
  EXPECT_EQ(store->stats().evicted_blocks, 1);
  EXPECT_EQ(store->stats().used_bytes, store->stats().running_bytes);
  store.Check(id);
  store.Run(kA, Line(1, 10) + Line(2, 8) + Tokens{1}, 10);
}

TEST(KvCache, StatsAddUpAndReturnToZero) {
  Store store;
  EXPECT_EQ(store->stats().capacity_bytes, 16 * kSlab);
  const SequenceId first = store.Run(kA, Line(1, 10), 0);
  const SequenceId second = store.Run(kA, Line(1, 10) + Tokens{1}, 10);
  KvStats stats = store->stats();
  EXPECT_EQ(stats.logical_bytes, 21 * store->shape().logical_token_bytes());
  EXPECT_EQ(store->shape().logical_token_bytes(), 4u * 4 * 2);
  EXPECT_EQ(stats.used_bytes, 4 * BytesOf(10 + 8));
  EXPECT_EQ(stats.running_bytes, stats.used_bytes);
  EXPECT_EQ(stats.held_bytes, kSlab);  // a quarter for each class
  EXPECT_GT(stats.metadata_bytes, 0u);
  store.Free(first);
  store.Free(second);
  stats = store->stats();
  EXPECT_EQ(stats.running_bytes, 0u);
  EXPECT_EQ(stats.logical_bytes, 0u);
  EXPECT_EQ(stats.used_bytes, 4 * BytesOf(10));
  store->DropPrefixCache();
  stats = store->stats();
  EXPECT_EQ(stats.used_bytes, 0u);
  EXPECT_EQ(stats.held_bytes, 0u);
}

TEST(KvCache, MinimumBytesAreEncodedOnesAndWrittenBytesAreNot) {
  std::vector<uint8_t> ends(1, 1);
  const std::vector<codec::Codec> sealed = {codec::Codec::kQ8, codec::Codec::kBf16};  // keys, values
  auto cache = KvCache::Create({{1, 64, codec::Codec::kBf16}, {0}, sealed}, BlockCutter(std::move(ends)),
                               {64 << 20, true, false, false});
  ASSERT_TRUE(cache.ok()) << cache.status().ToString();
  const codec::BlockLayout bf16{1, 64, codec::Codec::kBf16};
  const codec::BlockLayout q8{1, 64, codec::Codec::kQ8};
  const int block = codec::kBlockTokensMax;
  EXPECT_EQ((*cache)->WrittenBytes(3 * block), 6 * bf16.block_bytes(block));
  EXPECT_EQ((*cache)->MinimumBytes(3 * block), 3 * (bf16.block_bytes(block) + q8.block_bytes(block)));
}

TEST(KvCache, RoomForANewSequenceCountsWhatRunsNotWhatIsCached) {
  Store store({0, 12}, 1);
  EXPECT_EQ(store->MinimumBytes(0), 0u);
  EXPECT_EQ(store->MinimumBytes(9), 4 * BytesOf(10));
  EXPECT_EQ(store->MinimumBytes(100), 2 * BytesOf(100) + 2 * BytesOf(12));
  EXPECT_EQ(store->WrittenBytes(100), store->MinimumBytes(100));  // nothing is encoded
  store.Free(store.Run(kA, Line(1, 8) + Line(2, 8), 0));
  EXPECT_TRUE(store->HasRoomFor(200, 0));  // 2 * 200 + 2 * 12 of 480 tokens
  EXPECT_FALSE(store->HasRoomFor(200, BytesOf(60)));
  EXPECT_FALSE(store->HasRoomFor(300, 0));
  store.Run(kA, Line(3, 8) + Line(4, 8), 0);
  EXPECT_FALSE(store->HasRoomFor(200, 0));
}

// What is said beforehand is what one sequence alone then holds.
TEST(KvCache, LeastBytesAreWhatASequenceHolds) {
  std::mt19937 random(5);
  for (int i = 0; i < 50; ++i) {
    Store store({0, 0}, 32, false);
    Tokens tokens(1 + random() % 500);
    for (TokenId& token : tokens) token = static_cast<TokenId>(random() % (i % 2 == 0 ? 1000 : 20));
    const size_t least = store->LeastBytes(tokens, 0);
    EXPECT_GE(least, store->MinimumBytes(static_cast<int>(tokens.size())));
    EXPECT_GE(store->LeastBytes(tokens, 40), least);
    const SequenceId id = store.Create(kA, 600);
    ASSERT_TRUE(store.Append(id, tokens));
    EXPECT_EQ(least, store->stats().held_bytes) << tokens.size();
  }
  Store windows({0, 12});
  EXPECT_EQ(windows->LeastBytes(Line(1, 9), 20), windows->MinimumBytes(29));
}

TEST(KvCache, LossyAndExactSequencesShareNoPrefix) {
  Store store;
  const Tokens prompt = Line(1, 10) + Line(2, 8) + Tokens{5};
  const SequenceId exact = store.Run(kA, prompt, 0);
  const SequenceId lossy = store.Run(kA, prompt, 0, Sharing::kLossy);
  EXPECT_FALSE(store->lossy(exact));
  EXPECT_TRUE(store->lossy(lossy));
  for (int i = 0; i < 2; ++i) EXPECT_NE(store.Block(exact, 0, i), store.Block(lossy, 0, i));
  const SequenceId exact_too = store.Run(kA, prompt, 18);
  const SequenceId lossy_too = store.Run(kA, prompt, 18, Sharing::kLossy);
  EXPECT_EQ(store.Block(exact_too, 0, 1), store.Block(exact, 0, 1));
  EXPECT_EQ(store.Block(lossy_too, 0, 1), store.Block(lossy, 0, 1));
  EXPECT_TRUE(store->lossy(store.Fork(lossy)));
}

TEST(KvCache, ARedirectFreesTheBlockAndMovesItsForksAndItsEntryAlong) {
  Store store;
  const SequenceId a = store.Run(kA, Line(1, 10), 0, Sharing::kLossy);
  const SequenceId b = store.Run(kA, Line(2, 10) + Tokens{1}, 0, Sharing::kLossy);
  const SequenceId fork = store.Fork(b);
  const BlockId target = store.Block(a, 0, 0);
  const KvStats before = store->stats();
  store->Redirect(b, 0, 0, target);
  store->CheckIntegrity();
  EXPECT_EQ(store.Block(b, 0, 0), target);
  EXPECT_EQ(store.Block(fork, 0, 0), target);
  EXPECT_EQ(store->sharers(target), 5);  // three slots, two entries
  EXPECT_EQ(store->stats().used_bytes, before.used_bytes - BytesOf(10));
  EXPECT_EQ(store->stats().running_bytes, before.running_bytes - BytesOf(10));
  EXPECT_NE(store->table(b, 0, Kind::kV)[0], store->table(a, 0, Kind::kV)[0]);  // each table for itself
  // Whoever adopts the chain finds it there.
  const SequenceId c = store->Create(kA, 64, Sharing::kLossy);
  ASSERT_EQ(store->AdoptPrefix(c, Line(2, 10) + Tokens{1}), 10);
  EXPECT_EQ(store.Block(c, 0, 0), target);
  for (const SequenceId id : {a, b, fork, c}) store.Free(id);
  EXPECT_EQ(store->stats().running_bytes, 0u);
  store->DropPrefixCache();
  store->CheckIntegrity();
  EXPECT_EQ(store->stats().used_bytes, 0u);
}

// The target may be idle, of the index alone: it runs from then on.
TEST(KvCache, ARedirectToAnIdleBlockMakesItRun) {
  Store store;
  const SequenceId a = store.Run(kA, Line(1, 10), 0, Sharing::kLossy);
  const BlockId target = store.Block(a, 1, 0);
  store.Free(a);
  const SequenceId b = store.Run(kA, Line(2, 10), 0, Sharing::kLossy);
  const size_t running = store->stats().running_bytes;
  store->Redirect(b, 2, 0, target);
  store->CheckIntegrity();
  EXPECT_EQ(store->stats().running_bytes, running);
  store->DropPrefixCache();
  store->CheckIntegrity();
  EXPECT_EQ(store.Block(b, 1, 0), target);
}

TEST(KvCache, OnlyOwnSealedBlocksOfLossySequencesAreRedirectable) {
  Store store({0, 12});
  const SequenceId exact = store.Run(kA, Line(1, 10), 0);
  EXPECT_FALSE(store->Redirectable(exact, 0, 0));

  const SequenceId lossy = store.Run(kA, Line(1, 10) + Tokens{1, 2}, 0, Sharing::kLossy);
  EXPECT_TRUE(store->Redirectable(lossy, 0, 0));
  EXPECT_FALSE(store->Redirectable(lossy, 0, 1));  // open
  const SequenceId fork = store.Fork(lossy);
  EXPECT_TRUE(store->Redirectable(lossy, 0, 0));  // forks count as one with it
  EXPECT_TRUE(store->Redirectable(fork, 0, 0));

  const SequenceId other = store.Run(kA, Line(2, 10), 0, Sharing::kLossy);
  store->Redirect(other, 0, 0, store.Block(lossy, 0, 0));
  EXPECT_FALSE(store->Redirectable(other, 0, 0));  // another's block
  EXPECT_FALSE(store->Redirectable(lossy, 0, 0));  // it has become one for others
  EXPECT_TRUE(store->Redirectable(other, 1, 0));

  ASSERT_TRUE(store->Append(other, Line(3, 14)));
  store->Commit(other);
  EXPECT_FALSE(store.Block(other, 1, 0).valid());  // left the window
  EXPECT_FALSE(store->Redirectable(other, 2, 0));
}

// An entry in use whose window block is idle for it, but runs as another's representative, waits for its turn.
TEST(KvCache, AStripWaitsForARepresentativesLastReader) {
  Store store({0, 12});
  const SequenceId far = store.Run(kA, FiveLines(), 0, Sharing::kLossy);
  const SequenceId near = store.Run(kA, Line(8, 8) + Tokens{1}, 0, Sharing::kLossy);
  // `far` looked past its first lines; its entries still name them. One serves `near`.
  const SequenceId shallow = store.Run(kA, Line(1, 8) + Tokens{1}, 8, Sharing::kLossy);
  const BlockId representative = store.Block(shallow, 1, 0);
  store->Redirect(near, 2, 0, representative);
  store.Free(shallow);
  store->DropPrefixCache();
  store->CheckIntegrity();
  EXPECT_EQ(store.Block(near, 1, 0), representative);
  EXPECT_EQ(store->stats().used_bytes, store->stats().running_bytes);
  store.Free(near);
  EXPECT_GT(store->stats().used_bytes, store->stats().running_bytes);
  store->DropPrefixCache();
  store->CheckIntegrity();
  EXPECT_EQ(store->stats().used_bytes, store->stats().running_bytes);
  EXPECT_FALSE(store.Block(far, 1, 0).valid());
}

TEST(KvCache, RedirectAllTakesEverySlotAndEntryAlong) {
  Store store({0, 0}, 16, true, false, true);
  const SequenceId a = store.Run(kA, Line(1, 10), 0, Sharing::kLossy);
  const SequenceId b = store.Run(kA, Line(2, 10) + Line(3, 10), 0, Sharing::kLossy);
  const SequenceId c = store.Run(kA, Line(4, 10) + Tokens{1}, 0, Sharing::kLossy);
  const BlockId from = store.Block(a, 0, 0);
  const BlockId target = store.Block(c, 0, 0);
  store->Redirect(b, 0, 1, from, 0.5F);  // at another index
  const SequenceId fork = store->Fork(b, 64);
  const size_t used = store->stats().used_bytes;
  ASSERT_TRUE(store->RedirectAll(0, from, target, 4));
  store->CheckIntegrity();
  EXPECT_EQ(store.Block(a, 0, 0), target);
  EXPECT_EQ(store.Block(b, 0, 1), target);
  EXPECT_EQ(store.Block(fork, 0, 1), target);
  EXPECT_EQ(store->stats().used_bytes, used - BytesOf(10));
  EXPECT_EQ(store->scales(a, 0, Kind::kK)[0], 4);
  EXPECT_EQ(store->scales(fork, 0, Kind::kK)[1], 2);
  EXPECT_EQ(store->scales(c, 0, Kind::kK)[0], 1);
  const SequenceId adopted = store->Create(kA, 64, Sharing::kLossy);
  ASSERT_EQ(store->AdoptPrefix(adopted, Line(2, 10) + Line(3, 10) + Tokens{1}), 20);
  EXPECT_EQ(store.Block(adopted, 0, 1), target);
  EXPECT_EQ(store->scales(adopted, 0, Kind::kK)[1], 2);
  // An entry that nobody uses cannot be found from the tables.
  store.Free(a);
  const SequenceId d = store.Run(kA, Line(5, 10), 0, Sharing::kLossy);
  EXPECT_FALSE(store->RedirectAll(0, target, store.Block(d, 0, 0), 1));
  store->CheckIntegrity();
  EXPECT_EQ(store.Block(c, 0, 0), target);
}

TEST(KvCache, MoveDownFillsTheLowestGap) {
  Store store({0}, 16, false);
  std::vector<SequenceId> fillers;
  for (int i = 0; i < 30; ++i) fillers.push_back(store.Run(kA, Line(i, 10), 0));  // 40 blocks to a slab
  const SequenceId id = store.Run(kA, Line(50, 10) + Tokens{1}, 0, Sharing::kLossy);
  const SequenceId fork = store.Fork(id);
  const BlockId high = store.Block(id, 0, 0);
  EXPECT_EQ(store->MoveDown(id, 0, 0), high);  // nothing is free below
  const BlockId gap = store.Block(fillers[3], 0, 0);
  store.Free(fillers[3]);
  const size_t used = store->stats().used_bytes;
  EXPECT_EQ(store->MoveDown(id, 0, 0), gap);
  EXPECT_EQ(store.Block(id, 0, 0), gap);
  EXPECT_EQ(store.Block(fork, 0, 0), gap);
  EXPECT_EQ(store->stats().used_bytes, used);
  store.Check(id);
  store.Check(fork);
}

TEST(KvCache, AWatchedBlocksEndIsToldOnce) {
  Store store;
  std::vector<BlockId> released = {BlockId(7)};
  const SequenceId a = store.Run(kA, Line(1, 10), 0, Sharing::kLossy);
  const SequenceId b = store.Run(kA, Line(2, 10), 0, Sharing::kLossy);
  const BlockId watched = store.Block(a, 0, 0);
  store->Watch(watched);
  EXPECT_TRUE(store->watched(watched));
  store->Redirect(b, 0, 0, watched);
  store.Free(a);
  store.Free(b);
  store->TakeReleased(released);
  EXPECT_TRUE(released.empty()) << "the index still has it";
  store->DropPrefixCache();
  const SequenceId next = store.Run(kA, Line(3, 10), 0, Sharing::kLossy);
  EXPECT_EQ(store.Block(next, 0, 0), watched) << "in use again";
  EXPECT_FALSE(store->watched(watched));
  store->TakeReleased(released);
  EXPECT_EQ(released, std::vector<BlockId>{watched});
  store->TakeReleased(released);
  EXPECT_TRUE(released.empty());
}

TEST(KvCache, SlotsSayHowTheyShare) {
  Store store({0, 0}, 32);
  const SequenceId a = store.Run(kA, Line(1, 10) + Line(2, 8) + Tokens{1}, 0, Sharing::kLossy);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(store->state(a, 0, i), SlotState::kPrivate);
  const SequenceId b = store.Run(kA, Line(1, 10) + Line(3, 8) + Tokens{1}, 10, Sharing::kLossy);
  EXPECT_EQ(store->state(a, 0, 0), SlotState::kPrefix);
  EXPECT_EQ(store->state(b, 0, 0), SlotState::kPrefix);
  EXPECT_EQ(store->state(b, 0, 1), SlotState::kPrivate);
  store->Redirect(b, 0, 1, store.Block(a, 0, 1));
  EXPECT_EQ(store->state(a, 0, 1), SlotState::kFused);
  EXPECT_EQ(store->state(b, 0, 1), SlotState::kFused);
  EXPECT_EQ(store->state(b, 1, 1), SlotState::kPrivate);  // V has been left alone
  EXPECT_EQ(store->readers(store.Block(a, 0, 1)), 2);

  SharingStats stats = store->sharing_stats(1000);
  EXPECT_EQ(stats.prefix_slots, 2 * 4);
  EXPECT_EQ(stats.fused_slots, 2);
  EXPECT_EQ(stats.private_slots, 2 * 3 * 4 - 2 * 4 - 2);
  EXPECT_EQ(stats.blocks[0], stats.private_slots);
  EXPECT_EQ(stats.blocks[1], 4 + 1);
  EXPECT_EQ(stats.domain_bytes[kA], store->running_bytes());
  EXPECT_EQ(stats.unfused_bytes, store->running_bytes() + BytesOf(8));

  store.Free(a);
  EXPECT_EQ(store->state(b, 0, 0), SlotState::kPrefix);  // adopted, though nobody else runs on it now
  EXPECT_EQ(store->state(b, 0, 1), SlotState::kFused);
  store.Free(b);
  store->DropPrefixCache();
  const SequenceId c = store.Run(kA, Line(1, 10) + Line(2, 8) + Tokens{1}, 0, Sharing::kLossy);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(store->state(c, 0, i), SlotState::kPrivate);
}

TEST(KvCache, WhatIsSharedIsCountedOncePerDomain) {
  Store store({0, 12}, 32);
  store.Free(store.Run(kA, FiveLines(), 0));
  store.Run(kA, FiveLines() + Tokens{1}, 40);
  store.Run(kA, FiveLines() + Tokens{2}, 40);
  store.Fork(store.Run(kB, FiveLines() + Tokens{3}, 0));
  SharingStats stats = store->sharing_stats(1000);
  EXPECT_DOUBLE_EQ(stats.domain_bytes[kA] + stats.domain_bytes[kB], static_cast<double>(store->running_bytes()));
  EXPECT_GT(stats.domain_bytes[kA], stats.domain_bytes[kB]);  // two open blocks, not one that forks share
  EXPECT_DOUBLE_EQ(stats.unfused_bytes, static_cast<double>(store->running_bytes()));
  EXPECT_EQ(stats.fused_slots, 0);
  EXPECT_EQ(store->state(SequenceId(0), 2, 0), SlotState::kReleased);

  // With fewer slots than there are, some tables stand for all.
  stats = store->sharing_stats(1);
  EXPECT_GT(stats.domain_bytes[kA], 0);
}

TEST(SharingStats, ReadersFallIntoPowersOfTwo) {
  const std::vector<std::pair<int, int>> expected = {{1, 0},  {2, 1},  {3, 2},  {4, 2},  {5, 3},  {8, 3},   {9, 4},
                                                     {16, 4}, {17, 5}, {33, 6}, {64, 6}, {65, 7}, {5000, 7}};
  for (const auto& [readers, at] : expected) EXPECT_EQ(SharingStats::ReaderClass(readers), at) << readers;
}

TEST(KvCache, KeysCountFromTheirBlockOrFromZero) {
  for (const bool absolute : {false, true}) {
    Store store({0}, 16, true, absolute);
    const SequenceId id = store.Run(kA, Line(1, 10) + Line(2, 8) + Tokens{1}, 0);
    const SequenceId adopted = store.Run(kA, Line(1, 10) + Line(2, 8) + Tokens{2}, 18);
    for (const SequenceId each : {id, adopted, store.Fork(id)}) {
      for (const LogicalBlock& block : store->blocks(each)) EXPECT_EQ(block.base, absolute ? 0 : block.start);
    }
  }
}

TEST(KvCache, FactorsFollowTheirSlots) {
  Store store({0, 0}, 16, true, false, true);
  const SequenceId a = store.Run(kA, Line(1, 10), 0, Sharing::kLossy);
  const SequenceId b = store.Run(kA, Line(2, 10) + Tokens{1}, 0, Sharing::kLossy);
  const auto scale = [&](SequenceId id, int index) { return store->scales(id, 0, Kind::kV)[index]; };
  EXPECT_EQ(scale(b, 0), 1);
  const SequenceId fork = store.Fork(b);
  store->Redirect(b, 1, 0, store->table(a, 0, Kind::kV)[0], 0.5F);
  EXPECT_EQ(scale(a, 0), 1);
  EXPECT_EQ(scale(b, 0), 0.5F);
  EXPECT_EQ(scale(fork, 0), 0.5F);
  EXPECT_EQ(store->scales(b, 0, Kind::kK)[0], 1);
  EXPECT_EQ(scale(store->Fork(fork, 64), 0), 0.5F);
  // By the index, to who adopts and to who computes the same.
  const SequenceId adopted = store->Create(kA, 64, Sharing::kLossy);
  ASSERT_EQ(store->AdoptPrefix(adopted, Line(2, 10) + Tokens{1}), 10);
  EXPECT_EQ(scale(adopted, 0), 0.5F);
  const SequenceId beside = store->Create(kA, 64, Sharing::kLossy);
  ASSERT_TRUE(store->Append(beside, Line(2, 10) + Line(3, 10)));
  store->Commit(beside);
  EXPECT_EQ(scale(beside, 0), 0.5F);
  EXPECT_EQ(scale(beside, 1), 1);
  store->SetScale(beside, 1, 1, 2);
  const SequenceId late = store->Create(kA, 64, Sharing::kLossy);
  ASSERT_EQ(store->AdoptPrefix(late, Line(2, 10) + Line(3, 10) + Tokens{1}), 20);
  EXPECT_EQ(scale(late, 1), 2);
  // Tables that grow take them along.
  for (int i = 0; i < 30; ++i) {
    ASSERT_TRUE(store->Append(late, Line(10 + i, 4)));
    store->Commit(late);
  }
  EXPECT_EQ(scale(late, 0), 0.5F);
  EXPECT_EQ(scale(late, 1), 2);
  EXPECT_EQ(scale(late, 31), 1);
  store->CheckIntegrity();
  Store plain;
  EXPECT_EQ(plain->scales(plain.Run(kA, Line(1, 10), 0), 0, Kind::kK), nullptr);
}

// What a decoding sequence may still take has room in its tables from the start: no allocation, no stale views.
TEST(KvCache, AdoptPrefixReservesTheTables) {
  Store store({0, 0}, 64);
  const Tokens prompt = Line(1, 10) + Line(2, 8);
  store.Run(kA, prompt, 0);
  const SequenceId id = store.Create(kA, 18 + 80);
  ASSERT_EQ(store.Adopt(id, prompt + Tokens{1}), 18);
  const BlockId* table = store->table(id, 1, Kind::kV);
  const LogicalBlock* blocks = store->blocks(id).data();
  ASSERT_TRUE(store.Step(id, {1}));
  for (int i = 1; i < 80; ++i) ASSERT_TRUE(store.Step(id, {i % 4 == 3 ? kLineEnd : 1}));  // blocks as short as can be
  EXPECT_EQ(store->table(id, 1, Kind::kV), table);
  EXPECT_EQ(store->blocks(id).data(), blocks);
}

TEST(KvCacheDeathTest, TheStepProtocolIsChecked) {
  Store store;
  const SequenceId id = store.Create(kA);
  ASSERT_TRUE(store.Append(id, {1, 2, 3}));
  EXPECT_DEATH((void)store->Append(id, Tokens{4}), "committed");
  EXPECT_DEATH(store->Fork(id, 64), "committed");
  EXPECT_DEATH(store->AdoptPrefix(id, Tokens{4}), "empty");
  store->Free(id);
  EXPECT_DEATH(store->Commit(id), "sequences_");
}

TEST(KvCacheDeathTest, RedirectsAreChecked) {
  Store store;
  const SequenceId exact = store.Run(kA, Line(1, 10), 0);
  const SequenceId lossy = store.Run(kA, Line(1, 10), 0, Sharing::kLossy);
  EXPECT_DEATH(store->Redirect(exact, 0, 0, store.Block(lossy, 0, 0)), "Redirectable");
  EXPECT_DEATH(store->Redirect(lossy, 0, 0, store.Block(lossy, 0, 0)), "own != target");
  EXPECT_DEATH(store->MoveDown(exact, 0, 0), "Redirectable");
}

}  // namespace
}  // namespace jointkv::kv
