// Keyed 64-bit hashing (XXH3). The key is drawn per process, so a client cannot aim for collisions; every hit is still
// verified against the real data by its caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace jointkv {

uint64_t Hash64(std::span<const std::byte> bytes, uint64_t key);

template <typename T>
uint64_t HashSpan(std::span<const T> values, uint64_t key) {
  return Hash64(std::as_bytes(values), key);
}

// A key from the operating system's random source.
uint64_t RandomKey();

}  // namespace jointkv
