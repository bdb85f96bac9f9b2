// Command line flags of the engine, shared by the commands that load a model.
#pragma once

#include <memory>
#include <string>

#include <CLI/CLI.hpp>

#include "base/status.h"
#include "engine/engine.h"

namespace jointkv::cli {

// JOINTKV_MODEL, or the model that setup puts into the cache.
std::string DefaultModelPath();

// kNotFound, saying what to do, when there is no such file.
Status CheckModelFile(const std::string& path);

// -m and all that changes how the engine runs. `options` must outlive the parse.
void AddEngineFlags(CLI::App& app, engine::EngineOptions& options);

// Creates the engine with a bar of progress. Complains, and returns null with `exit_code` set, when that fails.
std::unique_ptr<engine::Engine> LoadEngine(engine::EngineOptions options, int& exit_code);

}  // namespace jointkv::cli
