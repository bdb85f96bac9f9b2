// Attention: one step's attention over the block store, layer by layer.
//
// Plan cuts a step into units of work once; Store and Run then execute them for each layer. A unit is one of
//   a part   visits: one row (one position of one sequence) against one of its blocks, for all heads. The visits of
//            decoding rows are ordered by physical block (or by two that the same rows read, one behind the other), so
//            that what several sequences share is read from memory once for all of them; each part keeps a partial
//            result per row, and these are merged after
//   a row    one position against all its blocks, kSplitBlocks at a time, of one KV head: short runs of a prompt
//   a tile   a run of positions of one sequence against all their tokens, of one KV head (prefill)
// With `rows_independent` the parts are splits of single rows instead, and a row's sums are added up in the same order
// whatever else is in the step.
//
// Threads: called by one thread, works on the pool's. Owns: plan and scratch, which grow to the largest step seen.
// Fails how: never.
#pragma once

#include <span>
#include <vector>

#include "attention/kernels.h"
#include "attention/read_ahead.h"
#include "base/huge_buffer.h"
#include "base/thread_pool.h"
#include "kv/kv_cache.h"

namespace jointkv::attention {

class DecodedBlocks;

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

  // Seconds that all calls of Plan, and of Run, have taken.
  struct Times {
    double plan_s = 0;
    double run_s = 0;
  };
  const Times& times() const { return times_; }

  // Heads of encoded blocks that parts have decoded so far.
  int64_t decoded_heads() const;

  // How queries weigh the channel pairs of a layer's keys: (n_kv_heads, head_dim / 2) sums of squares of their queries,
  // over the first kQueryRowsMax rows that Store took, without sequences' first ones. Empty: there were none, or the
  // store does not encode this layer's keys.
  static constexpr int kQueryRowsMax = 1024;
  std::span<const double> query_energy(int layer) const;

 private:
  // Rows of a span that fall into one logical block.
  struct Segment {
    int span = 0;
    int block = 0;  // logical
    int first_row = 0;
    int rows = 0;
    int offset = 0;  // of the first row's token in the block
  };
  // One row against one block, for all heads.
  struct PlannedVisit {
    BlockId key;  // physical block in the first layer of this window size
    // Among all visits, as they come; then, that of the first visit to the same block, or to the first of two joined
    // ones.
    int order = 0;
    int span = 0;
    int row = 0;
    int position = 0;
    int block = 0;       // logical
    int partial = 0;     // index into partials
    bool first = false;  // of its partial
  };
  static constexpr int kBatchVisits = 64;  // at most, and of two joined blocks
  struct Part {
    int first = 0;  // visits
    int last = 0;
  };
  struct Merge {
    int row = 0;
    int first_partial = 0;
    int partials = 0;
  };
  struct RowUnit {
    int span = 0;
    int row = 0;
    int position = 0;
    int first = 0;  // logical blocks
    int last = 0;
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
    int first_layer = 0;
    std::vector<PlannedVisit> visits;
    std::vector<Part> parts;
    std::vector<Merge> merges;
    std::vector<RowUnit> rows;
    std::vector<TileUnit> tiles;
    int partials = 0;
  };

  void PlanWindow(const kv::KvCache& cache, WindowPlan& plan);
  void PlanParts(const kv::KvCache& cache, WindowPlan& plan, int rows);
  static bool JoinBlocks(std::span<PlannedVisit> visits);
  std::span<float> Floats(size_t n);
  BlockRun RunOf(const kv::KvCache& cache, int layer, const RowSpan& span) const;
  // A row against the visible part of a block; where its keys and values are and its results go is still to be set.
  Visit VisitOf(const BlockRun& run, int index, int row, int position, int window, int head,
                const dense::RopeTable& rope) const;
  // How far it is from one head of a visit's blocks to the next: 0 for what is decoded head after head into one place.
  struct HeadStep {
    ptrdiff_t k = 0;
    ptrdiff_t v = 0;
  };
  // A visit as a layer meets it.
  struct Meeting {
    int visit = 0;
    BlockId k;
    BlockId v;
    uint64_t rank = 0;  // among those that one block of the plan's first layer brings together
  };
  struct alignas(64) LayerOrder {
    std::vector<Meeting> meetings;
    std::vector<BlockId> seen_k;
    std::vector<BlockId> seen_v;
    Ahead ahead;
    int64_t decoded_heads = 0;

