#include "attention/attention.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <numbers>
#include <tuple>
#include <utility>

#include "attention/decoded_blocks.h"
#include "attention/head_reader.h"
#include "base/clock.h"
#include "base/cpu.h"
#include "dense/ops.h"

namespace jointkv::attention {
namespace {

constexpr int kTileRowsMin = 8;   // shorter spans go row by row
constexpr int kWholeRowsMin = 4;  // spans of so many rows keep the threads busy without parts
// Parts of one step: as many as keep a handful of threads evenly busy, fixed, so that results do not depend on threads.
constexpr int kPartsMax = 12;
constexpr int kPartTokensMin = 256;

// End of the split that begins with block `at`.
int SplitEnd(int at, int last) { return std::min(last, (at / kSplitBlocks + 1) * kSplitBlocks); }

// What a visit costs, in tokens: its block in whole vectors, and what does not depend on the block's length.
int Cost(const kv::LogicalBlock& block) { return RoundUp<int>(block.tokens, 16) + 8; }

}  // namespace

Attention::Attention(const HeadShape& shape, const kv::KvCache& cache, int threads, int max_rows, bool rows_independent)
    : shape_(shape),
      rows_independent_(rows_independent),
      bf16_kernels_(HasAvx512Bf16() && cache.shape().layout.codec == codec::Codec::kBf16) {
  if (bf16_kernels_) {
    attend_ = AttendBf16;
  } else if (cache.shape().layout.codec == codec::Codec::kBf16 && HasAvx2Kernel(shape.head_dim)) {
    attend_ = AttendAvx2;
  }
  tiles_ = !rows_independent && shape.group() * kTileRowsMin <= kTileQueries;
  for (const int window : cache.shape().window) {
    auto plan = std::ranges::find(plans_, window, &WindowPlan::window);
    if (plan == plans_.end()) {
      plans_.emplace_back();
      plans_.back().window = window;
      plans_.back().first_layer = static_cast<int>(plan_of_layer_.size());
      plan = plans_.end() - 1;
    }
    plan_of_layer_.push_back(static_cast<int>(plan - plans_.begin()));
  }
  query_energy_.resize(cache.shape().n_layers());
  for (int layer = 0; layer < cache.shape().n_layers(); ++layer) {
    const int keys = 2 * layer + static_cast<int>(kv::Kind::kK);
    if (codec::IsQuantised(cache.shape().sealed_codec(keys))) query_energy_[layer].sums.resize(shape.d_kv() / 2);
  }
  q_ = Floats(static_cast<size_t>(max_rows) * shape.d_q());
  const size_t row_bytes =
      RoundUp<size_t>(VisitScratchFloats(shape.head_dim) + 2 * kGroupMax * (shape.head_dim + 2), 16) * sizeof(float);
  const size_t tile_bytes = (bf16_kernels_ ? TileScratchBytes : GenericTileScratchBytes)(tiles_ ? shape.head_dim : 0);
  kernel_scratch_bytes_ = RoundUp<size_t>(std::max(row_bytes, tile_bytes), 64);
  decodes_ = !cache.shape().sealed.empty() || cache.residuals();
  const size_t reader_bytes =
      decodes_ ? std::max(HeadReader::ScratchBytes(shape.head_dim), DecodedBlocks::ScratchBytes(shape.head_dim)) : 0;
  orders_.resize(threads);
  thread_scratch_bytes_ = RoundUp<size_t>(kernel_scratch_bytes_ + reader_bytes, 4096);
  const size_t scratch_bytes = thread_scratch_bytes_ * threads;
  scratch_ = {memory_.Allocate(scratch_bytes), scratch_bytes};
}

std::span<float> Attention::Floats(size_t n) {
  return {reinterpret_cast<float*>(memory_.Allocate(n * sizeof(float))), n};
}

void Attention::Plan(const kv::KvCache& cache, std::span<const RowSpan> spans) {
  const double start_s = MonotonicSeconds();
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
    partials = std::max<size_t>(partials, plan.partials);
  }
  size_t longest = 0;
  for (const WindowPlan& plan : plans_) {
    for (const Part& part : plan.parts) longest = std::max<size_t>(longest, part.last - part.first);
  }
  for (LayerOrder& order : orders_) order.Reserve(longest);
  const size_t floats = partials * partial_floats();
  if (floats > partials_.size()) partials_ = Floats(std::max(floats, 2 * partials_.size()));
  times_.plan_s += MonotonicSeconds() - start_s;
}

