// `bench serve`: load on any OpenAI server, with the options and result fields of vLLM's `bench serve`.
#pragma once

#include <CLI/CLI.hpp>

#include "cli/commands.h"

namespace jointkv::cli {

void AddBenchServe(CLI::App& bench, Command& run);

}  // namespace jointkv::cli
