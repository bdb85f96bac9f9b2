#include "engine/block_map.h"

#include <gtest/gtest.h>

#include "engine/test_engine.h"

namespace jointkv::engine {
namespace {

using kv::Kind;
using kv::SlotState;

constexpr BlockMapLimits kAll = {1000, 1000, 1000};

// How many cells of a sequence are in a state.
int Count(const BlockMap::Sequence& sequence, SlotState state) {
  return static_cast<int>(std::ranges::count(sequence.cells, state, &BlockMap::Cell::state));
}

TEST(BlockMap, IsEmptyWhenNothingRuns) {
  Driver driver(TestOptions());
  const BlockMap map = driver.engine().block_map(kAll);
  EXPECT_EQ(map.layers, 2);
  EXPECT_EQ(map.running, 0);
  EXPECT_TRUE(map.sequences.empty());
}

TEST(BlockMap, ShowsPrefixesForksAndWhatIsPrivate) {
  Driver driver(TestOptions());
  const Tokens prompt = RandomTokens(200, 1);
  SamplingParams two = Seeded(100, 1);
  two.n = 2;
  const RequestId first = driver.Submit(prompt, two);
  BlockMap map;
  driver.Step();
  map = driver.engine().block_map(kAll);
  ASSERT_EQ(map.sequences.size(), 2u);
  for (int i = 0; i < 30; ++i) driver.Step();
  map = driver.engine().block_map(kAll);
  for (const BlockMap::Sequence& sequence : map.sequences) {
    EXPECT_EQ(sequence.request, first);
    EXPECT_TRUE(sequence.decodes);
    EXPECT_EQ(sequence.prompt_tokens, 200);
    EXPECT_EQ(sequence.tokens, 230);
    EXPECT_EQ(sequence.blocks, static_cast<int>(sequence.columns.size()));
    EXPECT_EQ(sequence.cells.size(), 2 * 2 * sequence.columns.size());
    EXPECT_EQ(sequence.cell(1, Kind::kV, 0).state, SlotState::kPrefix);
    EXPECT_EQ(sequence.cell(1, Kind::kV, 0).readers, 2);
    const int last = sequence.blocks - 1;
    EXPECT_EQ(sequence.cell(0, Kind::kK, last).state, SlotState::kPrivate);
    EXPECT_EQ(sequence.cell(0, Kind::kK, last).readers, 1);
  }

  driver.Submit(prompt, Greedy(100));
  for (int i = 0; i < 3; ++i) driver.Step();
  map = driver.engine().block_map(kAll);
  ASSERT_EQ(map.sequences.size(), 3u);
  EXPECT_EQ(map.sequences[2].cell(0, Kind::kK, 0).readers, 3);
}

TEST(BlockMap, ShowsWhatIsFused) {
  Driver driver(TestOptions());
  driver.Submit(RandomTokens(1500, 2), Greedy(1));
  driver.Run();
  const Tokens document = RandomTokens(300, 3);
  for (uint64_t seed = 4; seed < 7; ++seed) {
    Tokens prompt = RandomTokens(40, seed);
    prompt.insert(prompt.end(), document.begin(), document.end());
    Request request;
    request.prompt = prompt;
    request.sampling = Greedy(50);
    request.kv_fusion = seed < 6;
    ASSERT_TRUE(driver.engine().Submit(std::move(request)).ok());
  }
  for (int i = 0; i < 10; ++i) driver.Step();
  const BlockMap map = driver.engine().block_map(kAll);
  ASSERT_EQ(map.sequences.size(), 3u);
  EXPECT_GT(Count(map.sequences[0], SlotState::kFused), 0);  // the representatives' first owner
  EXPECT_EQ(Count(map.sequences[0], SlotState::kFused), Count(map.sequences[1], SlotState::kFused));
  EXPECT_EQ(Count(map.sequences[2], SlotState::kFused), 0);  // asked not to be
  EXPECT_TRUE(map.sequences[1].lossy);
  EXPECT_FALSE(map.sequences[2].lossy);
}

TEST(BlockMap, SlotsThatLeftTheirWindowAreReleased) {
  Driver driver(TestOptions("gemma3"));
  driver.Submit(RandomTokens(200, 1), Greedy(100));
  for (int i = 0; i < 5; ++i) driver.Step();
  const BlockMap map = driver.engine().block_map(kAll);
  ASSERT_EQ(map.sequences.size(), 1u);
  const int released = Count(map.sequences[0], SlotState::kReleased);
  EXPECT_GT(released, 0);
  EXPECT_LT(released, static_cast<int>(map.sequences[0].cells.size()));
  for (const BlockMap::Cell& cell : map.sequences[0].cells) {
    EXPECT_EQ(cell.readers == 0, cell.state == SlotState::kReleased);
  }
}

TEST(BlockMap, IsBounded) {
  Driver driver(TestOptions());
  for (uint64_t seed = 0; seed < 5; ++seed) driver.Submit(RandomTokens(400, seed), Greedy(50), DomainId(seed % 2));
  for (int i = 0; i < 8; ++i) driver.Step();
  const BlockMap all = driver.engine().block_map(kAll);
  const BlockMap map = driver.engine().block_map({3, 1, 7});
  EXPECT_EQ(map.running, 5);
  ASSERT_EQ(map.sequences.size(), 3u);
  EXPECT_EQ(map.layer_stride, 2);
  EXPECT_EQ(map.rows(), 1);
  for (size_t i = 0; i < map.sequences.size(); ++i) {
    const BlockMap::Sequence& sequence = map.sequences[i];
    EXPECT_LE(sequence.columns.size(), 7u);
    EXPECT_GT(sequence.columns.size(), 3u);
    EXPECT_EQ(sequence.cells.size(), 2 * sequence.columns.size());
    for (size_t column = 0; column < sequence.columns.size(); ++column) {
      const int block = static_cast<int>(column) * sequence.block_stride;
      EXPECT_EQ(sequence.columns[column].start, all.sequences[i].columns[block].start);
      EXPECT_EQ(sequence.cell(0, Kind::kV, static_cast<int>(column)).state,
                all.sequences[i].cell(0, Kind::kV, block).state);
    }
  }
  EXPECT_EQ(driver.engine().block_map(kAll, DomainId(1)).running, 2);
  EXPECT_EQ(driver.engine().block_map(kAll, DomainId(7)).running, 0);
}

}  // namespace
}  // namespace jointkv::engine
