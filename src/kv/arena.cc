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
  CHECK(slab_bytes % 64 == 0);
  for (const size_t bytes : class_bytes) CHECK(bytes > 0 && bytes % 64 == 0 && bytes <= slab_bytes);
  const size_t n_slabs = cap_bytes / slab_bytes;
  if (n_slabs == 0) {
    return Status(StatusCode::kInvalidArgument,
                  "kv-bytes " + FormatBytes(cap_bytes) + ": less than one slab of " + FormatBytes(slab_bytes));
  }
  if (n_slabs > static_cast<size_t>(INT32_MAX) / kSlotsMax) {
    return Status(StatusCode::kOutOfRange,
                  "kv-bytes " + FormatBytes(cap_bytes) + ": more than 2^21 slabs of " + FormatBytes(slab_bytes));
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
      slab_bytes_(slab_bytes),
      slabs_(n_slabs),
      class_bytes_(class_bytes.begin(), class_bytes.end()),
      partial_(class_bytes.size()),
      free_slots_(class_bytes.size()) {
  free_slabs_.reserve(n_slabs);
  for (int slab = n_slabs - 1; slab >= 0; --slab) free_slabs_.push_back(slab);
  for (Partial& partial : partial_) partial.words.resize(CeilDiv(n_slabs, 64));
}

Arena::~Arena() { munmap(base_, capacity_bytes()); }

void Arena::Partial::Add(int slab) {
  words[slab / 64] |= uint64_t{1} << (slab % 64);
  first = std::min(first, static_cast<size_t>(slab / 64));
}

int Arena::Partial::Lowest() {
  while (first < words.size() && words[first] == 0) ++first;
  return first == words.size() ? -1 : static_cast<int>(first * 64) + std::countr_zero(words[first]);
}

int Arena::Slots(int block_class) const {
  return static_cast<int>(std::min<size_t>(slab_bytes_ / class_bytes_[block_class], kSlotsMax));
}

BlockId Arena::Allocate(int block_class) {
  CHECK(block_class >= 0 && block_class < static_cast<int>(class_bytes_.size()));
  Partial& partial = partial_[block_class];
  int index = partial.Lowest();
  if (index < 0) {
    if (free_slabs_.empty()) return BlockId();
    index = free_slabs_.back();
    free_slabs_.pop_back();
    Slab& slab = slabs_[index];
    slab.block_class = block_class;
    slab.block_bytes = static_cast<uint32_t>(class_bytes_[block_class]);
    slab.used = 0;
    const int slots = Slots(block_class);
    for (int word = 0; word < kSlotsMax / 64; ++word) {
      const int bits = std::clamp(slots - 64 * word, 0, 64);
      slab.free_slots[word] = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
    }
    free_slots_[block_class] += slots;
    partial.Add(index);
  }
  Slab& slab = slabs_[index];
  int word = 0;
  while (slab.free_slots[word] == 0) ++word;
  const int slot = word * 64 + std::countr_zero(slab.free_slots[word]);
  slab.free_slots[word] &= slab.free_slots[word] - 1;
  ++slab.used;
  --free_slots_[block_class];
  used_bytes_ += slab.block_bytes;
  ++used_blocks_;
  if (slab.used == Slots(block_class)) partial.Remove(index);
  return BlockId((index << kSlotBits) + slot);
}

void Arena::Free(BlockId block) {
  const int index = block.value >> kSlotBits;
  CHECK(block.valid() && index < static_cast<int>(slabs_.size()));
  Slab& slab = slabs_[index];
  const int slot = block.value & (kSlotsMax - 1);
  const int block_class = slab.block_class;
  CHECK(block_class >= 0 && slot < Slots(block_class));
  const uint64_t bit = uint64_t{1} << (slot % 64);
  CHECK((slab.free_slots[slot / 64] & bit) == 0);
  if (slab.used == Slots(block_class)) partial_[block_class].Add(index);
  slab.free_slots[slot / 64] |= bit;
  --slab.used;
  ++free_slots_[block_class];
  used_bytes_ -= slab.block_bytes;
  --used_blocks_;
  if (slab.used == 0) {
    partial_[block_class].Remove(index);
    free_slots_[block_class] -= Slots(block_class);
    slab.block_class = -1;
    free_slabs_.push_back(index);
  }
}

bool Arena::CanAllocate(std::span<const int> needed, int spare_slabs) const {
  CHECK(needed.size() <= class_bytes_.size());
  size_t slabs = 0;
  for (size_t c = 0; c < needed.size(); ++c) {
    if (needed[c] > free_slots_[c]) slabs += CeilDiv(needed[c] - free_slots_[c], Slots(static_cast<int>(c)));
  }
  return slabs == 0 || slabs + spare_slabs <= free_slabs_.size();
}

size_t Arena::HeldBytesOf(std::span<const int> blocks) const {
  CHECK(blocks.size() <= class_bytes_.size());
  size_t slabs = 0;
  for (size_t c = 0; c < blocks.size(); ++c) slabs += CeilDiv(blocks[c], Slots(static_cast<int>(c)));
  return slabs * slab_bytes_;
}

size_t Arena::metadata_bytes() const { return slabs_.size() * (sizeof(Slab) + sizeof(int)); }

void Arena::CheckIntegrity() const {
  size_t used = 0;
  size_t free_slabs = 0;
  std::vector<int> free_slots(class_bytes_.size());
  for (size_t i = 0; i < slabs_.size(); ++i) {
    const Slab& slab = slabs_[i];
    if (slab.block_class < 0) {
      ++free_slabs;
      CHECK(slab.used == 0);
      continue;
    }
    int free = 0;
    for (const uint64_t word : slab.free_slots) free += std::popcount(word);
    CHECK(slab.used > 0 && free + slab.used == Slots(slab.block_class));
    CHECK(slab.block_bytes == class_bytes_[slab.block_class]);
    for (size_t c = 0; c < class_bytes_.size(); ++c) {
      CHECK(partial_[c].Has(static_cast<int>(i)) == (static_cast<int>(c) == slab.block_class && free > 0));
    }
    free_slots[slab.block_class] += free;
    used += static_cast<size_t>(slab.used) * slab.block_bytes;
  }
  CHECK(free_slabs == free_slabs_.size());
  CHECK(used == used_bytes_);
  CHECK(free_slots == free_slots_);
  CHECK(held_bytes() <= capacity_bytes() && used_bytes() <= held_bytes());
}

}  // namespace jointkv::kv
