// Runs a set of requests through an engine to the end, or to Ctrl-C.
#pragma once

#include <functional>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "cli/summary.h"
#include "engine/engine.h"

namespace jointkv::cli {

// One choice of one request, ended.
struct Choice {
  size_t request = 0;  // as given to Submit
  std::string text;
  std::vector<TokenId> tokens;
  std::vector<engine::SampledLogprobs> logprobs;  // (tokens), when asked for
  engine::Event end;
};

// Batch. Threads: one. Owns: the texts of choices that have not ended; the engine must outlive it. Fails how: Submit
// passes the engine's refusal on; a request that fails later is a Choice with an error.
class Batch {
 public:
  explicit Batch(engine::Engine& engine);

  // `index` names the request in what follows.
  Status Submit(size_t index, engine::Request request);

  struct Observer {
    std::function<void(size_t request, int choice, const std::string& text)> on_text;
    std::function<void(const Choice& choice)> on_end;
    std::function<void()> on_step = {};  // after each
    // The raw logits of each output token, while the step runs; `position` is that of the token before.
    std::function<void(size_t request, int position, std::span<const float> logits)> on_logits = {};
  };
  // Until all are done. Ctrl-C (terminal.h) cancels what is left.
  void Run(const Observer& observer);

  Summary summary() const;
  bool all_ok() const { return all_ok_; }  // no choice ended with an error

 private:
  void Take(engine::Event&& event, const Observer& observer);
  std::string ProgressText() const;

  engine::Engine& engine_;
  std::map<engine::RequestId, size_t> submitted_;
  std::map<std::pair<engine::RequestId, int>, Choice> open_;
  SummaryBuilder builder_;
  size_t choices_ = 0;
  size_t ended_ = 0;
  double start_s_ = 0;
  double wall_s_ = 0;
  bool all_ok_ = true;
};

}  // namespace jointkv::cli
