// What the store keeps of one sequence. Private to kv/.
#pragma once

#include <vector>

#include "kv/kv_cache.h"

namespace jointkv::kv {

// Tables are one array of rows, each `table_capacity` ids long, so that a kernel walks one row contiguously.
struct KvCache::Sequence {
  DomainId domain;
  std::vector<TokenId> tokens;
  std::vector<LogicalBlock> blocks;
  std::vector<BlockId> tables;  // [table][table_capacity]
  int table_capacity = 0;       // logical blocks
  int committed = 0;            // tokens whose K and V are in place
  std::vector<EntryId> chain;   // index entries of the leading sealed blocks
  std::vector<int> released;    // per layer: leading blocks that have left the window
};

}  // namespace jointkv::kv
