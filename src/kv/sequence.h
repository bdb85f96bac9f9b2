// What the store keeps of one sequence. Private to kv/.
#pragma once

#include <vector>

#include "kv/kv_cache.h"

namespace jointkv::kv {

// Tables are one array of rows, each `table_capacity` ids long, so that a kernel walks one row contiguously.
struct KvCache::Sequence {
  DomainId domain;
  int64_t serial = 0;
  bool lossy = false;  // its blocks may be redirected; its prefixes are those of other lossy sequences
  std::vector<TokenId> tokens;
  std::vector<LogicalBlock> blocks;
  std::vector<BlockId> tables;  // [table][table_capacity]
  std::vector<float> scales;    // same shape; empty without Options::scales
  int table_capacity = 0;       // logical blocks
  int max_tokens = 0;           // what tables are to have room for
  int committed = 0;            // tokens whose K and V are in place
  int adopted = 0;              // leading blocks that AdoptPrefix found
  std::vector<EntryId> chain;   // index entries of the leading sealed blocks
  std::vector<int> released;    // per layer: leading blocks that have left the window

  PrefixRoot root() const { return {domain, lossy}; }
};

}  // namespace jointkv::kv
