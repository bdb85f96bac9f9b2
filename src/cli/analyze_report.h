// What an analysis found, as table, JSON and picture.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include "cli/analyze_run.h"

namespace jointkv::cli {

struct AnalysisContext {
  std::string model;
  std::string docs;  // empty: made up
  size_t requests = 0;
  AnalysisOptions options;
};

nlohmann::ordered_json ToJson(const AnalysisContext& context, const Analysis& analysis);
// A row for each layer, or for about eight of them.
std::string ToTable(const AnalysisContext& context, const Analysis& analysis, bool all_layers);
// Boxes per layer, equal tokens beside random ones: NMSE of K and V, cosine of K as stored and as the paper has it,
// cosine of V.
std::string ToSvg(const AnalysisContext& context, const Analysis& analysis);

}  // namespace jointkv::cli
