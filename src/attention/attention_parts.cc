// Running a part of a plan: visits in the order of a layer, a batch at a time.
#include <algorithm>

#include "attention/attention.h"
#include "attention/decoded_blocks.h"
#include "attention/head_reader.h"

namespace jointkv::attention {
namespace {

// That a batch reads: what the next one reads comes into the second cache meanwhile.
constexpr size_t kBatchBytes = 256 << 10;

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
    const PlannedVisit& leader = plan.visits[meetings[first].visit];
    size_t last = first + 1;
    size_t of_row = 1;  // visits of the first row
    bool alike = true;
    for (; last < meetings.size() && plan.visits[meetings[last].visit].order == leader.order; ++last) {
      if (last == first + of_row && plan.visits[meetings[last].visit].row == leader.row) {
        ++of_row;
        continue;
      }
      const Meeting& above = meetings[last - of_row];
      alike &= meetings[last].k == above.k && meetings[last].v == above.v;
    }
    if (!alike) Arrange(plan, std::span(meetings).subspan(first, last - first), order);
    first = last;
  }
}

// Rows that meet the same blocks come one after the other, blocks in the order of their first visits: where they lie in
// memory does not change a result. What a row visits stays together, in order; its first two blocks decide.
void Attention::Arrange(const WindowPlan& plan, std::span<Meeting> together, LayerOrder& order) const {
  order.seen_k.clear();
  order.seen_v.clear();
  const auto rank_of = [&](const Meeting& meeting) {
    return static_cast<uint32_t>(RankOf(meeting.k, order.seen_k)) << 16 |
           static_cast<uint32_t>(RankOf(meeting.v, order.seen_v));
  };
  for (size_t first = 0; first < together.size();) {
    size_t last = first + 1;
    const int row = plan.visits[together[first].visit].row;
    while (last < together.size() && plan.visits[together[last].visit].row == row) ++last;
    uint64_t rank = uint64_t{rank_of(together[first])} << 32;
    if (last - first > 1) rank |= rank_of(together[first + 1]);
    for (; first < last; ++first) together[first].rank = rank;
  }
  std::ranges::sort(together, [](const Meeting& a, const Meeting& b) {
    return a.rank != b.rank ? a.rank < b.rank : a.visit < b.visit;
  });
}

// The end of the visits from `first` on that are not to be divided between batches: those of one order. Where results
// must not depend on other rows, as many as a call of the kernel takes: it adds up a row's visits at once, so calls
// have to end where those of RunRow do. Looks no farther than a batch.
int Attention::EndOfUndivided(const WindowPlan& plan, const std::vector<Meeting>& meetings, int first) const {
  const int most = rows_independent_ ? kVisitsMax : kBatchVisits;
  const int end = std::min(first + most, static_cast<int>(meetings.size()));
  if (rows_independent_) return end;
  const int order = plan.visits[meetings[first].visit].order;
  int last = first + 1;
  while (last < end && plan.visits[meetings[last].visit].order == order) ++last;
  return last;
}

// Visits from `first` on that are worth a batch: what is together stays so, if it fits. What lies in place is read a
// few visits at a time.
int Attention::BatchVisits(const WindowPlan& plan, const std::vector<Meeting>& meetings, int first) const {
  const int end = static_cast<int>(meetings.size());
  const kv::KvCache& cache = *runs_[plan.visits[meetings[first].visit].span].cache;
  size_t bytes = 0;
  int n = 0;
  while (first + n < end) {
    const int from = first + n;
    const int to = EndOfUndivided(plan, meetings, from);
    if (n > 0 && to - first > (decodes_ ? kBatchVisits : kVisitsMax)) break;
    for (int i = from; decodes_ && i < to; ++i) {
      // Rows take turns at two blocks, if these are joined.
      const auto met = [&](auto block) {
        return (i > from && meetings[i - 1].*block == meetings[i].*block) ||
               (i > from + 1 && meetings[i - 2].*block == meetings[i].*block);
      };
      if (!met(&Meeting::k)) bytes += cache.block_bytes(meetings[i].k);
      if (!met(&Meeting::v)) bytes += cache.block_bytes(meetings[i].v);
    }
    if (bytes > kBatchBytes && n >= kVisitsMax) break;
    n = to - first;
    if (n >= kBatchVisits) return kBatchVisits;
  }
  return n;
}

