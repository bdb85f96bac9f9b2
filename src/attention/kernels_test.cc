#include "attention/kernels.h"

#include <cmath>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "attention/head_reader.h"
#include "attention/read_ahead.h"
#include "attention/test_world.h"

namespace jointkv::attention {
namespace {

float* AlignUp64(float* at) {
  return reinterpret_cast<float*>(RoundUp(reinterpret_cast<uintptr_t>(at), uintptr_t{64}));
}

struct Row {
  std::vector<float> out;  // (queries, head_dim), divided
  std::vector<float> max;

  bool operator==(const Row&) const = default;
};

// Consecutive blocks of one sequence, one row of queries, up to `at_once` visits in a call.
Row RunKernel(void (*kernel)(const VisitArgs&), VisitArgs args, std::vector<Visit> visits, int at_once) {
  const int head_dim = args.layout->head_dim;
  Row row;
  row.out.assign(static_cast<size_t>(args.queries) * head_dim, NAN);
  std::vector<float> stats(2 * kGroupMax, NAN);
  std::vector<float> buffer(VisitScratchFloats(head_dim) + 16, NAN);
  args.scratch = AlignUp64(buffer.data());
  Ahead nothing;
  args.ahead = &nothing;
  for (Visit& visit : visits) {
    visit.sum.sums = row.out.data();
    visit.sum.stats = stats.data();
    visit.fresh = &visit == visits.data();
  }
  for (size_t at = 0; at < visits.size(); at += at_once) {
    args.visits = visits.data() + at;
    args.n = static_cast<int>(std::min<size_t>(at_once, visits.size() - at));
    kernel(args);
  }
  for (size_t i = 0; i < row.out.size(); ++i) row.out[i] /= stats[kGroupMax + i / head_dim];
  row.max.assign(stats.begin(), stats.begin() + args.queries);
  return row;
}

// The bf16 kernel has one softmax over a row's visits of a call: its weights, relative to another largest score, round
// elsewhere when calls are cut elsewhere, 2^-9 of averages of values of order 1. A largest score is what it is.
void ExpectAlike(void (*kernel)(const VisitArgs&), const Row& row, const Row& same) {
  if (kernel != AttendBf16) {
    EXPECT_EQ(row, same);
    return;
  }
  EXPECT_EQ(row.max, same.max);
  for (size_t i = 0; i < row.out.size(); ++i) EXPECT_NEAR(row.out[i], same.out[i], 0.01);
}

// The generic kernel on every target, then those of a CPU that it can run. How many visits make a call is no matter,
// but for rounding in the bf16 kernel.
std::vector<Row> RunEveryKernel(const VisitArgs& args, const std::vector<Visit>& visits) {
  std::vector<Row> rows;
  const auto run = [&](void (*kernel)(const VisitArgs&)) {
    rows.push_back(RunKernel(kernel, args, visits, kVisitsMax));
    EXPECT_EQ(RunKernel(kernel, args, visits, kVisitsMax), rows.back());
    ExpectAlike(kernel, RunKernel(kernel, args, visits, 1), rows.back());
    ExpectAlike(kernel, RunKernel(kernel, args, visits, 3), rows.back());
  };
  dense::ForEachTarget([&] { run(AttendGeneric); });
  if (HasAvx2Kernel(args.layout->head_dim)) run(AttendAvx2);
  if (HasAvx512Bf16()) run(AttendBf16);
  return rows;
}

// On every target within f32 rounding of one another (1e-4 of values of order 1 that are averages of at most 512), and
// the bf16 kernel within what it rounds: 2^-8 of weights and, times scores' spread of order 1, of queries.
void ExpectAgreement(const std::vector<Row>& rows) {
  for (size_t r = 1; r < rows.size(); ++r) {
    const double tolerance = HasAvx512Bf16() && r + 1 == rows.size() ? 0.05 : 1e-4;
    for (size_t i = 0; i < rows[0].out.size(); ++i) ASSERT_NEAR(rows[r].out[i], rows[0].out[i], tolerance);
    for (size_t i = 0; i < rows[0].max.size(); ++i) ASSERT_NEAR(rows[r].max[i], rows[0].max[i], tolerance);
  }
}

// A sequence of 330 tokens in bf16 blocks, the last of them open, with a factor for each block's keys and values.
class Blocks {
 public:
  static constexpr int kTokens = 330;
  static constexpr int kKvHead = 1;

