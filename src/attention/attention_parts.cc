// Running a part of a plan: visits in the order of a layer, a batch at a time.
#include <algorithm>

#include "attention/attention.h"
#include "attention/decoded_blocks.h"
#include "attention/head_reader.h"

namespace jointkv::attention {
namespace {

constexpr int kDecodedVisitsMax = 64;  // of a batch, where blocks may be encoded

// Of each visit of a head, where a kernel asks for one at a time.
constexpr int kSlowLines = 40;

int RankOf(BlockId block, std::vector<BlockId>& seen) {
  int rank = static_cast<int>(seen.size()) - 1;
  while (rank >= 0 && seen[rank] != block) --rank;
  if (rank >= 0) return rank;
  seen.push_back(block);
  return static_cast<int>(seen.size()) - 1;
}

}  // namespace

// The plan brings visits together that share a block in its first layer. In a later layer, where fewer are alike, they
// may read several blocks: those to one block of keys come one after the other, and of these those to one of values.
void Attention::OrderVisits(const WindowPlan& plan, const Part& part, LayerOrder& order) const {
  std::vector<Meeting>& meetings = order.meetings;
  meetings.clear();
  for (int i = part.first; i < part.last; ++i) {
    const PlannedVisit& planned = plan.visits[i];
    const BlockRun& run = runs_[planned.span];
    meetings.push_back({i, run.k[planned.block], run.v[planned.block]});
  }
  for (size_t first = 0; first < meetings.size();) {
    size_t last = first + 1;
    bool alike = true;
    while (last < meetings.size() &&
           plan.visits[meetings[last].visit].order == plan.visits[meetings[first].visit].order) {
      alike &= meetings[last].k == meetings[first].k && meetings[last].v == meetings[first].v;
      ++last;
    }
    if (!alike) Arrange(plan, std::span(meetings).subspan(first, last - first), order);
    first = last;
  }
}

// Blocks in the order of their first visits: where they lie in memory does not change a result. A row that comes twice
// adds up in order.
void Attention::Arrange(const WindowPlan& plan, std::span<Meeting> together, LayerOrder& order) const {
  order.seen_k.clear();
  order.seen_v.clear();
  for (size_t i = 0; i < together.size(); ++i) {
    Meeting& meeting = together[i];
    if (i > 0 && plan.visits[meeting.visit].row == plan.visits[together[i - 1].visit].row) {
      meeting.rank = together[i - 1].rank;
      continue;
    }
    meeting.rank = uint64_t{static_cast<uint32_t>(RankOf(meeting.k, order.seen_k))} << 32 |
                   static_cast<uint32_t>(RankOf(meeting.v, order.seen_v));
  }
  std::ranges::sort(together, [](const Meeting& a, const Meeting& b) {
    return a.rank != b.rank ? a.rank < b.rank : a.visit < b.visit;
  });
}

// Batch after batch, head after head: what a batch's visits share is then in a near cache, and is decoded once for all
// of them.
void Attention::RunPart(const WindowPlan& plan, const Part& part, const dense::RopeTable& rope, int thread) {
  Visit visits[kDecodedVisitsMax];
  HeadStep steps[kDecodedVisitsMax];
  const int batch_max = decodes_ ? kDecodedVisitsMax : kVisitsMax;
  LayerOrder& order = orders_[thread];
  OrderVisits(plan, part, order);
  const std::vector<Meeting>& meetings = order.meetings;
  const int end = static_cast<int>(meetings.size());
  VisitArgs args;
  args.layout = runs_.front().layout;
  args.scratch = reinterpret_cast<float*>(scratch_.data() + thread * thread_scratch_bytes_);
  DecodedBlocks decoded(shape_.head_dim, ReaderScratch(thread));
  Ahead& ahead = order.ahead;
  ahead.Clear();
  args.ahead = &ahead;
  for (int first = 0, n = 0; first < end; first += n) {
    decoded.Clear();
    for (n = 0; n < batch_max && first + n < end && decoded.HasRoom(); ++n)
      visits[n] = FirstHead(plan, meetings[first + n], rope, decoded, steps[n]);
    if (first + n < end) {
      for (int i = first + n; i < std::min(first + 2 * n, end); ++i)
        AskFor(plan.visits[meetings[i].visit], meetings[i].k, meetings[i].v, rope, ahead);
    } else {
      AskForPart(plan, &part - plan.parts.data() + static_cast<ptrdiff_t>(orders_.size()), rope, ahead);
    }
    ahead.set_fast(ahead.lines() > ptrdiff_t{kSlowLines} * n * shape_.n_kv_heads);
    for (int kv_head = 0; kv_head < shape_.n_kv_heads; ++kv_head) {
      order.decoded_heads += decoded.Decode(kv_head);
      for (int at = 0; at < n; at += args.n) {
        args.visits = visits + at;
        args.n = std::min(kVisitsMax, n - at);
        for (int g = 0; g < shape_.group(); g += kGroupMax) {
          args.queries = std::min(kGroupMax, shape_.group() - g);
          attend_(args);
          for (int i = at; i < at + args.n; ++i) {
            visits[i].q += static_cast<ptrdiff_t>(args.queries) * shape_.head_dim;
            NextQueries(visits[i].sum, args.queries);
          }
        }
        for (int i = at; i < at + args.n; ++i) {
          visits[i].k += steps[i].k;
          visits[i].v += steps[i].v;
        }
      }
    }
  }
}

// The first of a part that this thread may well come to next.
void Attention::AskForPart(const WindowPlan& plan, ptrdiff_t index, const dense::RopeTable& rope, Ahead& ahead) const {
  if (index >= static_cast<ptrdiff_t>(plan.parts.size())) return;
  const Part& part = plan.parts[index];
  for (int i = part.first; i < std::min(part.first + kVisitsMax, part.last); ++i) {
    const PlannedVisit& later = plan.visits[i];
    AskFor(later, runs_[later.span].k[later.block], runs_[later.span].v[later.block], rope, ahead);
  }
}

int64_t Attention::decoded_heads() const {
  int64_t sum = 0;
  for (const LayerOrder& order : orders_) sum += order.decoded_heads;
  return sum;
}

// A visit for the first queries of the first head; encoded blocks are decoded for each head before it runs.
Visit Attention::FirstHead(const WindowPlan& plan, const Meeting& meeting, const dense::RopeTable& rope,
                           DecodedBlocks& decoded, HeadStep& step) {
  const PlannedVisit& planned = plan.visits[meeting.visit];
  const BlockRun& run = runs_[planned.span];
  Visit visit = VisitOf(run, planned.block, planned.row, planned.position, plan.window, 0, rope);
  const auto head_bytes = static_cast<ptrdiff_t>(run.layout->head_bytes(visit.cap));
  const auto where = [&](codec::Kind kind, BlockId block, ptrdiff_t& to_next) {
    const std::byte* in_place = HeadReader::InPlace(run, block);
    to_next = in_place != nullptr ? head_bytes : 0;
    return in_place != nullptr ? in_place : decoded.Add(run, kind, block, visit.cap);
  };
  visit.k = where(codec::Kind::kK, meeting.k, step.k);
  visit.v = where(codec::Kind::kV, meeting.v, step.v);
  visit.sum = PartialOf(planned.partial);
  visit.fresh = planned.first;
  return visit;
}

// What a later visit reads.
void Attention::AskFor(const PlannedVisit& later, BlockId k, BlockId v, const dense::RopeTable& rope,
                       Ahead& ahead) const {
  const BlockRun& run = runs_[later.span];
  // Its cosines and sines, which follow one another.
  const float* rotation = rope.cos(later.position - run.blocks[later.block].base);
  for (int at = 0; at < shape_.head_dim; at += 16) __builtin_prefetch(rotation + at);
  for (const BlockId block : {k, v}) ahead.Push(run.cache->data(block), run.cache->block_bytes(block));
}

}  // namespace jointkv::attention
