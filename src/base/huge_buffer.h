// HugeBuffer: a zeroed, page-aligned range for what is large and lives long (weights, tables), on huge pages where the
// system grants them. Threads: plain memory. Owns: the mapping. Fails how: an allocation failure ends the process, as
// operator new's would; callers bound the size first.
#pragma once

#include <cstddef>
#include <utility>

namespace jointkv {

class HugeBuffer {
 public:
  HugeBuffer() = default;
  explicit HugeBuffer(size_t bytes);
  ~HugeBuffer();
  HugeBuffer(HugeBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
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

}  // namespace jointkv