  explicit Blocks(int head_dim)
      : world_({.n_heads = 4, .n_kv_heads = 2, .head_dim = head_dim, .judged = false}), id_(world_.Start()) {
    world_.Step({{id_, RandomTokens(kTokens, 3)}});
    k_scale_ = dense::RandomFloats(blocks().size(), 6, 0.5f);
    v_scale_ = dense::RandomFloats(blocks().size(), 7);
  }

  const codec::BlockLayout& layout() { return world_.cache().shape().layout; }
  std::span<const kv::LogicalBlock> blocks() { return world_.cache().blocks(id_); }
  const dense::RopeTable& rope() const { return world_.rope(); }

  BlockRun Run(bool scaled) {
    const kv::KvCache& cache = world_.cache();
    return {.layout = &layout(),
            .blocks = blocks().data(),
            .k = cache.table(id_, 0, kv::Kind::kK),
            .v = cache.table(id_, 0, kv::Kind::kV),
            .k_scale = scaled ? k_scale_.data() : nullptr,
            .v_scale = scaled ? v_scale_.data() : nullptr,
            .cache = &cache};
  }

  // The first logical block that a row at `position` may see.
  int FirstVisible(int position, int window) {
    int first = 0;
    while (window != 0 && blocks()[first].start + blocks()[first].tokens <= position - window + 1) ++first;
    return first;
  }

  // What a row at `position` may see; q: (queries, 2, head_dim / 2).
  std::vector<Visit> Visits(int position, int window, bool scaled, const float* q) {
    const BlockRun run = Run(scaled);
    std::vector<Visit> all;
    for (int i = FirstVisible(position, window); i < static_cast<int>(blocks().size()); ++i) {
      const kv::LogicalBlock& block = blocks()[i];
      if (block.start > position) break;
      const ptrdiff_t head = static_cast<ptrdiff_t>(layout().head_offset(kKvHead, block.cap));
      all.push_back({.k = run.cache->data(run.k[i]) + head,
                     .v = run.cache->data(run.v[i]) + head,
                     .cap = block.cap,
                     .begin = window == 0 ? 0 : std::max(0, position - window + 1 - block.start),
                     .end = std::min<int>(block.tokens, position + 1 - block.start),
                     .k_scale = run.KScale(i),
                     .v_scale = run.VScale(i),
                     .cos = rope().cos(position - block.base),
                     .sin = rope().sin(position - block.base),
                     .q = q});
    }
    return all;
  }

