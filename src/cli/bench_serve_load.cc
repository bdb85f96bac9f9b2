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
constexpr size_t kAnswerBytesMax = size_t{16} << 20;  // of embeddings

// A connection with the request that it carries. Threads: the loop's. Owns: the request's outcome. Fails how: in the
// outcome.
class Slot {
 public:
  Slot(boost::asio::io_context& io, const HttpServer& server, bool embeddings)
      : connection_(io, server), embeddings_(embeddings) {}

  void Send(HttpCall call, double arrival_s, double run_start_s, std::function<void(bool answered)> on_end) {
    outcome_ = {};
    outcome_.arrival_s = arrival_s;
    sent_s_ = MonotonicSeconds();
    outcome_.start_s = sent_s_ - run_start_s;
    events_ = {};
    reader_.emplace(sent_s_);
    bad_ = Status::Ok();
    body_.clear();
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
    const bool failed = connection_.http_status() != 200;
    if (failed || embeddings_) {
      const size_t most = failed ? kErrorBytesMax : kAnswerBytesMax;
      if (!failed && body_.size() + bytes.size() > most && bad_.ok()) {
        bad_ = Status(StatusCode::kOutOfRange, "the answer has more than " + std::to_string(most) + " bytes");
        connection_.Cancel();
      }
      body_ += bytes.substr(0, most - std::min(most, body_.size()));
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
    const Status finished = embeddings_ ? FinishEmbeddings(http_status) : reader_->Finish(outcome_);
    if (http_status != 0 && http_status != 200) {
      outcome_.error = ErrorMessage(http_status, body_);
    } else if (!bad_.ok()) {
      outcome_.error = bad_.message();
    } else if (!status.ok()) {
      outcome_.error = status.message();
    } else if (!finished.ok()) {
      outcome_.error = finished.message();
    }
    outcome_.success = outcome_.error.empty();
  }

  Status FinishEmbeddings(int http_status) {
    outcome_.latency_s = outcome_.ttft_s = MonotonicSeconds() - sent_s_;
    return http_status == 200 ? ReadEmbeddings(body_, outcome_) : Status::Ok();
  }

  HttpConnection connection_;
  bool embeddings_;
  double sent_s_ = 0;
  SseParser events_;
  std::optional<CompletionReader> reader_;
  Status bad_;
  std::string body_;  // of an error, or with embeddings
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
      slots_.push_back(std::make_unique<Slot>(io_, server_, options_.embeddings));
      idle_.push_back(slots_.back().get());
    }
    Slot* slot = idle_.back();
    idle_.pop_back();
    ++running_;
    HttpHeaders headers = options_.headers;
    if (!options_.request_id_prefix.empty()) {
      headers.emplace_back("X-Request-Id", options_.request_id_prefix + std::to_string(index));
    }
    slot->Send({.method = boost::beast::http::verb::post,
                .path = options_.path,
                .headers = std::move(headers),
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

double RampUp::RateOf(size_t request, size_t count) const {
  const double progress = static_cast<double>(request) / static_cast<double>(std::max<size_t>(count, 2) - 1);
  return exponential ? start_rps * std::pow(end_rps / start_rps, progress)
                     : start_rps + (end_rps - start_rps) * progress;
}

std::vector<double> ArrivalTimes(size_t count, const ArrivalOptions& options) {
  CHECK(options.request_rate > 0 && options.burstiness > 0);
  std::vector<double> times(count, 0.0);
  const bool at_once = !options.ramp_up && std::isinf(options.request_rate);
  if (at_once || count == 0) return times;
  std::mt19937_64 random(options.seed);
  const bool even = std::isinf(options.burstiness);
  std::gamma_distribution<double> gap(even ? 1 : options.burstiness, even ? 1 : 1 / options.burstiness);  // of mean 1
  double now = 0;
  for (size_t i = 0; i < count; ++i) {
    const double rate = options.ramp_up ? options.ramp_up->RateOf(i, count) : options.request_rate;
    times[i] = now += (even ? 1 : gap(random)) / rate;
  }
  if (options.ramp_up) return times;
  const double scale = now > 0 ? static_cast<double>(count) / options.request_rate / now : 0;
  for (double& time : times) time *= scale;
  return times;
}

std::vector<RateChange> RateChanges(const RampUp& ramp_up, const std::vector<double>& arrivals_s) {
  std::vector<RateChange> changes = {{.rps = ramp_up.start_rps, .at_s = 0}};
  double last = std::floor(ramp_up.start_rps);
  for (size_t i = 0; i < arrivals_s.size(); ++i) {
    const double now = std::floor(ramp_up.RateOf(i, arrivals_s.size()));
    while (last < now) changes.push_back({.rps = ++last, .at_s = arrivals_s[i]});
  }
  return changes;
}

LoadResult RunLoad(const HttpServer& server, const LoadOptions& options, const std::vector<std::string>& bodies,
                   const std::vector<double>& arrivals_s, const std::function<bool(const LoadState&)>& watch) {
  return Load(server, options, bodies, arrivals_s, watch).Run();
}

}  // namespace jointkv::cli
