// The result of `bench serve`, as it is printed and saved.
#pragma once

#include <string>
#include <string_view>

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

// Does nothing unless --save-result or --append-result. Fails with kIo.
Status SaveServeResult(const ServeFlags& flags, const nlohmann::ordered_json& metrics, bool interrupted);

// The id of the first model in the answer of /v1/models; empty when there is none.
std::string FirstModelId(std::string_view body);

}  // namespace jointkv::cli