 private:
  World world_;
  SequenceId id_;
  std::vector<float> k_scale_;
  std::vector<float> v_scale_;
};

std::vector<float> RandomQueries(int queries, int head_dim) {
  return dense::RandomFloats(static_cast<size_t>(queries) * head_dim, 5,
                             1.44f / std::sqrt(static_cast<float>(head_dim)));
}

// Attention picks the best kernel that the CPU has, so all are called here.
TEST(KernelsTest, BlockKernelsAgreeOnBf16Blocks) {
  for (const int head_dim : {16, 64, 80, 256, 320}) {
    const testing::ScopedTrace trace(__FILE__, __LINE__, "head_dim " + std::to_string(head_dim));
    Blocks blocks(head_dim);
    const std::vector<float> q = RandomQueries(kGroupMax, head_dim);
    for (int queries = 1; queries <= kGroupMax; ++queries) {
      for (const int window : {0, 1, 6, 50}) {
        for (int last = 1; last <= static_cast<int>(blocks.blocks().size()); last += 3) {
          const kv::LogicalBlock& block = blocks.blocks()[last - 1];
          for (const bool scaled : {false, true}) {
            VisitArgs args{.layout = &blocks.layout(), .queries = queries};
            ExpectAgreement(
                RunEveryKernel(args, blocks.Visits(block.start + block.tokens / 2, window, scaled, q.data())));
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

// Lines that steps would ask for, one by one.
std::vector<ptrdiff_t> Lines(Ahead& ahead, const std::byte* from) {
  std::vector<ptrdiff_t> lines;
  for (Ahead::Range range = ahead.Take(); range.at != nullptr; range = ahead.Take()) {
    lines.push_back((range.at - from) / 64);
    range.Step();
    ahead.Return(range);
  }
  return lines;
}

TEST(ReadAheadTest, AsksForEachLineOnceInOrder) {
  alignas(64) static std::byte memory[1 << 16];
  Ahead ahead;
  EXPECT_EQ(ahead.lines(), 0);
  ahead.Push(memory + 640 + 60, 8);  // two lines
  ahead.Push(memory, 64);
  ahead.Push(memory + 640 + 60, 8);  // known
  ahead.Push(memory + 64, 65);
  EXPECT_EQ(ahead.lines(), 5);
  EXPECT_EQ(Lines(ahead, memory), (std::vector<ptrdiff_t>{10, 11, 0, 1, 2}));
  EXPECT_EQ(ahead.lines(), 0);
  ahead.Push(memory + 128, 256);
  ahead.set_fast(true);
  EXPECT_EQ(Lines(ahead, memory), (std::vector<ptrdiff_t>{2, 4}));
}

TEST(ReadAheadTest, ForgetsAndFillsAndGoesRound) {
  alignas(64) static std::byte memory[1 << 16];
  Ahead ahead;
  for (int round = 0; round < 5; ++round) {
    for (int i = 0; i < 1000; ++i) ahead.Push(memory + ptrdiff_t{64} * i, 64);
    const ptrdiff_t full = ahead.lines();
    EXPECT_GT(full, 2 * kVisitsMax);
    EXPECT_LT(full, 1000);
    if (round % 2 == 0) {
      ahead.Clear();
      EXPECT_EQ(ahead.lines(), 0);
      EXPECT_EQ(ahead.Take().at, nullptr);
      ahead.Push(memory, 64);  // it was forgotten, not asked for
      EXPECT_EQ(ahead.lines(), 1);
      ahead.Clear();
      continue;
    }
    const std::vector<ptrdiff_t> lines = Lines(ahead, memory);
    ASSERT_EQ(static_cast<ptrdiff_t>(lines.size()), full);
    for (ptrdiff_t i = 0; i < full; ++i) EXPECT_EQ(lines[i], i);
  }
}

// Rows of several sequences that share blocks: visits of the same block come one after the other, some of the same row,
// and see less or more of it. How many make a call is no matter.
TEST(KernelsTest, VisitsToOneBlockDoNotTouchEachOther) {
  constexpr int kRows = 5;
  for (const int head_dim : {16, 64, 80}) {
    Blocks blocks(head_dim);
    for (int queries = 1; queries <= kGroupMax; ++queries) {
      const testing::ScopedTrace trace(__FILE__, __LINE__,
                                       "head_dim " + std::to_string(head_dim) + " queries " + std::to_string(queries));
      const std::vector<float> q = RandomQueries(kRows * queries, head_dim);
      const size_t row_floats = static_cast<size_t>(queries) * head_dim;
      const auto run = [&](void (*kernel)(const VisitArgs&), int at_once) {
        std::vector<float> sums(kRows * row_floats, NAN);
        std::vector<float> stats(static_cast<size_t>(2) * kGroupMax * kRows, NAN);
        std::vector<Visit> visits;
        Ahead ahead;
        ahead.set_fast(at_once > 1);
        std::vector<std::vector<std::byte>> copies;  // values elsewhere, while keys are the same
        for (int block = 0; block < 8; ++block) {
          for (int row = 0; row < kRows; ++row) {
            const std::vector<Visit> all =
                blocks.Visits(blocks.blocks()[8].start, 0, row % 2 == 1, &q[row * row_floats]);
            Visit visit = all[block];
            visit.sum.sums = &sums[row * row_floats];
            visit.sum.stats = &stats[static_cast<size_t>(2) * kGroupMax * row];
            if (row == 1 && block % 2 == 1) {
              copies.emplace_back(visit.v, visit.v + blocks.layout().head_bytes(visit.cap));
              visit.v = copies.back().data();
            }
            ahead.Push(visit.k, blocks.layout().head_bytes(visit.cap));
            ahead.Push(visit.v, blocks.layout().head_bytes(visit.cap));
            if (row == 2 && visit.end > 2) visit.end -= 2;
            if (row == 3 && visit.end > 3) visit.begin += 3;
            visit.fresh = block == 0;
            visits.push_back(visit);
            visit.fresh = false;
            if (row == 4) visits.push_back(visit);
          }
        }
        std::vector<float> buffer(VisitScratchFloats(head_dim) + 16, NAN);
        VisitArgs args{
            .layout = &blocks.layout(), .queries = queries, .scratch = AlignUp64(buffer.data()), .ahead = &ahead};
        for (size_t at = 0; at < visits.size(); at += at_once) {
          args.visits = visits.data() + at;
          args.n = static_cast<int>(std::min<size_t>(at_once, visits.size() - at));
          kernel(args);
        }
        std::vector<std::vector<float>> rows(kRows);
        for (int row = 0; row < kRows; ++row) {
          const float* totals = &stats[static_cast<size_t>(2) * kGroupMax * row + kGroupMax];
          rows[row].assign(&sums[row * row_floats], &sums[row * row_floats] + row_floats);
          rows[row].insert(rows[row].end(), totals, totals + queries);
        }
        return rows;
      };
      std::vector<void (*)(const VisitArgs&)> kernels = {AttendGeneric};
      if (HasAvx2Kernel(head_dim)) kernels.push_back(AttendAvx2);
      if (HasAvx512Bf16()) kernels.push_back(AttendBf16);
      for (const auto kernel : kernels) {
        const std::vector<std::vector<float>> alone = run(kernel, 1);
        for (const int at_once : {2, 3, 7, kVisitsMax}) {
          const std::vector<std::vector<float>> together = run(kernel, at_once);
          for (int row = 0; row < kRows; ++row) {
            if (kernel != AttendBf16 || row < 4) {
              EXPECT_EQ(together[row], alone[row]) << "at once " << at_once << " row " << row;
              continue;
            }
            // Two visits of one row: see ExpectAlike.
            for (size_t i = 0; i < alone[row].size(); ++i) {
              const size_t total = row_floats + std::min(i, row_floats - 1) / head_dim;
              EXPECT_NEAR(together[row][i] / together[row][total], alone[row][i] / alone[row][total], 0.01);
            }
            for (size_t i = row_floats; i < alone[row].size(); ++i)
              EXPECT_NEAR(together[row][i] / alone[row][i], 1, 1e-5);
          }
        }
      }
    }
  }
}

// The last rows of a sequence, as tiles on every target and as one row after the other: within f32 rounding, and what
// the bf16 kernel rounds (see ExpectAgreement).
TEST(KernelsTest, TileKernelsAgreeWithBlockKernels) {
  constexpr int kGroup = 2;
  for (const int head_dim : {16, 18, 64, 80, 256}) {
    Blocks blocks(head_dim);
    std::vector<float> scratch(
        std::max(TileScratchBytes(head_dim), GenericTileScratchBytes(head_dim)) / sizeof(float) + 16, NAN);
    for (const int rows : {1, 7, 64}) {
      const std::vector<float> q = RandomQueries(rows * kGroup, head_dim);
      for (const int window : {0, 1, 50, 200}) {
        for (const bool scaled : {false, true}) {
          const testing::ScopedTrace trace(__FILE__, __LINE__,
                                           "head_dim " + std::to_string(head_dim) + " rows " + std::to_string(rows) +
                                               " window " + std::to_string(window) + (scaled ? " scaled" : ""));
          const int position = Blocks::kTokens - rows;
          std::vector<float> expected;
          for (int row = 0; row < rows; ++row) {
            const float* row_q = q.data() + static_cast<ptrdiff_t>(row) * kGroup * head_dim;
            const Row one = RunKernel(AttendGeneric, {.layout = &blocks.layout(), .queries = kGroup},
                                      blocks.Visits(position + row, window, scaled, row_q), kVisitsMax);
            expected.insert(expected.end(), one.out.begin(), one.out.end());
          }
          std::vector<float> out(expected.size());
          HeadReader reader(nullptr);  // nothing is encoded
          const TileArgs args{.run = blocks.Run(scaled),
                              .reader = &reader,
                              .kv_head = Blocks::kKvHead,
                              .rope = &blocks.rope(),
                              .q = q.data(),
                              .q_row_stride = static_cast<ptrdiff_t>(kGroup) * head_dim,
                              .group = kGroup,
                              .rows = rows,
                              .position = position,
                              .window = window,
                              .first = blocks.FirstVisible(position, window),
                              .last = static_cast<int>(blocks.blocks().size()),
                              .out = {out.data(), dense::Precision::kF32, rows, kGroup * head_dim},
                              .scratch = reinterpret_cast<std::byte*>(AlignUp64(scratch.data()))};
          const auto check = [&](void (*kernel)(const TileArgs&), double tolerance) {
            std::ranges::fill(out, NAN);
            kernel(args);
            for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], expected[i], tolerance) << "at " << i;
          };
          dense::ForEachTarget([&] { check(TileAttentionGeneric, 1e-4); });
          if (HasAvx512Bf16()) check(TileAttentionBf16, 0.05);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

}  // namespace
}  // namespace jointkv::attention
