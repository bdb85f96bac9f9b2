// How the running sequences share blocks, for metrics and the block map.
#include <algorithm>
#include <bit>

#include "base/checked.h"
#include "kv/kv_cache.h"
#include "kv/sequence.h"

namespace jointkv::kv {

int SharingStats::ReaderClass(int readers) {
  CHECK(readers > 0);
  return std::min(kReaderClasses - 1, static_cast<int>(std::bit_width(static_cast<unsigned>(readers - 1))));
}

SlotState KvCache::state(SequenceId id, int table, int index) const {
  Sequence& s = Get(id);
  const BlockId block = Row(s, table)[index];
  if (!block.valid()) return SlotState::kReleased;
  if ((marks_[block.index()] & kRepresents) != 0 || base(block).valid()) return SlotState::kFused;
  return readers(block) > 1 || index < s.adopted ? SlotState::kPrefix : SlotState::kPrivate;
}

double KvCache::SealedBytes(int table, const LogicalBlock& block) const {
  codec::BlockLayout layout = shape_.layout;
  layout.codec = shape_.sealed_codec(table);
  return static_cast<double>(layout.block_bytes(codec::IsQuantised(layout.codec) ? block.tokens : block.cap));
}

SharingStats KvCache::sharing_stats(int64_t slots_max) const {
  const int n_tables = shape_.n_tables();
  int64_t slots = 1;
  for (const auto& s : sequences_) slots += s == nullptr ? 0 : static_cast<int64_t>(s->blocks.size()) * n_tables;
  // Odd, or it would meet only K or only V.
  const int stride = static_cast<int>(std::min<int64_t>(n_tables, CeilDiv(slots, slots_max))) | 1;
  const double weight = static_cast<double>(n_tables) / static_cast<double>(CeilDiv(n_tables, stride));
  SharingStats sharing;
  for (size_t id = 0; id < sequences_.size(); ++id) {
    if (sequences_[id] == nullptr) continue;
    Sequence& s = *sequences_[id];
    double& domain_bytes = sharing.domain_bytes[s.domain];
    for (int table = 0; table < n_tables; table += stride) {
      for (size_t i = 0; i < s.blocks.size(); ++i) {
        const SlotState slot = state(SequenceId(static_cast<int32_t>(id)), table, static_cast<int>(i));
        if (slot == SlotState::kReleased) continue;
        const BlockId block = Row(s, table)[i];
        const BlockId of = base(block);
        const double bytes_16_bit = 2.0 * s.blocks[i].cap * shape_.layout.n_kv_heads * shape_.layout.head_dim;
        // What it would take by itself; a difference counts as the share of such a block that it takes.
        const double alone = of.valid() ? SealedBytes(table, s.blocks[i]) : block_bytes(block);
        // A block of n readers is met n times, some of these through a difference from it.
        const double share = weight / readers(block);
        const auto meet = [&](BlockId met, double met_share, double met_alone) {
          const auto bytes = static_cast<double>(block_bytes(met));
          sharing.blocks[SharingStats::ReaderClass(readers(met))] += met_share;
          domain_bytes += met_share * bytes;
          sharing.bytes_in_16_bit += met_share * bytes_16_bit * bytes / met_alone;
        };
        meet(block, share, alone);
        if (of.valid()) meet(of, share / readers(of), static_cast<double>(block_bytes(of)));
        sharing.private_slots += slot == SlotState::kPrivate ? weight : 0;
        sharing.prefix_slots += slot == SlotState::kPrefix ? weight : 0;
        sharing.fused_slots += slot == SlotState::kFused ? weight : 0;
        // Without fusion each index entry would have a block of its own, for all who use that entry.
        const int users = i < s.chain.size() ? index_[s.chain[i]].users : 1;
        sharing.unfused_bytes += alone * (slot == SlotState::kFused ? weight / users : share);
      }
    }
  }
  return sharing;
}

}  // namespace jointkv::kv
