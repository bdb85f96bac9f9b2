// Which SIMD targets the kernels can run on, and the JOINTKV_TARGET environment variable (base/cpu.h), which limits
// them: to see a lesser CPU's results, or to leave out a target that misbehaves.
//
// Threads: ApplyForcedTarget once, before any compute. Owns: nothing. Fails how: kInvalidArgument for a name that is
// not a target of this build on this CPU; Highway then chooses as if the variable were unset.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"

namespace jointkv::dense {

// Lower case, best first, so the first is the one in use: "avx512vnni" and "avx512bf16" where their kernels may run,
// then Highway's.
std::vector<std::string> SupportedTargetNames();

// Makes Highway's dispatch choose nothing better than the target that JOINTKV_TARGET names.
Status ApplyForcedTarget();

}  // namespace jointkv::dense