    void Reserve(size_t n) {
      if (n <= meetings.capacity()) return;
      meetings.clear();
      meetings.reserve(2 * n);
      seen_k.reserve(2 * n);
      seen_v.reserve(2 * n);
    }
  };
  void OrderVisits(const WindowPlan& plan, const Part& part, LayerOrder& order) const;
  void Arrange(const WindowPlan& plan, std::span<Meeting> together, LayerOrder& order) const;
  Visit FirstHead(const WindowPlan& plan, const Meeting& meeting, const dense::RopeTable& rope, DecodedBlocks& decoded,
                  HeadStep& step);
  void AskFor(const PlannedVisit& later, BlockId k, BlockId v, const dense::RopeTable& rope, Ahead& ahead) const;
  void AskForPart(const WindowPlan& plan, int index, const dense::RopeTable& rope, Ahead& ahead) const;
  std::byte* ReaderScratch(int thread) {
    return scratch_.data() + thread * thread_scratch_bytes_ + kernel_scratch_bytes_;
  }
  // The queries of a KV head from `query` of its group on.
  Partial PartialOf(int index, int kv_head, int query = 0);
  int BatchVisits(const WindowPlan& plan, const std::vector<Meeting>& meetings, int first) const;
  int EndOfUndivided(const WindowPlan& plan, const std::vector<Meeting>& meetings, int first) const;
  void RunPart(const WindowPlan& plan, int index, const dense::RopeTable& rope, int thread);
  void RunRow(const WindowPlan& plan, const RowUnit& unit, int kv_head, const dense::RopeTable& rope,
              const dense::Activations& out, int thread);
  void RunTile(const WindowPlan& plan, const TileUnit& unit, int kv_head, const dense::RopeTable& rope,
               float rope_magnitude, const dense::Activations& out, int thread);
  void Write(const Partial& sum, int queries, int row, int head, const dense::Activations& out) const;
  void MergeRow(const Merge& merge, int kv_head, const dense::Activations& out);

  // (n_heads, head_dim) sums, then (n_kv_heads, groups of kGroupMax queries, 2, kGroupMax) stats.
  size_t partial_floats() const {
    return static_cast<size_t>(shape_.d_q()) +
           static_cast<size_t>(2 * kGroupMax) * shape_.n_kv_heads * CeilDiv(shape_.group(), kGroupMax);
  }

  void CountQueries(int layer);

  HeadShape shape_;
  Times times_;
  bool rows_independent_ = false;
  bool tiles_ = false;
  bool bf16_kernels_ = false;
  bool decodes_ = false;  // blocks may be encoded
  void (*attend_)(const VisitArgs&) = AttendGeneric;
  std::vector<RowSpan> spans_;
  std::vector<Segment> segments_;
  std::vector<WindowPlan> plans_;  // one per distinct window
  std::vector<int> plan_of_layer_;
  struct QueryEnergy {
    std::vector<double> sums;  // empty: not counted
    int rows = 0;
  };
  std::vector<QueryEnergy> query_energy_;  // by layer
  std::vector<int> last_part_;             // (visiting rows) while planning
  std::vector<BlockRun> runs_;             // (spans) of the present layer
  std::vector<LayerOrder> orders_;         // (threads)
  size_t kernel_scratch_bytes_ = 0;
  size_t thread_scratch_bytes_ = 0;
  // What every visit touches, on huge pages: small ones may happen to share sets of a cache, for the whole of a run.
  HugeArena memory_;
  std::span<float> q_;            // (max_rows, n_heads, 2, head_dim / 2)
  std::span<float> partials_;     // (partials, partial_floats())
  std::span<std::byte> scratch_;  // (threads, thread_scratch_bytes_): a kernel's, then what decodes blocks
};

}  // namespace jointkv::attention
