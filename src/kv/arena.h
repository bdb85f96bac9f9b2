// Arena: all KV bytes of the server, below a hard cap.
//
// One address range, cut into slabs; a slab serves one size class at a time and goes back when its last block is freed.
// Of the slabs with room the lowest is filled first, so that the highest run empty. A BlockId names a slab and a slot
// in it; the slab knows its class, so a block's address, size and class follow from its id.
//
// Threads: one (the engine's); the bytes themselves may be used by many, and data, class_of and block_bytes be asked.
// Owns: the address range. Fails how: Allocate returns an invalid id when no slab is left; nothing else can fail.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "codec/layout.h"

namespace jointkv::kv {

// A slab holds so many of the smallest blocks of 16- and 32-bit elements. Divisible by 1..6, 8, 10, 12, 15 and 16 (32
// tokens, the most common block); of the other classes 11 (22 tokens) leaves the most room, a 27th of a slab.
inline constexpr int kSlabGranules = 240;

class Arena {
 public:
  // class_bytes: size of a block, by class; multiples of 64 and no larger than a slab. Reserves (does not touch)
  // cap_bytes, rounded down to whole slabs. kInvalidArgument when not even one slab fits.
  static Expected<std::unique_ptr<Arena>> Create(size_t cap_bytes, size_t slab_bytes,
                                                 std::span<const size_t> class_bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Contents are whatever was there.
  BlockId Allocate(int block_class);
  void Free(BlockId block);

  // Whether the next block of this one's class would lie in a lower slab.
  bool HasRoomBelow(BlockId block) {
    const int slab = partial_[class_of(block)].Lowest();
    return slab >= 0 && slab < block.value >> kSlotBits;
  }

  // Whether needed[c] blocks of each class c (of the first needed.size()) could all be allocated now, and `spare_slabs`
  // slabs be left free.
  bool CanAllocate(std::span<const int> needed, int spare_slabs = 0) const;

  // What blocks[c] blocks of each class c (of the first blocks.size()) hold when they are all that there is.
  size_t HeldBytesOf(std::span<const int> blocks) const;

  std::byte* data(BlockId block) const {
    const int slab = block.value >> kSlotBits;
    return base_ + slab * slab_bytes_ + static_cast<size_t>(block.value & (kSlotsMax - 1)) * slabs_[slab].block_bytes;
  }
  int class_of(BlockId block) const { return slabs_[block.value >> kSlotBits].block_class; }
  size_t block_bytes(BlockId block) const { return slabs_[block.value >> kSlotBits].block_bytes; }

  size_t slab_bytes() const { return slab_bytes_; }
  size_t capacity_bytes() const { return slabs_.size() * slab_bytes_; }
  size_t held_bytes() const { return (slabs_.size() - free_slabs_.size()) * slab_bytes_; }  // whole slabs
  size_t used_bytes() const { return used_bytes_; }                                         // blocks only
  int64_t used_blocks() const { return used_blocks_; }
  size_t metadata_bytes() const;
  int total_ids() const { return static_cast<int>(slabs_.size()) << kSlotBits; }  // every BlockId is below it

  // CHECKs the accounting: free + held = capacity, each slab's free slots are where they are said to be.
  void CheckIntegrity() const;

 private:
  static constexpr int kSlotBits = 10;
  static constexpr int kSlotsMax = 1 << kSlotBits;  // of a slab; a class of very small blocks leaves the rest unused

  struct Slab {
    int block_class = -1;                      // -1: free
    uint32_t block_bytes = 0;                  // of its class
    int used = 0;                              // blocks in use
    uint64_t free_slots[kSlotsMax / 64] = {};  // bit set: slot is free
  };
  // The slabs of one class with a free slot, as a set of bits.
  struct Partial {
    std::vector<uint64_t> words;
    size_t first = 0;  // no bit is set before this word

    void Add(int slab);
    void Remove(int slab) { words[slab / 64] &= ~(uint64_t{1} << (slab % 64)); }
    bool Has(int slab) const { return (words[slab / 64] >> (slab % 64) & 1) != 0; }
    int Lowest();  // -1: none
  };

  Arena(std::byte* base, size_t slab_bytes, int n_slabs, std::span<const size_t> class_bytes);
  int Slots(int block_class) const;

  std::byte* base_;
  size_t slab_bytes_;
  size_t used_bytes_ = 0;
  int64_t used_blocks_ = 0;
  std::vector<Slab> slabs_;
  std::vector<int> free_slabs_;
  std::vector<size_t> class_bytes_;  // by class
  std::vector<Partial> partial_;     // by class
  std::vector<int> free_slots_;      // by class, over its slabs
};

}  // namespace jointkv::kv
