// PrefixIndex: sealed logical blocks by content, a tree of hash chains.
//
// An entry is one logical block after one particular chain of blocks in one fusion domain, in one of two trees: the
// exact one, and the lossy one whose blocks may be representatives of others. It is found by a keyed hash of (domain,
// tree, parent, tokens) and verified token by token, so a hit is never a guess.
//
// Entries that no sequence uses stand in one queue for each domain, in order of last use, each behind its children, so
// the front of a queue is always a leaf. Eviction takes from the longest queue: a domain that floods the index pays
// with its own entries.
//
// Threads: one. Owns: its entries' tokens and block ids; the references behind the ids are the store's business.
// Fails how: Find returns no entry.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/ids.h"

namespace jointkv::kv {

using EntryId = Id<struct EntryTag>;

// Where a chain starts.
struct PrefixRoot {
  DomainId domain;
  bool lossy = false;

  bool operator==(const PrefixRoot&) const = default;
};

struct PrefixEntry {
  PrefixRoot root;
  EntryId parent;  // invalid: the block starts its sequence
  uint64_t hash = 0;
  std::vector<TokenId> tokens;
  std::vector<BlockId> blocks;  // by TableIndex; invalid: stripped (a window layer's block given back)
  std::vector<float> scales;    // by TableIndex; empty: all 1
  uint8_t cap = 0;
  bool stripped = false;
  bool queued_for_strip = false;
  int children = 0;  // entries whose parent this is
  int users = 0;     // sequences whose chain holds this entry
  EntryId older;     // neighbours in the queue of unused entries
  EntryId newer;
  EntryId next_in_bucket;
};

class PrefixIndex {
 public:
  // hash_mask narrows the hash, so that tests can make entries collide.
  explicit PrefixIndex(uint64_t key, uint64_t hash_mask = ~uint64_t{0}) : key_(key), hash_mask_(hash_mask) {}

  EntryId Find(const PrefixRoot& root, EntryId parent, std::span<const TokenId> tokens) const;
  // Adds an entry with one user. It must not exist yet.
  EntryId Insert(const PrefixRoot& root, EntryId parent, std::span<const TokenId> tokens,
                 std::span<const BlockId> blocks, std::span<const float> scales, int cap);
  // Removes an entry without children and users.
  void Remove(EntryId id);

  // A sequence uses a chain from its start on, and drops it from its end on.
  void AddUser(EntryId id);
  void DropUser(EntryId id);

  // The least recently used entry without users of the domain that has most of them, always a leaf; invalid when every
  // entry is in use.
  EntryId oldest_unused() const;

  PrefixEntry& operator[](EntryId id) { return entries_[id.index()]; }
  const PrefixEntry& operator[](EntryId id) const { return entries_[id.index()]; }
  size_t size() const { return entries_.size() - free_.size(); }
  size_t capacity() const { return entries_.size(); }  // ids are below it
  size_t metadata_bytes() const { return metadata_bytes_; }
  // CHECKs that each entry can be found, child counts, and that the queue holds the unused, children before parents.
  void CheckIntegrity() const;
  template <typename F>
  void ForEach(F&& f) const {
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (!entries_[i].tokens.empty()) f(EntryId(static_cast<int32_t>(i)), entries_[i]);
    }
  }

 private:
  uint64_t Hash(const PrefixRoot& root, EntryId parent, std::span<const TokenId> tokens) const;
  void Unlink(EntryId id);
  void LinkNewest(EntryId id);

  // Entries of one domain without users.
  struct Queue {
    EntryId oldest;
    EntryId newest;
    int64_t size = 0;
  };

  uint64_t key_;
  uint64_t hash_mask_;
  std::vector<PrefixEntry> entries_;
  std::vector<EntryId> free_;
  std::unordered_map<uint64_t, EntryId> buckets_;
  std::map<DomainId, Queue> unused_;  // none is empty
  size_t metadata_bytes_ = 0;
};

}  // namespace jointkv::kv
