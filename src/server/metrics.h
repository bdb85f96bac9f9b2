// What the server counts, for Prometheus.
//
// Metrics. Threads: the engine thread updates, any thread renders. Owns: the registry. Fails how: never.
#pragma once

#include <memory>
#include <string>

#include "engine/request.h"
#include "joint/policy.h"
#include "kv/kv_cache.h"

namespace jointkv::server {

class Metrics {
 public:
  explicit Metrics(std::string model_name);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // All choices of a request have ended; this is the last one's event.
  void RequestFinished(const engine::Event& last_event);
  // A token that was not its choice's first, and the time since the one before.
  void TokenEmitted(double inter_token_s);
  // State of the engine, at most every 100 ms.
  void Update(const engine::EngineStats& engine, const kv::KvStats& kv, const joint::FusionStats& fusion);

  std::string Render();

 private:
  struct Families;
  std::unique_ptr<Families> families_;
};

}  // namespace jointkv::server
