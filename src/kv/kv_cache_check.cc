// KvCache::CheckIntegrity: every count made anew from tables and index entries, and held against the kept ones.
#include <algorithm>

#include "kv/kv_cache.h"
#include "kv/sequence.h"

namespace jointkv::kv {

// By BlockId.
struct KvCache::Recount {
  using Size = std::pair<int, int>;

  explicit Recount(int ids) : refs(ids), index_refs(ids), sizes(ids), domains(ids) {}

  std::vector<int32_t> refs;
  std::vector<int32_t> index_refs;
  std::vector<Size> sizes;  // cap, and how many tokens
  std::vector<DomainId> domains;
  size_t used = 0;
  size_t running = 0;
};

void KvCache::Count(Recount& recount, BlockId block, std::pair<int, int> size, DomainId domain, bool from_index) const {
  const size_t i = block.index();
  if (recount.refs[i] == 0) {
    recount.sizes[i] = size;
    recount.domains[i] = domain;
    recount.used += block_bytes(block);
    const int encoded = arena_->class_of(block) - codec::kClasses;
    const auto [cap, tokens] = size;
    CHECK(encoded < 0 ? arena_->class_of(block) == ClassOf(cap) : encoded % codec::kQuantisedClasses + 1 == tokens);
  }
  CHECK(recount.sizes[i] == size && recount.domains[i] == domain);
  // The index is counted first, so the first table is the one that makes a block a running one.
  if (!from_index && recount.refs[i] == recount.index_refs[i]) recount.running += block_bytes(block);
  ++recount.refs[i];
  recount.index_refs[i] += from_index;
}

void KvCache::CheckSequence(const Sequence& s, Recount& recount) const {
  int position = 0;
  for (size_t i = 0; i < s.blocks.size(); ++i) {
    const LogicalBlock& block = s.blocks[i];
    CHECK(block.start == position && block.tokens > 0 && block.tokens <= block.cap);
    CHECK(block.complete || i + 1 == s.blocks.size());
    position += block.tokens;
    CHECK(block.sealed == (block.complete && position <= s.committed));
    for (int table = 0; table < shape_.n_tables(); ++table) {
      const BlockId id = s.tables[static_cast<size_t>(table) * s.table_capacity + i];
      CHECK(id.valid() == (static_cast<int>(i) >= s.released[table / 2]));
      if (id.valid()) Count(recount, id, {block.cap, block.tokens}, s.domain, false);
      CHECK(position <= s.committed || refs_[id.index()] == 1);  // about to be written: private
    }
  }
  CHECK(position == static_cast<int>(s.tokens.size()) && s.committed <= position && s.chain.size() <= s.blocks.size());
  EntryId parent;
  for (size_t i = 0; i < s.chain.size(); ++i) {
    const PrefixEntry& entry = index_[s.chain[i]];
    CHECK(s.blocks[i].sealed && entry.root == s.root() && entry.parent == parent && entry.cap == s.blocks[i].cap);
    CHECK(std::ranges::equal(entry.tokens, std::span(s.tokens).subspan(s.blocks[i].start, s.blocks[i].tokens)));
    parent = s.chain[i];
    for (int table = 0; table < shape_.n_tables(); ++table) {
      const BlockId id = s.tables[static_cast<size_t>(table) * s.table_capacity + i];
      CHECK(!id.valid() || id == entry.blocks[table]);
    }
  }
}

void KvCache::CheckIntegrity() const {
  arena_->CheckIntegrity();
  index_.CheckIntegrity();
  // Ids beyond what anybody names have nothing to count; were a block in use there, used bytes would not add up.
  int ids = 0;
  const auto see = [&](BlockId block) {
    if (block.valid()) ids = std::max({ids, block.value + 1, base(block).value + 1});
  };
  index_.ForEach([&](EntryId, const PrefixEntry& entry) { std::ranges::for_each(entry.blocks, see); });
  for (const auto& s : sequences_) {
    for (int table = 0; s != nullptr && table < shape_.n_tables(); ++table)
      std::for_each_n(Row(*s, table), s->blocks.size(), see);
  }
  Recount recount(ids);
  size_t queued = 0;
  index_.ForEach([&](EntryId, const PrefixEntry& entry) {
    CHECK(static_cast<int>(entry.blocks.size()) == shape_.n_tables());
    bool whole = true;
    for (int table = 0; table < shape_.n_tables(); ++table) {
      const BlockId block = entry.blocks[table];
      whole = whole && block.valid();
      if (!block.valid()) continue;
      Count(recount, block, {entry.cap, static_cast<int>(entry.tokens.size())}, entry.root.domain, true);
      // Whatever no sequence refers to can be reclaimed: by eviction, or by a strip.
      const bool idle = refs_[block.index()] == index_refs_[block.index()];
      CHECK(!idle || entry.users == 0 || (shape_.window[table / 2] > 0 && entry.queued_for_strip));
    }
    CHECK(entry.stripped == !whole);
    queued += entry.queued_for_strip;
  });
  CHECK(queued == strippable_.size());
  for (const EntryId id : strippable_) CHECK(index_[id].queued_for_strip);
  std::vector<int> users(index_.capacity());
  size_t tokens = 0;
  for (const auto& sequence : sequences_) {
    if (sequence == nullptr) continue;
    CheckSequence(*sequence, recount);
    tokens += sequence->tokens.size();
    for (const EntryId entry : sequence->chain) ++users[entry.index()];
  }
  index_.ForEach([&](EntryId id, const PrefixEntry& entry) { CHECK(entry.users == users[id.index()]); });
  for (int i = 0; i < ids; ++i) {
    if (bases_[i] == 0) continue;
    // A difference from another block holds one reference to it, of its own state.
    const BlockId block(i);
    const BlockId of = base(block);
    CHECK(recount.refs[i] > 0 && bases_[of.index()] == 0);
    const bool idle = recount.refs[i] == recount.index_refs[i];
    Count(recount, of, recount.sizes[i], recount.domains[i], idle);
  }
  for (int i = 0; i < ids; ++i) {
    CHECK(recount.refs[i] == refs_[i] && recount.index_refs[i] == index_refs_[i]);
    CHECK(refs_[i] > 0 || (marks_[i] == 0 && bases_[i] == 0));
  }
  CHECK(recount.used == arena_->used_bytes() && recount.running == running_bytes_ && tokens == logical_tokens_);
}

}  // namespace jointkv::kv
