// Speed of prefill and decode, measured on the engine itself.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"
#include "engine/engine.h"

namespace jointkv::cli {

struct BenchOptions {
  std::vector<int> prompt_lengths = {128, 1000};
  std::vector<int> batches = {1, 4, 16};
  std::vector<int> contexts = {16, 1000};
  int decode_tokens = 64;
  int repeat = 3;
};

struct BenchResult {
  std::string kind;  // prefill or decode
  int batch = 0;
  int context = 0;  // prompt tokens of each sequence
  int tokens = 0;   // timed, of each sequence
  double tok_s = 0;
  double tok_s_min = 0;
  double tok_s_max = 0;
  double gb_s = 0;     // weights and KV read
  double gflop_s = 0;  // of matrix products and attention
  // Of all repeats.
  double attention_share = 0;       // of the time
  double attention_plan_share = 0;  // to order its work
  double attention_gflop_s = 0;     // over its own time
};

// EngineBench. Threads: one. Owns: nothing; the engine must outlive it, idle and without a prefix cache. Fails how: a
// Status when a case does not fit the context or the KV memory, or the vocabulary has no ordinary token. Prompts are
// random tokens, none used twice.
class EngineBench {
 public:
  EngineBench(engine::Engine& engine, int repeat);

  Expected<BenchResult> Prefill(int length);
  // Timed over steps in which all sequences decode, from the one after the last of them got its first token.
  Expected<BenchResult> Decode(int batch, int context, int tokens);

 private:
  struct Run {
    double seconds = 0;
    double attention_s = 0;
    double attention_plan_s = 0;
  };
  Expected<Run> PrefillOnce(int length);
  Expected<Run> DecodeOnce(int batch, int context, int tokens);
  // Of an attention that began at these counters, so long ago.
  Run RunSince(const engine::EngineStats& start, double seconds) const;
  Expected<std::vector<TokenId>> RandomPrompt(int length);
  // `tokens` of each run.
  BenchResult Median(BenchResult result, double tokens, const std::vector<Run>& runs) const;
  void AddTraffic(BenchResult& result) const;
  Status Drain(std::vector<engine::Event>& events);

  engine::Engine& engine_;
  int repeat_;
  std::vector<TokenId> ordinary_;  // neither special nor end of generation
  uint64_t random_ = 0x9e3779b97f4a7c15u;
  size_t matrix_weights_ = 0;  // elements that a row is multiplied with
  size_t matrix_bytes_ = 0;    // of those, as the file stores them
};

}  // namespace jointkv::cli
