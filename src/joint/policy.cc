#include "joint/policy.h"

namespace jointkv::joint {

const char* PolicyName(Policy policy) {
  switch (policy) {
    case Policy::kOff: return "off";
    case Policy::kBounded: return "bounded";
    case Policy::kCosine: return "cosine";
  }
  return "?";
}

std::optional<Policy> ParsePolicy(std::string_view name) {
  for (const Policy policy : {Policy::kOff, Policy::kBounded, Policy::kCosine}) {
    if (name == PolicyName(policy)) return policy;
  }
  return std::nullopt;
}

}  // namespace jointkv::joint
