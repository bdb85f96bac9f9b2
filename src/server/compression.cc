#include "server/compression.h"

namespace jointkv::server {

Compression CompressionOf(const kv::KvStats& kv, const kv::SharingStats& sharing) {
  Compression compression;
  const auto logical = static_cast<double>(kv.logical_bytes);
  const auto physical = static_cast<double>(kv.running_bytes);
  double counted = 0;  // of physical; less where the walk met a part of the tables only
  for (const auto& [domain, bytes] : sharing.domain_bytes) counted += bytes;
  if (logical == 0 || physical == 0 || counted == 0) return compression;
  compression.total = logical / physical;
  compression.codec = sharing.bytes_in_16_bit / counted;
  compression.fusion = sharing.unfused_bytes / counted;
  compression.exact_sharing = compression.total / compression.fusion / compression.codec;
  return compression;
}

}  // namespace jointkv::server
