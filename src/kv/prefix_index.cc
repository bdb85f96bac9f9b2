#include "kv/prefix_index.h"

#include <algorithm>

#include "base/check.h"
#include "base/hash.h"

namespace jointkv::kv {
namespace {

size_t EntryBytes(const PrefixEntry& entry) {
  return sizeof(PrefixEntry) + entry.tokens.capacity() * sizeof(TokenId) + entry.blocks.capacity() * sizeof(BlockId) +
         entry.scales.capacity() * sizeof(float) + 2 * sizeof(uint64_t);
}

}  // namespace

uint64_t PrefixIndex::Hash(const PrefixRoot& root, EntryId parent, std::span<const TokenId> tokens) const {
  const int32_t head[3] = {root.domain.value, root.lossy, parent.value};
  return HashSpan(tokens, HashSpan(std::span<const int32_t>(head), key_)) & hash_mask_;
}

EntryId PrefixIndex::Find(const PrefixRoot& root, EntryId parent, std::span<const TokenId> tokens) const {
  const auto found = buckets_.find(Hash(root, parent, tokens));
  if (found == buckets_.end()) return EntryId();
  for (EntryId id = found->second; id.valid(); id = (*this)[id].next_in_bucket) {
    const PrefixEntry& entry = (*this)[id];
    if (entry.root == root && entry.parent == parent && std::ranges::equal(entry.tokens, tokens)) return id;
  }
  return EntryId();
}

EntryId PrefixIndex::Insert(const PrefixRoot& root, EntryId parent, std::span<const TokenId> tokens,
                            std::span<const BlockId> blocks, std::span<const float> scales, int cap) {
  EntryId id;
  if (free_.empty()) {
    id = EntryId(static_cast<int32_t>(entries_.size()));
    entries_.emplace_back();
  } else {
    id = free_.back();
    free_.pop_back();
  }
  PrefixEntry& entry = (*this)[id];
  entry = PrefixEntry();
  entry.root = root;
  entry.parent = parent;
  entry.hash = Hash(root, parent, tokens);
  entry.tokens.assign(tokens.begin(), tokens.end());
  entry.blocks.assign(blocks.begin(), blocks.end());
  entry.scales.assign(scales.begin(), scales.end());
  entry.cap = static_cast<uint8_t>(cap);
  entry.stripped = !std::ranges::all_of(blocks, [](BlockId block) { return block.valid(); });
  auto [bucket, inserted] = buckets_.try_emplace(entry.hash, id);
  if (!inserted) {
    entry.next_in_bucket = bucket->second;
    bucket->second = id;
  }
  if (parent.valid()) ++(*this)[parent].children;
  metadata_bytes_ += EntryBytes(entry);
  entry.users = 1;
  return id;
}

void PrefixIndex::Remove(EntryId id) {
  PrefixEntry& entry = (*this)[id];
  CHECK(entry.children == 0 && entry.users == 0);
  const auto bucket = buckets_.find(entry.hash);
  CHECK(bucket != buckets_.end());
  if (bucket->second == id) {
    if (entry.next_in_bucket.valid()) {
      bucket->second = entry.next_in_bucket;
    } else {
      buckets_.erase(bucket);
    }
  } else {
    EntryId before = bucket->second;
    while ((*this)[before].next_in_bucket != id) before = (*this)[before].next_in_bucket;
    (*this)[before].next_in_bucket = entry.next_in_bucket;
  }
  if (entry.parent.valid()) --(*this)[entry.parent].children;
  metadata_bytes_ -= EntryBytes(entry);
  Unlink(id);
  entry = PrefixEntry();
  free_.push_back(id);
}

void PrefixIndex::AddUser(EntryId id) {
  if ((*this)[id].users++ == 0) Unlink(id);
}

void PrefixIndex::DropUser(EntryId id) {
  CHECK((*this)[id].users > 0);
  if (--(*this)[id].users == 0) LinkNewest(id);
}

void PrefixIndex::Unlink(EntryId id) {
  PrefixEntry& entry = (*this)[id];
  const auto queue = unused_.find(entry.root.domain);
  CHECK(queue != unused_.end());
  (entry.older.valid() ? (*this)[entry.older].newer : queue->second.oldest) = entry.newer;
  (entry.newer.valid() ? (*this)[entry.newer].older : queue->second.newest) = entry.older;
  entry.older = entry.newer = EntryId();
  if (--queue->second.size == 0) unused_.erase(queue);
}

EntryId PrefixIndex::oldest_unused() const {
  const auto longest = std::ranges::max_element(unused_, {}, [](const auto& queue) { return queue.second.size; });
  return longest == unused_.end() ? EntryId() : longest->second.oldest;
}

void PrefixIndex::CheckIntegrity() const {
  std::vector<int> children(entries_.size());
  size_t unused = 0;
  size_t bytes = 0;
  ForEach([&](EntryId id, const PrefixEntry& entry) {
    CHECK(Find(entry.root, entry.parent, entry.tokens) == id);
    if (entry.parent.valid()) {
      const PrefixEntry& parent = (*this)[entry.parent];
      CHECK(!parent.tokens.empty() && parent.root == entry.root && parent.users >= entry.users);
      ++children[entry.parent.index()];
    }
    unused += entry.users == 0;
    bytes += EntryBytes(entry);
  });
  ForEach([&](EntryId id, const PrefixEntry& entry) { CHECK(entry.children == children[id.index()]); });
  for (const auto& [domain, queue] : unused_) {
    int64_t size = 0;
    EntryId before;
    for (EntryId id = queue.oldest; id.valid(); id = (*this)[id].newer) {
      const PrefixEntry& entry = (*this)[id];
      CHECK(entry.root.domain == domain);
      CHECK(entry.users == 0 && entry.older == before && children[id.index()] == 0);
      if (entry.parent.valid()) --children[entry.parent.index()];
      before = id;
      ++size;
    }
    CHECK(before == queue.newest && size == queue.size && size > 0);
    unused -= static_cast<size_t>(size);
  }
  CHECK(unused == 0 && bytes == metadata_bytes_);
}

void PrefixIndex::LinkNewest(EntryId id) {
  PrefixEntry& entry = (*this)[id];
  Queue& queue = unused_[entry.root.domain];
  entry.older = queue.newest;
  (queue.newest.valid() ? (*this)[queue.newest].newer : queue.oldest) = id;
  queue.newest = id;
  ++queue.size;
}

}  // namespace jointkv::kv
