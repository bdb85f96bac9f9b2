// Requests over shared documents, run with fusion off and on: what `demo` and `bench capacity` have in common.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "base/status.h"
#include "cli/batch.h"
#include "cli/output_files.h"
#include "cli/workloads.h"
#include "engine/engine.h"

namespace jointkv::cli {

struct RagFlags {
  engine::EngineOptions engine;
  WorkloadOptions workload;  // rag-pool
  int output_tokens = 64;
  uint64_t seed = 1;
};

// Options of the workload and of the engine, with less KV memory by default; `flags` must outlive the parse.
void AddRagFlags(CLI::App& app, RagFlags& flags);

// The files that it reads.
std::vector<NamedFile> InputsOf(const RagFlags& flags);

// The engines to run it on: fusion off, and then as asked for, unless that is off too.
std::vector<engine::EngineOptions> RagEngines(const RagFlags& flags);

// Says what the requests are, as a line.
std::string RagTitle(const RagFlags& flags);

// Encodes the requests for the engine's model. Complains when the model has no usable chat template.
Expected<std::vector<EncodedRequest>> EncodeRag(const RagFlags& flags, const WorkloadMaker& maker,
                                                const engine::Engine& engine);

// All at once, to be answered greedily with `output_tokens` each, or with their continuations where they have some.
Status SubmitRag(const RagFlags& flags, const std::vector<EncodedRequest>& requests, Batch& batch);

}  // namespace jointkv::cli
