// Command line flags of the engine, shared by the commands that load a model.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include <CLI/CLI.hpp>

#include "base/status.h"
#include "cli/terminal.h"
#include "engine/engine.h"

namespace jointkv::cli {

// JOINTKV_MODEL, or the model that setup puts into the cache.
std::string DefaultModelPath();

// kNotFound, saying what to do, when there is no such file; kInvalidArgument for a directory.
Status CheckModelFile(const std::string& path);

// -m and all that changes how the engine runs. `options` must outlive the parse. Takes the command's
// parse_complete_callback.
void AddEngineFlags(CLI::App& app, engine::EngineOptions& options);
// Of these only what loading the model and its KV memory need.
void AddModelFlags(CLI::App& app, engine::EngineOptions& options);
// All but how keys and values are stored and fused, for commands that have lists of those.
void AddEngineFlagsButKv(CLI::App& app, engine::EngineOptions& options);
// How the policies look for what to fuse: --similarity and --cosine-scope.
void AddFusionScopeFlags(CLI::App& app, joint::FusionOptions& fusion);

// kNotFound or kUnsupported when the model file or the CPU does not allow it; seen before anything is loaded.
Status CheckEngineOptions(const engine::EngineOptions& options);

// A bar of progress for EngineOptions::load_progress, on a line that must outlive the load.
std::function<void(int done, int total)> LoadProgress(ProgressLine& line);

// Creates the engine with a bar of progress. Complains, and returns null with `exit_code` set, when that fails.
std::unique_ptr<engine::Engine> LoadEngine(engine::EngineOptions options, int& exit_code);

}  // namespace jointkv::cli
