#include "server/block_map.h"

#include <algorithm>

#include <nlohmann/json.hpp>

namespace jointkv::server {
namespace {

using nlohmann::json;

char StateCharacter(kv::SlotState state) {
  switch (state) {
    case kv::SlotState::kReleased: return '-';
    case kv::SlotState::kPrivate: return 'o';
    case kv::SlotState::kPrefix: return 'p';
    case kv::SlotState::kFused: return 'f';
  }
  return '?';
}

char ReadersCharacter(int readers) { return "0123456789abcdefghijklmnopqrstuvwxyz"[std::min(readers, 35)]; }

json RowsJson(const engine::BlockMap& map, const engine::BlockMap::Sequence& sequence) {
  const int columns = static_cast<int>(sequence.columns.size());
  json rows = json::array();
  for (int row = 0; row < map.rows(); ++row) {
    json& out = rows.emplace_back(json::object({{"layer", row * map.layer_stride}}));
    for (const kv::Kind kind : {kv::Kind::kK, kv::Kind::kV}) {
      std::string states;
      std::string readers;
      for (int column = 0; column < columns; ++column) {
        const engine::BlockMap::Cell& cell = sequence.cell(row, kind, column);
        states.push_back(StateCharacter(cell.state));
        readers.push_back(ReadersCharacter(cell.readers));
      }
      const std::string name = kind == kv::Kind::kK ? "k" : "v";
      out[name + "_readers"] = std::move(readers);
      out[name] = std::move(states);
    }
  }
  return rows;
}

}  // namespace

std::string BlockMapJson(const engine::Engine& engine, std::optional<DomainId> domain) {
  const engine::BlockMap map = engine.block_map({}, domain);
  json requests = json::array();
  for (const engine::BlockMap::Sequence& sequence : map.sequences) {
    json starts = json::array();
    json sizes = json::array();
    for (const kv::LogicalBlock& block : sequence.columns) {
      starts.push_back(block.start);
      sizes.push_back(block.tokens);
    }
    requests.push_back({{"id", sequence.request.value},
                        {"choice", sequence.choice},
                        {"phase", sequence.decodes ? "decode" : "prefill"},
                        {"kv_fusion", sequence.lossy},
                        {"prompt_tokens", sequence.prompt_tokens},
                        {"tokens", sequence.tokens},
                        {"blocks", sequence.blocks},
                        {"block_stride", sequence.block_stride},
                        {"starts", std::move(starts)},
                        {"sizes", std::move(sizes)},
                        {"rows", RowsJson(map, sequence)}});
  }
  return json({{"layers", map.layers},
               {"layer_stride", map.layer_stride},
               {"running", map.running},
               {"requests", std::move(requests)}})
      .dump();
}

}  // namespace jointkv::server
