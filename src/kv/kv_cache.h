// KvCache: the block store. Sequences with block tables over one arena, shared by reference counts.
//
// See kv/README.md for the contract (concepts, ownership, invariants). In short:
//   logical block   a run of <= 32 tokens of one sequence, cut by content; open while it grows, then sealed
//   physical block  K or V of one layer for those tokens; reference counted
//   block table     per sequence: [layer][K or V][logical index] -> physical block
//
// A step is: Append (reserves room, all or nothing) -> the forward pass writes K and V of the new tokens -> Commit.
//
// Threads: one (the engine's). While a forward pass runs, other threads may read tables and blocks and write the slots
// that Append reserved. Owns: the arena, the tables, the prefix index.
// Fails how: Append returns false when there is no room, and no sequence has changed. Fork takes no room.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "base/ids.h"
#include "base/lazy_array.h"
#include "base/status.h"
#include "codec/quantised.h"
#include "kv/arena.h"
#include "kv/cutter.h"
#include "kv/prefix_index.h"

namespace jointkv::kv {

using codec::Kind;

struct KvShape {
  codec::BlockLayout layout;  // of blocks as a forward pass writes them
  std::vector<int> window;    // per layer: how many tokens a query may look back, itself included; 0: all
  // By table: what its sealed blocks are encoded as (layout.codec: not at all). Empty: none is.
  std::vector<codec::Codec> sealed = {};

  int n_layers() const { return static_cast<int>(window.size()); }
  int n_tables() const { return 2 * n_layers(); }  // one per layer and kind
  codec::Codec sealed_codec(int table) const { return sealed.empty() ? layout.codec : sealed[table]; }
  // Bytes of one token as private 16-bit K and V in all layers: the yardstick of compression.
  size_t logical_token_bytes() const {
    return static_cast<size_t>(n_tables()) * layout.n_kv_heads * layout.head_dim * 2;
  }
};

// What a block that is a difference from another one may be in, coarsest first.
inline constexpr std::array kResidualCodecs = {codec::Codec::kQ1, codec::Codec::kQ2, codec::Codec::kQ4};

constexpr int TableIndex(int layer, Kind kind) { return 2 * layer + static_cast<int>(kind); }

// One row of every block table of a sequence.
struct LogicalBlock {
  int start = 0;          // position of its first token
  int base = 0;           // position that its keys' rotation counts from: start, or 0 with absolute keys
  uint8_t tokens = 0;     // filled (appended) tokens
  uint8_t cap = 0;        // size class of its written physical blocks, in tokens
  bool complete = false;  // its content says that it ends here
  bool sealed = false;    // complete and committed: never changes again
};

// Logical blocks [first, last) of a sequence.
struct SealedRange {
  int first = 0;
  int last = 0;
  bool empty() const { return first == last; }
};

struct KvStats {
  size_t capacity_bytes = 0;
  size_t held_bytes = 0;      // slabs in use: what the operating system and the cap see
  size_t used_bytes = 0;      // blocks inside them
  size_t running_bytes = 0;   // blocks that a sequence refers to
  size_t metadata_bytes = 0;  // tables, counts and index
  size_t logical_bytes = 0;   // resident tokens of sequences as private 16-bit K and V
  int64_t prefix_hit_tokens = 0;
  int64_t prefix_query_tokens = 0;
  int64_t evicted_blocks = 0;  // logical
  int64_t copies_on_write = 0;
};

// What a table slot refers to.
enum class SlotState : uint8_t {
  kReleased,  // nothing: the block has left the layer's window
  kPrivate,   // a block that no other sequence reads
  kPrefix,    // a block that holds exactly this content, read by others too or adopted from the prefix index
  kFused,     // a block that stands for others as well, or the difference from one: something was redirected to it
};

// How the running sequences share blocks.
struct SharingStats {
  // Blocks by readers: 1, 2, to 4, to 8, to 16, to 32, to 64, more.
  static constexpr int kReaderClasses = 8;
  static int ReaderClass(int readers);

