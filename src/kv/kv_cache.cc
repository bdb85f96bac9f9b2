#include "kv/kv_cache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "base/hash.h"
#include "codec/block_io.h"
#include "kv/sequence.h"

namespace jointkv::kv {

namespace {

template <typename T>
std::unique_ptr<T[], void (*)(void*)> LazyZeros(size_t n) {
  return {static_cast<T*>(std::calloc(n, sizeof(T))), std::free};
}

}  // namespace

Expected<std::unique_ptr<KvCache>> KvCache::Create(KvShape shape, BlockCutter cutter, Options options) {
  CHECK(shape.n_layers() > 0 && shape.layout.n_kv_heads > 0 && shape.layout.head_dim > 0 &&
        shape.layout.head_dim % 2 == 0);
  ASSIGN_OR_RETURN(auto arena, Arena::Create(options.cap_bytes, shape.layout.granule_bytes()));
  std::unique_ptr<KvCache> cache(new KvCache(std::move(shape), std::move(cutter), options, std::move(arena)));
  if (cache->refs_ == nullptr || cache->index_refs_ == nullptr) {
    return Status(StatusCode::kResourceExhausted, "kv-bytes: no memory for the reference counts");
  }
  return cache;
}

KvCache::KvCache(KvShape shape, BlockCutter cutter, Options options, std::unique_ptr<Arena> arena)
    : shape_(std::move(shape)),
      cutter_(std::move(cutter)),
      options_(options),
      arena_(std::move(arena)),
      refs_(LazyZeros<int32_t>(arena_->total_granules())),
      index_refs_(LazyZeros<int32_t>(arena_->total_granules())),
      index_(RandomKey()),
      widest_window_(std::ranges::max(shape_.window)) {}

KvCache::~KvCache() = default;

KvCache::Sequence& KvCache::Get(SequenceId id) const {
  CHECK(id.valid() && id.index() < sequences_.size() && sequences_[id.index()] != nullptr);
  return *sequences_[id.index()];
}

BlockId* KvCache::Row(Sequence& s, int table) const {
  return s.tables.data() + static_cast<size_t>(table) * s.table_capacity;
}

void KvCache::ReserveTables(Sequence& s, int max_blocks) const {
  if (max_blocks <= s.table_capacity) return;
  std::vector<BlockId> tables(static_cast<size_t>(max_blocks) * shape_.n_tables());
  for (int table = 0; table < shape_.n_tables(); ++table) {
    std::copy_n(Row(s, table), s.blocks.size(), tables.begin() + static_cast<ptrdiff_t>(table) * max_blocks);
  }
  s.tables = std::move(tables);
  s.table_capacity = max_blocks;
  s.blocks.reserve(max_blocks);
  s.chain.reserve(max_blocks);
}

SequenceId KvCache::Create(DomainId domain, int max_tokens) {
  auto sequence = std::make_unique<Sequence>();
  sequence->domain = domain;
  sequence->tokens.reserve(max_tokens);
  sequence->released.assign(shape_.n_layers(), 0);
  ReserveTables(*sequence, max_tokens / BlockCutter::kMinTokens + 2);
  if (free_sequences_.empty()) {
    sequences_.push_back(std::move(sequence));
    free_sequences_.reserve(sequences_.size());
    return SequenceId(static_cast<int32_t>(sequences_.size()) - 1);
  }
  const int index = free_sequences_.back();
  free_sequences_.pop_back();
  sequences_[index] = std::move(sequence);
  return SequenceId(index);
}

// running_bytes counts blocks that some table refers to: those with more references than the index alone holds.
void KvCache::Ref(BlockId block) {
  CHECK(block.valid());
  ++refs_[block.index()];
}

void KvCache::Unref(BlockId block, int cap) {
  CHECK(refs_[block.index()] > 0);
  if (--refs_[block.index()] == 0) arena_->Free(block, cap / codec::kClassStep);
}

void KvCache::ReleaseRow(Sequence& s, int index) {
  const int cap = s.blocks[index].cap;
  for (int table = 0; table < shape_.n_tables(); ++table) {
    BlockId& block = Row(s, table)[index];
    if (!block.valid()) continue;
    if (refs_[block.index()] - index_refs_[block.index()] == 1) running_bytes_ -= shape_.layout.block_bytes(cap);
    Unref(block, cap);
    block = BlockId();
  }
}

void KvCache::Free(SequenceId id) {
  Sequence& s = Get(id);
  for (int i = static_cast<int>(s.blocks.size()) - 1; i >= 0; --i) ReleaseRow(s, i);
  for (size_t i = s.chain.size(); i > 0; --i) {
    index_.DropUser(s.chain[i - 1]);
    if (widest_window_ > 0 && index_[s.chain[i - 1]].users > 0) QueueForStrip(s.chain[i - 1]);
  }
  logical_tokens_ -= s.tokens.size();
  sequences_[id.index()].reset();
  free_sequences_.push_back(id.value);
}

int KvCache::FirstVisible(int layer, int next_position) const {
  const int window = shape_.window[layer];
  return window == 0 ? 0 : std::max(0, next_position - window + 1);
}

int KvCache::AdoptPrefix(SequenceId id, std::span<const TokenId> tokens) {
  Sequence& s = Get(id);
  CHECK(s.tokens.empty());
  prefix_query_tokens_ += static_cast<int64_t>(tokens.size());
  if (!options_.prefix_cache || tokens.empty()) return 0;

  // The longest known chain of whole blocks that leaves at least one token to compute.
  std::vector<EntryId> chain;
  std::vector<int> ends;  // tokens up to and with chain[i]
  const auto usable = tokens.first(tokens.size() - 1);
  int end = 0;
  while (true) {
    const int length = cutter_.FirstBlock(usable.subspan(end));
    if (length == 0) break;
    const EntryId entry = index_.Find(s.domain, chain.empty() ? EntryId() : chain.back(), usable.subspan(end, length));
    if (!entry.valid()) break;
    chain.push_back(entry);
    end += length;
    ends.push_back(end);
  }
  // A window layer must still hold every block that the next token looks back on.
  while (widest_window_ > 0 && !chain.empty()) {
    bool whole = true;
    for (size_t i = chain.size(); i-- > 0 && whole && ends[i] > ends.back() - widest_window_;) {
      const PrefixEntry& entry = index_[chain[i]];
      if (!entry.stripped) continue;
      for (int layer = 0; layer < shape_.n_layers() && whole; ++layer) {
        const bool visible = ends[i] > FirstVisible(layer, ends.back());
        whole = !visible || (entry.blocks[TableIndex(layer, Kind::kK)].valid() &&
                             entry.blocks[TableIndex(layer, Kind::kV)].valid());
      }
    }
    if (whole) break;
    chain.pop_back();
    ends.pop_back();
  }
  if (chain.empty()) return 0;

  const int length = ends.back();
  ReserveTables(s, static_cast<int>(chain.size()) + 2);
  for (size_t i = 0; i < chain.size(); ++i) {
    const PrefixEntry& entry = index_[chain[i]];
    const int start = ends[i] - static_cast<int>(entry.tokens.size());
    s.blocks.push_back({start, static_cast<uint8_t>(entry.tokens.size()), entry.cap, true, true});
    for (int table = 0; table < shape_.n_tables(); ++table) {
      const BlockId block = entry.blocks[table];
      const bool visible = ends[i] > FirstVisible(table / 2, length);
      if (!visible) {
        Row(s, table)[i] = BlockId();
        s.released[table / 2] = static_cast<int>(i) + 1;
        if (block.valid()) QueueForStrip(chain[i]);
        continue;
      }
      if (refs_[block.index()] == index_refs_[block.index()]) running_bytes_ += shape_.layout.block_bytes(entry.cap);
      Ref(block);
      Row(s, table)[i] = block;
    }
    index_.AddUser(chain[i]);
    s.chain.push_back(chain[i]);
  }
  s.tokens.assign(tokens.begin(), tokens.begin() + length);
  s.committed = length;
  logical_tokens_ += length;
  prefix_hit_tokens_ += length;
  return length;
}

bool KvCache::MakeRoom(std::span<const int, codec::kClasses> needed) {
  size_t bytes = running_bytes_;
  for (int c = 0; c < codec::kClasses; ++c) bytes += needed[c] * shape_.layout.block_bytes((c + 1) * codec::kClassStep);
  if (bytes > arena_->capacity_bytes()) return false;  // no eviction could help: keep the prefix cache
  while (!arena_->CanAllocate(needed)) {
    if (!StripOne() && !EvictOne()) return false;
  }
  return true;
}

void KvCache::QueueForStrip(EntryId id) {
  if (index_[id].queued_for_strip) return;
  index_[id].queued_for_strip = true;
  strippable_.push_back(id);
}

// Gives back the window layers' blocks that no sequence refers to of an entry that some sequence still uses. Entries
// without users are left whole: they go by their last use.
bool KvCache::StripOne() {
  while (!strippable_.empty()) {
    PrefixEntry& entry = index_[strippable_.front()];
    strippable_.pop_front();
    entry.queued_for_strip = false;
    if (entry.users == 0) continue;
    bool freed = false;
    for (int table = 0; table < shape_.n_tables(); ++table) {
      BlockId& block = entry.blocks[table];
      if (shape_.window[table / 2] == 0 || !block.valid() || refs_[block.index()] != index_refs_[block.index()])
        continue;
      --index_refs_[block.index()];
      Unref(block, entry.cap);
      block = BlockId();
      entry.stripped = freed = true;
    }
    if (freed) return true;
  }
  return false;
}

bool KvCache::EvictOne() {
  const EntryId id = index_.oldest_unused();
  if (!id.valid()) return false;
  const PrefixEntry& entry = index_[id];
  for (const BlockId block : entry.blocks) {
    if (!block.valid()) continue;
    --index_refs_[block.index()];
    Unref(block, entry.cap);
  }
  index_.Remove(id);
  ++evicted_blocks_;
  return true;
}

void KvCache::DropPrefixCache() {
  while (StripOne() || EvictOne()) {
  }
}

void KvCache::PushBlock(Sequence& s, int start, int cap) {
  if (static_cast<int>(s.blocks.size()) == s.table_capacity) ReserveTables(s, 2 * s.table_capacity);
  const size_t index = s.blocks.size();
  s.blocks.push_back({start, 0, static_cast<uint8_t>(cap), false, false});
  for (int table = 0; table < shape_.n_tables(); ++table) {
    const BlockId block = arena_->Allocate(cap / codec::kClassStep);
    CHECK(block.valid());
    Ref(block);
    Row(s, table)[index] = block;
  }
  running_bytes_ += shape_.n_tables() * shape_.layout.block_bytes(cap);
}

void KvCache::CopyOpenBlock(Sequence& s) {
  const int index = static_cast<int>(s.blocks.size()) - 1;
  const LogicalBlock& block = s.blocks[index];
  bool copied = false;
  for (int table = 0; table < shape_.n_tables(); ++table) {
    BlockId& id = Row(s, table)[index];
    if (refs_[id.index()] == 1) continue;
    const BlockId copy = arena_->Allocate(block.cap / codec::kClassStep);
    CHECK(copy.valid());
    std::memcpy(arena_->data(copy), arena_->data(id), shape_.layout.block_bytes(block.cap));
    Ref(copy);
    Unref(id, block.cap);
    id = copy;
    copied = true;
    running_bytes_ += shape_.layout.block_bytes(block.cap);
  }
  copies_on_write_ += copied;
}

bool KvCache::Append(SequenceId id, std::span<const TokenId> tokens) {
  Sequence& s = Get(id);
  CHECK(s.committed == static_cast<int>(s.tokens.size()));
  if (tokens.empty()) return true;

  // Plan: how the tokens fall into blocks, and which physical blocks that takes.
  const bool has_open = !s.blocks.empty() && !s.blocks.back().complete;
  const int n_tables = shape_.n_tables();
  int needed[codec::kClasses] = {};
  size_t at = 0;
  if (has_open) {
    int shared = 0;
    for (int table = 0; table < n_tables; ++table) shared += refs_[Row(s, table)[s.blocks.size() - 1].index()] > 1;
    needed[s.blocks.back().cap / codec::kClassStep - 1] += shared;
    int length = s.blocks.back().tokens;
    TokenId previous = s.tokens.back();
    bool ended = false;
    while (at < tokens.size() && !ended) {
      ended = cutter_.EndsAfter(++length, previous, tokens[at]);
      previous = tokens[at++];
    }
  }
  const size_t first_new = at;
  while (at < tokens.size()) {
    const int length = cutter_.FirstBlock(tokens.subspan(at));
    const int cap = length == 0 ? codec::kBlockTokensMax : codec::ClassCapacity(length);
    needed[cap / codec::kClassStep - 1] += n_tables;
    at += length == 0 ? tokens.size() - at : length;
  }
  if (!MakeRoom(needed)) return false;

  // Commit to it.
  if (has_open) {
    CopyOpenBlock(s);
    LogicalBlock& open = s.blocks.back();
    open.tokens = static_cast<uint8_t>(open.tokens + first_new);
    const TokenId last = tokens[first_new - 1];
    const TokenId previous = first_new >= 2 ? tokens[first_new - 2] : s.tokens.back();
    open.complete = cutter_.EndsAfter(open.tokens, previous, last);
  }
  const int base = static_cast<int>(s.tokens.size());
  for (at = first_new; at < tokens.size();) {
    const int length = cutter_.FirstBlock(tokens.subspan(at));
    PushBlock(s, base + static_cast<int>(at), length == 0 ? codec::kBlockTokensMax : codec::ClassCapacity(length));
    LogicalBlock& block = s.blocks.back();
    block.tokens = static_cast<uint8_t>(length == 0 ? tokens.size() - at : length);
    block.complete = length != 0;
    at += block.tokens;
  }
  s.tokens.insert(s.tokens.end(), tokens.begin(), tokens.end());
  logical_tokens_ += tokens.size();
  return true;
}

void KvCache::Commit(SequenceId id) {
  Sequence& s = Get(id);
  s.committed = static_cast<int>(s.tokens.size());
  int first = static_cast<int>(s.blocks.size());
  while (first > 0 && !s.blocks[first - 1].sealed) --first;
  for (int i = first; i < static_cast<int>(s.blocks.size()); ++i) {
    if (s.blocks[i].complete) SealBlock(s, i);
  }
  if (widest_window_ > 0) ReleaseWindow(s);
}

void KvCache::SealBlock(Sequence& s, int index) {
  MoveToClass(s, index);
  s.blocks[index].sealed = true;
  Publish(s, index);
}

// A block that was open has the largest class: move it to its own. Where no slab is left for that, it stays.
void KvCache::MoveToClass(Sequence& s, int index) {
  LogicalBlock& block = s.blocks[index];
  const int cap = codec::ClassCapacity(block.tokens);
  if (block.cap == cap) return;
  int needed[codec::kClasses] = {};
  needed[cap / codec::kClassStep - 1] = shape_.n_tables();
  if (!arena_->CanAllocate(needed)) return;
  for (int table = 0; table < shape_.n_tables(); ++table) {
    BlockId& id = Row(s, table)[index];
    CHECK(refs_[id.index()] == 1);
    const BlockId target = arena_->Allocate(cap / codec::kClassStep);
    codec::CopyBlock(shape_.layout, static_cast<Kind>(table % 2), arena_->data(id), block.cap, arena_->data(target),
                     cap, block.tokens);
    Ref(target);
    Unref(id, block.cap);
    id = target;
  }
  running_bytes_ -= shape_.n_tables() * (shape_.layout.block_bytes(block.cap) - shape_.layout.block_bytes(cap));
  block.cap = static_cast<uint8_t>(cap);
}

// Enters a sealed block into the index, or, when the index knows this content after this chain already, takes the known
// bytes and frees its own. An entry that was stripped becomes whole again from the sequence's bytes.
void KvCache::Publish(Sequence& s, int index) {
  if (!options_.prefix_cache || static_cast<int>(s.chain.size()) != index) return;
  const LogicalBlock& block = s.blocks[index];
  const auto tokens = std::span<const TokenId>(s.tokens).subspan(block.start, block.tokens);
  const EntryId parent = index == 0 ? EntryId() : s.chain.back();
  const EntryId entry = index_.Find(s.domain, parent, tokens);
  if (entry.valid()) {
    TakeKnown(s, index, entry);
    return;
  }
  publish_scratch_.clear();
  for (int table = 0; table < shape_.n_tables(); ++table) {
    const BlockId id = Row(s, table)[index];
    publish_scratch_.push_back(id);
    Ref(id);
    ++index_refs_[id.index()];
  }
  s.chain.push_back(index_.Insert(s.domain, parent, tokens, publish_scratch_, block.cap));
}

void KvCache::TakeKnown(Sequence& s, int index, EntryId entry) {
  PrefixEntry& known = index_[entry];
  LogicalBlock& block = s.blocks[index];
  // All rows of a logical block have one size class, so a stripped entry of another class can be neither taken nor made
  // whole. The sequence leaves the chain: a user of an entry must refer to its blocks, or they could not be reclaimed.
  if (known.stripped && known.cap != block.cap) return;
  for (int table = 0; table < shape_.n_tables(); ++table) {
    BlockId& own = Row(s, table)[index];
    BlockId& theirs = known.blocks[table];
    if (!theirs.valid()) {
      Ref(own);
      ++index_refs_[own.index()];
      theirs = own;
      continue;
    }
    running_bytes_ -= shape_.layout.block_bytes(block.cap);
    Unref(own, block.cap);
    if (refs_[theirs.index()] == index_refs_[theirs.index()]) running_bytes_ += shape_.layout.block_bytes(known.cap);
    Ref(theirs);
    own = theirs;
  }
  known.stripped = false;
  block.cap = known.cap;
  index_.AddUser(entry);
  s.chain.push_back(entry);
}

void KvCache::ReleaseWindow(Sequence& s) {
  const int next = static_cast<int>(s.tokens.size());
  for (int layer = 0; layer < shape_.n_layers(); ++layer) {
    if (shape_.window[layer] == 0) continue;
    const int visible = FirstVisible(layer, next);
    int& released = s.released[layer];
    while (released < static_cast<int>(s.blocks.size()) && s.blocks[released].sealed &&
           s.blocks[released].start + s.blocks[released].tokens <= visible) {
      for (const Kind kind : {Kind::kK, Kind::kV}) {
        BlockId& block = Row(s, TableIndex(layer, kind))[released];
        if (!block.valid()) continue;
        const int cap = s.blocks[released].cap;
        if (refs_[block.index()] - index_refs_[block.index()] == 1) running_bytes_ -= shape_.layout.block_bytes(cap);
        Unref(block, cap);
        block = BlockId();
      }
      if (released < static_cast<int>(s.chain.size())) QueueForStrip(s.chain[released]);
      ++released;
    }
  }
}

SequenceId KvCache::Fork(SequenceId id, int max_tokens) {
  const SequenceId child_id = Create(Get(id).domain, max_tokens);
  Sequence& s = Get(id);
  Sequence& child = Get(child_id);
  CHECK(s.committed == static_cast<int>(s.tokens.size()));
  ReserveTables(child, static_cast<int>(s.blocks.size()) + 1);
  child.tokens.assign(s.tokens.begin(), s.tokens.end());
  child.blocks.assign(s.blocks.begin(), s.blocks.end());
  child.committed = s.committed;
  child.chain.assign(s.chain.begin(), s.chain.end());
  child.released = s.released;
  for (int table = 0; table < shape_.n_tables(); ++table) {
    for (size_t i = 0; i < s.blocks.size(); ++i) {
      const BlockId block = Row(s, table)[i];
      Row(child, table)[i] = block;
      if (block.valid()) Ref(block);
    }
  }
  for (const EntryId entry : child.chain) index_.AddUser(entry);
  logical_tokens_ += child.tokens.size();
  return child_id;
}

size_t KvCache::MinimumBytes(int tokens) const {
  size_t bytes = 0;
  for (int layer = 0; layer < shape_.n_layers(); ++layer) {
    const int window = shape_.window[layer];
    const int kept = window == 0 ? tokens : std::min(tokens, window);
    bytes += 2 * shape_.layout.granule_bytes() * CeilDiv(kept, codec::kClassStep);
  }
  return bytes;
}

bool KvCache::HasRoomFor(int tokens, size_t reserve_bytes) const {
  const size_t taken = running_bytes_ + reserve_bytes + MinimumBytes(tokens);
  return taken <= arena_->capacity_bytes();
}

std::span<const LogicalBlock> KvCache::blocks(SequenceId sequence) const { return Get(sequence).blocks; }

const BlockId* KvCache::table(SequenceId sequence, int layer, Kind kind) const {
  return Row(Get(sequence), TableIndex(layer, kind));
}

std::span<const TokenId> KvCache::tokens(SequenceId sequence) const { return Get(sequence).tokens; }

KvStats KvCache::stats() const {
  KvStats stats;
  stats.capacity_bytes = arena_->capacity_bytes();
  stats.held_bytes = arena_->held_bytes();
  stats.used_bytes = arena_->used_bytes();
  stats.running_bytes = running_bytes_;
  stats.metadata_bytes = arena_->metadata_bytes() + index_.metadata_bytes();
  for (const auto& s : sequences_) {
    if (s == nullptr) continue;
    stats.metadata_bytes += sizeof(Sequence) + s->blocks.capacity() * sizeof(LogicalBlock) +
                            s->tables.capacity() * sizeof(BlockId) + s->tokens.capacity() * sizeof(TokenId) +
                            s->chain.capacity() * sizeof(EntryId) + s->released.capacity() * sizeof(int);
  }
  stats.metadata_bytes += stats.used_bytes / shape_.layout.granule_bytes() * 2 * sizeof(int32_t);
  stats.logical_bytes = logical_tokens_ * shape_.logical_token_bytes();
  stats.prefix_hit_tokens = prefix_hit_tokens_;
  stats.prefix_query_tokens = prefix_query_tokens_;
  stats.evicted_blocks = evicted_blocks_;
  stats.copies_on_write = copies_on_write_;
  return stats;
}

}  // namespace jointkv::kv
