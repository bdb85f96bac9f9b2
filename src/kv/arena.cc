#include "kv/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <string>

#include "base/bytes.h"

namespace jointkv::kv {

Expected<std::unique_ptr<Arena>> Arena::Create(size_t cap_bytes, size_t slab_bytes,
                                               std::span<const size_t> class_bytes) {
  CHECK(slab_bytes % (64 * kSlabQuarters) == 0);
  for (const size_t bytes : class_bytes)
    CHECK(bytes > 0 && bytes % codec::kQuantisedBlockStep == 0 && bytes <= slab_bytes);
  const size_t n_slabs = cap_bytes / slab_bytes;
  if (n_slabs == 0) {
    return Status(StatusCode::kInvalidArgument,
                  "kv-bytes " + FormatBytes(cap_bytes) + ": less than one slab of " + FormatBytes(slab_bytes));
  }
  if (n_slabs > static_cast<size_t>(INT32_MAX) / (kSlabQuarters * kSlotsMax)) {
    return Status(StatusCode::kOutOfRange,
                  "kv-bytes " + FormatBytes(cap_bytes) + ": more than 2^22 slabs of " + FormatBytes(slab_bytes));
  }
  const size_t mapped = n_slabs * slab_bytes;
  void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return Status(StatusCode::kResourceExhausted,
                  "kv-bytes " + FormatBytes(cap_bytes) + ": cannot reserve memory: " + std::strerror(errno));
  }
  madvise(base, mapped, MADV_HUGEPAGE);
  return std::unique_ptr<Arena>(
      new Arena(static_cast<std::byte*>(base), slab_bytes, static_cast<int>(n_slabs), class_bytes));
}

Arena::Arena(std::byte* base, size_t slab_bytes, int n_slabs, std::span<const size_t> class_bytes)
    : base_(base),
      quarter_bytes_(slab_bytes / kSlabQuarters),
      quarters_(static_cast<size_t>(n_slabs) * kSlabQuarters),
      free_quarters_(n_slabs, kAllFree),
      divided_(n_slabs),
      free_slots_(class_bytes.size()) {
  free_slabs_.reserve(n_slabs);
  for (int slab = n_slabs - 1; slab >= 0; --slab) free_slabs_.push_back(slab);
  for (const size_t bytes : class_bytes) {
    const int of_slab = static_cast<int>(std::min<size_t>(slab_bytes / bytes, kSlotsMax));
    const int of_quarter = static_cast<int>(std::min<size_t>(quarter_bytes_ / bytes, kSlotsMax));
    // Half of a whole slab is gained once; a 32nd of all slabs would be lost.
    const bool whole = kSlabQuarters * of_quarter < of_slab - of_slab / 32;
    classes_.push_back({bytes, whole, whole ? of_slab : of_quarter});
    partial_.emplace_back(n_slabs * kSlabQuarters);
  }
}

Arena::~Arena() { munmap(base_, capacity_bytes()); }

void Arena::Set::Add(int i) {
  words[i / 64] |= uint64_t{1} << (i % 64);
  first = std::min(first, static_cast<size_t>(i / 64));
}

int Arena::Set::Lowest() {
  while (first < words.size() && words[first] == 0) ++first;
  return first == words.size() ? -1 : static_cast<int>(first * 64) + std::countr_zero(words[first]);
}

int Arena::Take(bool whole) {
  int slab = whole ? -1 : divided_.Lowest();
  if (slab < 0) {
    if (free_slabs_.empty()) return -1;
    slab = free_slabs_.back();
    free_slabs_.pop_back();
    if (whole) {
      free_quarters_[slab] = 0;
      return slab * kSlabQuarters;
    }
    divided_.Add(slab);
    divided_quarters_ += kSlabQuarters;
  }
  const int quarter = std::countr_zero(free_quarters_[slab]);
  free_quarters_[slab] &= free_quarters_[slab] - 1;
  --divided_quarters_;
  if (free_quarters_[slab] == 0) divided_.Remove(slab);
  return slab * kSlabQuarters + quarter;
}

void Arena::GiveBack(int quarter, bool whole) {
  const int slab = quarter / kSlabQuarters;
  uint8_t& free = free_quarters_[slab];
  if (whole) {
    free = kAllFree;
  } else {
    if (free == 0) divided_.Add(slab);
    free |= 1 << (quarter % kSlabQuarters);
    ++divided_quarters_;
    if (free == kAllFree) {
      divided_.Remove(slab);
      divided_quarters_ -= kSlabQuarters;
    }
  }
  if (free == kAllFree) free_slabs_.push_back(slab);
}

BlockId Arena::Allocate(int block_class) {
  CHECK(block_class >= 0 && block_class < static_cast<int>(classes_.size()));
  int index = partial_[block_class].Lowest();
  if (index < 0) index = Open(block_class);
  return index < 0 ? BlockId() : AllocateIn(index);
}

BlockId Arena::AllocateBelow(BlockId block) {
  const int own = block.value >> kSlotBits;
  const int block_class = quarters_[own].block_class;
  int index = partial_[block_class].Lowest();
  if (index < 0 || index >= own) {
    const int slab = classes_[block_class].whole ? -1 : divided_.Lowest();
    if (slab < 0 || slab >= own / kSlabQuarters) return BlockId();
    index = Open(block_class);
  }
  return AllocateIn(index);
}