  std::array<double, kReaderClasses> blocks = {};
  double private_slots = 0;
  double prefix_slots = 0;
  double fused_slots = 0;
  double unfused_bytes = 0;                 // what the running sequences would refer to, had no block been fused
  double bytes_in_16_bit = 0;               // the blocks that they do refer to, had each codec 16 bit
  std::map<DomainId, double> domain_bytes;  // and as they are
};

class KvCache {
 public:
  struct Options {
    size_t cap_bytes = 0;
    bool prefix_cache = true;
    bool absolute_keys = false;  // keys rotated by their position instead of their offset in the block
    bool scales = false;         // every table slot carries a factor for its block's values
    bool residuals = false;      // sealed blocks may be kept as their difference from another one (bf16 layout only)
  };

  static Expected<std::unique_ptr<KvCache>> Create(KvShape shape, BlockCutter cutter, Options options);
  ~KvCache();

  // An empty sequence. After AdoptPrefix its tables have room for `max_tokens` tokens without another heap allocation.
  // Exact sequences share prefixes among themselves only; the blocks of lossy ones may be redirected to others'
  // representatives.
  enum class Sharing : uint8_t { kExact, kLossy };
  SequenceId Create(DomainId domain, int max_tokens, Sharing sharing = Sharing::kExact);
  // Drops the sequence and its references. Its sealed blocks may live on in the prefix index.
  void Free(SequenceId sequence);

  // Lets an empty sequence start with the longest known prefix of `tokens` (less the last token, whose logits the
  // caller needs), never from another domain. Returns how many tokens are now in the sequence. `adopts` = false: none,
  // for a caller that needs what the pass over them gives.
  int AdoptPrefix(SequenceId sequence, std::span<const TokenId> tokens, bool adopts = true);

  // Reserves slots for `tokens` after the sequence's present end, evicting unused prefix blocks when it must. Shared
  // open blocks are copied first. False, and nothing changed but evictions, when there is no room; no evictions either
  // where the running sequences alone leave too little.
  bool Append(SequenceId sequence, std::span<const TokenId> tokens);
  // All appended tokens have their K and V in place: seals complete blocks, publishes them in the prefix index, and
  // gives back what sliding-window layers can no longer see. Returns which blocks it sealed.
  SealedRange Commit(SequenceId sequence);

  // A sequence with the same tokens that shares every block. Requires a committed source.
  SequenceId Fork(SequenceId sequence, int max_tokens);

  // Joint encoding. A block is redirectable while it is sealed, belongs to a lossy sequence, and nobody but this table
  // slot (with its forks' at the same index, and its index entry) refers to it.
  bool Redirectable(SequenceId sequence, int table, int index) const;
  // The same, of any sequence.
  bool Owned(SequenceId sequence, int table, int index) const;
  // Lets such a slot, and its index entry, refer to `target` (same tokens count, cap and domain) and frees its own
  // block. `scale` multiplies target's values for this slot; 1 unless Options::scales.
  void Redirect(SequenceId sequence, int table, int index, BlockId target, float scale = 1);
  // Lets every slot and index entry that refers to `from` refer to `target` instead, multiplying their factors by
  // `scale`. False, and nothing changed, when an entry that no running sequence uses refers to it too.
  bool RedirectAll(int table, BlockId from, BlockId target, float scale);
  // Moves such a slot's own block to the lowest free place of its class, so that slabs of short-lived blocks run empty.
  // Returns where it lies now.
  BlockId MoveDown(SequenceId sequence, int table, int index);
  // Lets all that refers to the sealed block of this slot refer to a block of `to` (a quantised codec) instead, of
  // just its tokens, and frees it. `encoded`: what the new block holds. With a `base` (same tokens count, cap and
  // domain, itself without one; Options::residuals), the new block is a difference from it and owns a reference to it.
  // Returns the new block; invalid, and nothing changed, when there is no room for it, or an entry that no running
  // sequence uses refers to the old one.
  BlockId Encode(SequenceId sequence, int table, int index, codec::Codec to, const std::byte* encoded,
                 BlockId base = BlockId());
  // After the last owner of a watched block is gone, its id is in TakeReleased once, and may be in use again already.
  void Watch(BlockId block);
  void Unwatch(BlockId block) { marks_[block.index()] &= ~kWatched; }
  bool watched(BlockId block) const { return (marks_[block.index()] & kWatched) != 0; }
  // The block's values are not what was written any more, nor may they move farther from it: it stays as it is.
  void Settle(BlockId block) { marks_[block.index()] |= kSettled; }
  bool settled(BlockId block) const { return (marks_[block.index()] & kSettled) != 0; }
  void TakeReleased(std::vector<BlockId>& out);

