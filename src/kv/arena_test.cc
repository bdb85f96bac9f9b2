#include "kv/arena.h"

#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace jointkv::kv {
namespace {

constexpr size_t kGranule = 64;

std::unique_ptr<Arena> Make(int slabs, size_t extra_bytes = 0) {
  auto arena = Arena::Create(slabs * kSlabGranules * kGranule + extra_bytes, kGranule);
  EXPECT_TRUE(arena.ok()) << arena.status().ToString();
  return std::move(arena).value();
}

TEST(Arena, RefusesLessThanOneSlabAndMoreThanIdsReach) {
  const auto small = Arena::Create(kSlabGranules * kGranule - 1, kGranule);
  ASSERT_FALSE(small.ok());
  EXPECT_EQ(small.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(small.status().message().find("slab"), std::string::npos);
  const auto large = Arena::Create(size_t{1} << 45, kGranule);
  ASSERT_FALSE(large.ok());
  EXPECT_EQ(large.status().code(), StatusCode::kOutOfRange);
}

TEST(Arena, CapacityIsWholeSlabsBelowTheCap) {
  const auto arena = Make(2, kSlabGranules * kGranule - 1);
  EXPECT_EQ(arena->capacity_bytes(), 2 * kSlabGranules * kGranule);
  EXPECT_EQ(arena->total_granules(), 2 * kSlabGranules);
  EXPECT_EQ(arena->held_bytes(), 0u);
  EXPECT_EQ(arena->used_bytes(), 0u);
}

// One class alone can take every slot of every slab; blocks do not overlap; the last free gives the slab back.
TEST(Arena, EachClassFillsTheArena) {
  for (int granules = 1; granules <= codec::kClasses; ++granules) {
    const auto arena = Make(3);
    std::vector<BlockId> blocks;
    std::vector<bool> taken(arena->total_granules());
    while (true) {
      const BlockId block = arena->Allocate(granules);
      if (!block.valid()) break;
      for (int g = 0; g < granules; ++g) {
        ASSERT_FALSE(taken.at(block.index() + g));
        taken[block.index() + g] = true;
      }
      blocks.push_back(block);
    }
    EXPECT_EQ(static_cast<int>(blocks.size()), 3 * (kSlabGranules / granules));
    EXPECT_EQ(arena->held_bytes(), arena->capacity_bytes());
    EXPECT_EQ(arena->used_bytes(), blocks.size() * granules * kGranule);
    arena->CheckIntegrity();
    for (const BlockId block : blocks) {
      arena->Free(block, granules);
      arena->CheckIntegrity();
    }
    EXPECT_EQ(arena->held_bytes(), 0u);
    EXPECT_EQ(arena->used_bytes(), 0u);
  }
}

TEST(Arena, ASlabServesOneClassUntilItIsEmpty) {
  const auto arena = Make(1);
  const BlockId one = arena->Allocate(1);
  EXPECT_FALSE(arena->Allocate(2).valid());
  EXPECT_TRUE(arena->Allocate(1).valid());
  arena->Free(one, 1);
  EXPECT_FALSE(arena->Allocate(2).valid());
  arena->Free(BlockId(1), 1);
  EXPECT_TRUE(arena->Allocate(2).valid());
}

TEST(Arena, BlocksAreCacheLineAlignedAndWritable) {
  const auto arena = Make(2);
  std::vector<BlockId> blocks;
  for (BlockId block = arena->Allocate(3); block.valid(); block = arena->Allocate(3)) {
    ASSERT_EQ(reinterpret_cast<uintptr_t>(arena->data(block)) % 64, 0u);
    std::memset(arena->data(block), static_cast<int>(blocks.size() % 251), 3 * kGranule);
    blocks.push_back(block);
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    for (size_t byte = 0; byte < 3 * kGranule; ++byte) {
      ASSERT_EQ(arena->data(blocks[i])[byte], static_cast<std::byte>(i % 251));
    }
  }
}

TEST(ArenaDeathTest, WrongFreesAreBrokenInvariants) {
  const auto arena = Make(1);
  const BlockId block = arena->Allocate(2);
  (void)arena->Allocate(2);
  EXPECT_DEATH(arena->Free(block, 3), "granules");
  EXPECT_DEATH(arena->Free(BlockId(block.value + 1), 2), "granules");
  EXPECT_DEATH(arena->Free(BlockId(), 2), "valid");
  arena->Free(block, 2);
  EXPECT_DEATH(arena->Free(block, 2), "free_slots");
}

// CanAllocate must promise exactly what a run of Allocate then delivers, in any mix of classes.
TEST(Arena, RandomOperationsAgainstAPlainModel) {
  std::mt19937 random(7);
  const auto arena = Make(6);
  std::vector<std::pair<BlockId, int>> live;
  size_t used = 0;
  for (int step = 0; step < 20'000; ++step) {
    if (random() % 64 == 0) {
      int needed[codec::kClasses] = {};
      for (int& n : needed) n = random() % 4 == 0 ? static_cast<int>(random() % 80) : 0;
      const bool promised = arena->CanAllocate(needed);
      bool delivered = true;
      const size_t before = live.size();
      for (int c = 0; c < codec::kClasses && delivered; ++c) {
        for (int i = 0; i < needed[c] && delivered; ++i) {
          const BlockId block = arena->Allocate(c + 1);
          delivered = block.valid();
          if (delivered) live.emplace_back(block, c + 1);
        }
      }
      ASSERT_EQ(promised, delivered);
      while (live.size() > before) {
        arena->Free(live.back().first, live.back().second);
        live.pop_back();
      }
    } else if (random() % 2 == 0 || live.empty()) {
      const int granules = 1 + static_cast<int>(random() % codec::kClasses);
      const BlockId block = arena->Allocate(granules);
      if (block.valid()) {
        live.emplace_back(block, granules);
        used += granules * kGranule;
      }
    } else {
      const size_t i = random() % live.size();
      arena->Free(live[i].first, live[i].second);
      used -= live[i].second * kGranule;
      live[i] = live.back();
      live.pop_back();
    }
    ASSERT_EQ(arena->used_bytes(), used);
    ASSERT_LE(arena->held_bytes(), arena->capacity_bytes());
    arena->CheckIntegrity();
  }
  for (const auto& [block, granules] : live) arena->Free(block, granules);
  EXPECT_EQ(arena->held_bytes(), 0u);
  arena->CheckIntegrity();
}

}  // namespace
}  // namespace jointkv::kv
