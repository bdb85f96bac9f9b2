#include "base/cpu.h"

#include <cctype>
#include <cstdlib>

namespace jointkv {

const std::string& ForcedTarget() {
  static const std::string target = [] {
    const char* value = std::getenv("JOINTKV_TARGET");
    std::string text = value == nullptr ? "" : value;
    for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return text;
  }();
  return target;
}

bool HasAvx512Bf16() {
#if defined(__x86_64__)
  static const bool has =
      (ForcedTarget().empty() || ForcedTarget() == "avx512vnni" || ForcedTarget() == "avx512bf16") &&
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

bool HasAvx512Vnni() {
#if defined(__x86_64__)
  static const bool has = HasAvx512Bf16() && ForcedTarget() != "avx512bf16" && __builtin_cpu_supports("avx512vnni");
  return has;
#else
  return false;
#endif
}

bool HasAvx2() {
#if defined(__x86_64__)
  // Among the targets' names "avx" begins those of AVX2 and better ones. No CPU has AVX2 without F16C, which clang 14
  // cannot ask for.
  static const bool has = (ForcedTarget().empty() || ForcedTarget().starts_with("avx")) &&
                          __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
#else
  return false;
#endif
}

}  // namespace jointkv
