#include "attention/kernels.h"

#include <cmath>
#include <string>
#include <vector>

#include <gtest/gtest.h>

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
  row.out.resize(static_cast<size_t>(args.queries) * head_dim);
  std::vector<float> stats(2 * kGroupMax);
  std::fill_n(stats.begin(), kGroupMax, kUnseen);
  std::vector<float> buffer(VisitScratchFloats(head_dim) + 16, NAN);
  args.scratch = AlignUp64(buffer.data());
  for (Visit& visit : visits) {
    visit.sums = row.out.data();
    visit.stats = stats.data();
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

// The generic kernel on every target, then the bf16 kernel where the CPU can. How many visits make a call is no matter.
std::vector<Row> RunEveryKernel(const VisitArgs& args, const std::vector<Visit>& visits) {
  std::vector<Row> rows;
  const auto run = [&](void (*kernel)(const VisitArgs&)) {
    rows.push_back(RunKernel(kernel, args, visits, kVisitsMax));
    EXPECT_EQ(RunKernel(kernel, args, visits, 1), rows.back());
    EXPECT_EQ(RunKernel(kernel, args, visits, 3), rows.back());
  };
  dense::ForEachTarget([&] { run(AttendGeneric); });
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

// Attention never picks the generic kernel for bf16 blocks where the CPU has a better one, so it is called here.
TEST(KernelsTest, BlockKernelsAgreeOnBf16Blocks) {
  constexpr int kKvHead = 1;
  for (const int head_dim : {16, 64, 80, 256}) {
    const testing::ScopedTrace trace(__FILE__, __LINE__, "head_dim " + std::to_string(head_dim));
    World world({.n_heads = 4, .n_kv_heads = 2, .head_dim = head_dim, .judged = false});
    const SequenceId id = world.Start();
    world.Step({{id, RandomTokens(200, 3)}});
    const kv::KvCache& cache = world.cache();
    const auto blocks = cache.blocks(id);
    const std::vector<float> q = dense::RandomFloats(static_cast<size_t>(kGroupMax) * head_dim, 5,
                                                     1.44f / std::sqrt(static_cast<float>(head_dim)));
    const std::vector<float> k_scale = dense::RandomFloats(blocks.size(), 6, 0.5f);
    const std::vector<float> v_scale = dense::RandomFloats(blocks.size(), 7);
    const auto visits = [&](int window, int last, bool scaled) {
      const int position = blocks[last - 1].start + blocks[last - 1].tokens / 2;
      std::vector<Visit> all;
      for (int i = 0; i < last; ++i) {
        const kv::LogicalBlock& block = blocks[i];
        if (window != 0 && block.start + block.tokens <= position - window + 1) continue;
        const auto head = [&](kv::Kind kind) {
          return cache.data(cache.table(id, 0, kind)[i]) + cache.shape().layout.head_offset(kKvHead, block.cap);
        };
        all.push_back({.k = head(kv::Kind::kK),
                       .v = head(kv::Kind::kV),
                       .cap = block.cap,
                       .begin = window == 0 ? 0 : std::max(0, position - window + 1 - block.start),
                       .end = std::min<int>(block.tokens, position + 1 - block.start),
                       .k_scale = scaled ? k_scale[i] : 1,
                       .v_scale = scaled ? v_scale[i] : 1,
                       .cos = world.rope().cos(position - block.base),
                       .sin = world.rope().sin(position - block.base),
                       .q = q.data()});
      }
      return all;
    };
    for (int queries = 1; queries <= kGroupMax; ++queries) {
      for (const int window : {0, 1, 6, 50}) {
        for (int last = 1; last <= static_cast<int>(blocks.size()); last += 3) {
          for (const bool scaled : {false, true}) {
            VisitArgs args{.layout = &cache.shape().layout, .queries = queries};
            ExpectAgreement(RunEveryKernel(args, visits(window, last, scaled)));
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace jointkv::attention
