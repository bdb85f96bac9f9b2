#include "dense/targets.h"

#include <algorithm>
#include <cctype>

#include "base/cpu.h"
#include "hwy/targets.h"

namespace jointkv::dense {
namespace {

constexpr const char* kAvx512Vnni = "avx512vnni";
constexpr const char* kAvx512Bf16 = "avx512bf16";

std::string LowerName(int64_t target) {
  std::string name = hwy::TargetName(target);
  std::ranges::transform(name, name.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return name;
}

// Best first: Highway numbers better targets lower.
std::vector<int64_t> HighwayTargets() {
  std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  // What the build assumes of every CPU is always there, whether or not Highway counts it as supported.
  if (std::ranges::find(targets, HWY_STATIC_TARGET) == targets.end()) targets.push_back(HWY_STATIC_TARGET);
  return targets;
}

}  // namespace

std::vector<std::string> SupportedTargetNames() {
  std::vector<std::string> names;
  if (HasAvx512Vnni()) names.emplace_back(kAvx512Vnni);
  if (HasAvx512Bf16()) names.emplace_back(kAvx512Bf16);
  for (const int64_t target : HighwayTargets()) names.push_back(LowerName(target));
  return names;
}

Status ApplyForcedTarget() {
  const std::string& forced = ForcedTarget();
  if (forced.empty() || (forced == kAvx512Bf16 && HasAvx512Bf16()) || (forced == kAvx512Vnni && HasAvx512Vnni())) {
    return Status::Ok();
  }
  std::string known;
  for (const int64_t target : HighwayTargets()) {
    if (LowerName(target) == forced) {
      hwy::DisableTargets(target - 1);
      hwy::GetChosenTarget().DeInit();
      return Status::Ok();
    }
    known += (known.empty() ? "" : ", ") + LowerName(target);
  }
  return {StatusCode::kInvalidArgument,
          "JOINTKV_TARGET '" + forced + "': this program can run " + known + " here" +
              (forced == kAvx512Bf16 || forced == kAvx512Vnni ? ", not " + forced
                                                              : ", and avx512vnni or avx512bf16 if the CPU has it")};
}

}  // namespace jointkv::dense
