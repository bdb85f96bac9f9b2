#include "attention/kernels.h"

#include <cmath>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "attention/test_world.h"

namespace jointkv::attention {
namespace {

struct Row {
  std::vector<float> out;  // (queries, head_dim), divided
  std::vector<float> max;

  bool operator==(const Row&) const = default;
};

Row RunKernel(void (*kernel)(const RowArgs&), RowArgs args) {
  const int head_dim = args.run.layout->head_dim;
  Row row;
  row.out.resize(static_cast<size_t>(args.queries) * head_dim);
  row.max.resize(args.queries);
  std::vector<float> total(args.queries);
  std::vector<float> scratch(RowScratchFloats(head_dim), NAN);
  args.sums = row.out.data();
  args.max = row.max.data();
  args.total = total.data();
  args.scratch = scratch.data();
  kernel(args);
  for (size_t i = 0; i < row.out.size(); ++i) row.out[i] /= total[i / head_dim];
  return row;
}

// The generic kernel on every target, then the bf16 kernel where the CPU can.
std::vector<Row> RunEveryKernel(const RowArgs& args) {
  std::vector<Row> rows;
  dense::ForEachTarget([&] { rows.push_back(RunKernel(RowAttentionGeneric, args)); });
  if (HasAvx512Bf16()) rows.push_back(RunKernel(RowAttentionBf16, args));
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
TEST(KernelsTest, RowKernelsAgreeOnBf16Blocks) {
  for (const int head_dim : {16, 64, 80, 256}) {
    const testing::ScopedTrace trace(__FILE__, __LINE__, "head_dim " + std::to_string(head_dim));
    World world({.n_heads = 4, .n_kv_heads = 2, .head_dim = head_dim, .judged = false});
    const SequenceId id = world.Start();
    world.Step({{id, RandomTokens(200, 3)}});
    const kv::KvCache& cache = world.cache();
    const auto blocks = cache.blocks(id);
    const std::vector<float> q = dense::RandomFloats(static_cast<size_t>(kGroupMax) * head_dim, 5,
                                                     1.44f / std::sqrt(static_cast<float>(head_dim)));
    RowArgs args;
    args.run.layout = &cache.shape().layout;
    args.run.blocks = blocks.data();
    args.run.k = cache.table(id, 0, kv::Kind::kK);
    args.run.v = cache.table(id, 0, kv::Kind::kV);
    args.run.arena = cache.data(BlockId(0));
    args.run.granule_bytes = args.run.layout->granule_bytes();
    args.run.kv_head = 1;
    const std::vector<float> k_scale = dense::RandomFloats(blocks.size(), 6, 0.5f);
    const std::vector<float> v_scale = dense::RandomFloats(blocks.size(), 7);
    const std::vector<float> ones(blocks.size(), 1.0f);
    args.rope = &world.rope();
    args.q = q.data();
    for (args.queries = 1; args.queries <= kGroupMax; ++args.queries) {
      for (const int window : {0, 1, 6, 50}) {
        for (int last = 1; last <= std::min<int>(kSplitBlocks, static_cast<int>(blocks.size())); last += 3) {
          args.window = window;
          args.last = last;
          args.position = blocks[last - 1].start + blocks[last - 1].tokens / 2;
          args.first = 0;
          while (window != 0 && blocks[args.first].start + blocks[args.first].tokens <= args.position - window + 1)
            ++args.first;
          args.run.k_scale = args.run.v_scale = nullptr;
          const std::vector<Row> rows = RunEveryKernel(args);
          ExpectAgreement(rows);
          args.run.k_scale = args.run.v_scale = ones.data();
          ASSERT_EQ(RunEveryKernel(args), rows) << "no scales and scales of 1";
          args.run.k_scale = k_scale.data();
          args.run.v_scale = v_scale.data();
          ExpectAgreement(RunEveryKernel(args));
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

}  // namespace
}  // namespace jointkv::attention
