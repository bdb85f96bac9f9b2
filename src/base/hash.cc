#include "base/hash.h"

#include <xxhash.h>

#include <random>

namespace jointkv {

uint64_t Hash64(std::span<const std::byte> bytes, uint64_t key) {
  return XXH3_64bits_withSeed(bytes.data(), bytes.size(), key);
}

uint64_t RandomKey() {
  std::random_device device;
  return (static_cast<uint64_t>(device()) << 32) | device();
}

}  // namespace jointkv
