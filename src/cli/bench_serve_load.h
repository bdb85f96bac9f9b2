// The load: requests that arrive by a schedule and are answered over a limited number of connections.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "cli/bench_serve_http.h"
#include "cli/bench_serve_stream.h"

namespace jointkv::cli {

struct ArrivalOptions {
  double request_rate = std::numeric_limits<double>::infinity();  // a second; infinite: all at once
  // Shape of the gamma distribution of the gaps: 1 is a Poisson process, less comes in bursts, more is more even.
  double burstiness = 1;
  uint64_t seed = 0;
};

// Seconds from the start at which each of `count` requests arrives, rising; scaled so that the last one comes at
// count / request_rate. Requires positive options.
std::vector<double> ArrivalTimes(size_t count, const ArrivalOptions& options);

struct LoadOptions {
  size_t max_concurrency = 0;  // 0: no limit
  std::string path = {};
  HttpHeaders headers = {};
  double timeout_s = 6 * 3600;  // of a request
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
