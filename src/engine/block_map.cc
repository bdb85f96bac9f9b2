#include "engine/block_map.h"

#include "base/checked.h"
#include "engine/engine_state.h"

namespace jointkv::engine {

BlockMap Engine::block_map(const BlockMapLimits& limits, std::optional<DomainId> domain) const {
  BlockMap map;
  map.layers = cache_->shape().n_layers();
  map.layer_stride = CeilDiv(map.layers, limits.layers);
  for (const auto& running : running_) {
    const RequestState& request = *running->request;
    if (request.request.shadow || (domain && request.request.domain != *domain)) continue;
    if (++map.running > limits.sequences) continue;
    const auto blocks = cache_->blocks(running->kv);
    BlockMap::Sequence& sequence = map.sequences.emplace_back();
    sequence.request = request.id;
    sequence.choice = running->choice;
    sequence.decodes = running->decodes;
    sequence.lossy = cache_->lossy(running->kv);
    sequence.prompt_tokens = static_cast<int>(request.request.prompt.size());
    sequence.tokens = cache_->length(running->kv);
    sequence.blocks = static_cast<int>(blocks.size());
    sequence.block_stride = std::max(1, CeilDiv(sequence.blocks, limits.columns));
    for (int i = 0; i < sequence.blocks; i += sequence.block_stride) sequence.columns.push_back(blocks[i]);
    sequence.cells.reserve(2 * map.rows() * sequence.columns.size());
    for (int layer = 0; layer < map.layers; layer += map.layer_stride) {
      for (const kv::Kind kind : {kv::Kind::kK, kv::Kind::kV}) {
        const BlockId* row = cache_->table(running->kv, layer, kind);
        for (int i = 0; i < sequence.blocks; i += sequence.block_stride) {
          const kv::SlotState state = cache_->state(running->kv, kv::TableIndex(layer, kind), i);
          sequence.cells.push_back({state, row[i].valid() ? cache_->readers(row[i]) : 0});
        }
      }
    }
  }
  return map;
}

}  // namespace jointkv::engine
