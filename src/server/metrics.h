// Metrics: what /metrics says. vLLM's names where it has one (`vllm:`), ours with `jointkv_`; docs/operations.md lists
// them.
//
// Threads: the engine's calls everything but Render, which any thread may call at any time. Owns: the values.
// Fails how: never.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/shadow_check.h"

namespace jointkv::server {

class Metrics {
 public:
  explicit Metrics(std::string model_name);
  ~Metrics();

  // Domains with a name have metrics of their own under the label `tenant`. Before the first Update.
  void NameTenant(DomainId domain, const std::string& name);

  // An event with a finish reason.
  void RequestFinished(const engine::Event& finish);
  // Seconds since the choice's token before; not for a choice's first.
  void TokenEmitted(double inter_token_s);
  // Takes the engine's counters over; walks its block tables at most once a second.
  void Update(const engine::Engine& engine);
  // Takes the shadow check's counters over, and the KL of the runs that have ended since.
  void UpdateShadow(const engine::ShadowCheck::Stats& stats, const std::vector<double>& run_kls);

  // Prometheus text format 0.0.4.
  std::string Render() const;

 private:
  struct Instruments;
  std::unique_ptr<Instruments> instruments_;
  double walked_s_ = 0;
};

}  // namespace jointkv::server
