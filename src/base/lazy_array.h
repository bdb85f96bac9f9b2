// LazyArray: zeros from calloc, so that a table with a row per granule of the arena takes memory only for rows in use.
// Threads: plain memory. Owns: the bytes. Fails how: valid() is false when there is no address space left.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <type_traits>

namespace jointkv {

template <typename T>
class LazyArray {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  LazyArray() = default;
  explicit LazyArray(size_t n) : data_(static_cast<T*>(std::calloc(n, sizeof(T)))) {}

  bool valid() const { return data_ != nullptr; }
  T& operator[](size_t i) { return data_.get()[i]; }
  const T& operator[](size_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace jointkv
