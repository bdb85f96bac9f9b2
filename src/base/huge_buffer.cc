#include "base/huge_buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "base/checked.h"

namespace jointkv {

HugeBuffer::HugeBuffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  madvise(base, bytes, MADV_HUGEPAGE);
  data_ = static_cast<std::byte*>(base);
}

std::byte* HugeArena::Allocate(size_t bytes) {
  bytes = RoundUp<size_t>(bytes, 64);
  if (chunks_.empty() || used_ + bytes > chunks_.back().size()) {
    chunks_.emplace_back(std::max(bytes, kChunkBytes));
    used_ = 0;
  }
  std::byte* range = chunks_.back().data() + used_;
  used_ += bytes;
  return range;
}

HugeBuffer::~HugeBuffer() {
  if (data_ != nullptr) munmap(data_, size_);
}

}  // namespace jointkv
