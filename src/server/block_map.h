// What GET /jointkv/blocks answers.
//
// Threads: the engine's, between steps. Owns: nothing. Fails how: never.
#pragma once

#include <optional>
#include <string>

#include "engine/engine.h"

namespace jointkv::server {

// The block map as JSON, of one domain's requests or of all. Neither tokens nor text are in it; at most a few hundred
// kilobytes. It takes the engine's thread some milliseconds: whoever answers many clients keeps it for a second.
//
//   {"layers": 30, "layer_stride": 1, "running": 1, "requests": [
//     {"id": 7, "choice": 0, "phase": "decode", "kv_fusion": true, "prompt_tokens": 40, "tokens": 52,
//      "blocks": 3, "block_stride": 1, "starts": [0, 16, 40], "sizes": [16, 24, 12],
//      "rows": [{"layer": 0, "k": "pfo", "v": "poo", "k_readers": "231", "v_readers": "211"}, ...]}]}
//
// A row has a character for each block: p is shared as a prefix, f fused, o the request's own, - has left the layer's
// window; readers are a digit to the base of 36, z for 35 and more.
std::string BlockMapJson(const engine::Engine& engine, std::optional<DomainId> domain = {});

}  // namespace jointkv::server
