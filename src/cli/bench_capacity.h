// How many requests the KV memory holds at once, with fusion off and on.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"
#include "cli/commands.h"
#include "engine/engine.h"

namespace jointkv::cli {

// What one engine held. Threads: one. Owns: a few numbers per step. Fails how: never.
class CapacityMeter {
 public:
  explicit CapacityMeter(const engine::Engine& engine) : engine_(engine) {}

  void AfterStep();

  // Most requests that ran at once before the first was preempted.
  int held() const { return held_; }

  // Means of the steps that only decode, and decode for at least 9 of 10 of `held`; zeros when there were none.
  struct Decoding {
    double requests = 0;
    double seconds = 0;
    double attention_s = 0;
    double attention_plan_s = 0;
    double kv_bytes = 0;  // that some sequence refers to: what attention has to read at least
    double attention_flops = 0;
    double tok_s() const { return seconds > 0 ? requests / seconds : 0; }
    double attention_gb_s() const { return attention_s > 0 ? kv_bytes / attention_s / 1e9 : 0; }
    double attention_gflop_s() const { return attention_s > 0 ? attention_flops / attention_s / 1e9 : 0; }
  };
  Decoding decoding() const;

 private:
  double StepFlops(double queries) const;

  const engine::Engine& engine_;
  engine::EngineStats last_;
  int held_ = 0;
  std::vector<Decoding> steps_;  // that only decode
};

void AddBenchCapacity(CLI::App& bench, Command& run);

}  // namespace jointkv::cli
