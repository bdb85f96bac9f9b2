// HugeBuffer: a zeroed, page-aligned range for what is large and lives long (weights, tables), on huge pages where the
// system grants them. Threads: plain memory. Owns: the mapping. Fails how: an allocation failure ends the process, as
// operator new's would; callers bound the size first.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace jointkv {

class HugeBuffer {
 public:
  HugeBuffer() = default;
  explicit HugeBuffer(size_t bytes);
  ~HugeBuffer();
  HugeBuffer(HugeBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  HugeBuffer& operator=(HugeBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// HugeArena: many long-lived ranges packed into few large buffers, so that ranges below the size of a huge page get one
// too. Threads: one. Owns: the buffers; a range lives as long as its arena. Fails how: as HugeBuffer.
class HugeArena {
 public:
  // Zeroed, aligned to a cache line.
  std::byte* Allocate(size_t bytes);

 private:
  static constexpr size_t kChunkBytes = size_t{64} << 20;
  std::vector<HugeBuffer> chunks_;
  size_t used_ = 0;  // of the last chunk
};

}  // namespace jointkv
