// What `demo` shows: a column for each run.
#pragma once

#include <span>
#include <string>

#include <nlohmann/json.hpp>

#include "cli/eval_run.h"
#include "cli/eval_stats.h"
#include "cli/summary.h"
#include "joint/policy.h"

namespace jointkv::cli {

struct DemoRun {
  joint::Policy policy = joint::Policy::kOff;
  Summary summary;
  Fullest fullest;  // at the step with the most resident tokens
  joint::FusionStats fusion;
  Quality quality;  // against the run with fusion off; no tokens in that run itself
};

std::string ToTable(std::span<const DemoRun> runs);
// The summary of the last run, and an object for each run by the name of its policy.
nlohmann::ordered_json ToJson(std::span<const DemoRun> runs);

}  // namespace jointkv::cli