  // Whether a new sequence of `tokens` tokens should fit beside what the running sequences refer to (everything else
  // can be evicted) with `reserve_bytes` to spare. An estimate: the content decides how blocks fall into size classes.
  bool HasRoomFor(int tokens, size_t reserve_bytes) const;
  // Least bytes that `tokens` tokens can take: a request beyond the capacity can never run.
  size_t MinimumBytes(int tokens) const { return LeastBytesOf(tokens, true); }
  // The same as the forward pass writes them, before anything is encoded.
  size_t WrittenBytes(int tokens) const { return LeastBytesOf(tokens, false); }
  // The same of a sequence of these tokens and `more` unknown ones that shares nothing, in whole slabs: no less than
  // MinimumBytes.
  size_t LeastBytes(std::span<const TokenId> tokens, int more) const;

  // Views for kernels. Valid until the next change of the sequence.
  std::span<const LogicalBlock> blocks(SequenceId sequence) const;
  const BlockId* table(SequenceId sequence, int layer,
                       Kind kind) const;  // by logical index; invalid id: left the window
  std::byte* data(BlockId block) const { return arena_->data(block); }
  size_t block_bytes(BlockId block) const { return arena_->block_bytes(block); }
  codec::Codec codec(BlockId block) const {
    const int above = arena_->class_of(block) - codec::kClasses;
    return codecs_[above < 0 ? 0 : 1 + above / codec::kQuantisedClasses];
  }
  // What a block is the difference from; invalid: it stands alone.
  BlockId base(BlockId block) const { return BlockId(bases_[block.index()] - 1); }
  bool residuals() const { return options_.residuals; }
  // What the encoded keys of a layer are relative to, those that stand alone. Set once, before any is encoded: `mean`
  // is a block of kBlockTokensMax tokens, pair_scales (n_kv_heads, head_dim / 2) or empty.
  codec::Reference key_reference(int layer) const;
  void SetKeyReference(int layer, std::vector<std::byte> mean, std::vector<float> pair_scales);
  // The slots' factors by logical index; null: all 1.
  const float* scales(SequenceId sequence, int layer, Kind kind) const;
  void SetScale(SequenceId sequence, int table, int index, float scale);
  std::span<const TokenId> tokens(SequenceId sequence) const;
  DomainId domain(SequenceId sequence) const;
  bool lossy(SequenceId sequence) const;
  int64_t serial(SequenceId sequence) const;  // of its creation: never used again
  int length(SequenceId sequence) const { return static_cast<int>(tokens(sequence).size()); }
  int sharers(BlockId block) const { return refs_[block.index()]; }
  // Table slots that refer to it, and differences from it that such slots refer to.
  int readers(BlockId block) const { return refs_[block.index()] - index_refs_[block.index()]; }
  SlotState state(SequenceId sequence, int table, int index) const;
  // Walks the tables of all sequences: exact where they have at most `slots_max` slots, else from every n-th table.
  SharingStats sharing_stats(int64_t slots_max) const;
  int total_blocks() const { return arena_->total_ids(); }  // ids are below it

  const KvShape& shape() const { return shape_; }
  const BlockCutter& cutter() const { return cutter_; }
  size_t running_bytes() const { return running_bytes_; }  // blocks that some sequence refers to
  size_t logical_bytes() const { return logical_tokens_ * shape_.logical_token_bytes(); }
  KvStats stats() const;
  // Drops every block that no sequence uses.
  void DropPrefixCache();
  // Recomputes every count from the tables and CHECKs the accounting. Slow: tests and debug builds.
  void CheckIntegrity() const;

 private:
  struct Sequence;
  struct Recount;

