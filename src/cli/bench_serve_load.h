// The load: requests that arrive by a schedule and are answered over a limited number of connections.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "cli/bench_serve_http.h"
#include "cli/bench_serve_stream.h"

namespace jointkv::cli {

// A rate that rises from the first request to the last one.
struct RampUp {
  bool exponential = false;  // otherwise linear
  double start_rps = 0;
  double end_rps = 0;

  double RateOf(size_t request, size_t count) const;
};

struct ArrivalOptions {
  double request_rate = std::numeric_limits<double>::infinity();  // a second; infinite: all at once
  std::optional<RampUp> ramp_up = {};                             // in its place
  // Shape of the gamma distribution of the gaps: 1 is a Poisson process, less comes in bursts, more is more even,
  // infinite is even.
  double burstiness = 1;
  uint64_t seed = 0;
};

// Seconds from the start at which each of `count` requests arrives, rising; without a ramp scaled so that the last one
// comes at count / request_rate. Requires positive options.
std::vector<double> ArrivalTimes(size_t count, const ArrivalOptions& options);

// When a rising rate passed whole numbers of requests a second: the first entry is the start.
struct RateChange {
  double rps = 0;
  double at_s = 0;
};
std::vector<RateChange> RateChanges(const RampUp& ramp_up, const std::vector<double>& arrivals_s);

struct LoadOptions {
  size_t max_concurrency = 0;  // 0: no limit
  std::string path = {};
  HttpHeaders headers = {};
  std::string request_id_prefix = {};  // of X-Request-Id, with the request's number behind; empty: no such header
  double timeout_s = 6 * 3600;         // of a request
  bool embeddings = false;             // answers are not streamed
};

struct LoadState {
  size_t completed = 0;
  size_t failed = 0;
  size_t running = 0;
};

struct LoadResult {
  std::vector<RequestOutcome> outcomes;  // of those that ended, in the order of the bodies
  double duration_s = 0;                 // from the start to the end of the last one
  bool interrupted = false;
};

// Sends each body when it arrives. `watch` is called some twenty times a second, and stops the run by returning false:
// what is under way is then cut off and leaves no outcome. One thread.
LoadResult RunLoad(const HttpServer& server, const LoadOptions& options, const std::vector<std::string>& bodies,
                   const std::vector<double>& arrivals_s, const std::function<bool(const LoadState&)>& watch);

}  // namespace jointkv::cli
