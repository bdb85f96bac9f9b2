// CHECK: a broken invariant of our own ends the process with file, line and condition. Never for input.
#pragma once

namespace jointkv {
[[noreturn]] void CheckFailed(const char* file, int line, const char* condition);
}  // namespace jointkv

#define CHECK(condition)                                      \
  do {                                                        \
    if (!(condition)) [[unlikely]]                            \
      ::jointkv::CheckFailed(__FILE__, __LINE__, #condition); \
  } while (false)