  KvCache(KvShape shape, BlockCutter cutter, Options options, std::vector<codec::Codec> codecs,
          std::unique_ptr<Arena> arena);
  Sequence& Get(SequenceId id) const;
  BlockId* Row(Sequence& s, int table) const;
  void ReserveTables(Sequence& s, int max_blocks) const;
  int BlocksFor(std::span<const TokenId> tokens, int max_tokens) const;
  void PushBlock(Sequence& s, int start, int cap);
  int BaseOf(int start) const { return options_.absolute_keys ? 0 : start; }
  float* ScaleRow(Sequence& s, int table) const;
  // References of table slots, and of index entries.
  void Ref(BlockId block);
  void Unref(BlockId block);
  void RefFromIndex(BlockId block);
  void UnrefFromIndex(BlockId block);
  bool Idle(BlockId block) const { return refs_[block.index()] == index_refs_[block.index()]; }
  void Wake(BlockId block);
  void Sleep(BlockId block);
  void Release(BlockId block);
  // The class of unencoded blocks of `cap` tokens; encoded ones follow, codec by codec.
  static int ClassOf(int cap) { return cap / codec::kClassStep - 1; }
  bool CanAllocate(std::span<const int> needed) const;
  void RedirectOwned(SequenceId sequence, int table, int index, BlockId target, float scale);
  void ReleaseRow(Sequence& s, int index);
  bool MakeRoom(std::span<const int, codec::kClasses> needed);
  bool EvictOne();
  bool StripOne();
  void MakeOpenPrivate(Sequence& s, int cap);
  void SealBlock(Sequence& s, int index);
  void MoveToClass(Sequence& s, int index);
  void Publish(Sequence& s, int index);
  void TakeKnown(Sequence& s, int index, EntryId entry);
  void QueueForStrip(EntryId id);
  void ReleaseWindow(Sequence& s);
  int FirstVisible(int layer, int next_position) const;
  size_t LeastBytesOf(int tokens, bool encoded) const;
  double SealedBytes(int table, const LogicalBlock& block) const;
  // size: cap, and how many tokens.
  void Count(Recount& recount, BlockId block, std::pair<int, int> size, DomainId domain, bool from_index) const;
  void CheckSequence(const Sequence& s, Recount& recount) const;

  KvShape shape_;
  BlockCutter cutter_;
  Options options_;
  std::vector<codec::Codec> codecs_;  // shape_.layout's, then those that sealed blocks are encoded as
  struct KeyReference {
    std::vector<std::byte> mean;
    std::vector<float> pair_scales;
  };
  std::vector<KeyReference> key_references_;  // by layer
  int spare_slabs_ = 0;                       // kept for encoded blocks, so that a full store can still shrink
  std::unique_ptr<Arena> arena_;
  LazyArray<int32_t> refs_;        // by BlockId; owners: table slots, index entries, differences from it
  LazyArray<int32_t> index_refs_;  // of those, how many are index entries or differences that are idle
  LazyArray<int32_t> bases_;       // by BlockId; the base's id + 1, 0: none
  // By BlockId. kRepresents: a slot or entry was redirected to it.
  static constexpr uint8_t kWatched = 1;
  static constexpr uint8_t kRepresents = 2;
  static constexpr uint8_t kSettled = 4;
  LazyArray<uint8_t> marks_;
  std::vector<BlockId> released_;  // watched blocks without an owner since TakeReleased
  PrefixIndex index_;
  std::deque<EntryId> strippable_;  // entries with window blocks that perhaps no sequence refers to any more
  std::vector<BlockId> publish_scratch_;
  std::vector<float> scale_scratch_;
  std::vector<std::unique_ptr<Sequence>> sequences_;
  std::vector<int> free_sequences_;
  size_t running_bytes_ = 0;
  size_t logical_tokens_ = 0;
  int64_t next_serial_ = 0;
  int64_t prefix_hit_tokens_ = 0;
  int64_t prefix_query_tokens_ = 0;
  int64_t evicted_blocks_ = 0;
  int64_t copies_on_write_ = 0;
  int widest_window_ = 0;  // 0: no layer has one
};

}  // namespace jointkv::kv
