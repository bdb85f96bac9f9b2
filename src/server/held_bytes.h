// A budget for what clients make the server hold before the engine has it: bodies and grammars.
//
// HeldBytes. Threads: any. Owns: a count. Fails how: Hold::Set returns false, and nothing changed, when it is used up.
#pragma once

#include <atomic>
#include <cstddef>
#include <utility>

namespace jointkv::server {

class HeldBytes {
 public:
  // A share of the budget, given back with it. The HeldBytes must outlive it.
  class Hold {
   public:
    Hold() = default;
    explicit Hold(HeldBytes& budget) : budget_(&budget) {}
    Hold(Hold&& other) noexcept
        : budget_(std::exchange(other.budget_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    Hold& operator=(Hold&& other) noexcept {
      std::swap(budget_, other.budget_);
      std::swap(bytes_, other.bytes_);
      return *this;
    }
    ~Hold() {
      if (budget_ != nullptr) budget_->used_ -= bytes_;
    }

    // Less is always granted.
    bool Set(size_t bytes) {
      if (budget_ == nullptr) return true;
      if (bytes > bytes_ && !budget_->Take(bytes - bytes_)) return false;
      if (bytes < bytes_) budget_->used_ -= bytes_ - bytes;
      bytes_ = bytes;
      return true;
    }
    size_t bytes() const { return bytes_; }

   private:
    HeldBytes* budget_ = nullptr;
    size_t bytes_ = 0;
  };

  explicit HeldBytes(size_t bytes_max) : bytes_max_(bytes_max) {}

  size_t used() const { return used_; }
  size_t bytes_max() const { return bytes_max_; }

 private:
  bool Take(size_t bytes) {
    size_t used = used_;
    do {
      if (bytes > bytes_max_ - used) return false;
    } while (!used_.compare_exchange_weak(used, used + bytes));
    return true;
  }

  const size_t bytes_max_;
  std::atomic<size_t> used_ = 0;
};

}  // namespace jointkv::server
