// Monotonic time in seconds, for metrics.
#pragma once

#include <chrono>

namespace jointkv {

inline double MonotonicSeconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace jointkv
