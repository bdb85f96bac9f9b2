#include "kv/prefix_index.h"

#include <map>
#include <random>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

namespace jointkv::kv {
namespace {

constexpr DomainId kDomain(0);
const std::vector<BlockId> kBlocks = {BlockId(1), BlockId(2)};

using Tokens = std::vector<TokenId>;

TEST(PrefixIndex, FindsByDomainParentAndTokens) {
  PrefixIndex index(1);
  const EntryId root = index.Insert({kDomain}, EntryId(), Tokens{1, 2, 3, 4}, kBlocks, {}, 4);
  const EntryId child = index.Insert({kDomain}, root, Tokens{1, 2, 3, 4}, kBlocks, {}, 4);
  EXPECT_EQ(index.Find({kDomain}, EntryId(), Tokens{1, 2, 3, 4}), root);
  EXPECT_EQ(index.Find({kDomain}, root, Tokens{1, 2, 3, 4}), child);
  EXPECT_FALSE(index.Find({DomainId(1)}, EntryId(), Tokens{1, 2, 3, 4}).valid());
  EXPECT_FALSE(index.Find({kDomain}, child, Tokens{1, 2, 3, 4}).valid());
  EXPECT_FALSE(index.Find({kDomain}, EntryId(), Tokens{1, 2, 3}).valid());
  EXPECT_FALSE(index.Find({kDomain}, EntryId(), Tokens{1, 2, 3, 5}).valid());
  EXPECT_EQ(index.size(), 2u);
  index.CheckIntegrity();
}

TEST(PrefixIndex, MarksEntriesWithMissingBlocksStripped) {
  PrefixIndex index(1);
  EXPECT_FALSE(index[index.Insert({kDomain}, EntryId(), Tokens{1}, kBlocks, {}, 4)].stripped);
  EXPECT_TRUE(index[index.Insert({kDomain}, EntryId(), Tokens{2}, std::vector<BlockId>{BlockId(1), BlockId()}, {}, 4)]
                  .stripped);
}

// A hash of one value for all: only the comparison of tokens, parents and domains keeps entries apart.
TEST(PrefixIndex, CollidingEntriesStayApart) {
  PrefixIndex index(1, 0);
  std::vector<EntryId> entries;
  for (int i = 0; i < 20; ++i)
    entries.push_back(index.Insert({DomainId(i % 3)}, EntryId(), Tokens{i, 5, 6, 7}, kBlocks, {}, 4));
  const EntryId child = index.Insert({DomainId(1)}, entries[1], Tokens{1, 5, 6, 7}, kBlocks, {}, 4);
  EXPECT_FALSE(index.Find({DomainId(0)}, EntryId(), Tokens{1, 5, 6, 7}).valid());
  EXPECT_EQ(index.Find({DomainId(1)}, entries[1], Tokens{1, 5, 6, 7}), child);
  index.DropUser(child);
  std::mt19937 random(1);
  while (!entries.empty()) {
    for (const EntryId id : entries) {
      const PrefixEntry& entry = index[id];
      ASSERT_EQ(index.Find(entry.root, entry.parent, entry.tokens), id);
    }
    const size_t i = random() % entries.size();
    const EntryId id = entries[i];
    if (index[id].children > 0) {
      index.Remove(child);
      continue;
    }
    index.DropUser(id);
    index.Remove(id);
    entries.erase(entries.begin() + static_cast<ptrdiff_t>(i));
    index.CheckIntegrity();
  }
  EXPECT_EQ(index.size(), 0u);
  EXPECT_EQ(index.metadata_bytes(), 0u);
}

TEST(PrefixIndex, UnusedEntriesQueueByLastUseLeavesFirst) {
  PrefixIndex index(1);
  const EntryId a = index.Insert({kDomain}, EntryId(), Tokens{1}, kBlocks, {}, 4);
  const EntryId b = index.Insert({kDomain}, a, Tokens{2}, kBlocks, {}, 4);
  const EntryId c = index.Insert({kDomain}, EntryId(), Tokens{3}, kBlocks, {}, 4);
  EXPECT_FALSE(index.oldest_unused().valid());
  index.DropUser(b);
  EXPECT_EQ(index.oldest_unused(), b);
  index.DropUser(a);
  index.DropUser(c);
  EXPECT_EQ(index.oldest_unused(), b);
  index.AddUser(a);  // another sequence uses the chain anew
  index.AddUser(b);
  index.CheckIntegrity();
  EXPECT_EQ(index.oldest_unused(), c);
  index.DropUser(b);
  index.DropUser(a);
  EXPECT_EQ(index.oldest_unused(), c);
  index.Remove(c);
  EXPECT_EQ(index.oldest_unused(), b);
  index.Remove(b);
  EXPECT_EQ(index.oldest_unused(), a);
  index.Remove(a);
  EXPECT_FALSE(index.oldest_unused().valid());
  index.CheckIntegrity();
}

TEST(PrefixIndex, ReusesIdsOfRemovedEntries) {
  PrefixIndex index(1);
  for (int i = 0; i < 100; ++i) {
    const EntryId id = index.Insert({kDomain}, EntryId(), Tokens{i}, kBlocks, {}, 4);
    index.DropUser(id);
    index.Remove(id);
  }
  EXPECT_EQ(index.capacity(), 1u);
  EXPECT_EQ(index.size(), 0u);
}

TEST(PrefixIndexDeathTest, OnlyUnusedLeavesMayGo) {
  PrefixIndex index(1);
  const EntryId a = index.Insert({kDomain}, EntryId(), Tokens{1}, kBlocks, {}, 4);
  const EntryId b = index.Insert({kDomain}, a, Tokens{2}, kBlocks, {}, 4);
  EXPECT_DEATH(index.Remove(b), "users");
  index.DropUser(b);
  index.DropUser(a);
  EXPECT_DEATH(index.Remove(a), "children");
  EXPECT_DEATH(index.DropUser(a), "users");
}

TEST(PrefixIndex, TheDomainThatFloodsPays) {
  PrefixIndex index(1);
  const EntryId mine = index.Insert({DomainId(1)}, EntryId(), Tokens{1}, kBlocks, {}, 4);
  index.DropUser(mine);
  std::vector<EntryId> flood;
  for (TokenId token = 0; token < 5; ++token) {
    flood.push_back(index.Insert({DomainId(2)}, EntryId(), Tokens{token}, kBlocks, {}, 4));
    index.DropUser(flood.back());
  }
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(index.oldest_unused(), flood[static_cast<size_t>(i)]);
    index.Remove(flood[static_cast<size_t>(i)]);
    index.CheckIntegrity();
  }
  EXPECT_EQ(index.size(), 2U);
}

// A narrow hash, so that buckets hold several entries at all times.
TEST(PrefixIndex, RandomOperationsAgainstAMap) {
  PrefixIndex index(3, 7);
  using Key = std::tuple<int, int, Tokens>;
  std::map<Key, EntryId> model;
  std::mt19937 random(4);
  std::vector<std::vector<EntryId>> chains;
  for (int step = 0; step < 10'000; ++step) {
    if (chains.size() < 10 && random() % 2 == 0) {
      const int domain = static_cast<int>(random() % 2);
      std::vector<EntryId> chain;
      for (int depth = static_cast<int>(random() % 5); depth >= 0; --depth) {
        const EntryId parent = chain.empty() ? EntryId() : chain.back();
        const Tokens tokens(1 + random() % 2, static_cast<TokenId>(random() % 3));
        const auto known = model.find({domain, parent.value, tokens});
        const EntryId found = index.Find({DomainId(domain)}, parent, tokens);
        ASSERT_EQ(found, known == model.end() ? EntryId() : known->second);
        if (found.valid()) {
          index.AddUser(found);
          chain.push_back(found);
        } else {
          chain.push_back(index.Insert({DomainId(domain)}, parent, tokens, kBlocks, {}, 4));
          model[{domain, parent.value, tokens}] = chain.back();
        }
      }
      chains.push_back(chain);
    } else if (!chains.empty() && random() % 2 == 0) {
      std::swap(chains[random() % chains.size()], chains.back());
      for (size_t i = chains.back().size(); i > 0; --i) index.DropUser(chains.back()[i - 1]);
      chains.pop_back();
    } else if (const EntryId oldest = index.oldest_unused(); oldest.valid()) {
      const PrefixEntry& entry = index[oldest];
      model.erase({entry.root.domain.value, entry.parent.value, entry.tokens});
      index.Remove(oldest);
    }
    ASSERT_EQ(index.size(), model.size());
    index.CheckIntegrity();
  }
}

}  // namespace
}  // namespace jointkv::kv