void Attention::PlanWindow(const kv::KvCache& cache, WindowPlan& plan) {
  plan.visits.clear();
  plan.parts.clear();
  plan.merges.clear();
  plan.rows.clear();
  plan.tiles.clear();
  plan.partials = 0;
  int visiting_rows = 0;
  const auto end_of = [](const kv::LogicalBlock& block) { return block.start + block.tokens; };
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
    const BlockId* keys = cache.table(span.sequence, plan.first_layer, kv::Kind::kK);
    for (int row = 0; row < span.rows; ++row) {
      const int position = span.position + row;
      advance(position, position);
      if (span.rows >= kWholeRowsMin) {
        plan.rows.push_back({static_cast<int>(i), span.first_row + row, position, first, last});
        continue;
      }
      for (int block = first; block < last; ++block) {
        plan.visits.push_back({keys[block], static_cast<int>(plan.visits.size()), static_cast<int>(i),
                               span.first_row + row, position, block, visiting_rows});
      }
      ++visiting_rows;
    }
  }
  PlanParts(cache, plan, visiting_rows);
  // Long tiles first: the last ones handed out should be short.
  std::ranges::stable_sort(plan.tiles, std::greater<>(),
                           [](const TileUnit& unit) { return unit.rows * (unit.last - unit.first); });
}

// Cuts visits into parts and numbers the partials. A visit's `partial` comes in as its row's number.
void Attention::PlanParts(const kv::KvCache& cache, WindowPlan& plan, int rows) {
  std::vector<PlannedVisit>& visits = plan.visits;
  const int n = static_cast<int>(visits.size());
  if (rows_independent_) {
    // Splits stand at multiples of kSplitBlocks, so that they depend on the sequence alone.
    for (int at = 0; at < n;) {
      const int row = visits[at].row;
      const int first_partial = plan.partials;
      while (at < n && visits[at].row == row) {
        const int block = visits[at].block;
        Part part{at, at};
        while (part.last < n && visits[part.last].row == row && visits[part.last].block < SplitEnd(block, INT_MAX)) {
          visits[part.last].first = part.last == at;
          visits[part.last++].partial = plan.partials;
        }
        plan.parts.push_back(part);
        ++plan.partials;
        at = part.last;
      }
      plan.merges.push_back({row, first_partial, plan.partials - first_partial});
    }
    return;
  }
  // All that visit a block one after the other, blocks in the order of their first visits: where blocks lie in memory
  // does not change a result.
  std::ranges::sort(visits, [](const PlannedVisit& a, const PlannedVisit& b) {
    return std::pair(a.key.value, a.order) < std::pair(b.key.value, b.order);
  });
  for (int i = 1; i < n; ++i) {
    if (visits[i].key == visits[i - 1].key) visits[i].order = visits[i - 1].order;
  }
  const auto together = [](const PlannedVisit& a, const PlannedVisit& b) {
    return std::tuple(a.order, a.row, a.block) < std::tuple(b.order, b.row, b.block);
  };
  std::ranges::sort(visits, together);
  if (bf16_kernels_ && JoinBlocks(visits)) std::ranges::sort(visits, together);
  int64_t total = 0;
  const auto cost = [&](const PlannedVisit& visit) {
    return Cost(cache.blocks(spans_[visit.span].sequence)[visit.block]);
  };
  for (const PlannedVisit& visit : visits) total += cost(visit);
  const int parts = static_cast<int>(std::clamp<int64_t>(total / kPartTokensMin, 1, kPartsMax));
  plan.merges.assign(rows, Merge());
  last_part_.assign(rows, -1);
  int64_t done = 0;
  int at = 0;
  for (int part = 0; part < parts && at < n; ++part) {
    const int first = at;
    const int64_t end = total * (part + 1) / parts;
    // Rather not in the midst of those that visit a block: two parts would read and decode it.
    const auto midst = [&] { return at > first && visits[at].order == visits[at - 1].order; };
    for (; at < n && (part == parts - 1 || done < end || (midst() && done < end + total / parts / 4)); ++at) {
      PlannedVisit& visit = visits[at];
      done += cost(visit);
      visit.first = last_part_[visit.partial] != part;
      last_part_[visit.partial] = part;
      Merge& merge = plan.merges[visit.partial];
      merge.row = visit.row;
      merge.partials += visit.first;
    }
    if (at > first) plan.parts.push_back({first, at});
  }
  for (Merge& merge : plan.merges) {
    merge.first_partial = plan.partials;
    plan.partials += merge.partials;
    merge.partials = 0;  // counted again below
  }
  for (PlannedVisit& visit : visits) {
    Merge& merge = plan.merges[visit.partial];
    merge.partials += visit.first;
    visit.partial = merge.first_partial + merge.partials - 1;
  }
}

