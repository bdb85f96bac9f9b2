// BlockMap: which blocks the running sequences hold, layer by layer, and how many read each. For people to look at: it
// has neither tokens nor text.
//
// Threads: plain data, taken by the engine's thread between steps. Owns: copies. Fails how: never; what is beyond the
// limits is left out evenly, and it says how much.
#pragma once

#include <vector>

#include "engine/request.h"
#include "kv/kv_cache.h"

namespace jointkv::engine {

// Their product bounds the cells, and so the time that the engine's thread spends: some milliseconds.
struct BlockMapLimits {
  int sequences = 24;
  int layers = 32;
  int columns = 96;
};

struct BlockMap {
  struct Cell {
    kv::SlotState state = kv::SlotState::kReleased;
    int readers = 0;  // table slots that refer to the block
  };
  struct Sequence {
    RequestId request;
    int choice = 0;
    bool decodes = false;  // its prompt is computed
    bool lossy = false;    // its blocks may be fused
    int prompt_tokens = 0;
    int tokens = 0;  // in the store
    int blocks = 0;
    int block_stride = 1;                   // columns are every so manieth logical block, from the first on
    std::vector<kv::LogicalBlock> columns;  // as many as the limit at most
    std::vector<Cell> cells;                // (rows, K and V, columns)

    const Cell& cell(int row, kv::Kind kind, int column) const {
      return cells[static_cast<size_t>(kv::TableIndex(row, kind)) * columns.size() + column];
    }
  };

  int layers = 0;
  int layer_stride = 1;  // rows are every so manieth layer, from the first on
  int running = 0;       // sequences, those beyond the limit too
  std::vector<Sequence> sequences;

  int rows() const { return (layers + layer_stride - 1) / layer_stride; }
};

}  // namespace jointkv::engine
