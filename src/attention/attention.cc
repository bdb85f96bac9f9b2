#include "attention/attention.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/cpu.h"
#include "dense/ops.h"

namespace jointkv::attention {
namespace {

constexpr int kTileRowsMin = 8;  // shorter spans go row by row
// Spans of so many rows keep the threads busy without splitting rows, so their partial results need no memory.
constexpr int kWholeRowsMin = 4;

// Sums, maxima and totals of one row kernel call.
constexpr size_t ResultFloats(int head_dim) { return static_cast<size_t>(kGroupMax) * (head_dim + 2); }

// End of the split that begins with block `at`.
int SplitEnd(int at, int last) { return std::min(last, (at / kSplitBlocks + 1) * kSplitBlocks); }

// Adds one partial result (sums of head_dim, max, total) to another, always the later blocks to the earlier ones.
void Combine(float* sums, float& max, float& total, const float* more_sums, float more_max, float more_total,
             int head_dim) {
  const float largest = std::max(max, more_max);
  const float keep = std::exp2(max - largest);
  const float add = std::exp2(more_max - largest);
  for (int c = 0; c < head_dim; ++c) sums[c] = sums[c] * keep + more_sums[c] * add;
  total = total * keep + more_total * add;
  max = largest;
}

}  // namespace

Attention::Attention(const HeadShape& shape, const kv::KvCache& cache, int threads, int max_rows, bool rows_independent)
    : shape_(shape), bf16_kernels_(HasAvx512Bf16() && cache.shape().layout.codec == codec::Codec::kBf16) {
  tiles_ = bf16_kernels_ && !rows_independent && shape.group() * kTileRowsMin <= kTileQueries;
  for (const int window : cache.shape().window) {
    auto plan = std::ranges::find(plans_, window, &WindowPlan::window);
    if (plan == plans_.end()) {
      plans_.emplace_back();
      plans_.back().window = window;
      plan = plans_.end() - 1;
    }
    plan_of_layer_.push_back(static_cast<int>(plan - plans_.begin()));
  }
  q_.resize(static_cast<size_t>(max_rows) * shape.d_q());
  const size_t row_bytes = (RowScratchFloats(shape.head_dim) + 2 * ResultFloats(shape.head_dim)) * sizeof(float);
  const size_t tile_bytes = tiles_ ? TileScratchBytes(shape.head_dim) : 0;
  thread_scratch_bytes_ = RoundUp<size_t>(std::max(row_bytes, tile_bytes), 4096);
  scratch_ = HugeBuffer(thread_scratch_bytes_ * threads);
}

void Attention::Plan(const kv::KvCache& cache, std::span<const RowSpan> spans) {
  spans_.assign(spans.begin(), spans.end());
  segments_.clear();
  for (size_t i = 0; i < spans.size(); ++i) {
    const RowSpan& span = spans[i];
    const auto blocks = cache.blocks(span.sequence);
    int end = span.position + span.rows;
    CHECK(end == cache.length(span.sequence));
    int block = static_cast<int>(blocks.size()) - 1;
    while (blocks[block].start > span.position) --block;
    for (int row = 0; row < span.rows; ++block) {
      const int offset = span.position + row - blocks[block].start;
      const int rows = std::min(span.rows - row, blocks[block].tokens - offset);
      segments_.push_back({static_cast<int>(i), block, span.first_row + row, rows, offset});
      row += rows;
    }
  }
  size_t partials = 0;
  for (WindowPlan& plan : plans_) {
    PlanWindow(cache, plan);
    if (!plan.merges.empty())
      partials = std::max<size_t>(partials, plan.merges.back().first_partial + plan.merges.back().partials);
  }
  if (partials * partial_floats() > partials_.size()) partials_.resize(partials * partial_floats());
}

void Attention::PlanWindow(const kv::KvCache& cache, WindowPlan& plan) {
  plan.rows.clear();
  plan.merges.clear();
  plan.tiles.clear();
  const auto end_of = [](const kv::LogicalBlock& block) { return block.start + block.tokens; };
  int partials = 0;
  for (size_t i = 0; i < spans_.size(); ++i) {
    const RowSpan& span = spans_[i];
    const auto blocks = cache.blocks(span.sequence);
    // Visible blocks move forward with the position.
    int first = 0;
    int last = 0;
    const auto advance = [&](int first_position, int last_position) {
      const int oldest = plan.window == 0 ? 0 : std::max(0, first_position - plan.window + 1);
      while (end_of(blocks[first]) <= oldest) ++first;
      while (last < static_cast<int>(blocks.size()) && blocks[last].start <= last_position) ++last;
    };
    if (tiles_ && span.rows >= kTileRowsMin) {
      const int step = std::clamp(kTileQueries / shape_.group(), 1, 64);
      for (int row = 0; row < span.rows; row += step) {
        const int rows = std::min(step, span.rows - row);
        advance(span.position + row, span.position + row + rows - 1);
        plan.tiles.push_back({static_cast<int>(i), span.first_row + row, rows, span.position + row, first, last});
      }
      continue;
    }
    for (int row = 0; row < span.rows; ++row) {
      const int position = span.position + row;
      advance(position, position);
      // Splits stand at multiples of kSplitBlocks, so that they depend on the sequence alone.
      const int splits = (last - 1) / kSplitBlocks - first / kSplitBlocks + 1;
      if (splits == 1 || span.rows >= kWholeRowsMin) {
        plan.rows.push_back({static_cast<int>(i), span.first_row + row, position, first, last, -1});
        continue;
      }
      plan.merges.push_back({span.first_row + row, partials, splits});
      for (int at = first; at < last;) {
        const int end = SplitEnd(at, last);
        plan.rows.push_back({static_cast<int>(i), span.first_row + row, position, at, end, partials++});
        at = end;
      }
    }
  }
  // Long tiles first: the last ones handed out should be short.
  std::ranges::stable_sort(plan.tiles, std::greater<>(),
                           [](const TileUnit& unit) { return unit.rows * (unit.last - unit.first); });
}

BlockRun Attention::RunOf(const kv::KvCache& cache, int layer, const RowSpan& span, int kv_head) const {
  BlockRun run;
  run.layout = &cache.shape().layout;
  run.blocks = cache.blocks(span.sequence).data();
  run.k = cache.table(span.sequence, layer, kv::Kind::kK);
  run.v = cache.table(span.sequence, layer, kv::Kind::kV);
  run.k_scale = cache.scales(span.sequence, layer, kv::Kind::kK);
  run.v_scale = cache.scales(span.sequence, layer, kv::Kind::kV);
  run.arena = cache.data(BlockId(0));
  run.granule_bytes = run.layout->granule_bytes();
  run.kv_head = kv_head;
  return run;
}

void Attention::Store(ThreadPool& pool, const kv::KvCache& cache, int layer, const dense::RopeTable& rope,
                      const HeadNorms& norms, float* qkv) {
  const int width = shape_.d_q() + 2 * shape_.d_kv();
  pool.ParallelFor(static_cast<int>(segments_.size()), [&](int task, int thread) {
    const Segment& segment = segments_[task];
    const RowSpan& span = spans_[segment.span];
    TokenArgs args;
    args.layout = &cache.shape().layout;
    args.n_heads = shape_.n_heads;
    args.neox = shape_.neox;
    args.q_scale = shape_.scale * static_cast<float>(std::numbers::log2e);
    args.k_block = cache.data(cache.table(span.sequence, layer, kv::Kind::kK)[segment.block]);
    args.v_block = cache.data(cache.table(span.sequence, layer, kv::Kind::kV)[segment.block]);
    const kv::LogicalBlock& block = cache.blocks(span.sequence)[segment.block];
    args.cap = block.cap;
    args.scratch = reinterpret_cast<float*>(scratch_.data() + thread * thread_scratch_bytes_);
    for (int i = 0; i < segment.rows; ++i) {
      float* row = qkv + static_cast<ptrdiff_t>(segment.first_row + i) * width;
      for (int head = 0; norms.q != nullptr && head < shape_.n_heads; ++head) {
        dense::RmsNormRow(row + static_cast<ptrdiff_t>(head) * shape_.head_dim, norms.q, norms.eps, shape_.head_dim);
      }
      for (int head = 0; norms.k != nullptr && head < shape_.n_kv_heads; ++head) {
        dense::RmsNormRow(row + static_cast<ptrdiff_t>(shape_.n_heads + head) * shape_.head_dim, norms.k, norms.eps,
                          shape_.head_dim);
      }
      args.qkv = row;
      args.q = q_.data() + static_cast<ptrdiff_t>(segment.first_row + i) * shape_.d_q();
      args.offset = segment.offset + i;
      args.cos = rope.cos(block.start - block.base + args.offset);
      args.sin = rope.sin(block.start - block.base + args.offset);
      StoreToken(args);
    }
  });
}

void Attention::Run(ThreadPool& pool, const kv::KvCache& cache, int layer, const dense::RopeTable& rope,
                    float rope_magnitude, const dense::Activations& out) {
  const WindowPlan& plan = plans_[plan_of_layer_[layer]];
  const int heads = shape_.n_kv_heads;
  const int tiles = static_cast<int>(plan.tiles.size()) * heads;
  const int rows = static_cast<int>(plan.rows.size()) * heads;
  pool.ParallelFor(tiles + rows, [&](int task, int thread) {
    if (task < tiles) {
      RunTile(cache, layer, plan, plan.tiles[task / heads], task % heads, rope, rope_magnitude, out, thread);
    } else {
      RunRow(cache, layer, plan, plan.rows[(task - tiles) / heads], (task - tiles) % heads, rope, out, thread);
    }
  });
  pool.ParallelFor(static_cast<int>(plan.merges.size()), [&](int task, int) { MergeRow(plan.merges[task], out); });
}

void Attention::RunTile(const kv::KvCache& cache, int layer, const WindowPlan& plan, const TileUnit& unit, int kv_head,
                        const dense::RopeTable& rope, float rope_magnitude, const dense::Activations& out, int thread) {
  TileArgs args;
  args.run = RunOf(cache, layer, spans_[unit.span], kv_head);
  args.rope = &rope;
  args.inverse_magnitude = 1 / rope_magnitude;
  args.q = q_.data() + static_cast<ptrdiff_t>(unit.row) * shape_.d_q() +
           static_cast<ptrdiff_t>(kv_head) * shape_.group() * shape_.head_dim;
  args.q_row_stride = shape_.d_q();
  args.group = shape_.group();
  args.rows = unit.rows;
  args.position = unit.position;
  args.window = plan.window;
  args.first = unit.first;
  args.last = unit.last;
  args.out = out;
  args.out_row = unit.row;
  args.out_column = kv_head * shape_.group() * shape_.head_dim;
  args.scratch = scratch_.data() + thread * thread_scratch_bytes_;
  TileAttentionBf16(args);
}

void Attention::RunRow(const kv::KvCache& cache, int layer, const WindowPlan& plan, const RowUnit& unit, int kv_head,
                       const dense::RopeTable& rope, const dense::Activations& out, int thread) {
  auto* scratch = reinterpret_cast<float*>(scratch_.data() + thread * thread_scratch_bytes_);
  RowArgs args;
  args.run = RunOf(cache, layer, spans_[unit.span], kv_head);
  args.rope = &rope;
  args.position = unit.position;
  args.window = plan.window;
  args.first = unit.first;
  args.last = unit.last;
  args.scratch = scratch;
  const int head_dim = shape_.head_dim;
  const auto sums_of = [&](int slot) { return scratch + RowScratchFloats(head_dim) + slot * ResultFloats(head_dim); };
  for (int g = 0; g < shape_.group(); g += kGroupMax) {
    const int head = kv_head * shape_.group() + g;
    args.queries = std::min(kGroupMax, shape_.group() - g);
    args.q = q_.data() + static_cast<ptrdiff_t>(unit.row) * shape_.d_q() + static_cast<ptrdiff_t>(head) * head_dim;
    if (unit.partial >= 0) {
      float* partial = partials_.data() + unit.partial * partial_floats();
      args.sums = partial + static_cast<ptrdiff_t>(head) * head_dim;
      args.max = partial + static_cast<ptrdiff_t>(shape_.n_heads) * head_dim + head;
      args.total = args.max + shape_.n_heads;
      (bf16_kernels_ ? RowAttentionBf16 : RowAttentionGeneric)(args);
      continue;
    }
    // A whole row: split after split, added up as MergeRow would.
    float* sums = sums_of(0);
    float* max = sums + static_cast<ptrdiff_t>(kGroupMax) * head_dim;
    float* total = max + kGroupMax;
    for (int at = unit.first; at < unit.last; at = args.last) {
      args.first = at;
      args.last = SplitEnd(at, unit.last);
      args.sums = at == unit.first ? sums : sums_of(1);
      args.max = args.sums + static_cast<ptrdiff_t>(kGroupMax) * head_dim;
      args.total = args.max + kGroupMax;
      (bf16_kernels_ ? RowAttentionBf16 : RowAttentionGeneric)(args);
      for (int q = 0; at != unit.first && q < args.queries; ++q) {
        const ptrdiff_t offset = static_cast<ptrdiff_t>(q) * head_dim;
        Combine(sums + offset, max[q], total[q], args.sums + offset, args.max[q], args.total[q], head_dim);
      }
    }
    WriteRow(sums, total, args.queries, unit.row, head, out);
  }
}

void Attention::WriteRow(const float* sums, const float* total, int queries, int row, int first_head,
                         const dense::Activations& out) const {
  const int head_dim = shape_.head_dim;
  for (int g = 0; g < queries; ++g) {
    const float scale = 1.0f / total[g];
    const float* in = sums + static_cast<ptrdiff_t>(g) * head_dim;
    const int column = (first_head + g) * head_dim;
    if (out.precision == dense::Precision::kBf16) {
      for (int c = 0; c < head_dim; ++c) out.bf16(row)[column + c] = codec::Bf16FromF32(in[c] * scale);
    } else {
      for (int c = 0; c < head_dim; ++c) out.f32(row)[column + c] = in[c] * scale;
    }
  }
}

// Partials of one row, added to the first in block order (as in flash decoding).
void Attention::MergeRow(const Merge& merge, const dense::Activations& out) {
  const int head_dim = shape_.head_dim;
  for (int head = 0; head < shape_.n_heads; ++head) {
    const auto sums = [&](int i) {
      return partials_.data() + (merge.first_partial + i) * partial_floats() + static_cast<ptrdiff_t>(head) * head_dim;
    };
    const auto max = [&](int i) {
      return partials_.data() + (merge.first_partial + i) * partial_floats() +
             static_cast<ptrdiff_t>(shape_.n_heads) * head_dim + head;
    };
    for (int i = 1; i < merge.partials; ++i) {
      Combine(sums(0), *max(0), max(0)[shape_.n_heads], sums(i), *max(i), max(i)[shape_.n_heads], head_dim);
    }
    WriteRow(sums(0), max(0) + shape_.n_heads, 1, merge.row, head, out);
  }
}

}  // namespace jointkv::attention