// Two blocks that the same rows visit, one after the other, get one order: then a row's visits to them follow each
// other, and are added up at once. No more than two: their keys and values, of one head, stay in the first cache also
// where readers part in later layers. Whether there were any.
bool Attention::JoinBlocks(std::span<PlannedVisit> visits) {
  const auto end_of = [&](size_t first) {
    size_t last = first + 1;
    while (last < visits.size() && visits[last].order == visits[first].order) ++last;
    return last;
  };
  bool any = false;
  for (size_t first = 0; first < visits.size();) {
    const size_t next = end_of(first);
    const size_t rows = next - first;
    const auto own = visits.subspan(first, rows);
    first = next;
    if (rows == 1 || 2 * rows > kBatchVisits || next == visits.size() || end_of(next) - next != rows) continue;
    const auto twice = [](const PlannedVisit& a, const PlannedVisit& b) { return a.row == b.row; };
    if (std::ranges::adjacent_find(own, twice) != own.end()) continue;
    const auto other = visits.subspan(next, rows);
    if (!std::ranges::equal(own, other, {}, &PlannedVisit::row, &PlannedVisit::row)) continue;
    for (PlannedVisit& visit : other) visit.order = own.front().order;
    first = next + rows;
    any = true;
  }
  return any;
}

BlockRun Attention::RunOf(const kv::KvCache& cache, int layer, const RowSpan& span) const {
  BlockRun run;
  run.layout = &cache.shape().layout;
  run.blocks = cache.blocks(span.sequence).data();
  run.k = cache.table(span.sequence, layer, kv::Kind::kK);
  run.v = cache.table(span.sequence, layer, kv::Kind::kV);
  run.k_scale = cache.scales(span.sequence, layer, kv::Kind::kK);
  run.v_scale = cache.scales(span.sequence, layer, kv::Kind::kV);
  run.cache = &cache;
  run.key_reference = cache.key_reference(layer);
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
  CountQueries(layer);
}

void Attention::CountQueries(int layer) {
  QueryEnergy& energy = query_energy_[layer];
  if (energy.sums.empty()) return;
  const int pairs = shape_.head_dim / 2;
  for (const RowSpan& span : spans_) {
    for (int i = span.position == 0 ? 1 : 0; i < span.rows && energy.rows < kQueryRowsMax; ++i, ++energy.rows) {
      const float* q = q_.data() + static_cast<ptrdiff_t>(span.first_row + i) * shape_.d_q();
      for (int head = 0; head < shape_.n_heads; ++head, q += shape_.head_dim) {
        double* sums = energy.sums.data() + static_cast<ptrdiff_t>(head / shape_.group()) * pairs;
        for (int pair = 0; pair < pairs; ++pair) {
          const double first = q[pair];
          const double second = q[pairs + pair];
          sums[pair] += first * first + second * second;
        }
      }
    }
  }
}

std::span<const double> Attention::query_energy(int layer) const {
  const QueryEnergy& energy = query_energy_[layer];
  if (energy.rows == 0) return {};
  return energy.sums;
}

void Attention::Run(ThreadPool& pool, const kv::KvCache& cache, int layer, const dense::RopeTable& rope,
                    float rope_magnitude, const dense::Activations& out) {
  const double start_s = MonotonicSeconds();
  const WindowPlan& plan = plans_[plan_of_layer_[layer]];
  runs_.clear();
  for (const RowSpan& span : spans_) runs_.push_back(RunOf(cache, layer, span));
  const int heads = shape_.n_kv_heads;
  const int tiles = static_cast<int>(plan.tiles.size()) * heads;
  const int parts = static_cast<int>(plan.parts.size());
  const int rows = static_cast<int>(plan.rows.size()) * heads;
  pool.ParallelFor(tiles + parts + rows, [&](int task, int thread) {
    if (task < tiles) {
      RunTile(plan, plan.tiles[task / heads], task % heads, rope, rope_magnitude, out, thread);
    } else if (task < tiles + parts) {
      RunPart(plan, task - tiles, rope, thread);
    } else {
      const int unit = task - tiles - parts;
      RunRow(plan, plan.rows[unit / heads], unit % heads, rope, out, thread);
    }
  });
  pool.ParallelFor(static_cast<int>(plan.merges.size()) * heads,
                   [&](int task, int) { MergeRow(plan.merges[task / heads], task % heads, out); });
  times_.run_s += MonotonicSeconds() - start_s;
}

void Attention::RunTile(const WindowPlan& plan, const TileUnit& unit, int kv_head, const dense::RopeTable& rope,
                        float rope_magnitude, const dense::Activations& out, int thread) {
  TileArgs args;
  args.run = runs_[unit.span];
  args.kv_head = kv_head;
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
  HeadReader reader(ReaderScratch(thread));
  args.reader = &reader;
  args.scratch = scratch_.data() + thread * thread_scratch_bytes_;
  (bf16_kernels_ ? TileAttentionBf16 : TileAttentionGeneric)(args);
}

