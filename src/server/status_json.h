// What GET /jointkv/status answers: the engine's counters and gauges for the page.
//
// Threads: the engine's, between steps. Owns: nothing. Fails how: never.
#pragma once

#include <string>

#include "engine/engine.h"

namespace jointkv::server {

// Counters are totals since the start beside a monotonic time (`time_s`), so that whoever asks twice has rates. It
// takes the engine's thread some milliseconds: whoever answers many clients keeps it for a second.
std::string StatusJson(const engine::Engine& engine);

}  // namespace jointkv::server
