#include "kv/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <string>

#include "base/bytes.h"

namespace jointkv::kv {

Expected<std::unique_ptr<Arena>> Arena::Create(size_t cap_bytes, size_t granule_bytes) {
  CHECK(granule_bytes > 0 && granule_bytes % 64 == 0);
  const size_t slab_bytes = granule_bytes * kSlabGranules;
  const size_t n_slabs = cap_bytes / slab_bytes;
  if (n_slabs == 0) {
    return Status(StatusCode::kInvalidArgument,
                  "kv-bytes " + FormatBytes(cap_bytes) + ": less than one slab of " + FormatBytes(slab_bytes));
  }
  if (n_slabs > static_cast<size_t>(INT32_MAX) / kSlabGranules) {
    return Status(StatusCode::kOutOfRange,
                  "kv-bytes " + FormatBytes(cap_bytes) + ": more than 2^31 blocks of " + FormatBytes(granule_bytes));
  }
  const size_t mapped = n_slabs * slab_bytes;
  void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return Status(StatusCode::kResourceExhausted,
                  "kv-bytes " + FormatBytes(cap_bytes) + ": cannot reserve memory: " + std::strerror(errno));
  }
  madvise(base, mapped, MADV_HUGEPAGE);
  return std::unique_ptr<Arena>(
      new Arena(static_cast<std::byte*>(base), mapped, granule_bytes, static_cast<int>(n_slabs)));
}

Arena::Arena(std::byte* base, size_t mapped_bytes, size_t granule_bytes, int n_slabs)
    : base_(base), mapped_bytes_(mapped_bytes), granule_bytes_(granule_bytes), slabs_(n_slabs) {
  free_slabs_.reserve(n_slabs);
  for (int slab = n_slabs - 1; slab >= 0; --slab) free_slabs_.push_back(slab);
  for (Partial& partial : partial_) partial.words.resize(CeilDiv(n_slabs, 64));
}

Arena::~Arena() { munmap(base_, mapped_bytes_); }

void Arena::Partial::Add(int slab) {
  words[slab / 64] |= uint64_t{1} << (slab % 64);
  first = std::min(first, static_cast<size_t>(slab / 64));
}

int Arena::Partial::Lowest() {
  while (first < words.size() && words[first] == 0) ++first;
  return first == words.size() ? -1 : static_cast<int>(first * 64) + std::countr_zero(words[first]);
}

BlockId Arena::Allocate(int granules) {
  CHECK(granules >= 1 && granules <= codec::kClasses);
  Partial& partial = partial_[granules - 1];
  int index = partial.Lowest();
  if (index < 0) {
    if (free_slabs_.empty()) return BlockId();
    index = free_slabs_.back();
    free_slabs_.pop_back();
    Slab& slab = slabs_[index];
    slab.granules = granules;
    slab.used = 0;
    const int slots = Slots(granules);
    slab.free_slots[0] = slots >= 64 ? ~uint64_t{0} : (uint64_t{1} << slots) - 1;
    slab.free_slots[1] = slots > 64 ? (uint64_t{1} << (slots - 64)) - 1 : 0;
    free_slots_[granules - 1] += slots;
    partial.Add(index);
  }
  Slab& slab = slabs_[index];
  const int word = slab.free_slots[0] != 0 ? 0 : 1;
  const int slot = word * 64 + std::countr_zero(slab.free_slots[word]);
  slab.free_slots[word] &= slab.free_slots[word] - 1;
  ++slab.used;
  --free_slots_[granules - 1];
  used_granules_ += granules;
  if (slab.used == Slots(granules)) partial.Remove(index);
  return BlockId(index * kSlabGranules + slot * granules);
}

void Arena::Free(BlockId block, int granules) {
  const int index = block.value / kSlabGranules;
  CHECK(block.valid() && index < static_cast<int>(slabs_.size()));
  Slab& slab = slabs_[index];
  CHECK(slab.granules == granules && block.value % kSlabGranules % granules == 0);
  const int slot = block.value % kSlabGranules / granules;
  const uint64_t bit = uint64_t{1} << (slot % 64);
  CHECK((slab.free_slots[slot / 64] & bit) == 0);
  if (slab.used == Slots(granules)) partial_[granules - 1].Add(index);
  slab.free_slots[slot / 64] |= bit;
  --slab.used;
  ++free_slots_[granules - 1];
  used_granules_ -= granules;
  if (slab.used == 0) {
    partial_[granules - 1].Remove(index);
    free_slots_[granules - 1] -= Slots(granules);
    slab.granules = 0;
    free_slabs_.push_back(index);
  }
}

bool Arena::CanAllocate(std::span<const int, codec::kClasses> needed) const {
  size_t slabs = 0;
  for (int c = 0; c < codec::kClasses; ++c) {
    if (needed[c] > free_slots_[c]) slabs += CeilDiv(needed[c] - free_slots_[c], Slots(c + 1));
  }
  return slabs <= free_slabs_.size();
}

size_t Arena::metadata_bytes() const { return slabs_.size() * (sizeof(Slab) + sizeof(int)); }

void Arena::CheckIntegrity() const {
  size_t used = 0;
  size_t free_slabs = 0;
  int free_slots[codec::kClasses] = {};
  for (size_t i = 0; i < slabs_.size(); ++i) {
    const Slab& slab = slabs_[i];
    if (slab.granules == 0) {
      ++free_slabs;
      CHECK(slab.used == 0);
      continue;
    }
    const int free = std::popcount(slab.free_slots[0]) + std::popcount(slab.free_slots[1]);
    CHECK(slab.used > 0 && free + slab.used == Slots(slab.granules));
    for (int c = 0; c < codec::kClasses; ++c) {
      CHECK(partial_[c].Has(static_cast<int>(i)) == (c == slab.granules - 1 && free > 0));
    }
    free_slots[slab.granules - 1] += free;
    used += static_cast<size_t>(slab.used) * slab.granules;
  }
  CHECK(free_slabs == free_slabs_.size());
  CHECK(used == used_granules_);
  for (int c = 0; c < codec::kClasses; ++c) CHECK(free_slots[c] == free_slots_[c]);
  CHECK(held_bytes() <= capacity_bytes() && used_bytes() <= held_bytes());
}

}  // namespace jointkv::kv
