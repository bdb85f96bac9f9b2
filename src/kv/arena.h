// Arena: all KV bytes of the server, below a hard cap.
//
// One address range, cut into slabs; a slab serves one size class at a time and goes back when its last block is freed.
// Classes whose blocks fill quarters of a slab about as well take those: a class leaves half of its last one empty. A
// divided slab goes back when its quarters are all free. Of the slabs or quarters with room the lowest is filled first,
// so that the highest run empty. A BlockId names a quarter (of a whole slab: the first) and a slot in it; the quarter
// knows its class, so a block's address, size and class follow from its id.
//
// Threads: one (the engine's); the bytes themselves may be used by many, and data, class_of and block_bytes be asked.
// Owns: the address range. Fails how: Allocate returns an invalid id when no slab is left; nothing else can fail.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/checked.h"
#include "base/ids.h"
#include "base/status.h"
#include "codec/layout.h"

namespace jointkv::kv {

// A slab holds so many of the smallest blocks of 16- and 32-bit elements. Divisible by 1..6, 8, 10, 12, 15 and 16 (32
// tokens, the most common block); of the other classes 11 (22 tokens) leaves the most room, a 27th of a slab. A quarter
// is divisible by 1..6, 10, 12 and 15.
inline constexpr int kSlabGranules = 240;
inline constexpr int kSlabQuarters = 4;

class Arena {
 public:
  // class_bytes: size of a block, by class; multiples of codec::kQuantisedBlockStep and no larger than a slab, which is
  // a multiple of 256. Reserves (does not touch) cap_bytes, rounded down to whole slabs. kInvalidArgument when not even
  // one slab fits.
  static Expected<std::unique_ptr<Arena>> Create(size_t cap_bytes, size_t slab_bytes,
                                                 std::span<const size_t> class_bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Contents are whatever was there.
  BlockId Allocate(int block_class);
  void Free(BlockId block);

  // A block of this one's class in a lower slab or quarter; invalid: none has room. Opens a free quarter of a divided
  // slab for that, but no free slab.
  BlockId AllocateBelow(BlockId block);

  // Whether needed[c] blocks of each class c (of the first needed.size()) could all be allocated now, and `spare_slabs`
  // slabs be left free.
  bool CanAllocate(std::span<const int> needed, int spare_slabs = 0) const;

  // What blocks[c] blocks of each class c (of the first blocks.size()) hold when they are all that there is.
  size_t HeldBytesOf(std::span<const int> blocks) const;

  std::byte* data(BlockId block) const {
    const int quarter = block.value >> kSlotBits;
    return base_ + quarter * quarter_bytes_ +
           static_cast<size_t>(block.value & (kSlotsMax - 1)) * quarters_[quarter].block_bytes;
  }
  int class_of(BlockId block) const { return quarters_[block.value >> kSlotBits].block_class; }
  size_t block_bytes(BlockId block) const { return quarters_[block.value >> kSlotBits].block_bytes; }

  size_t slab_bytes() const { return kSlabQuarters * quarter_bytes_; }
  size_t capacity_bytes() const { return free_quarters_.size() * slab_bytes(); }
  // Whole slabs, also those of which only some quarters are in use.
  size_t held_bytes() const { return (free_quarters_.size() - free_slabs_.size()) * slab_bytes(); }
  size_t free_quarter_bytes() const { return divided_quarters_ * quarter_bytes_; }  // of held slabs
  size_t used_bytes() const { return used_bytes_; }                                 // blocks only
  int64_t used_blocks() const { return used_blocks_; }
  size_t metadata_bytes() const;
  int total_ids() const { return static_cast<int>(quarters_.size()) << kSlotBits; }  // every BlockId is below it

  // CHECKs the accounting: free + held = capacity, free slots and free quarters are where they are said to be.
  void CheckIntegrity() const;

 private:
  static constexpr int kSlotBits = 7;
  static constexpr int kSlotsMax = 1 << kSlotBits;  // classes of very small blocks leave the rest of a slab unused
  static constexpr uint8_t kAllFree = (1 << kSlabQuarters) - 1;

  // A quarter, or a whole slab by its first one.
  struct Quarter {
    int block_class = -1;                      // -1: free, or not the first of a whole slab
    uint32_t block_bytes = 0;                  // of its class
    int used = 0;                              // blocks in use
    uint64_t free_slots[kSlotsMax / 64] = {};  // bit set: slot is free
  };
  struct Class {
    size_t block_bytes = 0;
    bool whole = false;  // takes whole slabs
    int slots = 0;       // of a slab, or of a quarter
  };
  // Some of the slabs or quarters, as a set of bits.
  struct Set {
    std::vector<uint64_t> words;
    size_t first = 0;  // no bit is set before this word

    explicit Set(int size) : words(CeilDiv(size, 64)) {}
    void Add(int i);
    void Remove(int i) { words[i / 64] &= ~(uint64_t{1} << (i % 64)); }
    bool Has(int i) const { return (words[i / 64] >> (i % 64) & 1) != 0; }
    int Lowest();  // -1: none
  };

  Arena(std::byte* base, size_t slab_bytes, int n_slabs, std::span<const size_t> class_bytes);
  int Open(int block_class);  // a slab or quarter for it; -1: none is left
  BlockId AllocateIn(int quarter);
  // The first quarter of a free slab, or a free quarter of a divided one; -1: no slab is left.
  int Take(bool whole);
  void GiveBack(int quarter, bool whole);
  size_t SlabsOf(size_t whole, size_t quarters) const { return whole + CeilDiv<size_t>(quarters, kSlabQuarters); }

  std::byte* base_;
  size_t quarter_bytes_;
  size_t used_bytes_ = 0;
  int64_t used_blocks_ = 0;
  std::vector<Quarter> quarters_;
  std::vector<uint8_t> free_quarters_;  // by slab: a bit for each, kAllFree where it is free; 0 where it serves a class
  std::vector<int> free_slabs_;
  Set divided_;                  // slabs with some free quarters and some not
  size_t divided_quarters_ = 0;  // free ones in those
  std::vector<Class> classes_;
  std::vector<Set> partial_;     // by class: quarters (first ones of whole slabs) with a free slot
  std::vector<int> free_slots_;  // by class, over those
};

}  // namespace jointkv::kv
