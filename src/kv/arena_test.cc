#include "kv/arena.h"

#include <array>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace jointkv::kv {
namespace {

constexpr size_t kGranule = 64;

constexpr size_t kSlab = kSlabGranules * kGranule;

// Classes of 1 .. kClasses granules, and one of five that is not the fifth.
constexpr std::array<size_t, codec::kClasses + 1> kClassBytes = [] {
  std::array<size_t, codec::kClasses + 1> bytes{};
  for (size_t c = 0; c < codec::kClasses; ++c) bytes[c] = (c + 1) * kGranule;
  bytes[codec::kClasses] = 5 * kGranule;
  return bytes;
}();

std::unique_ptr<Arena> Make(int slabs, size_t extra_bytes = 0) {
  auto arena = Arena::Create(slabs * kSlab + extra_bytes, kSlab, kClassBytes);
  EXPECT_TRUE(arena.ok()) << arena.status().ToString();
  return std::move(arena).value();
}

TEST(Arena, RefusesLessThanOneSlabAndMoreThanIdsReach) {
  const auto small = Arena::Create(kSlab - 1, kSlab, kClassBytes);
  ASSERT_FALSE(small.ok());
  EXPECT_EQ(small.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(small.status().message().find("slab"), std::string::npos);
  const auto large = Arena::Create(size_t{1} << 45, kSlab, kClassBytes);
  ASSERT_FALSE(large.ok());
  EXPECT_EQ(large.status().code(), StatusCode::kOutOfRange);
}

TEST(Arena, CapacityIsWholeSlabsBelowTheCap) {
  const auto arena = Make(2, kSlabGranules * kGranule - 1);
  EXPECT_EQ(arena->capacity_bytes(), 2 * kSlabGranules * kGranule);
  EXPECT_EQ(arena->held_bytes(), 0u);
  EXPECT_EQ(arena->used_bytes(), 0u);
}

// One class alone can take every slot of every slab; blocks do not overlap; the last free gives the slab back.
TEST(Arena, EachClassFillsTheArena) {
  for (size_t c = 0; c < kClassBytes.size(); ++c) {
    const auto arena = Make(3);
    const size_t bytes = kClassBytes[c];
    std::vector<BlockId> blocks;
    std::vector<bool> taken(arena->capacity_bytes() / kGranule);
    const std::byte* base = nullptr;
    while (true) {
      const BlockId block = arena->Allocate(static_cast<int>(c));
      if (!block.valid()) break;
      if (base == nullptr) base = arena->data(block);
      ASSERT_LT(block.value, arena->total_ids());
      ASSERT_EQ(arena->class_of(block), static_cast<int>(c));
      ASSERT_EQ(arena->block_bytes(block), bytes);
      const size_t first = (arena->data(block) - base) / kGranule;
      for (size_t g = first; g < first + bytes / kGranule; ++g) {
        ASSERT_FALSE(taken.at(g));
        taken[g] = true;
      }
      blocks.push_back(block);
    }
    const size_t of_slab = kSlab / bytes;
    EXPECT_GE(blocks.size(), 3 * (of_slab - of_slab / 32));
    EXPECT_LE(blocks.size(), 3 * of_slab);
    EXPECT_EQ(arena->held_bytes(), arena->capacity_bytes());
    EXPECT_EQ(arena->used_bytes(), blocks.size() * bytes);
    EXPECT_EQ(arena->used_blocks(), static_cast<int64_t>(blocks.size()));
    arena->CheckIntegrity();
    for (const BlockId block : blocks) {
      arena->Free(block);
      arena->CheckIntegrity();
    }
    EXPECT_EQ(arena->held_bytes(), 0u);
    EXPECT_EQ(arena->used_bytes(), 0u);
  }
}

// A quarter has 128 places at most, also where more blocks would fit.
TEST(Arena, VerySmallBlocksFillTheirPlaces) {
  constexpr size_t kSmall[] = {64, 4096};
  auto arena = Arena::Create(2 * 64 * 2000, 64 * 2000, kSmall);
  ASSERT_TRUE(arena.ok());
  std::set<std::byte*> places;
  for (BlockId block = (*arena)->Allocate(0); block.valid(); block = (*arena)->Allocate(0)) {
    places.insert((*arena)->data(block));
  }
  EXPECT_EQ(places.size(), 2u * kSlabQuarters * 128);
  (*arena)->CheckIntegrity();
}

// Spare slabs are for others; what still fits into slabs in use needs none.
TEST(Arena, SparesSlabs) {
  const auto arena = Make(2);
  const int one[] = {1};
  EXPECT_TRUE(arena->CanAllocate(one, 1));
  EXPECT_FALSE(arena->CanAllocate(one, 2));
  (void)arena->Allocate(0);
  EXPECT_TRUE(arena->CanAllocate(one, 2));
  const int many[] = {kSlabGranules};
  EXPECT_FALSE(arena->CanAllocate(many, 1));
  EXPECT_TRUE(arena->CanAllocate(many, 0));
}

constexpr int kWhole = 15;  // 16 granules: 15 blocks fill a slab, 3 a quarter to four fifths

TEST(Arena, ASlabServesOneClassUntilItIsEmpty) {
  const auto arena = Make(1);
  const BlockId one = arena->Allocate(kWhole);
  EXPECT_FALSE(arena->Allocate(0).valid());
  const BlockId another = arena->Allocate(kWhole);
  EXPECT_TRUE(another.valid());
  arena->Free(one);
  EXPECT_FALSE(arena->Allocate(0).valid());
  arena->Free(another);
  EXPECT_TRUE(arena->Allocate(0).valid());
}

TEST(Arena, QuartersServeAClassEachUntilTheyAreEmpty) {
  const auto arena = Make(2);
  std::vector<BlockId> blocks;
  for (int c = 0; c < kSlabQuarters; ++c) blocks.push_back(arena->Allocate(c));
  EXPECT_EQ(arena->held_bytes(), kSlab);
  EXPECT_TRUE(arena->Allocate(kWhole).valid());
  const BlockId more = arena->Allocate(0);  // beside the first
  EXPECT_TRUE(more.valid());
  EXPECT_FALSE(arena->Allocate(kSlabQuarters).valid());
  arena->Free(blocks[1]);
  EXPECT_TRUE(arena->Allocate(kSlabQuarters).valid());
  arena->CheckIntegrity();
}

TEST(Arena, ADividedSlabGoesBackWithItsLastQuarter) {
  const auto arena = Make(1);
  const BlockId one = arena->Allocate(0);
  const BlockId another = arena->Allocate(1);
  arena->Free(one);
  EXPECT_EQ(arena->held_bytes(), kSlab);
  EXPECT_FALSE(arena->Allocate(kWhole).valid());
  EXPECT_TRUE(arena->CanAllocate(std::array{kSlabGranules / kSlabQuarters * 3}));
  EXPECT_FALSE(arena->CanAllocate(std::array{kSlabGranules / kSlabQuarters * 3 + 1}));
  arena->Free(another);
  EXPECT_EQ(arena->held_bytes(), 0u);
  EXPECT_TRUE(arena->Allocate(kWhole).valid());
}

TEST(Arena, ABlockGoesBelowIntoRoomOfItsClassOrAFreeQuarter) {
  const auto arena = Make(3);
  const BlockId low = arena->Allocate(0);
  EXPECT_FALSE(arena->AllocateBelow(low).valid());
  std::vector<BlockId> whole;
  for (int i = 0; i < 16; ++i) whole.push_back(arena->Allocate(kWhole));  // 15 to a slab
  EXPECT_FALSE(arena->AllocateBelow(whole.back()).valid());
  arena->Free(whole[3]);
  EXPECT_EQ(arena->AllocateBelow(whole.back()), whole[3]);
  arena->Free(whole.back());
  std::vector<BlockId> quarters;
  for (int c = 1; c < kSlabQuarters + 1; ++c) quarters.push_back(arena->Allocate(c));  // the last one in another slab
  EXPECT_FALSE(arena->AllocateBelow(quarters.back()).valid());
  arena->Free(quarters.front());
  const BlockId below = arena->AllocateBelow(quarters.back());
  ASSERT_TRUE(below.valid());
  EXPECT_LT(below.value, quarters.back().value);
  EXPECT_EQ(arena->class_of(below), kSlabQuarters);
  arena->CheckIntegrity();
}

TEST(Arena, HeldBytesAreWholeSlabs) {
  const auto arena = Make(4);
  EXPECT_EQ(arena->HeldBytesOf(std::array{1}), kSlab);
  EXPECT_EQ(arena->HeldBytesOf(std::array{1, 1, 1, 1}), kSlab);
  EXPECT_EQ(arena->HeldBytesOf(std::array{61, 1, 1, 1}), 2 * kSlab);
  std::array<int, kWhole + 1> blocks{};
  blocks[0] = 1;
  blocks[kWhole] = 16;
  EXPECT_EQ(arena->HeldBytesOf(blocks), 3 * kSlab);
}

TEST(Arena, BlocksAreCacheLineAlignedAndWritable) {
  const auto arena = Make(2);
  std::vector<BlockId> blocks;
  for (BlockId block = arena->Allocate(2); block.valid(); block = arena->Allocate(2)) {
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
  const BlockId block = arena->Allocate(1);
  (void)arena->Allocate(1);
  EXPECT_DEATH(arena->Free(BlockId(block.value + kSlabGranules / kSlabQuarters)), "slots");
  EXPECT_DEATH(arena->Free(BlockId()), "valid");
  arena->Free(block);
  EXPECT_DEATH(arena->Free(block), "free_slots");
}

// CanAllocate must promise exactly what a run of Allocate then delivers, in any mix of classes.
TEST(Arena, RandomOperationsAgainstAPlainModel) {
  std::mt19937 random(7);
  const auto arena = Make(6);
  std::vector<BlockId> live;
  size_t used = 0;
  for (int step = 0; step < 20'000; ++step) {
    if (random() % 64 == 0) {
      std::array<int, kClassBytes.size()> needed{};
      for (int& n : needed) n = random() % 4 == 0 ? static_cast<int>(random() % 80) : 0;
      const bool promised = arena->CanAllocate(needed);
      bool delivered = true;
      const size_t before = live.size();
      for (size_t c = 0; c < needed.size() && delivered; ++c) {
        for (int i = 0; i < needed[c] && delivered; ++i) {
          const BlockId block = arena->Allocate(static_cast<int>(c));
          delivered = block.valid();
          if (delivered) live.push_back(block);
        }
      }
      ASSERT_EQ(promised, delivered);
      while (live.size() > before) {
        arena->Free(live.back());
        live.pop_back();
      }
    } else if (random() % 2 == 0 || live.empty()) {
      const int block_class = static_cast<int>(random() % kClassBytes.size());
      const BlockId block = arena->Allocate(block_class);
      if (block.valid()) {
        live.push_back(block);
        used += kClassBytes[block_class];
      }
    } else {
      const size_t i = random() % live.size();
      used -= arena->block_bytes(live[i]);
      arena->Free(live[i]);
      live[i] = live.back();
      live.pop_back();
    }
    ASSERT_EQ(arena->used_bytes(), used);
    ASSERT_LE(arena->held_bytes(), arena->capacity_bytes());
    arena->CheckIntegrity();
  }
  for (const BlockId block : live) arena->Free(block);
  EXPECT_EQ(arena->held_bytes(), 0u);
  arena->CheckIntegrity();
}

}  // namespace
}  // namespace jointkv::kv
