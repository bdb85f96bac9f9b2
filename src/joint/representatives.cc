#include "joint/representatives.h"

#include <algorithm>
#include <numeric>

#include "base/check.h"
#include "base/hash.h"

namespace jointkv::joint {

Representatives::Representatives(int n_tables, int total_blocks, uint64_t key)
    : n_tables_(n_tables), key_(key), records_(total_blocks), sizes_(n_tables) {
  CHECK(records_.valid());
}

GroupId Representatives::Find(DomainId domain, std::span<const TokenId> tokens, int cap) {
  const int32_t head[2] = {domain.value, cap};
  const uint64_t hash = HashSpan(tokens, HashSpan(std::span<const int32_t>(head), key_));
  const auto [bucket, inserted] = buckets_.try_emplace(hash);
  for (GroupId id = bucket->second; id.valid(); id = groups_[id.index()].next_in_bucket) {
    const Group& group = groups_[id.index()];
    if (group.domain == domain && group.cap == cap && std::ranges::equal(group.tokens, tokens)) return id;
  }
  GroupId id;
  if (free_.empty()) {
    id = GroupId(static_cast<int32_t>(groups_.size()));
    groups_.emplace_back();
  } else {
    id = free_.back();
    free_.pop_back();
  }
  Group& group = groups_[id.index()];
  group.domain = domain;
  group.hash = hash;
  group.cap = cap;
  group.tokens.assign(tokens.begin(), tokens.end());
  group.first.assign(n_tables_, BlockId());
  group.next_in_bucket = bucket->second;
  bucket->second = id;
  return id;
}

void Representatives::Add(GroupId id, int table, BlockId block, float bound, codec::Codec codec) {
  Group& group = groups_[id.index()];
  records_[block.index()] = {id, group.first[table], bound, 1, table, codec};
  group.first[table] = block;
  ++sizes_[table];
}

BlockId& Representatives::LinkTo(BlockId block) {
  const Representative& record = records_[block.index()];
  BlockId* link = &groups_[record.group.index()].first[record.table];
  while (*link != block) link = &records_[link->index()].next;
  return *link;
}

void Representatives::Rename(BlockId from, BlockId to) {
  LinkTo(from) = to;
  records_[to.index()] = records_[from.index()];
}

void Representatives::Remove(BlockId block) {
  const Representative& record = records_[block.index()];
  const GroupId id = record.group;
  LinkTo(block) = record.next;
  --sizes_[record.table];
  Settle(id);
}

bool Representatives::Empty(const Group& group) const {
  return std::ranges::none_of(group.first, [](BlockId block) { return block.valid(); });
}

void Representatives::Settle(GroupId id) {
  Group& group = groups_[id.index()];
  if (group.tokens.empty() || !Empty(group)) return;
  const auto bucket = buckets_.find(group.hash);
  CHECK(bucket != buckets_.end());
  GroupId* link = &bucket->second;
  while (*link != id) link = &groups_[link->index()].next_in_bucket;
  *link = group.next_in_bucket;
  if (!bucket->second.valid()) buckets_.erase(bucket);
  group = Group();
  free_.push_back(id);
}

int64_t Representatives::size() const { return std::accumulate(sizes_.begin(), sizes_.end(), int64_t{0}); }

size_t Representatives::metadata_bytes() const {
  size_t bytes = static_cast<size_t>(size()) * sizeof(Representative) + buckets_.size() * 4 * sizeof(uint64_t);
  for (const Group& group : groups_) {
    bytes += sizeof(Group) + group.tokens.capacity() * sizeof(TokenId) + group.first.capacity() * sizeof(BlockId);
  }
  return bytes;
}

}  // namespace jointkv::joint
