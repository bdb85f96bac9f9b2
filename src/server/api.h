// The endpoints: which path and method goes where, and who may call it. docs/http-api.md is their description.
//
// Api. Threads: the I/O thread; long bodies are read on a helper thread. Owns: calls in progress; all else that it is
// given must outlive it. Fails how: every request gets one answer, errors in OpenAI's shape.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "server/engine_thread.h"
#include "server/exchange.h"
#include "server/generations.h"
#include "server/limits.h"
#include "server/metrics.h"
#include "server/tenants.h"
#include "server/views.h"

namespace jointkv::server {

struct ApiOptions {
  std::string model_name;
  std::string version;
  std::vector<std::string> cors_origins;  // "*": any
  Limits limits;
};

// How work leaves the I/O thread and comes back to it.
struct Executor {
  std::function<void(std::function<void()>)> in_background;
  std::function<void(std::function<void()>)> on_io_thread;
};

class Api {
 public:
  Api(ApiOptions options, Executor executor, EngineThread& engine, Tenants& tenants, Metrics& metrics, RequestLog& log);
  ~Api();

  void Handle(HttpRequest request, std::shared_ptr<ReplyChannel> channel);
  // Answers a request that could not be read to its end, or not at all.
  void Refuse(const HttpRequest& request, const ApiError& error, std::shared_ptr<ReplyChannel> channel);

  void OnReady() { state_ = State::kReady; }
  void OnDeliveries(std::vector<Delivery>&& deliveries) { generations_.OnDeliveries(std::move(deliveries)); }
  // From now on new calls are refused.
  void Drain() { state_ = State::kDraining; }
  bool idle() const { return generations_.empty() && in_background_ == 0; }
  void CancelAll();

 private:
  enum class State { kLoading, kReady, kDraining };
  enum class Kind { kChat, kCompletion, kEmbedding };
  enum class Access { kPublic, kTenant, kAdmin };
  struct Context {
    HttpRequest& request;
    Exchange& exchange;
    Caller caller;
  };
  struct Route {
    const char* method;
    std::string_view path;  // ending in '*': a prefix
    Access access;
    void (Api::*handler)(Context&);
  };
  struct Job;
  static const std::vector<Route>& Routes();

  void Dispatch(HttpRequest& request, Exchange& exchange);
  void AddCorsHeaders(const HttpRequest& request, Exchange& exchange, bool preflight) const;
  void CheckReady() const;
  static void CheckJsonType(const HttpRequest& request);

  void Health(Context& context);
  void Ready(Context& context);
  void Version(Context& context);
  void RenderMetrics(Context& context);
  void Page(Context& context);
  void Status(Context& context);
  void Blocks(Context& context);
  void Models(Context& context);
  void Model(Context& context);
  void Chat(Context& context) { Generate(context, Kind::kChat); }
  void Completion(Context& context) { Generate(context, Kind::kCompletion); }
  void Embedding(Context& context) { Generate(context, Kind::kEmbedding); }
  // `work` on the helper thread, unless the client has gone by then, and `then` on the I/O thread, if it still waits.
  // `use` counts until then. Throws an ApiError when there is no room for it.
  void RunBeside(const Exchange& exchange, Tenant& tenant, const Use& use,
                 std::function<void(const std::atomic<bool>& gone)> work, std::function<void()> then);
  // Replies with what `work` makes of the body: at once, or of a large one, or one that is `slow`, on the helper
  // thread.
  void ReplyWith(Context& context, bool slow, std::function<std::string(const std::string& body)> work);
  void Tokenize(Context& context);
  void Detokenize(Context& context);
  void TokenizerInfo(Context& context);

  void Generate(Context& context, Kind kind);
  void Admit(Job& job);
  std::string ModelJson() const;
  std::string RequestIdOf(const HttpRequest& request);
  std::string RandomName();

  ApiOptions options_;
  Executor executor_;
  EngineThread& engine_;
  Tenants& tenants_;
  Metrics& metrics_;
  RequestLog& log_;
  Generations generations_;
  Views views_;
  State state_ = State::kLoading;
  int in_background_ = 0;
  int64_t started_s_;  // Unix time
  std::mt19937_64 random_;
};

}  // namespace jointkv::server
