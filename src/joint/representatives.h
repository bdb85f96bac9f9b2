// Representatives: which blocks stand for others, found by their content.
//
// A group is one content (domain, tokens, size class). For each table it lists the blocks that a further block with
// this content may be redirected to. Groups are found by a keyed hash and verified token by token.
//
// Threads: one, except that Add and the lists of different tables may be used at once between Find and Settle.
// Owns: groups and records, not the blocks' bytes nor references to them: the store says when one is gone.
// Fails how: never.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/ids.h"
#include "base/lazy_array.h"
#include "codec/codec.h"

namespace jointkv::joint {

using GroupId = Id<struct GroupTag>;

struct Representative {
  GroupId group;
  BlockId next;        // in the list of its group and table
  float bound = 0;     // proven: no member is farther away (the policy's measure)
  int32_t weight = 0;  // blocks that its mean is made of
  int32_t table = 0;
  codec::Codec codec = codec::Codec::kBf16;  // of its bytes
  bool fixed = false;                        // its bytes stay as they are: blocks are kept as differences from it
};

class Representatives {
 public:
  Representatives(int n_tables, int total_blocks, uint64_t key);

  // The group of this content, made when there is none. Ids stay until Remove empties them.
  GroupId Find(DomainId domain, std::span<const TokenId> tokens, int cap);

  // First of the list; the newest.
  BlockId first(GroupId group, int table) const { return groups_[group.index()].first[table]; }
  Representative& operator[](BlockId block) { return records_[block.index()]; }
  const Representative& operator[](BlockId block) const { return records_[block.index()]; }

  void Add(GroupId group, int table, BlockId block, float bound, codec::Codec codec = codec::Codec::kBf16);
  // The block has moved.
  void Rename(BlockId from, BlockId to);
  // The block is gone.
  void Remove(BlockId block);
  // Drops the group if nothing was added to it.
  void Settle(GroupId group);

  int64_t size() const;  // representatives
  size_t metadata_bytes() const;
  DomainId domain(GroupId group) const { return groups_[group.index()].domain; }
  int cap(GroupId group) const { return groups_[group.index()].cap; }
  std::span<const TokenId> tokens(GroupId group) const { return groups_[group.index()].tokens; }
  template <typename F>
  void ForEach(F&& f) const {
    for (size_t i = 0; i < groups_.size(); ++i) {
      for (const BlockId head : groups_[i].first) {
        for (BlockId block = head; block.valid(); block = records_[block.index()].next)
          f(block, records_[block.index()]);
      }
    }
  }

 private:
  struct Group {
    DomainId domain;
    uint64_t hash = 0;
    int cap = 0;
    std::vector<TokenId> tokens;  // empty: free
    std::vector<BlockId> first;   // (tables)
    GroupId next_in_bucket;
  };
  bool Empty(const Group& group) const;
  // What points to a listed block.
  BlockId& LinkTo(BlockId block);

  int n_tables_;
  uint64_t key_;
  std::vector<Group> groups_;
  std::vector<GroupId> free_;
  std::unordered_map<uint64_t, GroupId> buckets_;
  LazyArray<Representative> records_;  // by BlockId
  std::vector<int64_t> sizes_;         // by table: representatives
};

}  // namespace jointkv::joint
