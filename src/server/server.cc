#include "server/server.h"

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "base/clock.h"
#include "server/api.h"
#include "server/engine_thread.h"
#include "server/http_server.h"
#include "server/metrics.h"
#include "server/request_log.h"
#include "server/tenants.h"

namespace jointkv::server {
namespace {

std::string ModelName(const ServerOptions& options, const engine::EngineOptions& engine_options) {
  if (!options.model_name.empty()) return options.model_name;
  return std::filesystem::path(engine_options.model_path).stem().string();
}

class Server {
 public:
  Server(const ServerOptions& options, const engine::EngineOptions& engine_options, Tenants tenants)
      : options_(options),
        log_(options.log_format),
        metrics_(ModelName(options, engine_options)),
        tenants_(std::move(tenants)),
        http_(
            options, "jointkv/" + options.version,
            [this](HttpRequest request, std::shared_ptr<ReplyChannel> channel) {
              api_.Handle(std::move(request), std::move(channel));
            },
            [this](const HttpRequest& request, const ApiError& error, std::shared_ptr<ReplyChannel> channel) {
              api_.Refuse(request, error, std::move(channel));
            }),
        engine_(engine_options, options.chat_template, options.shadow_rate, metrics_,
                {[this](const Status& status) { http_.Post([this, status] { OnLoaded(status); }); },
                 [this](std::vector<Delivery>&& deliveries) {
                   // Asio's handlers are copyable.
                   const auto shared = std::make_shared<std::vector<Delivery>>(std::move(deliveries));
                   http_.Post([this, shared] { api_.OnDeliveries(std::move(*shared)); });
                 }}),
        api_({ModelName(options, engine_options), options.version, options.cors_origins, options.limits},
             {[this](std::function<void()> work) { http_.InBackground(std::move(work)); },
              [this](std::function<void()> work) { http_.Post(std::move(work)); }},
             engine_, tenants_, metrics_, log_) {}

  Status Run() {
    for (const Tenant& tenant : tenants_.tenants()) metrics_.NameTenant(tenant.domain, tenant.name);
    http_.OnSignal([this](int signal) { OnSignal(signal); });
    RETURN_IF_ERROR(http_.Listen());
    log_.Info("listening on " + http_.address() + ", loading the model");
    if (http_.connections_max() < options_.limits.connections_max) {
      log_.Info("the limit of open files allows " + std::to_string(http_.connections_max()) +
                " connections, fewer than --max-connections " + std::to_string(options_.limits.connections_max));
    }
    http_.OnTick([this](double now_s) { OnTick(now_s); });
    engine_.Start();
    http_.Run();
    engine_.Stop();
    if (failed_.ok()) log_.Info("stopped");
    return failed_;
  }

 private:
  void OnLoaded(const Status& status) {
    loaded_ = true;
    if (!status.ok()) {
      failed_ = status;
      http_.Stop();
      return;
    }
    const std::string& warning = engine_.model().chat_template->warning();
    if (!warning.empty()) log_.Info(warning);
    if (!engine_.model().chat_template->shows_tools()) {
      log_.Info("the chat template shows the model no tools: where requests have some they are left out");
    }
    api_.OnReady();
    log_.Info("ready: page " + http_.address() + "/, API " + http_.address() + "/v1, metrics " + http_.address() +
              "/metrics");
  }

  void OnSignal(int signal) {
    if (drain_until_s_) ExitAtOnce(128 + signal);
    log_.Info("shutting down: " + std::to_string(http_.connections()) + " connections");
    // Loading cannot be interrupted, and nothing is open yet.
    if (!loaded_) ExitAtOnce(EXIT_SUCCESS);
    drain_until_s_ = MonotonicSeconds() + options_.drain_timeout_s;
    api_.Drain();
    http_.Drain();
    OnTick(MonotonicSeconds());
  }

  [[noreturn]] void ExitAtOnce(int code) {
    http_.RemoveSocketFile();
    std::_Exit(code);
  }

  void OnTick(double now_s) {
    if (!drain_until_s_) return;
    if (now_s > *drain_until_s_ && !gave_up_) {
      gave_up_ = true;
      log_.Info("the drain's time is over: what is open is cancelled");
      api_.CancelAll();
    }
    // Answers that are not all written yet are connections.
    const bool written = http_.connections() == 0 || now_s > *drain_until_s_ + 1;
    if (api_.idle() && written) http_.Stop();
  }

  const ServerOptions& options_;
  RequestLog log_;
  Metrics metrics_;
  Tenants tenants_;
  HttpServer http_;
  EngineThread engine_;
  Api api_;
  bool loaded_ = false;
  bool gave_up_ = false;
  std::optional<double> drain_until_s_;
  Status failed_;
};

}  // namespace

Status Serve(const ServerOptions& options, const engine::EngineOptions& engine_options) {
  std::signal(SIGPIPE, SIG_IGN);
  Expected<Tenants> tenants = Tenants(options.limits);
  if (!options.api_keys.empty()) tenants = Tenants::Load(options.api_keys, options.limits);
  if (!tenants.ok()) return tenants.status();
  return Server(options, engine_options, std::move(tenants).value()).Run();
}

}  // namespace jointkv::server
