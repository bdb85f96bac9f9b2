// One setting of the KV cache, judged on one draw of a workload.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/huge_buffer.h"
#include "base/status.h"
#include "cli/eval_stats.h"
#include "cli/workloads.h"
#include "engine/engine.h"

namespace jointkv::cli {

struct EvalSetting {
  joint::FusionOptions fusion;
  engine::KvType kv_type;

  // The engine that has this setting and is otherwise like `options`.
  engine::EngineOptions Apply(engine::EngineOptions options) const;
};

// Logits of every scored token under the exact cache. Threads: one. Owns: requests x tokens x vocabulary floats.
// Fails how: Create with kResourceExhausted when that is more than half of the free memory.
class ExactLogits {
 public:
  static Expected<ExactLogits> Create(size_t requests, size_t tokens, size_t n_vocab);

  std::span<float> at(size_t request, size_t token) {
    return {reinterpret_cast<float*>(buffer_.data()) + (request * tokens_ + token) * n_vocab_, n_vocab_};
  }

 private:
  ExactLogits() = default;

  HugeBuffer buffer_;
  size_t tokens_ = 0;
  size_t n_vocab_ = 0;
};

// What the store held when it was fullest: just after the last request began to decode, without blocks that only the
// prefix cache held; where some request had ended before, the step with the most resident tokens.
struct Fullest {
  size_t logical_bytes = 0;   // resident tokens as private 16-bit K and V
  size_t held_bytes = 0;      // slabs
  size_t metadata_bytes = 0;  // the store's and fusion's
  bool all_resident = false;

  static Fullest Of(const engine::Engine& engine);  // now

  double ratio() const {
    const size_t bytes = held_bytes + metadata_bytes;
    return bytes > 0 ? static_cast<double>(logical_bytes) / static_cast<double>(bytes) : 1;
  }
};

struct EvalRun {
  std::vector<TokenScore> scores;  // in no particular order; none of the exact run
  Fullest fullest;
  joint::FusionStats fusion;
  engine::EngineStats engine;
  double step_s = 0;  // all steps
};

using EvalProgress = std::function<void(size_t done, size_t total)>;  // scored tokens

// Submits all requests at once, forces their continuations, and either keeps the logits (`scored` false) or holds them
// against `exact`. kCancelled after Ctrl-C; else as Submit, or what a request failed with.
Expected<EvalRun> RunForced(engine::Engine& engine, const std::vector<EncodedRequest>& requests, ExactLogits& exact,
                            bool scored, const EvalProgress& progress);

}  // namespace jointkv::cli