int Arena::Open(int block_class) {
  const Class& served = classes_[block_class];
  const int index = Take(served.whole);
  if (index < 0) return -1;
  Quarter& quarter = quarters_[index];
  quarter.block_class = block_class;
  quarter.block_bytes = static_cast<uint32_t>(served.block_bytes);
  quarter.used = 0;
  for (int word = 0; word < kSlotsMax / 64; ++word) {
    const int bits = std::clamp(served.slots - 64 * word, 0, 64);
    quarter.free_slots[word] = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  }
  free_slots_[block_class] += served.slots;
  partial_[block_class].Add(index);
  return index;
}

BlockId Arena::AllocateIn(int index) {
  Quarter& quarter = quarters_[index];
  int word = 0;
  while (quarter.free_slots[word] == 0) ++word;
  const int slot = word * 64 + std::countr_zero(quarter.free_slots[word]);
  quarter.free_slots[word] &= quarter.free_slots[word] - 1;
  ++quarter.used;
  --free_slots_[quarter.block_class];
  used_bytes_ += quarter.block_bytes;
  ++used_blocks_;
  if (quarter.used == classes_[quarter.block_class].slots) partial_[quarter.block_class].Remove(index);
  return BlockId((index << kSlotBits) + slot);
}

void Arena::Free(BlockId block) {
  const int index = block.value >> kSlotBits;
  CHECK(block.valid() && index < static_cast<int>(quarters_.size()));
  Quarter& quarter = quarters_[index];
  const int slot = block.value & (kSlotsMax - 1);
  const int block_class = quarter.block_class;
  CHECK(block_class >= 0 && slot < classes_[block_class].slots);
  const Class& served = classes_[block_class];
  const uint64_t bit = uint64_t{1} << (slot % 64);
  CHECK((quarter.free_slots[slot / 64] & bit) == 0);
  if (quarter.used == served.slots) partial_[block_class].Add(index);
  quarter.free_slots[slot / 64] |= bit;
  --quarter.used;
  ++free_slots_[block_class];
  used_bytes_ -= quarter.block_bytes;
  --used_blocks_;
  if (quarter.used == 0) {
    partial_[block_class].Remove(index);
    free_slots_[block_class] -= served.slots;
    quarter.block_class = -1;
    GiveBack(index, served.whole);
  }
}

bool Arena::CanAllocate(std::span<const int> needed, int spare_slabs) const {
  CHECK(needed.size() <= classes_.size());
  size_t whole = 0;
  size_t quarters = 0;
  for (size_t c = 0; c < needed.size(); ++c) {
    if (needed[c] <= free_slots_[c]) continue;
    (classes_[c].whole ? whole : quarters) += CeilDiv(needed[c] - free_slots_[c], classes_[c].slots);
  }
  const size_t slabs = SlabsOf(whole, quarters - std::min(quarters, divided_quarters_));
  return slabs == 0 || slabs + spare_slabs <= free_slabs_.size();
}

size_t Arena::HeldBytesOf(std::span<const int> blocks) const {
  CHECK(blocks.size() <= classes_.size());
  size_t whole = 0;
  size_t quarters = 0;
  for (size_t c = 0; c < blocks.size(); ++c) {
    (classes_[c].whole ? whole : quarters) += CeilDiv(blocks[c], classes_[c].slots);
  }
  return SlabsOf(whole, quarters) * slab_bytes();
}

size_t Arena::metadata_bytes() const {
  return quarters_.size() * sizeof(Quarter) + free_quarters_.size() * (sizeof(uint8_t) + sizeof(int));
}

void Arena::CheckIntegrity() const {
  size_t used = 0;
  size_t free_slabs = 0;
  size_t divided_quarters = 0;
  std::vector<int> free_slots(classes_.size());
  for (size_t slab = 0; slab < free_quarters_.size(); ++slab) {
    const uint8_t free = free_quarters_[slab];
    const bool divided = free != 0 && free != kAllFree;
    free_slabs += free == kAllFree;
    divided_quarters += divided ? std::popcount(free) : 0;
    CHECK(divided_.Has(static_cast<int>(slab)) == divided);
    const int first_class = quarters_[slab * kSlabQuarters].block_class;
    const bool whole = first_class >= 0 && classes_[first_class].whole;
    CHECK(!whole || free == 0);
    for (int i = 0; i < kSlabQuarters; ++i) {
      const size_t index = slab * kSlabQuarters + i;
      const Quarter& quarter = quarters_[index];
      const bool serves = whole ? i == 0 : (free >> i & 1) == 0;
      CHECK(serves == (quarter.block_class >= 0) && (serves || quarter.used == 0));
      int free_here = 0;
      if (serves) {
        const Class& served = classes_[quarter.block_class];
        for (const uint64_t word : quarter.free_slots) free_here += std::popcount(word);
        CHECK(served.whole == whole && quarter.used > 0 && free_here + quarter.used == served.slots);
        CHECK(quarter.block_bytes == served.block_bytes);
        free_slots[quarter.block_class] += free_here;
        used += static_cast<size_t>(quarter.used) * quarter.block_bytes;
      }
      for (size_t c = 0; c < classes_.size(); ++c) {
        CHECK(partial_[c].Has(static_cast<int>(index)) ==
              (static_cast<int>(c) == quarter.block_class && free_here > 0));
      }
    }
  }
  CHECK(free_slabs == free_slabs_.size());
  CHECK(divided_quarters == divided_quarters_);
  CHECK(used == used_bytes_);
  CHECK(free_slots == free_slots_);
  CHECK(held_bytes() <= capacity_bytes() && used_bytes() <= held_bytes());
}

}  // namespace jointkv::kv
