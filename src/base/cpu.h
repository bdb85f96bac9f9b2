// What this processor can do, and what the JOINTKV_TARGET environment variable leaves of it.
#pragma once

#include <string>

namespace jointkv {

// AVX-512 F, BW, DQ, VL and BF16, unless JOINTKV_TARGET names a lesser target.
bool HasAvx512Bf16();

// HasAvx512Bf16() and VNNI, which every CPU with the former has; JOINTKV_TARGET=avx512bf16 leaves it out.
bool HasAvx512Vnni();

// AVX2, FMA and F16C, unless JOINTKV_TARGET names a target below AVX2.
bool HasAvx2();

// JOINTKV_TARGET, lower case; empty when unset. "avx512vnni" and then "avx512bf16" are the best; Highway's target names
// limit the rest.
const std::string& ForcedTarget();

}  // namespace jointkv
