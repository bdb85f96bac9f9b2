#include "base/huge_buffer.h"

#include <sys/mman.h>

#include <new>

namespace jointkv {

HugeBuffer::HugeBuffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  madvise(base, bytes, MADV_HUGEPAGE);
  data_ = static_cast<std::byte*>(base);
}

HugeBuffer::~HugeBuffer() {
  if (data_ != nullptr) munmap(data_, size_);
}

}  // namespace jointkv
