// What this processor can do, and what the JOINTKV_TARGET environment variable leaves of it.
#pragma once

#include <string>

namespace jointkv {

// AVX-512 F, BW, DQ, VL and BF16, unless JOINTKV_TARGET names a lesser target.
bool HasAvx512Bf16();

// JOINTKV_TARGET, lower case; empty when unset. "avx512bf16" is the best; Highway's target names limit the rest.
const std::string& ForcedTarget();

}  // namespace jointkv
