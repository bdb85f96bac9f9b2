// How many requests the KV memory holds at once, with fusion off and on.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"
#include "cli/commands.h"
#include "engine/engine.h"

namespace jointkv::cli {

// What one engine held. Threads: one. Owns: a number or two per step. Fails how: never.
class CapacityMeter {
 public:
  explicit CapacityMeter(const engine::Engine& engine) : engine_(engine) {}

  void AfterStep();

  // Most requests that ran at once before the first was preempted.
  int held() const { return held_; }
  // Output tokens a second over the steps that only decode, and decode for at least 9 of 10 of `held`; 0 when there
  // were none.
  double decode_tok_s() const;
  double decode_requests() const;  // mean of those steps

 private:
  struct DecodeStep {
    int rows = 0;
    double seconds = 0;
  };
  struct Decoded {
    int64_t steps = 0;
    int64_t rows = 0;
    double seconds = 0;
  };
  Decoded Sum() const;

  const engine::Engine& engine_;
  engine::EngineStats last_;
  int held_ = 0;
  std::vector<DecodeStep> decode_steps_;
};

void AddBenchCapacity(CLI::App& bench, Command& run);

}  // namespace jointkv::cli
