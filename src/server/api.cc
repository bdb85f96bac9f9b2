#include "server/api.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <ctime>
#include <set>
#include <utility>

#include "server/openai_schema.h"
#include "server/page.h"
#include "server/prepare.h"
#include "text/detokenizer.h"

namespace jointkv::server {
namespace {

using OrderedJson = nlohmann::ordered_json;

constexpr size_t kInlineBodyBytes = 16384;  // read on the I/O thread: a millisecond or two
constexpr size_t kRequestIdBytesMax = 128;

std::string Dump(const OrderedJson& json) { return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace); }

bool Matches(std::string_view pattern, std::string_view path) {
  if (!pattern.ends_with('*')) return pattern == path;
  pattern.remove_suffix(1);
  return path.size() > pattern.size() && path.starts_with(pattern);
}

bool IsIdCharacter(char c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || c == '_' ||
         c == '.' || c == ':';
}

// An empty name means the one that is served.
void CheckModel(const std::string& name, const std::string& served) {
  if (name.empty() || name == served) return;
  throw ApiError{.status = 404,
                 .message = "model: '" + name.substr(0, 200) + "' does not exist, this is " + served,
                 .param = "model",
                 .code = "model_not_found"};
}

// What is no escape stays as it is.
std::string PercentDecoded(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    unsigned value = 0;
    const char* digits = text.data() + i + 1;
    if (text[i] == '%' && i + 2 < text.size() && std::from_chars(digits, digits + 2, value, 16).ptr == digits + 2) {
      out += static_cast<char>(value);
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

// What `work` throws, as the API says it.
template <typename Work>
std::optional<ApiError> ErrorOf(const Work& work) try {
  work();
  return std::nullopt;
} catch (const ApiError& bad) {
  return bad;
} catch (const std::exception& bad) {
  return ApiError{.status = 500, .message = bad.what(), .type = "server_error"};
}

}  // namespace

// A call between its arrival and its admission.
struct Api::Job {
  Exchange exchange;
  Tenant* tenant = nullptr;
  Kind kind = Kind::kChat;
  std::string body;
  HeldBytes::Hold held;
  // What reading it gave:
  GenerationCall call;
  Prepared prepared;
  std::optional<ApiError> error;

  void Parse(const ApiOptions& options) {
    error = ErrorOf([&] {
      const Json json = ParseObject(body, options.limits.json_depth_max);
      switch (kind) {
        case Kind::kChat: call = ParseChat(json, options.limits, body); break;
        case Kind::kCompletion: call = ParseCompletion(json, options.limits, body); break;
        case Kind::kEmbedding: call = ParseEmbedding(json, options.limits); break;
      }
      CheckModel(call.model, options.model_name);
    });
  }
  void Prepare(const ModelInfo& model, const ApiOptions& options) {
    if (!error) error = ErrorOf([&] { prepared = server::Prepare(call, model, options.limits, std::move(held)); });
    body = {};
  }
};

Api::Api(ApiOptions options, Executor executor, EngineThread& engine, Tenants& tenants, Metrics& metrics,
         RequestLog& log)
    : options_(std::move(options)),
      executor_(std::move(executor)),
      engine_(engine),
      tenants_(tenants),
      metrics_(metrics),
      log_(log),
      generations_(engine, tenants),
      views_(engine, executor_.on_io_thread),
      started_s_(static_cast<int64_t>(std::time(nullptr))),
      random_(std::random_device()()) {}

Api::~Api() = default;

const std::vector<Api::Route>& Api::Routes() {
  static const std::vector<Route> kRoutes = {
      {"GET", "/health", Access::kPublic, &Api::Health},
      {"GET", "/ready", Access::kPublic, &Api::Ready},
      {"GET", "/version", Access::kPublic, &Api::Version},
      {"GET", "/metrics", Access::kAdmin, &Api::RenderMetrics},
      {"GET", "/", Access::kPublic, &Api::Page},
      {"GET", "/page/*", Access::kPublic, &Api::Page},
      {"GET", "/jointkv/status", Access::kAdmin, &Api::Status},
      {"GET", "/jointkv/blocks", Access::kTenant, &Api::Blocks},
      {"GET", "/v1/models", Access::kTenant, &Api::Models},
      {"GET", "/v1/models/*", Access::kTenant, &Api::Model},
      {"POST", "/v1/chat/completions", Access::kTenant, &Api::Chat},
      {"POST", "/v1/completions", Access::kTenant, &Api::Completion},
      {"POST", "/v1/embeddings", Access::kTenant, &Api::Embedding},
      {"POST", "/tokenize", Access::kTenant, &Api::Tokenize},
      {"POST", "/detokenize", Access::kTenant, &Api::Detokenize},
      {"GET", "/tokenizer_info", Access::kTenant, &Api::TokenizerInfo},
  };
  return kRoutes;
}

void Api::Handle(HttpRequest request, std::shared_ptr<ReplyChannel> channel) {
  Exchange exchange(log_, request, RequestIdOf(request), std::move(channel));
  try {
    Dispatch(request, exchange);
  } catch (const ApiError& error) {
    exchange.ReplyError(error);
  } catch (const std::exception& error) {
    exchange.ReplyError({.status = 500, .message = error.what(), .type = "server_error"});
  }
}

void Api::Refuse(const HttpRequest& request, const ApiError& error, std::shared_ptr<ReplyChannel> channel) {
  Exchange exchange(log_, request, RequestIdOf(request), std::move(channel));
  AddCorsHeaders(request, exchange, false);
  exchange.ReplyError(error);
}

void Api::Dispatch(HttpRequest& request, Exchange& exchange) {
  const bool preflight = request.method == "OPTIONS";
  AddCorsHeaders(request, exchange, preflight);
  const std::string method = request.method == "HEAD" ? "GET" : request.method;
  const Route* route = nullptr;
  std::set<std::string> allowed;
  for (const Route& candidate : Routes()) {
    if (!Matches(candidate.path, request.path)) continue;
    allowed.insert(candidate.method);
    if (candidate.method == method) route = &candidate;
  }
  if (allowed.empty()) {
    throw ApiError{
        .status = 404, .message = "there is no " + request.path.substr(0, 200) + " here", .code = "unknown_url"};
  }
  if (allowed.contains("GET")) allowed.insert("HEAD");
  allowed.insert("OPTIONS");
  if (preflight || route == nullptr) exchange.AddHeader("Allow", fmt::format("{}", fmt::join(allowed, ", ")));
  if (preflight) {
    exchange.Reply({.status = 204, .content_type = ""});
    return;
  }
  if (route == nullptr) {
    throw ApiError{.status = 405,
                   .message = request.method + " is not a method of " + request.path.substr(0, 200),
                   .code = "method_not_allowed"};
  }
  Context context{request, exchange, {}};
  if (route->access != Access::kPublic) {
    const std::optional<Caller> caller = tenants_.Authenticate(request.authorization);
    if (!caller) {
      const bool missing = request.authorization.empty();
      throw ApiError{
          .status = 401,
          .message = missing ? "an API key is needed: Authorization: Bearer KEY" : "the API key is not known",
          .code = "invalid_api_key"};
    }
    context.caller = *caller;
    exchange.line().tenant = caller->tenant->name;
    if (route->access == Access::kAdmin && !caller->admin) {
      throw ApiError{.status = 403, .message = "this needs a key with \"admin\": true", .code = "forbidden"};
    }
  }
  (this->*route->handler)(context);
}

void Api::AddCorsHeaders(const HttpRequest& request, Exchange& exchange, bool preflight) const {
  const bool any = std::ranges::find(options_.cors_origins, "*") != options_.cors_origins.end();
  if (options_.cors_origins.empty()) return;
  if (!any) {
    if (request.origin.empty()) return;
    exchange.AddHeader("Vary", "Origin");
    if (std::ranges::find(options_.cors_origins, request.origin) == options_.cors_origins.end()) return;
  }
  exchange.AddHeader("Access-Control-Allow-Origin", any ? "*" : request.origin);
  exchange.AddHeader("Access-Control-Expose-Headers", "X-Request-Id, Retry-After, WWW-Authenticate, X-JointKV-Ignored");
  if (!preflight) return;
  exchange.AddHeader("Access-Control-Allow-Methods", "GET, HEAD, POST, OPTIONS");
  // Clients send headers of their own (x-stainless-* of OpenAI's): none of them does harm.
  exchange.AddHeader("Access-Control-Allow-Headers", request.wanted_headers.empty()
                                                         ? "Authorization, Content-Type, X-Request-Id"
                                                         : request.wanted_headers);
  exchange.AddHeader("Access-Control-Max-Age", "3600");
}

void Api::CheckReady() const {
  if (state_ == State::kLoading) throw Unavailable("loading", "the model is being loaded");
  if (state_ == State::kDraining) throw Unavailable("draining", "the server is shutting down");
}

// A browser sends any other type across origins without asking first.
void Api::CheckJsonType(const HttpRequest& request) {
  std::string type = request.content_type.substr(0, request.content_type.find(';'));
  while (!type.empty() && (type.back() == ' ' || type.back() == '\t')) type.pop_back();
  std::ranges::transform(type, type.begin(),
                         [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
  if (type == "application/json") return;
  throw ApiError{.status = 415, .message = "Content-Type must be application/json", .code = "unsupported_media_type"};
}

void Api::Health(Context& context) { context.exchange.Reply(R"({"status":"ok"})"); }

void Api::Ready(Context& context) {
  CheckReady();
  context.exchange.Reply(R"({"status":"ready"})");
}

void Api::Version(Context& context) { context.exchange.Reply(Dump({{"version", options_.version}})); }

void Api::RenderMetrics(Context& context) {
  context.exchange.Reply(
      {.status = 200, .content_type = "text/plain; version=0.0.4; charset=utf-8", .body = metrics_.Render()});
}

void Api::Page(Context& context) {
  context.exchange.line().quiet = true;
  const auto files = PageFiles();
  const auto file = std::ranges::find(files, std::string_view(context.request.path), &PageFile::path);
  if (file == files.end()) {
    throw ApiError{.status = 404,
                   .message = "there is no " + context.request.path.substr(0, 200) + " here",
                   .code = "unknown_url"};
  }
  context.exchange.Reply({.status = 200,
                          .content_type = std::string(file->content_type),
                          .headers = {{"Content-Security-Policy", std::string(kPageSecurityPolicy)},
                                      {"X-Content-Type-Options", "nosniff"},
                                      {"Referrer-Policy", "no-referrer"},
                                      {"Cache-Control", "no-cache"}},
                          .body = std::string(file->bytes)});
}

void Api::Status(Context& context) {
  CheckReady();
  context.exchange.line().quiet = true;
  const auto exchange = std::make_shared<Exchange>(context.exchange);
  views_.Status([exchange](const std::string& json) { exchange->Reply(json); });
}

void Api::Blocks(Context& context) {
  CheckReady();
  context.exchange.line().quiet = true;
  const auto exchange = std::make_shared<Exchange>(context.exchange);
  std::optional<DomainId> domain;
  if (!context.caller.admin) domain = context.caller.tenant->domain;
  views_.Blocks(domain, [exchange](const std::string& json) { exchange->Reply(json); });
}

std::string Api::ModelJson() const {
  OrderedJson model = {{"id", options_.model_name}, {"object", "model"},           {"created", started_s_},
                       {"owned_by", "jointkv"},     {"root", options_.model_name}, {"parent", nullptr}};
  if (state_ != State::kLoading) model["max_model_len"] = engine_.model().context_max;
  return Dump(model);
}

void Api::Models(Context& context) { context.exchange.Reply("{\"object\":\"list\",\"data\":[" + ModelJson() + "]}"); }

void Api::Model(Context& context) {
  CheckModel(PercentDecoded(context.request.path.substr(std::string_view("/v1/models/").size())), options_.model_name);
  context.exchange.Reply(ModelJson());
}

void Api::ReplyWith(Context& context, bool slow, std::function<std::string(const std::string& body)> work) {
  CheckJsonType(context.request);
  CheckReady();
  if (!slow && context.request.body.size() <= kInlineBodyBytes) {
    context.exchange.Reply(work(context.request.body));
    return;
  }
  Tenant& tenant = *context.caller.tenant;
  Use use = tenants_.Preparing(tenant, context.request.body.size());
  use.requests = 0;  // it will be no request of the engine's
  struct Large {
    Exchange exchange;
    HttpRequest request;  // with what it counts as held
    std::function<std::string(const std::string&)> work;
    std::string answer = {};
    std::optional<ApiError> error = {};
  };
  const auto large = std::make_shared<Large>(Large{context.exchange, std::move(context.request), std::move(work)});
  RunBeside(
      large->exchange, tenant, use,
      [large](const std::atomic<bool>&) {
        large->error = ErrorOf([&] { large->answer = large->work(large->request.body); });
      },
      [large] {
        if (large->error) {
          large->exchange.ReplyError(*large->error);
        } else {
          large->exchange.Reply(large->answer);
        }
      });
}

void Api::RunBeside(const Exchange& exchange, Tenant& tenant, const Use& use,
                    std::function<void(const std::atomic<bool>& gone)> work, std::function<void()> then) {
  if (const std::optional<ApiError> error = tenants_.Enter(tenant, use)) throw *error;
  struct Beside {
    Exchange exchange;
    std::function<void(const std::atomic<bool>&)> work;
    std::function<void()> then;
    std::atomic<bool> gone = false;
  };
  const auto beside = std::shared_ptr<Beside>(new Beside{exchange, std::move(work), std::move(then)});
  ++in_background_;
  beside->exchange.channel().OnGone([beside] { beside->gone = true; });
  executor_.in_background([this, beside, &tenant, use] {
    if (!beside->gone) beside->work(beside->gone);
    executor_.on_io_thread([this, beside, &tenant, use] {
      --in_background_;
      tenants_.Leave(tenant, use);
      if (beside->gone) {
        beside->exchange.Gone();
      } else {
        beside->then();
      }
    });
  });
}

void Api::Tokenize(Context& context) {
  const bool has_tools = context.request.body.find("\"tools\"") != std::string::npos;
  ReplyWith(context, has_tools, [this](const std::string& text) {
    const Json body = ParseObject(text, options_.limits.json_depth_max);
    CheckModel(StringOr(body, "model", ""), options_.model_name);
    const ModelInfo& model = engine_.model();
    std::vector<TokenId> tokens;
    const Json* prompt = Find(body, "prompt");
    if (prompt == nullptr) {
      tokens = EncodeConversation(ParseConversation(body, options_.limits, text), model,
                                  BoolOr(body, "add_generation_prompt", true));
    } else {
      tokens = Encode(String(*prompt, "prompt"), "prompt", model, BoolOr(body, "add_special_tokens", true));
    }
    OrderedJson answer = {{"count", tokens.size()}, {"max_model_len", model.context_max}, {"tokens", tokens}};
    if (BoolOr(body, "return_token_strs", false)) {
      OrderedJson& strings = answer["token_strs"] = OrderedJson::array();
      for (const TokenId token : tokens) strings.push_back(text::SanitizeUtf8(model.tokenizer->Piece(token)));
    }
    return Dump(answer);
  });
}

void Api::Detokenize(Context& context) {
  ReplyWith(context, false, [this](const std::string& text) {
    const Json body = ParseObject(text, options_.limits.json_depth_max);
    CheckModel(StringOr(body, "model", ""), options_.model_name);
    const Json* value = Find(body, "tokens");
    if (value == nullptr) throw BadField("tokens", "is missing");
    const ModelInfo& model = engine_.model();
    const std::vector<TokenId> tokens = Tokens(*value, "tokens", options_.limits.body_bytes_max);
    size_t bytes = 0;
    for (const TokenId token : tokens) {
      if (!model.tokenizer->IsValid(token))
        throw BadField("tokens", std::to_string(token) + " is not in the vocabulary");
      bytes += model.tokenizer->Piece(token).size();
    }
    if (bytes > options_.limits.response_bytes_max) {
      throw BadField("tokens", std::to_string(bytes) + " bytes of text are above the limit of " +
                                   std::to_string(options_.limits.response_bytes_max));
    }
    return Dump({{"prompt", text::SanitizeUtf8(model.tokenizer->Decode(tokens, true))}});
  });
}

// vLLM's endpoint of that name; Hugging Face's names for what there is.
void Api::TokenizerInfo(Context& context) {
  CheckReady();
  const ModelInfo& model = engine_.model();
  const text::Tokenizer& tokenizer = *model.tokenizer;
  const auto piece = [&](std::optional<TokenId> token) {
    return token ? OrderedJson(text::SanitizeUtf8(tokenizer.Piece(*token))) : OrderedJson(nullptr);
  };
  context.exchange.Reply(Dump({{"tokenizer_class", "GGUF"},
                               {"vocab_size", model.n_vocab},
                               {"model_max_length", model.context_max},
                               {"add_bos_token", tokenizer.adds_bos()},
                               {"add_eos_token", tokenizer.adds_eos()},
                               {"bos_token", piece(tokenizer.bos())},
                               {"eos_token", piece(tokenizer.eos())},
                               {"pad_token", piece(tokenizer.eos())},
                               {"chat_template", model.chat_template->source()}}));
}

void Api::Generate(Context& context, Kind kind) {
  CheckJsonType(context.request);
  CheckReady();
  const auto job = std::make_shared<Job>(Job{context.exchange,
                                             context.caller.tenant,
                                             kind,
                                             std::move(context.request.body),
                                             std::move(context.request.held),
                                             {},
                                             {},
                                             {}});
  const size_t body_bytes = job->body.size();
  const bool is_short = body_bytes <= kInlineBodyBytes;
  if (is_short) job->Parse(options_);
  if (is_short && (job->error || !job->call.has_grammar())) {
    job->Prepare(engine_.model(), options_);
    Admit(*job);
    return;
  }
  RunBeside(
      job->exchange, *job->tenant, tenants_.Preparing(*job->tenant, body_bytes),
      [this, job, is_short](const std::atomic<bool>& gone) {
        if (!is_short) job->Parse(options_);
        if (!gone) job->Prepare(engine_.model(), options_);
      },
      [this, job] { Admit(*job); });
}

void Api::Admit(Job& job) {
  try {
    if (job.error) throw *job.error;
    CheckReady();
    const Answer::Head head = {(job.kind == Kind::kChat ? "chatcmpl-" : "cmpl-") + RandomName(), options_.model_name,
                               static_cast<int64_t>(std::time(nullptr))};
    if (!job.call.tools.empty() && !engine_.model().chat_template->shows_tools()) {
      job.exchange.AddHeader("X-JointKV-Ignored", "tools");
    }
    generations_.Start(job.exchange, *job.tenant, job.call, std::move(job.prepared), head);
  } catch (const ApiError& error) {
    job.exchange.ReplyError(error);
  }
}

void Api::CancelAll() { generations_.CancelAll(Unavailable("draining", "the server is shutting down")); }

std::string Api::RequestIdOf(const HttpRequest& request) {
  const std::string& id = request.request_id;
  const bool usable = !id.empty() && id.size() <= kRequestIdBytesMax && std::ranges::all_of(id, IsIdCharacter);
  return usable ? id : "req-" + RandomName();
}

std::string Api::RandomName() { return fmt::format("{:016x}{:016x}", random_(), random_()); }

}  // namespace jointkv::server
