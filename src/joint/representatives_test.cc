#include "joint/representatives.h"

#include <vector>

#include <gtest/gtest.h>

namespace jointkv::joint {
namespace {

using Tokens = std::vector<TokenId>;

constexpr DomainId kA(0);
constexpr DomainId kB(1);
constexpr int kTables = 4;
const Tokens kText = {5, 6, 7, 8, 9};

Representatives Make() { return {kTables, 100, 1234}; }

Tokens ListOf(const Representatives& r, GroupId group, int table) {
  Tokens list;
  for (BlockId block = r.first(group, table); block.valid(); block = r[block].next) list.push_back(block.value);
  return list;
}

TEST(Representatives, AGroupIsOneContent) {
  Representatives r = Make();
  const GroupId group = r.Find(kA, kText, 8);
  EXPECT_EQ(r.Find(kA, kText, 8), group);
  EXPECT_EQ(r.domain(group), kA);
  EXPECT_EQ(r.cap(group), 8);
  EXPECT_EQ(Tokens(r.tokens(group).begin(), r.tokens(group).end()), kText);
  EXPECT_NE(r.Find(kB, kText, 8), group);
  EXPECT_NE(r.Find(kA, kText, 12), group);
  EXPECT_NE(r.Find(kA, Tokens{5, 6, 7, 8}, 8), group);
  EXPECT_NE(r.Find(kA, Tokens{5, 6, 7, 8, 10}, 8), group);
  EXPECT_NE(r.Find(kA, Tokens{5, 6, 7, 9, 8}, 8), group);
  EXPECT_EQ(r.Find(kA, kText, 8), group);
}

TEST(Representatives, ManyGroupsKeepApart) {
  Representatives r = Make();
  std::vector<GroupId> groups;
  for (int i = 0; i < 1000; ++i) groups.push_back(r.Find(DomainId(i % 3), Tokens{i / 3, 1, 2, 3}, 4));
  for (int i = 0; i < 1000; ++i) {
    EXPECT_EQ(r.Find(DomainId(i % 3), Tokens{i / 3, 1, 2, 3}, 4), groups[static_cast<size_t>(i)]);
  }
  for (const GroupId group : groups) r.Settle(group);
  // All ids are free again.
  for (int i = 0; i < 1000; ++i) EXPECT_LT(r.Find(kA, Tokens{i, 9}, 4).value, 1000);
}

TEST(Representatives, EachTableHasItsOwnListNewestFirst) {
  Representatives r = Make();
  const GroupId group = r.Find(kA, kText, 8);
  EXPECT_FALSE(r.first(group, 0).valid());
  r.Add(group, 0, BlockId(10), 0);
  r.Add(group, 0, BlockId(20), 0.25F);
  r.Add(group, 3, BlockId(30), 0);
  EXPECT_EQ(ListOf(r, group, 0), (Tokens{20, 10}));
  EXPECT_EQ(ListOf(r, group, 1), Tokens());
  EXPECT_EQ(ListOf(r, group, 3), Tokens{30});
  EXPECT_EQ(r[BlockId(20)].bound, 0.25F);
  EXPECT_EQ(r[BlockId(20)].weight, 1);
  EXPECT_EQ(r[BlockId(20)].table, 0);
  EXPECT_EQ(r[BlockId(30)].table, 3);
  EXPECT_EQ(r[BlockId(30)].group, group);
  EXPECT_EQ(r.size(), 3);
  int seen = 0;
  r.ForEach([&](BlockId block, const Representative& record) {
    EXPECT_EQ(block.value == 30, record.table == 3);
    ++seen;
  });
  EXPECT_EQ(seen, 3);
}

TEST(Representatives, ARenamedBlockKeepsItsPlaceAndRecord) {
  Representatives r = Make();
  const GroupId group = r.Find(kA, kText, 8);
  for (const int block : {10, 20, 30}) r.Add(group, 1, BlockId(block), static_cast<float>(block));
  r[BlockId(20)].weight = 7;
  r.Rename(BlockId(20), BlockId(25));
  EXPECT_EQ(ListOf(r, group, 1), (Tokens{30, 25, 10}));
  EXPECT_EQ(r[BlockId(25)].bound, 20);
  EXPECT_EQ(r[BlockId(25)].weight, 7);
  r.Rename(BlockId(30), BlockId(31));  // the head
  r.Rename(BlockId(10), BlockId(20));  // the tail, to an id that was in use
  EXPECT_EQ(ListOf(r, group, 1), (Tokens{31, 25, 20}));
}

TEST(Representatives, TheLastBlockTakesItsGroupAlong) {
  Representatives r = Make();
  const size_t empty = r.metadata_bytes();
  const GroupId group = r.Find(kA, kText, 8);
  for (const int block : {10, 20, 30}) r.Add(group, 2, BlockId(block), 0);
  r.Add(group, 0, BlockId(40), 0);
  r.Settle(group);  // it has blocks: stays
  EXPECT_EQ(r.Find(kA, kText, 8), group);
  EXPECT_GT(r.metadata_bytes(), empty);
  r.Remove(BlockId(20));
  EXPECT_EQ(ListOf(r, group, 2), (Tokens{30, 10}));
  r.Remove(BlockId(30));
  r.Remove(BlockId(10));
  EXPECT_EQ(r.Find(kA, kText, 8), group) << "table 0 still has one";
  r.Remove(BlockId(40));
  EXPECT_EQ(r.size(), 0);
  // Its id serves the next content.
  const GroupId next = r.Find(kB, Tokens{1, 2, 3, 4}, 4);
  EXPECT_EQ(next, group);
  for (int table = 0; table < kTables; ++table) EXPECT_FALSE(r.first(next, table).valid());
}

TEST(Representatives, SettleDropsWhatNothingWasAddedTo) {
  Representatives r = Make();
  const GroupId group = r.Find(kA, kText, 8);
  r.Settle(group);
  r.Settle(group);  // twice in one call, when a text repeats: no harm
  EXPECT_EQ(r.Find(kB, kText, 8), group);
  EXPECT_NE(r.Find(kA, kText, 8), group);
}

}  // namespace
}  // namespace jointkv::joint
