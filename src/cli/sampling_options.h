// Command line flags of sampling.
#pragma once

#include <CLI/CLI.hpp>

#include "engine/sampling.h"

namespace jointkv::cli {

// Defaults are the values that `params` holds now; it must outlive the parse. Without `per_choice`: not -n and
// --logprobs.
void AddSamplingFlags(CLI::App& app, engine::SamplingParams& params, bool per_choice = true);

}  // namespace jointkv::cli
