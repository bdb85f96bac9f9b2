// Arena: all KV bytes of the server, below a hard cap.
//
// One address range, cut into granules (4 tokens of K or V of one layer); kSlabGranules granules form a slab; a slab
// serves one size class at a time and goes back when its last block is freed. Of the slabs with room the lowest is
// filled first, so that the highest run empty. A BlockId is the index of a block's first
// granule, so address = base + id * granule_bytes and no table stands between a kernel and its bytes.
//
// Threads: one (the engine's); the bytes themselves may be used by many. Owns: the address range.
// Fails how: Allocate returns an invalid id when no slab is left; nothing else can fail.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "codec/layout.h"

namespace jointkv::kv {

// Divisible by 1..6 and 8, so that only class 7 (28 tokens) wastes a granule per slab.
inline constexpr int kSlabGranules = 120;

class Arena {
 public:
  // Reserves (does not touch) cap_bytes, rounded down to whole slabs. kInvalidArgument when not even one slab fits.
  static Expected<std::unique_ptr<Arena>> Create(size_t cap_bytes, size_t granule_bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // A block of `granules` (1..8) contiguous granules. Contents are whatever was there.
  BlockId Allocate(int granules);
  void Free(BlockId block, int granules);

  // Whether the next block of this size would lie in a lower slab than `block`.
  bool HasRoomBelow(BlockId block, int granules) {
    const int slab = partial_[granules - 1].Lowest();
    return slab >= 0 && slab < block.value / kSlabGranules;
  }

  // Whether needed[g] blocks of g + 1 granules each could all be allocated now.
  bool CanAllocate(std::span<const int, codec::kClasses> needed) const;

  std::byte* data(BlockId block) const { return base_ + static_cast<size_t>(block.value) * granule_bytes_; }

  size_t granule_bytes() const { return granule_bytes_; }
  size_t slab_bytes() const { return granule_bytes_ * kSlabGranules; }
  size_t capacity_bytes() const { return slabs_.size() * slab_bytes(); }
  size_t held_bytes() const { return (slabs_.size() - free_slabs_.size()) * slab_bytes(); }  // whole slabs
  size_t used_bytes() const { return used_granules_ * granule_bytes_; }                      // blocks only
  size_t metadata_bytes() const;
  int total_granules() const { return static_cast<int>(slabs_.size()) * kSlabGranules; }

  // CHECKs the accounting: free + held = capacity, each slab's free slots are where they are said to be.
  void CheckIntegrity() const;

 private:
  struct Slab {
    int granules = 0;             // block size it serves; 0: free
    int used = 0;                 // blocks in use
    uint64_t free_slots[2] = {};  // bit set: slot is free
  };

  Arena(std::byte* base, size_t mapped_bytes, size_t granule_bytes, int n_slabs);
  static int Slots(int granules) { return kSlabGranules / granules; }
  // The slabs of one class with a free slot, as a set of bits.
  struct Partial {
    std::vector<uint64_t> words;
    size_t first = 0;  // no bit is set before this word

    void Add(int slab);
    void Remove(int slab) { words[slab / 64] &= ~(uint64_t{1} << (slab % 64)); }
    bool Has(int slab) const { return (words[slab / 64] >> (slab % 64) & 1) != 0; }
    int Lowest();  // -1: none
  };

  std::byte* base_;
  size_t mapped_bytes_;
  size_t granule_bytes_;
  size_t used_granules_ = 0;
  std::vector<Slab> slabs_;
  std::vector<int> free_slabs_;
  Partial partial_[codec::kClasses];
  int free_slots_[codec::kClasses] = {};  // over those slabs
};

}  // namespace jointkv::kv
