// What fusion costs on the traffic itself: a share of the requests runs a second time with exact K and V, when nothing
// else is to do, and the two distributions of each output token are compared.
//
// ShadowCheck. Threads: the engine's. Owns: the logits of sampled requests within bytes_max, and the engine's logits
// observer. Fails how: never; what does not fit, or is in the way of a client's request, is dropped and counted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <set>
#include <span>
#include <vector>

#include "engine/engine.h"

namespace jointkv::engine {

class ShadowCheck {
 public:
  struct Options {
    double rate = 0;                       // share of requests, 0 to 1; 0: nothing is kept
    int tokens_max = 64;                   // of each output; its first choice only
    size_t bytes_max = size_t{256} << 20;  // of all logits that are kept
    int waiting_max = 16;                  // runs that wait for an idle engine
  };
  struct Stats {
    int64_t runs = 0;
    int64_t rows = 0;   // output tokens compared
    double kl_sum = 0;  // of rows: KL(exact || as served), nats
    int64_t dropped = 0;
    int waiting = 0;
    size_t bytes = 0;
  };

  ShadowCheck(Engine& engine, const Options& options);
  ~ShadowCheck();
  ShadowCheck(const ShadowCheck&) = delete;
  ShadowCheck& operator=(const ShadowCheck&) = delete;

  // A client's request was accepted. Ends a run that is under way.
  void OnSubmitted(RequestId id, const Request& request);
  // After each step: takes out the events of its own runs.
  void OnEvents(std::vector<Event>& events);
  // Starts a run if the engine is idle; true when one is under way: then Step has something to do.
  bool RunWhenIdle();

  const Stats& stats() const { return stats_; }
  // Mean KL of the runs that have ended since the last call.
  std::vector<double> TakeRunKls();

 private:
  struct Record {
    Request request;
    std::vector<TokenId> tokens;
    std::vector<float> logits;  // (rows, n_vocab) as served
    int rows = 0;
  };

  void Observe(RequestId request, int choice, std::span<const float> logits);
  void Drop(const Record& record);
  void EndRun(bool complete);

  Engine& engine_;
  Options options_;
  size_t n_vocab_;
  double due_ = 0;
  std::map<RequestId, Record> recording_;
  std::deque<Record> waiting_;
  std::set<RequestId> own_;  // whose events may still come
  RequestId run_;            // valid while one is under way, of `current_`
  Record current_;
  int compared_ = 0;
  double kl_ = 0;
  std::vector<double> run_kls_;
  Stats stats_;
};

}  // namespace jointkv::engine
