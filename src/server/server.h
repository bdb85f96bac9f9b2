// The server as a whole: engine thread, API and sockets, from start to drain.
//
// Server. Threads: Run blocks the caller's, which becomes the I/O thread. Owns: everything. Fails how: Run returns a
// Status when it cannot listen, read its keys or load the model; Ok after a drain.
#pragma once

#include "base/status.h"
#include "engine/engine.h"
#include "server/options.h"

namespace jointkv::server {

// Listens at once; requests are answered with 503 until the model is loaded. Returns after SIGINT or SIGTERM, when what
// was open is answered or the drain's time is over. A second signal ends the process.
Status Serve(const ServerOptions& options, const engine::EngineOptions& engine_options);

}  // namespace jointkv::server