// Batch after batch, head after head: what a batch's visits share is then in a near cache, and is decoded once for all
// of them.
void Attention::RunPart(const WindowPlan& plan, int index, const dense::RopeTable& rope, int thread) {
  Visit visits[kBatchVisits];
  HeadStep steps[kBatchVisits];
  LayerOrder& order = orders_[thread];
  OrderVisits(plan, plan.parts[index], order);
  const std::vector<Meeting>& meetings = order.meetings;
  const int end = static_cast<int>(meetings.size());
  const bool asks = attend_ != AttendGeneric;
  // One for each pair of channels, and some for tokens.
  const ptrdiff_t steps_of_visit =
      ptrdiff_t{shape_.n_kv_heads} * CeilDiv(shape_.group(), kGroupMax) * (shape_.head_dim / 2 + 8);
  Ahead& ahead = order.ahead;
  ahead.Clear();
  VisitArgs args;
  args.layout = runs_.front().layout;
  args.scratch = reinterpret_cast<float*>(scratch_.data() + thread * thread_scratch_bytes_);
  args.ahead = &ahead;
  DecodedBlocks decoded(shape_.head_dim, ReaderScratch(thread));
  for (int first = 0, n = 0; first < end; first += n) {
    decoded.Clear();
    const int most = BatchVisits(plan, meetings, first);
    int last_first = 0;  // the last visits that are together
    int last_end = 0;
    DecodedBlocks::Mark last_mark = {};
    for (n = 0; n < most && decoded.HasRoom(); ++n) {
      if (n == last_end) {
        last_first = n;
        last_end = EndOfUndivided(plan, meetings, first + n) - first;
        last_mark = decoded.mark();
      }
      visits[n] = FirstHead(plan, meetings[first + n], rope, decoded, steps[n]);
    }
    if (n < most && last_first > 0) {
      n = last_first;
      decoded.Return(last_mark);
    }
    if (asks && first + n < end) {
      for (int i = first + n; i < std::min(first + 2 * n, end); ++i)
        AskFor(plan.visits[meetings[i].visit], meetings[i].k, meetings[i].v, rope, ahead);
    } else if (asks) {
      AskForPart(plan, index + static_cast<int>(orders_.size()), rope, ahead);
    }
    ahead.set_fast(ahead.lines() > steps_of_visit * n);
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
            visits[i].sum.sums += static_cast<ptrdiff_t>(args.queries) * shape_.head_dim;
            visits[i].sum.stats += 2 * kGroupMax;
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
void Attention::AskForPart(const WindowPlan& plan, int index, const dense::RopeTable& rope, Ahead& ahead) const {
  if (index >= static_cast<int>(plan.parts.size())) return;
  const Part& part = plan.parts[index];
  const int last = std::min(part.first + (decodes_ ? 2 * kVisitsMax : kVisitsMax), part.last);
  for (int i = part.first; i < last; ++i) {
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
    return in_place != nullptr ? in_place : decoded.Add(run, kind, block, run.blocks[planned.block]);
  };
  visit.k = where(codec::Kind::kK, meeting.k, step.k);
  visit.v = where(codec::Kind::kV, meeting.v, step.v);
  visit.sum = PartialOf(planned.partial, 0);
  visit.fresh = planned.first;
  return visit;
}

// What a later visit reads.
void Attention::AskFor(const PlannedVisit& later, BlockId k, BlockId v, const dense::RopeTable& rope,
                       Ahead& ahead) const {
  const BlockRun& run = runs_[later.span];
  // Its cosines and sines, which follow one another.
  const float* rotation = rope.cos(later.position - run.blocks[later.block].base);
  for (int at = 0; at < shape_.head_dim; at += 16) __builtin_prefetch(rotation + at, 0, 2);
  for (const BlockId block : {k, v}) {
    if (const BlockId base = run.cache->base(block); base.valid())
      ahead.Push(run.cache->data(base), run.cache->block_bytes(base));
    ahead.Push(run.cache->data(block), run.cache->block_bytes(block));
  }
}

}  // namespace jointkv::attention
