// Attention: one step's attention over the block store, layer by layer.
//
// Plan cuts a step into units of work once; Store and Run then execute them for each layer. A unit is either
//   a row    one position of one sequence against its blocks (decode, and any row whose result must not depend on how
//   rows
//            are grouped), kSplitBlocks at a time; where there are few rows each split is a unit of its own, merged
//            after
//   a tile   a run of positions of one sequence against all their tokens (prefill), where the CPU has the kernel
// times the KV heads.
//
// Threads: called by one thread, works on the pool's. Owns: plan and scratch, which grow to the largest step seen.
// Fails how: never.
#pragma once

#include <span>
#include <vector>

#include "attention/kernels.h"
#include "base/huge_buffer.h"
#include "base/thread_pool.h"
#include "kv/kv_cache.h"

namespace jointkv::attention {

// Consecutive positions of one sequence in consecutive rows of a step. Their slots are reserved, not yet committed.
struct RowSpan {
  SequenceId sequence;
  int first_row = 0;
  int rows = 0;
  int position = 0;  // of the first row
};

struct HeadShape {
  int n_heads = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  float scale = 1;    // multiplies q.k
  bool neox = false;  // RoPE pairs (i, i + head_dim / 2); otherwise (2i, 2i + 1)

  int group() const { return n_heads / n_kv_heads; }
  int d_q() const { return n_heads * head_dim; }
  int d_kv() const { return n_kv_heads * head_dim; }
};

class Attention {
 public:
  // rows_independent: never use tiles, so that a row's result is the same bit for bit in any step.
  Attention(const HeadShape& shape, const kv::KvCache& cache, int threads, int max_rows, bool rows_independent);

  void Plan(const kv::KvCache& cache, std::span<const RowSpan> spans);

  // Optional per-head normalisation before RoPE (RMSNorm over head_dim): (head_dim) each, or null.
  struct HeadNorms {
    const float* q = nullptr;
    const float* k = nullptr;
    float eps = 0;
  };

  // Takes the step's QKV product (rows, d_q + 2 d_kv), normalises it per head in place, keeps the queries, and writes K
  // and V into the reserved slots of `layer`.
  void Store(ThreadPool& pool, const kv::KvCache& cache, int layer, const dense::RopeTable& rope,
             const HeadNorms& norms, float* qkv);

  // out (rows, d_q) = softmax(q k^T) v over what each row may see.
  void Run(ThreadPool& pool, const kv::KvCache& cache, int layer, const dense::RopeTable& rope, float rope_magnitude,
           const dense::Activations& out);

 private:
  // Rows of a span that fall into one logical block.
  struct Segment {
    int span = 0;
    int block = 0;  // logical
    int first_row = 0;
    int rows = 0;
    int offset = 0;  // of the first row's token in the block
  };
  struct RowUnit {
    int span = 0;
    int row = 0;
    int position = 0;
    int first = 0;  // logical blocks
    int last = 0;
    int partial = -1;  // index into partials; -1: a whole row, which writes its result directly
  };
  struct Merge {
    int row = 0;
    int first_partial = 0;
    int partials = 0;
  };
  struct TileUnit {
    int span = 0;
    int row = 0;
    int rows = 0;
    int position = 0;
    int first = 0;
    int last = 0;
  };
  // Units for layers with one window size.
  struct WindowPlan {
    int window = 0;
    std::vector<RowUnit> rows;
    std::vector<Merge> merges;
    std::vector<TileUnit> tiles;
  };

  void PlanWindow(const kv::KvCache& cache, WindowPlan& plan);
  BlockRun RunOf(const kv::KvCache& cache, int layer, const RowSpan& span, int kv_head) const;
  void RunRow(const kv::KvCache& cache, int layer, const WindowPlan& plan, const RowUnit& unit, int kv_head,
              const dense::RopeTable& rope, const dense::Activations& out, int thread);
  void RunTile(const kv::KvCache& cache, int layer, const WindowPlan& plan, const TileUnit& unit, int kv_head,
               const dense::RopeTable& rope, float rope_magnitude, const dense::Activations& out, int thread);
  void WriteRow(const float* sums, const float* total, int queries, int row, int first_head,
                const dense::Activations& out) const;
  void MergeRow(const Merge& merge, const dense::Activations& out);

  size_t partial_floats() const { return static_cast<size_t>(shape_.n_heads) * (shape_.head_dim + 2); }

  HeadShape shape_;
  bool tiles_ = false;
  bool bf16_kernels_ = false;
  std::vector<RowSpan> spans_;
  std::vector<Segment> segments_;
  std::vector<WindowPlan> plans_;  // one per distinct window
  std::vector<int> plan_of_layer_;
  std::vector<float> q_;         // (max_rows, n_heads, 2, head_dim / 2)
  std::vector<float> partials_;  // (partials, n_heads, head_dim + 2): sums, max, total
  size_t thread_scratch_bytes_ = 0;
  HugeBuffer scratch_;  // (threads, thread_scratch_bytes_)
};

}  // namespace jointkv::attention
