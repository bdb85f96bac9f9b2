#include "cli/bench_serve_load.h"

#include <boost/asio/steady_timer.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <memory>
#include <optional>
#include <random>
#include <utility>

#include "base/check.h"
#include "base/clock.h"

namespace jointkv::cli {
namespace {

constexpr size_t kErrorBytesMax = 4096;

// A connection with the request that it carries. Threads: the loop's. Owns: the request's outcome. Fails how: in the
// outcome.
class Slot {
 public:
  Slot(boost::asio::io_context& io, const HttpServer& server) : connection_(io, server) {}

  void Send(HttpCall call, double arrival_s, double run_start_s, std::function<void(bool answered)> on_end) {
    outcome_ = {};
    outcome_.arrival_s = arrival_s;
    const double now_s = MonotonicSeconds();
    outcome_.start_s = now_s - run_start_s;
    events_ = {};
    reader_.emplace(now_s);
    bad_ = Status::Ok();
    error_body_.clear();
    connection_.Start(
        std::move(call), [this](std::string_view bytes) { Take(bytes); },
        [this, end = std::move(on_end)](const Status& status, int http_status) {
          const bool cut_off = status.code() == StatusCode::kCancelled && bad_.ok();
          Conclude(status, http_status);
          end(!cut_off);
        });
  }

  void Cancel() { connection_.Cancel(); }
  RequestOutcome TakeOutcome() { return std::move(outcome_); }

 private:
  void Take(std::string_view bytes) {
    if (connection_.http_status() != 200) {
      error_body_ += bytes.substr(0, kErrorBytesMax - std::min(kErrorBytesMax, error_body_.size()));
      return;
    }
    const double now_s = MonotonicSeconds();
    const Status status = events_.Take(bytes, [&](std::string_view data) {
      if (bad_.ok()) bad_ = reader_->Take(data, now_s);
    });
    if (bad_.ok()) bad_ = status;
    if (!bad_.ok()) connection_.Cancel();
  }

  void Conclude(const Status& status, int http_status) {
    const Status finished = reader_->Finish(outcome_);
    if (http_status != 0 && http_status != 200) {
      outcome_.error = ErrorMessage(http_status, error_body_);
    } else if (!bad_.ok()) {
      outcome_.error = bad_.message();
    } else if (!status.ok()) {
      outcome_.error = status.message();
    } else if (!finished.ok()) {
      outcome_.error = finished.message();
    }
    outcome_.success = outcome_.error.empty();
  }

  HttpConnection connection_;
  SseParser events_;
  std::optional<CompletionReader> reader_;
  Status bad_;
  std::string error_body_;
  RequestOutcome outcome_;
};

// Threads: one. Owns: the loop and its connections. Fails how: in the outcomes.
class Load {
 public:
  Load(const HttpServer& server, const LoadOptions& options, const std::vector<std::string>& bodies,
       const std::vector<double>& arrivals_s, const std::function<bool(const LoadState&)>& watch)
      : server_(server),
        options_(options),
        bodies_(bodies),
        arrivals_s_(arrivals_s),
        watch_(watch),
        outcomes_(bodies.size()) {
    CHECK(arrivals_s.size() == bodies.size());
  }

  LoadResult Run() {
    start_s_ = MonotonicSeconds();
    Watch();
    Admit();
    io_.run();
    LoadResult result;
    for (auto& outcome : outcomes_) {
      if (outcome.has_value()) result.outcomes.push_back(std::move(*outcome));
    }
    result.duration_s = last_end_s_;
    result.interrupted = interrupted_;
    return result;
  }

 private:
  static std::chrono::steady_clock::duration Seconds(double seconds) {
    return std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(seconds));
  }

  bool Over() const { return interrupted_ || (next_ == bodies_.size() && running_ == 0); }

  void Watch() {
    if (!watch_({.completed = completed_, .failed = failed_, .running = running_}) && !interrupted_) Interrupt();
    if (Over()) return;
    watch_timer_.expires_after(Seconds(0.05));
    watch_timer_.async_wait([this](const boost::system::error_code& error) {
      if (!error) Watch();
    });
  }

  void Interrupt() {
    interrupted_ = true;
    last_end_s_ = MonotonicSeconds() - start_s_;
    arrival_timer_.cancel();
    for (const auto& slot : slots_) slot->Cancel();
  }

  // Starts what has arrived and fits, and wakes up again when the next one arrives.
  void Admit() {
    while (!interrupted_ && next_ < bodies_.size()) {
      if (options_.max_concurrency > 0 && running_ >= options_.max_concurrency) return;  // an end admits the next
      const double wait_s = arrivals_s_[next_] - (MonotonicSeconds() - start_s_);
      if (wait_s > 0) {
        arrival_timer_.expires_after(Seconds(wait_s));
        arrival_timer_.async_wait([this](const boost::system::error_code& error) {
          if (!error) Admit();
        });
        return;
      }
      Start(next_++);
    }
  }

  void Start(size_t index) {
    if (idle_.empty()) {
      slots_.push_back(std::make_unique<Slot>(io_, server_));
      idle_.push_back(slots_.back().get());
    }
    Slot* slot = idle_.back();
    idle_.pop_back();
    ++running_;
    slot->Send({.method = boost::beast::http::verb::post,
                .path = options_.path,
                .headers = options_.headers,
                .body = bodies_[index],
                .timeout_s = options_.timeout_s},
               arrivals_s_[index], start_s_, [this, slot, index](bool answered) { OnEnd(slot, index, answered); });
  }

  void OnEnd(Slot* slot, size_t index, bool answered) {
    --running_;
    idle_.push_back(slot);
    if (answered) {
      outcomes_[index] = slot->TakeOutcome();
      ++(outcomes_[index]->success ? completed_ : failed_);
    }
    if (interrupted_) return;
    last_end_s_ = MonotonicSeconds() - start_s_;
    Admit();
    if (Over()) watch_timer_.cancel();
  }

  const HttpServer& server_;
  const LoadOptions& options_;
  const std::vector<std::string>& bodies_;
  const std::vector<double>& arrivals_s_;
  const std::function<bool(const LoadState&)>& watch_;

  boost::asio::io_context io_;
  boost::asio::steady_timer watch_timer_{io_};
  boost::asio::steady_timer arrival_timer_{io_};
  std::vector<std::unique_ptr<Slot>> slots_;
  std::vector<Slot*> idle_;
  std::vector<std::optional<RequestOutcome>> outcomes_;
  double start_s_ = 0;
  double last_end_s_ = 0;
  size_t next_ = 0;
  size_t running_ = 0;
  size_t completed_ = 0;
  size_t failed_ = 0;
  bool interrupted_ = false;
};

}  // namespace

std::vector<double> ArrivalTimes(size_t count, const ArrivalOptions& options) {
  CHECK(options.request_rate > 0 && options.burstiness > 0);
  std::vector<double> times(count, 0.0);
  if (std::isinf(options.request_rate) || count == 0) return times;
  std::mt19937_64 random(options.seed);
  std::gamma_distribution<double> gap(options.burstiness, 1 / (options.request_rate * options.burstiness));
  double now = 0;
  for (double& time : times) time = now += gap(random);
  const double scale = now > 0 ? static_cast<double>(count) / options.request_rate / now : 0;
  for (double& time : times) time *= scale;
  return times;
}

LoadResult RunLoad(const HttpServer& server, const LoadOptions& options, const std::vector<std::string>& bodies,
                   const std::vector<double>& arrivals_s, const std::function<bool(const LoadState&)>& watch) {
  return Load(server, options, bodies, arrivals_s, watch).Run();
}

}  // namespace jointkv::cli