Visit Attention::VisitOf(const BlockRun& run, int index, int row, int position, int window, int head,
                         const dense::RopeTable& rope) const {
  const kv::LogicalBlock& block = run.blocks[index];
  Visit visit;
  visit.cap = block.cap;
  visit.begin = window == 0 ? 0 : std::max(0, position - window + 1 - block.start);
  visit.end = std::min<int>(block.tokens, position + 1 - block.start);
  visit.k_scale = run.KScale(index);
  visit.v_scale = run.VScale(index);
  visit.cos = rope.cos(position - block.base);
  visit.sin = rope.sin(position - block.base);
  visit.q = q_.data() + static_cast<ptrdiff_t>(row) * shape_.d_q() + static_cast<ptrdiff_t>(head) * shape_.head_dim;
  return visit;
}

// Split after split, added up as MergeRow would.
void Attention::RunRow(const WindowPlan& plan, const RowUnit& unit, int kv_head, const dense::RopeTable& rope,
                       const dense::Activations& out, int thread) {
  auto* scratch = reinterpret_cast<float*>(scratch_.data() + thread * thread_scratch_bytes_);
  const int head_dim = shape_.head_dim;
  const ptrdiff_t part_floats = kGroupMax * (head_dim + 2);
  const auto partial = [&](float* at) { return Partial{at, at + ptrdiff_t{kGroupMax} * head_dim}; };
  const Partial all = partial(scratch + VisitScratchFloats(head_dim));
  const Partial split = partial(all.sums + part_floats);  // the present one, after the first
  Visit visits[kVisitsMax];
  VisitArgs args;
  args.layout = runs_.front().layout;
  args.visits = visits;
  args.scratch = scratch;
  args.ahead = &orders_[thread].ahead;
  args.ahead->Clear();
  HeadReader reader(ReaderScratch(thread));
  for (int g = 0; g < shape_.group(); g += kGroupMax) {
    const int head = kv_head * shape_.group() + g;
    args.queries = std::min(kGroupMax, shape_.group() - g);
    for (int at = unit.first; at < unit.last;) {
      const Partial& part = at == unit.first ? all : split;
      const int end = SplitEnd(at, unit.last);
      for (const int first = at; at < end; at += args.n) {
        args.n = std::min(kVisitsMax, end - at);
        for (int i = 0; i < args.n; ++i) {
          visits[i] = VisitOf(runs_[unit.span], at + i, unit.row, unit.position, plan.window, head, rope);
          visits[i].k = reader.Keys(runs_[unit.span], at + i, kv_head);
          visits[i].v = reader.Values(runs_[unit.span], at + i, kv_head);
          visits[i].sum = part;
        }
        visits[0].fresh = at == first;
        attend_(args);
      }
      if (part.sums != all.sums) Combine(all, split, args.queries, head_dim);
    }
    Write(all, args.queries, unit.row, head, out);
  }
}

// The queries from `head` on.
void Attention::Write(const Partial& sum, int queries, int row, int head, const dense::Activations& out) const {
  const int head_dim = shape_.head_dim;
  for (int q = 0; q < queries; ++q) {
    WriteAverage(sum.sums + static_cast<ptrdiff_t>(q) * head_dim, sum.stats[kGroupMax + q], head_dim, out, row,
                 (head + q) * head_dim);
  }
}

Partial Attention::PartialOf(int index, int kv_head, int query) {
  float* sums = partials_.data() + index * partial_floats();
  const ptrdiff_t head = ptrdiff_t{kv_head} * shape_.group() + query;
  const ptrdiff_t group = ptrdiff_t{kv_head} * CeilDiv(shape_.group(), kGroupMax) + query / kGroupMax;
  return {sums + head * shape_.head_dim, sums + shape_.d_q() + 2 * kGroupMax * group};
}

// Partials of one row, added to the first in their order (as in flash decoding).
void Attention::MergeRow(const Merge& merge, int kv_head, const dense::Activations& out) {
  for (int g = 0; g < shape_.group(); g += kGroupMax) {
    const int queries = std::min(kGroupMax, shape_.group() - g);
    const Partial all = PartialOf(merge.first_partial, kv_head, g);
    for (int i = 1; i < merge.partials; ++i)
      Combine(all, PartialOf(merge.first_partial + i, kv_head, g), queries, shape_.head_dim);
    Write(all, queries, merge.row, kv_head * shape_.group() + g, out);
  }
}

}  // namespace jointkv::attention
