// The result of `bench serve`, as it is printed and saved.
#pragma once

#include <chrono>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "base/status.h"
#include "cli/bench_serve_options.h"
#include "cli/bench_serve_stats.h"

namespace jointkv::cli {

ServeTableHead TableHead(const ServeFlags& flags);

// What was run, then `metrics`. `date` as YYYYMMDD-HHMMSS.
nlohmann::ordered_json ServeResultJson(const ServeFlags& flags, const std::string& date,
                                       const nlohmann::ordered_json& metrics);

// --result-filename, or one made of what was run; in --result-dir.
std::string ServeResultPath(const ServeFlags& flags, const std::string& date);

// Before the run: makes --result-dir, and looks whether the result can be written there. Does nothing unless
// --save-result or --append-result. Fails with kIo, kNotFound, or kInvalidArgument for a file that is an input.
Status PrepareServeResult(const ServeFlags& flags);

// When the rate of a ramp rose, in the form that vLLM gives to it; `start` is when the run began.
nlohmann::ordered_json RateChangesJson(const std::vector<RateChange>& changes,
                                       std::chrono::system_clock::time_point start);

// Does nothing unless --save-result or --append-result. Fails with kIo.
Status SaveServeResult(const ServeFlags& flags, const nlohmann::ordered_json& metrics, bool interrupted);

// The id of the first model in the answer of /v1/models; empty when there is none.
std::string FirstModelId(std::string_view body);

}  // namespace jointkv::cli
