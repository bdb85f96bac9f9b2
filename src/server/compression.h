// Compression: what the KV memory of the running sequences is worth, and what each technique adds to that.
#pragma once

#include "kv/kv_cache.h"

namespace jointkv::server {

// Slots that one walk over the block tables visits for kv::SharingStats: a few milliseconds of the engine's thread.
inline constexpr int64_t kSlotsPerWalk = int64_t{1} << 18;

// All 1 when nothing runs. total = exact_sharing * fusion * codec.
struct Compression {
  double total = 1;          // tokens of the sequences as private 16-bit K and V / bytes of the blocks they refer to
  double exact_sharing = 1;  // prefixes, forks and windows, less room in blocks that no token fills
  double fusion = 1;
  double codec = 1;  // elements of 16 bit / as stored
};

Compression CompressionOf(const kv::KvStats& kv, const kv::SharingStats& sharing);

}  // namespace jointkv::server
