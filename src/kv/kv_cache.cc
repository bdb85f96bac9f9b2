#include "kv/kv_cache.h"

#include <algorithm>
#include <cstring>

#include "base/hash.h"
#include "codec/block_io.h"
#include "kv/sequence.h"

namespace jointkv::kv {

namespace {

// An open block doubles from 8 tokens on: one copy or two in its life, and little room for tokens that never come.
int OpenCapacity(int tokens) { return tokens <= 8 ? 8 : tokens <= 16 ? 16 : codec::kBlockTokensMax; }

// Class of a new block of `length` tokens; 0: it stays open, with `rest` tokens.
int CapOf(int length, int rest) { return length == 0 ? OpenCapacity(rest) : codec::ClassCapacity(length); }

}  // namespace

Expected<std::unique_ptr<KvCache>> KvCache::Create(KvShape shape, BlockCutter cutter, Options options) {
  CHECK(shape.n_layers() > 0 && shape.layout.n_kv_heads > 0 && shape.layout.head_dim > 0 &&
        shape.layout.head_dim % 2 == 0);
  CHECK(shape.sealed.empty() || static_cast<int>(shape.sealed.size()) == shape.n_tables());
  std::vector<codec::Codec> codecs = {shape.layout.codec};
  for (const codec::Codec sealed : shape.sealed) {
    CHECK(sealed == shape.layout.codec || codec::IsQuantised(sealed));
    // Where blocks are of 4 bits, some may be of 8.
    for (const codec::Codec codec : {sealed, sealed == codec::Codec::kQ4 ? codec::Codec::kQ8 : sealed}) {
      if (std::ranges::find(codecs, codec) == codecs.end()) codecs.push_back(codec);
    }
  }
  if (options.residuals) {
    CHECK(shape.layout.codec == codec::Codec::kBf16 && shape.layout.head_dim % 8 == 0 && !options.scales);
    for (const codec::Codec codec : kResidualCodecs) {
      if (std::ranges::find(codecs, codec) == codecs.end()) codecs.push_back(codec);
    }
  }
  std::vector<size_t> class_bytes;
  for (const codec::Codec codec : codecs) {
    codec::BlockLayout layout = shape.layout;
    layout.codec = codec;
    const int step = codec == shape.layout.codec ? codec::kClassStep : 1;
    for (int cap = step; cap <= codec::kBlockTokensMax; cap += step) class_bytes.push_back(layout.block_bytes(cap));
  }
  ASSIGN_OR_RETURN(auto arena,
                   Arena::Create(options.cap_bytes, shape.layout.granule_bytes() * kSlabGranules, class_bytes));
  std::unique_ptr<KvCache> cache(
      new KvCache(std::move(shape), std::move(cutter), options, std::move(codecs), std::move(arena)));
  if (!cache->refs_.valid() || !cache->index_refs_.valid() || !cache->bases_.valid() || !cache->marks_.valid()) {
    return Status(StatusCode::kResourceExhausted, "kv-bytes: no memory for the reference counts");
  }
  return cache;
}

KvCache::KvCache(KvShape shape, BlockCutter cutter, Options options, std::vector<codec::Codec> codecs,
                 std::unique_ptr<Arena> arena)
    : shape_(std::move(shape)),
      cutter_(std::move(cutter)),
      options_(options),
      codecs_(std::move(codecs)),
      key_references_(shape_.n_layers()),
      arena_(std::move(arena)),
      refs_(arena_->total_ids()),
      index_refs_(arena_->total_ids()),
      bases_(arena_->total_ids()),
      marks_(arena_->total_ids()),
      index_(RandomKey()),
      widest_window_(std::ranges::max(shape_.window)) {
  std::vector<int> one_encoded(codec::kClasses, 0);
  for (size_t i = 1; i < codecs_.size(); ++i) {
    for (int tokens = 1; tokens <= codec::kQuantisedClasses; ++tokens)
      one_encoded.push_back(tokens < BlockCutter::kMinTokens ? 0 : 1);
  }
  const size_t spare = std::min(arena_->HeldBytesOf(one_encoded), arena_->capacity_bytes() / 16);
  spare_slabs_ = static_cast<int>(spare / arena_->slab_bytes());
}

KvCache::~KvCache() = default;

KvCache::Sequence& KvCache::Get(SequenceId id) const {
  CHECK(id.valid() && id.index() < sequences_.size() && sequences_[id.index()] != nullptr);
  return *sequences_[id.index()];
}

BlockId* KvCache::Row(Sequence& s, int table) const {
  return s.tables.data() + static_cast<size_t>(table) * s.table_capacity;
}

float* KvCache::ScaleRow(Sequence& s, int table) const {
  return s.scales.data() + static_cast<size_t>(table) * s.table_capacity;
}

void KvCache::ReserveTables(Sequence& s, int max_blocks) const {
  if (max_blocks <= s.table_capacity) return;
  std::vector<BlockId> tables(static_cast<size_t>(max_blocks) * shape_.n_tables());
  for (int table = 0; table < shape_.n_tables(); ++table) {
    std::copy_n(Row(s, table), s.blocks.size(), tables.begin() + static_cast<ptrdiff_t>(table) * max_blocks);
  }
  if (options_.scales) {
    std::vector<float> scales(tables.size(), 1.0F);
    for (int table = 0; table < shape_.n_tables() && !s.blocks.empty(); ++table) {
      std::copy_n(ScaleRow(s, table), s.blocks.size(), scales.begin() + static_cast<ptrdiff_t>(table) * max_blocks);
    }
    s.scales = std::move(scales);
  }
  s.tables = std::move(tables);
  s.table_capacity = max_blocks;
  s.blocks.reserve(max_blocks);
  s.chain.reserve(max_blocks);
}

// Logical blocks that these tokens and what may still follow them can make.
int KvCache::BlocksFor(std::span<const TokenId> tokens, int max_tokens) const {
  int blocks = 2;
  while (!tokens.empty()) {
    const int length = cutter_.FirstBlock(tokens);
    if (length == 0) break;
    tokens = tokens.subspan(length);
    max_tokens -= length;
    ++blocks;
  }
  return blocks + std::max(0, max_tokens) / BlockCutter::kMinTokens;
}

SequenceId KvCache::Create(DomainId domain, int max_tokens, Sharing sharing) {
  auto sequence = std::make_unique<Sequence>();
  sequence->domain = domain;
  sequence->serial = next_serial_++;
  sequence->lossy = sharing == Sharing::kLossy;
  sequence->max_tokens = max_tokens;
  sequence->tokens.reserve(max_tokens);
  sequence->released.assign(shape_.n_layers(), 0);
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

void KvCache::Ref(BlockId block) {
  CHECK(block.valid());
  if (Idle(block)) Wake(block);
  ++refs_[block.index()];
}

void KvCache::Unref(BlockId block) {
  CHECK(!Idle(block));
  --refs_[block.index()];
  if (!Idle(block)) return;
  Sleep(block);
  if (refs_[block.index()] == 0) Release(block);
}

void KvCache::RefFromIndex(BlockId block) {
  CHECK(block.valid());
  ++refs_[block.index()];
  ++index_refs_[block.index()];
}

void KvCache::UnrefFromIndex(BlockId block) {
  CHECK(index_refs_[block.index()] > 0);
  --refs_[block.index()];
  --index_refs_[block.index()];
  if (refs_[block.index()] == 0) Release(block);
}

// A block runs while a table slot refers to it, or a running block that is a difference from it. The difference's one
// reference counts among the index entries' while it is idle.
void KvCache::Wake(BlockId block) {
  running_bytes_ += block_bytes(block);
  const BlockId of = base(block);
  if (!of.valid()) return;
  if (Idle(of)) Wake(of);
  --index_refs_[of.index()];
}

void KvCache::Sleep(BlockId block) {
  running_bytes_ -= block_bytes(block);
  const BlockId of = base(block);
  if (!of.valid()) return;
  ++index_refs_[of.index()];
  if (Idle(of)) Sleep(of);
}

void KvCache::Release(BlockId block) {
  const BlockId of = base(block);
  arena_->Free(block);
  if (watched(block)) released_.push_back(block);
  marks_[block.index()] = 0;
  bases_[block.index()] = 0;
  if (of.valid()) UnrefFromIndex(of);
}

void KvCache::ReleaseRow(Sequence& s, int index) {
  for (int table = 0; table < shape_.n_tables(); ++table) {
    BlockId& block = Row(s, table)[index];
    if (!block.valid()) continue;
    Unref(block);
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

int KvCache::AdoptPrefix(SequenceId id, std::span<const TokenId> tokens, bool adopts) {
  Sequence& s = Get(id);
  CHECK(s.tokens.empty());
  ReserveTables(s, BlocksFor(tokens, s.max_tokens));
  if (!adopts) return 0;
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
    const EntryId entry = index_.Find(s.root(), chain.empty() ? EntryId() : chain.back(), usable.subspan(end, length));
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
  for (size_t i = 0; i < chain.size(); ++i) {
    const PrefixEntry& entry = index_[chain[i]];
    const int start = ends[i] - static_cast<int>(entry.tokens.size());
    s.blocks.push_back({start, BaseOf(start), static_cast<uint8_t>(entry.tokens.size()), entry.cap, true, true});
    for (int table = 0; table < shape_.n_tables(); ++table) {
      const BlockId block = entry.blocks[table];
      const bool visible = ends[i] > FirstVisible(table / 2, length);
      if (!visible) {
        Row(s, table)[i] = BlockId();
        s.released[table / 2] = static_cast<int>(i) + 1;
        if (block.valid()) QueueForStrip(chain[i]);
        continue;
      }
      Ref(block);
      Row(s, table)[i] = block;
      if (options_.scales) ScaleRow(s, table)[i] = entry.scales[table];
    }
    index_.AddUser(chain[i]);
    s.chain.push_back(chain[i]);
  }
  s.tokens.assign(tokens.begin(), tokens.begin() + length);
  s.committed = length;
  s.adopted = static_cast<int>(chain.size());
  logical_tokens_ += length;
  prefix_hit_tokens_ += length;
  return length;
}

// A sequence that is alone may take the last slab.
bool KvCache::CanAllocate(std::span<const int> needed) const {
  const bool alone = sequences_.size() == free_sequences_.size() + 1;
  return arena_->CanAllocate(needed, alone ? 0 : spare_slabs_);
}

bool KvCache::MakeRoom(std::span<const int, codec::kClasses> needed) {
  size_t bytes = running_bytes_;
  for (int c = 0; c < codec::kClasses; ++c) bytes += needed[c] * shape_.layout.block_bytes((c + 1) * codec::kClassStep);
  if (bytes > arena_->capacity_bytes()) return false;  // no eviction could help: keep the prefix cache
  while (!CanAllocate(needed)) {
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
// without users are left whole: they go by their last use. An entry whose window block another entry's users still
// refer to (a representative) waits its turn again.
bool KvCache::StripOne() {
  for (size_t turns = strippable_.size(); turns > 0; --turns) {
    const EntryId id = strippable_.front();
    PrefixEntry& entry = index_[id];
    strippable_.pop_front();
    bool freed = false;
    bool waits = false;
    for (int table = 0; table < shape_.n_tables() && entry.users > 0; ++table) {
      BlockId& block = entry.blocks[table];
      if (shape_.window[table / 2] == 0 || !block.valid()) continue;
      if (!Idle(block)) {
        waits = true;
        continue;
      }
      UnrefFromIndex(block);
      block = BlockId();
      entry.stripped = freed = true;
    }
    entry.queued_for_strip = waits;
    if (waits) strippable_.push_back(id);
    if (freed) return true;
  }
  return false;
}

bool KvCache::EvictOne() {
  const EntryId id = index_.oldest_unused();
  if (!id.valid()) return false;
  const PrefixEntry& entry = index_[id];
  for (const BlockId block : entry.blocks) {
    if (block.valid()) UnrefFromIndex(block);
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
  if (static_cast<int>(s.blocks.size()) == s.table_capacity) ReserveTables(s, std::max(8, 2 * s.table_capacity));
  const size_t index = s.blocks.size();
  s.blocks.push_back({start, BaseOf(start), 0, static_cast<uint8_t>(cap), false, false});
  for (int table = 0; table < shape_.n_tables(); ++table) {
    const BlockId block = arena_->Allocate(ClassOf(cap));
    CHECK(block.valid());
    Ref(block);
    Row(s, table)[index] = block;
    if (options_.scales) ScaleRow(s, table)[index] = 1;
  }
}

// Gives the open block tables of its own, of class `cap`: those that a fork shares are copied, and all are when the
// class changes.
void KvCache::MakeOpenPrivate(Sequence& s, int cap) {
  const int index = static_cast<int>(s.blocks.size()) - 1;
  LogicalBlock& block = s.blocks[index];
  bool shared = false;
  for (int table = 0; table < shape_.n_tables(); ++table) {
    BlockId& id = Row(s, table)[index];
    const bool own = refs_[id.index()] == 1;
    if (own && block.cap == cap) continue;
    const BlockId copy = arena_->Allocate(ClassOf(cap));
    CHECK(copy.valid());
    codec::CopyBlock(shape_.layout, static_cast<Kind>(table % 2), arena_->data(id), block.cap, arena_->data(copy), cap,
                     block.tokens);
    Ref(copy);
    Unref(id);
    id = copy;
    shared = shared || !own;
  }
  block.cap = static_cast<uint8_t>(cap);
  copies_on_write_ += shared;
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
  int open_cap = 0;
  if (has_open) {
    int length = s.blocks.back().tokens;
    TokenId previous = s.tokens.back();
    bool ended = false;
    while (at < tokens.size() && !ended) {
      ended = cutter_.EndsAfter(++length, previous, tokens[at]);
      previous = tokens[at++];
    }
    const int cap = s.blocks.back().cap;
    open_cap = cap >= length ? cap : ended ? codec::ClassCapacity(length) : OpenCapacity(length);
    int copies = 0;
    for (int table = 0; table < n_tables; ++table) {
      copies += open_cap != cap || refs_[Row(s, table)[s.blocks.size() - 1].index()] > 1;
    }
    needed[open_cap / codec::kClassStep - 1] += copies;
  }
  const size_t first_new = at;
  while (at < tokens.size()) {
    const int length = cutter_.FirstBlock(tokens.subspan(at));
    const int cap = CapOf(length, static_cast<int>(tokens.size() - at));
    needed[cap / codec::kClassStep - 1] += n_tables;
    at += length == 0 ? tokens.size() - at : length;
  }
  if (!MakeRoom(needed)) return false;

  // Commit to it.
  if (has_open) {
    MakeOpenPrivate(s, open_cap);
    LogicalBlock& open = s.blocks.back();
    open.tokens = static_cast<uint8_t>(open.tokens + first_new);
    const TokenId last = tokens[first_new - 1];
    const TokenId previous = first_new >= 2 ? tokens[first_new - 2] : s.tokens.back();
    open.complete = cutter_.EndsAfter(open.tokens, previous, last);
  }
  const int base = static_cast<int>(s.tokens.size());
  for (at = first_new; at < tokens.size();) {
    const int length = cutter_.FirstBlock(tokens.subspan(at));
    PushBlock(s, base + static_cast<int>(at), CapOf(length, static_cast<int>(tokens.size() - at)));
    LogicalBlock& block = s.blocks.back();
    block.tokens = static_cast<uint8_t>(length == 0 ? tokens.size() - at : length);
    block.complete = length != 0;
    at += block.tokens;
  }
  s.tokens.insert(s.tokens.end(), tokens.begin(), tokens.end());
  logical_tokens_ += tokens.size();
  return true;
}

SealedRange KvCache::Commit(SequenceId id) {
  Sequence& s = Get(id);
  s.committed = static_cast<int>(s.tokens.size());
  int first = static_cast<int>(s.blocks.size());
  while (first > 0 && !s.blocks[first - 1].sealed) --first;
  int last = first;
  for (; last < static_cast<int>(s.blocks.size()) && s.blocks[last].complete; ++last) SealBlock(s, last);
  if (widest_window_ > 0) ReleaseWindow(s);
  return {first, last};
}

void KvCache::SealBlock(Sequence& s, int index) {
  MoveToClass(s, index);
  s.blocks[index].sealed = true;
  Publish(s, index);
}

// A block that was open may have a larger class than it needs: move it to its own. Where no slab is left for that, it
// stays.
void KvCache::MoveToClass(Sequence& s, int index) {
  LogicalBlock& block = s.blocks[index];
  const int cap = codec::ClassCapacity(block.tokens);
  if (block.cap == cap) return;
  int needed[codec::kClasses] = {};
  needed[cap / codec::kClassStep - 1] = shape_.n_tables();
  if (!CanAllocate(needed)) return;
  for (int table = 0; table < shape_.n_tables(); ++table) {
    BlockId& id = Row(s, table)[index];
    CHECK(refs_[id.index()] == 1);
    const BlockId target = arena_->Allocate(ClassOf(cap));
    codec::CopyBlock(shape_.layout, static_cast<Kind>(table % 2), arena_->data(id), block.cap, arena_->data(target),
                     cap, block.tokens);
    Ref(target);
    Unref(id);
    id = target;
  }
  block.cap = static_cast<uint8_t>(cap);
}

// Enters a sealed block into the index, or, when the index knows this content after this chain already, takes the known
// bytes and frees its own. An entry that was stripped becomes whole again from the sequence's bytes.
void KvCache::Publish(Sequence& s, int index) {
  if (!options_.prefix_cache || static_cast<int>(s.chain.size()) != index) return;
  const LogicalBlock& block = s.blocks[index];
  const auto tokens = std::span<const TokenId>(s.tokens).subspan(block.start, block.tokens);
  const EntryId parent = index == 0 ? EntryId() : s.chain.back();
  const EntryId entry = index_.Find(s.root(), parent, tokens);
  if (entry.valid()) {
    TakeKnown(s, index, entry);
    return;
  }
  publish_scratch_.clear();
  for (int table = 0; table < shape_.n_tables(); ++table) {
    const BlockId id = Row(s, table)[index];
    publish_scratch_.push_back(id);
    RefFromIndex(id);
  }
  scale_scratch_.assign(options_.scales ? shape_.n_tables() : 0, 1.0F);
  s.chain.push_back(index_.Insert(s.root(), parent, tokens, publish_scratch_, scale_scratch_, block.cap));
}

void KvCache::TakeKnown(Sequence& s, int index, EntryId entry) {
  PrefixEntry& known = index_[entry];
  LogicalBlock& block = s.blocks[index];
  // All rows of a logical block have one cap, so a stripped entry of another one can be neither taken nor made
  // whole. The sequence leaves the chain: a user of an entry must refer to its blocks, or they could not be reclaimed.
  if (known.stripped && known.cap != block.cap) return;
  for (int table = 0; table < shape_.n_tables(); ++table) {
    BlockId& own = Row(s, table)[index];
    BlockId& theirs = known.blocks[table];
    if (!theirs.valid()) {
      RefFromIndex(own);
      theirs = own;
      if (options_.scales) known.scales[table] = ScaleRow(s, table)[index];
      continue;
    }
    Unref(own);
    Ref(theirs);
    own = theirs;
    if (options_.scales) ScaleRow(s, table)[index] = known.scales[table];
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
        Unref(block);
        block = BlockId();
      }
      if (released < static_cast<int>(s.chain.size())) QueueForStrip(s.chain[released]);
      ++released;
    }
  }
}

SequenceId KvCache::Fork(SequenceId id, int max_tokens) {
  const SequenceId child_id = Create(Get(id).domain, max_tokens, Get(id).lossy ? Sharing::kLossy : Sharing::kExact);
  Sequence& s = Get(id);
  Sequence& child = Get(child_id);
  CHECK(s.committed == static_cast<int>(s.tokens.size()));
  ReserveTables(child,
                static_cast<int>(s.blocks.size()) + BlocksFor({}, max_tokens - static_cast<int>(s.tokens.size())));
  child.tokens.assign(s.tokens.begin(), s.tokens.end());
  child.blocks.assign(s.blocks.begin(), s.blocks.end());
  child.committed = s.committed;
  child.adopted = s.adopted;
  child.chain.assign(s.chain.begin(), s.chain.end());
  child.released = s.released;
  for (int table = 0; table < shape_.n_tables(); ++table) {
    for (size_t i = 0; i < s.blocks.size(); ++i) {
      const BlockId block = Row(s, table)[i];
      Row(child, table)[i] = block;
      if (block.valid()) Ref(block);
      if (options_.scales) ScaleRow(child, table)[i] = ScaleRow(s, table)[i];
    }
  }
  for (const EntryId entry : child.chain) index_.AddUser(entry);
  logical_tokens_ += child.tokens.size();
  return child_id;
}

bool KvCache::Redirectable(SequenceId id, int table, int index) const {
  return Get(id).lossy && Owned(id, table, index);
}

bool KvCache::Owned(SequenceId id, int table, int index) const {
  Sequence& s = Get(id);
  const BlockId own = Row(s, table)[index];
  if (!s.blocks[index].sealed || !own.valid()) return false;
  const bool chained = index < static_cast<int>(s.chain.size());
  int slots = 0;
  for (const auto& other : sequences_) {
    if (other == nullptr || index >= static_cast<int>(other->blocks.size())) continue;
    slots += Row(*other, table)[index] == own;
  }
  return refs_[own.index()] == slots + chained && index_refs_[own.index()] == static_cast<int>(chained);
}

void KvCache::Redirect(SequenceId id, int table, int index, BlockId target, float scale) {
  CHECK(Redirectable(id, table, index));
  RedirectOwned(id, table, index, target, scale);
}

void KvCache::RedirectOwned(SequenceId id, int table, int index, BlockId target, float scale) {
  CHECK(refs_[target.index()] > 0);
  Sequence& s = Get(id);
  const BlockId own = Row(s, table)[index];
  CHECK(own != target);
  marks_[target.index()] |= kRepresents;
  if (index < static_cast<int>(s.chain.size())) {
    PrefixEntry& entry = index_[s.chain[index]];
    CHECK(entry.blocks[table] == own);
    RefFromIndex(target);
    UnrefFromIndex(own);
    entry.blocks[table] = target;
    if (options_.scales) entry.scales[table] = scale;
  }
  for (const auto& other : sequences_) {
    if (other == nullptr || index >= static_cast<int>(other->blocks.size()) || Row(*other, table)[index] != own) {
      continue;
    }
    Ref(target);
    Unref(own);
    Row(*other, table)[index] = target;
    if (options_.scales) ScaleRow(*other, table)[index] = scale;
    if (refs_[own.index()] == 0) break;
  }
}

bool KvCache::RedirectAll(int table, BlockId from, BlockId target, float scale) {
  CHECK(from != target && refs_[from.index()] > 0 && refs_[target.index()] > 0);
  std::vector<EntryId> entries;
  int slots = 0;
  for (const auto& s : sequences_) {
    for (size_t i = 0; s != nullptr && i < s->blocks.size(); ++i) {
      if (Row(*s, table)[i] != from) continue;
      ++slots;
      if (i < s->chain.size()) entries.push_back(s->chain[i]);
    }
  }
  std::ranges::sort(entries);
  entries.erase(std::unique(entries.begin(), entries.end()), entries.end());
  if (refs_[from.index()] != slots + static_cast<int>(entries.size()) || slots == 0) return false;
  marks_[target.index()] |= kRepresents;
  for (const EntryId id : entries) {
    index_[id].blocks[table] = target;
    if (options_.scales) index_[id].scales[table] *= scale;
    RefFromIndex(target);
    UnrefFromIndex(from);
  }
  for (const auto& s : sequences_) {
    for (size_t i = 0; s != nullptr && i < s->blocks.size() && slots > 0; ++i) {
      if (Row(*s, table)[i] != from) continue;
      --slots;
      Row(*s, table)[i] = target;
      if (options_.scales) ScaleRow(*s, table)[i] *= scale;
      Ref(target);
      Unref(from);
    }
  }
  return true;
}

BlockId KvCache::MoveDown(SequenceId id, int table, int index) {
  CHECK(Redirectable(id, table, index));
  Sequence& s = Get(id);
  const BlockId own = Row(s, table)[index];
  const BlockId target = arena_->AllocateBelow(own);
  if (!target.valid()) return own;
  std::memcpy(arena_->data(target), arena_->data(own), block_bytes(own));
  Ref(target);
  const uint8_t represents = marks_[own.index()] & kRepresents;
  Redirect(id, table, index, target, options_.scales ? ScaleRow(s, table)[index] : 1);
  marks_[target.index()] = represents;
  Unref(target);
  return target;
}

BlockId KvCache::Encode(SequenceId id, int table, int index, codec::Codec to, const std::byte* encoded, BlockId base) {
  Sequence& s = Get(id);
  const BlockId own = Row(s, table)[index];
  CHECK(s.blocks[index].sealed && own.valid() && codec(own) == shape_.layout.codec && !options_.scales);
  const auto found = std::ranges::find(codecs_, to);
  CHECK(found != codecs_.begin() && found != codecs_.end());
  const int offset = codec::kClasses + static_cast<int>(found - codecs_.begin() - 1) * codec::kQuantisedClasses;
  const BlockId target = arena_->Allocate(offset + s.blocks[index].tokens - 1);
  if (!target.valid()) return target;
  std::memcpy(arena_->data(target), encoded, block_bytes(target));
  if (base.valid()) {
    CHECK(base != own && refs_[base.index()] > 0 && bases_[base.index()] == 0);
    bases_[target.index()] = base.value + 1;
    RefFromIndex(base);
  }
  Ref(target);
  const uint8_t represents = marks_[own.index()] & kRepresents;
  bool done = true;
  if (Owned(id, table, index)) {
    RedirectOwned(id, table, index, target, 1);
  } else {
    done = RedirectAll(table, own, target, 1);
  }
  marks_[target.index()] = represents;
  if (done && base.valid()) marks_[base.index()] |= kRepresents;
  Unref(target);
  return done ? target : BlockId();
}

codec::Reference KvCache::key_reference(int layer) const {
  const KeyReference& own = key_references_[layer];
  return {.mean = own.mean.empty() ? nullptr : own.mean.data(),
          .pair_scales = own.pair_scales.empty() ? nullptr : own.pair_scales.data()};
}

void KvCache::SetKeyReference(int layer, std::vector<std::byte> mean, std::vector<float> pair_scales) {
  const codec::BlockLayout& layout = shape_.layout;
  CHECK(key_references_[layer].mean.empty() && mean.size() == layout.block_bytes(codec::kBlockTokensMax));
  CHECK(pair_scales.empty() || pair_scales.size() == static_cast<size_t>(layout.n_kv_heads) * (layout.head_dim / 2));
  for (const float scale : pair_scales) CHECK(scale >= 1 / codec::kPairScaleMax && scale <= codec::kPairScaleMax);
  key_references_[layer] = {std::move(mean), std::move(pair_scales)};
}

void KvCache::Watch(BlockId block) {
  CHECK(refs_[block.index()] > 0);
  marks_[block.index()] |= kWatched;
}

void KvCache::TakeReleased(std::vector<BlockId>& out) {
  out.assign(released_.begin(), released_.end());
  released_.clear();
}

size_t KvCache::LeastBytesOf(int tokens, bool encoded) const {
  size_t bytes = 0;
  for (int layer = 0; layer < shape_.n_layers(); ++layer) {
    const int window = shape_.window[layer];
    const int kept = window == 0 ? tokens : std::min(tokens, window);
    for (const Kind kind : {Kind::kK, Kind::kV}) {
      codec::BlockLayout layout = shape_.layout;
      if (encoded) layout.codec = shape_.sealed_codec(TableIndex(layer, kind));
      const int room = codec::IsQuantised(layout.codec) ? kept : codec::ClassCapacity(kept);
      bytes += layout.block_bytes(codec::kBlockTokensMax) * room / codec::kBlockTokensMax;
    }
  }
  return bytes;
}

size_t KvCache::LeastBytes(std::span<const TokenId> tokens, int more) const {
  const size_t least = MinimumBytes(static_cast<int>(tokens.size()) + more);
  // Windows give blocks back, and encoding shrinks them.
  if (widest_window_ > 0 || codecs_.size() > 1) return least;
  int complete[codec::kClasses] = {};
  size_t at = 0;
  for (int length = 0; (length = cutter_.FirstBlock(tokens.subspan(at))) != 0; at += static_cast<size_t>(length)) {
    complete[ClassOf(codec::ClassCapacity(length))] += shape_.n_tables();
  }
  // What is left over in slabs of complete blocks may hold the rest.
  const auto rest = static_cast<int>(tokens.size() - at);
  size_t bytes = MinimumBytes(rest + more);
  for (int c = 0; c < codec::kClasses; ++c)
    bytes += static_cast<size_t>(complete[c]) * shape_.layout.block_bytes((c + 1) * codec::kClassStep);
  if (rest > 0) complete[ClassOf(OpenCapacity(rest))] += shape_.n_tables();  // as the prompt ends
  return std::max({least, bytes, arena_->HeldBytesOf(complete)});
}

bool KvCache::HasRoomFor(int tokens, size_t reserve_bytes) const {
  // In a full store each class leaves half a slab or quarter on average, and Append leaves the spare ones. Free
  // quarters do not serve every class.
  int one[codec::kClasses];
  std::ranges::fill(one, 1);
  const size_t capacity = arena_->capacity_bytes();
  const size_t gaps = std::min(arena_->HeldBytesOf(one) / 2, capacity / 16);
  const size_t spare = spare_slabs_ * arena_->slab_bytes();
  return running_bytes_ + reserve_bytes + MinimumBytes(tokens) <=
         capacity - std::min(capacity, gaps + spare + std::min(arena_->free_quarter_bytes(), capacity / 32));
}

std::span<const LogicalBlock> KvCache::blocks(SequenceId sequence) const { return Get(sequence).blocks; }

const BlockId* KvCache::table(SequenceId sequence, int layer, Kind kind) const {
  return Row(Get(sequence), TableIndex(layer, kind));
}

const float* KvCache::scales(SequenceId sequence, int layer, Kind kind) const {
  return options_.scales ? ScaleRow(Get(sequence), TableIndex(layer, kind)) : nullptr;
}

void KvCache::SetScale(SequenceId sequence, int table, int index, float scale) {
  CHECK(options_.scales);
  Sequence& s = Get(sequence);
  ScaleRow(s, table)[index] = scale;
  if (index < static_cast<int>(s.chain.size())) index_[s.chain[index]].scales[table] = scale;
}

DomainId KvCache::domain(SequenceId sequence) const { return Get(sequence).domain; }

int64_t KvCache::serial(SequenceId sequence) const { return Get(sequence).serial; }

bool KvCache::lossy(SequenceId sequence) const { return Get(sequence).lossy; }

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
                            s->tables.capacity() * sizeof(BlockId) + s->scales.capacity() * sizeof(float) +
                            s->tokens.capacity() * sizeof(TokenId) + s->chain.capacity() * sizeof(EntryId) +
                            s->released.capacity() * sizeof(int);
  }
  stats.metadata_bytes += arena_->used_blocks() * (3 * sizeof(int32_t) + sizeof(uint8_t));
  for (const KeyReference& reference : key_references_)
    stats.metadata_bytes += reference.mean.size() + reference.pair_scales.size() * sizeof(float);
  stats.logical_bytes = logical_tokens_ * shape_.logical_token_bytes();
  stats.prefix_hit_tokens = prefix_hit_tokens_;
  stats.prefix_query_tokens = prefix_query_tokens_;
  stats.evicted_blocks = evicted_blocks_;
  stats.copies_on_write = copies_on_write_;
  return stats;
}

}  // namespace jointkv::kv
