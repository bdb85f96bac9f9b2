#include <cctype>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "cli/chat_template_option.h"
#include "cli/commands.h"
#include "cli/engine_options.h"
#include "cli/terminal.h"
#include "server/server.h"

namespace jointkv::cli {
namespace {

struct ServeFlags {
  std::string config;  // already read, by ExpandServeConfig
  engine::EngineOptions engine;
  server::ServerOptions server;
};

int Serve(ServeFlags& flags) {
  if (const Status status = CheckEngineOptions(flags.engine); !status.ok()) {
    Complain(status.message());
    return kExitUsage;
  }
  const Status status = server::Serve(flags.server, flags.engine);
  if (status.ok()) return kExitOk;
  Complain(status.message());
  return kExitFailed;
}

void AddAddressFlags(CLI::App& app, server::ServerOptions& options) {
  app.add_option("--host", options.host, "address to listen on")->type_name("HOST")->capture_default_str();
  app.add_option("--port", options.port, "0: any that is free")
      ->check(CLI::Range(0, 65535))
      ->type_name("N")
      ->capture_default_str();
  app.add_option("--unix-socket", options.unix_socket, "listen there instead of on host and port")->type_name("PATH");
  app.add_option("--tls-cert", options.tls_cert, "certificate chain, PEM")->type_name("FILE");
  app.add_option("--tls-key", options.tls_key, "its private key, PEM")->type_name("FILE");
  app.add_option("--cors-origin", options.cors_origins, "origin whose pages may call the API, * for all; repeatable")
      ->allow_extra_args(false)
      ->type_name("ORIGIN");
}

void AddLimitFlags(CLI::App& app, server::Limits& limits) {
  const auto count = [&app](const char* flag, auto& value, const char* help) {
    app.add_option(flag, value, help)->check(CLI::Range(1, 1 << 30))->type_name("N")->capture_default_str();
  };
  const auto seconds = [&app](const char* flag, double& value, const char* help) {
    app.add_option(flag, value, help)->check(CLI::Range(0.1, 86400.0))->type_name("S")->capture_default_str();
  };
  const auto bytes = [&app](const char* flag, size_t& value, const char* help) {
    const auto parse = [&value, flag](const std::string& text) {
      const Expected<size_t> size = ParseBytes(text);
      if (!size.ok()) throw CLI::ValidationError(flag, size.status().message());
      if (*size < 1024 || *size > size_t{1} << 30) throw CLI::ValidationError(flag, "must be from 1K to 1G");
      value = *size;
    };
    app.add_option_function<std::string>(flag, parse, help)->type_name("SIZE")->default_str(FormatBytes(value));
  };
  count("--max-connections", limits.connections_max, "open at once");
  bytes("--max-header-bytes", limits.header_bytes_max, "of a request");
  bytes("--max-body-bytes", limits.body_bytes_max, "of a request");
  bytes("--max-held-bytes", limits.held_bytes_max, "of bodies being read and grammars of open requests, over all");
  bytes("--max-output-bytes", limits.output_bytes_max, "that a stream's client may be behind before it is cut");
  bytes("--max-response-bytes", limits.response_bytes_max, "of an answer that is not streamed");
  count("--max-json-depth", limits.json_depth_max, "nesting of a body");
  count("--max-prompts", limits.prompts_max, "prompts of one call");
  count("--max-queued-requests", limits.queued_requests_max, "that wait for their first token");
  count("--max-queued-tokens", limits.queued_tokens_max, "of the prompts of those");
  seconds("--header-timeout-s", limits.header_timeout_s, "for a request's headers");
  seconds("--body-timeout-s", limits.body_timeout_s, "for its body");
  seconds("--idle-timeout-s", limits.idle_timeout_s, "between requests of a connection");
  seconds("--write-timeout-s", limits.write_timeout_s, "without a byte taken by the client");
  seconds("--ping-s", limits.ping_s, "a stream that is quiet for so long gets a comment");
}

// JOINTKV_SERVE_KV_BYTES for kv-bytes.
std::string EnvironmentName(const std::string& option) {
  std::string name = "JOINTKV_SERVE_" + option;
  for (char& c : name) c = c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return name;
}

void AddEnvironment(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    if (option->get_lnames().empty() || option->get_lnames().front() == "help") continue;
    option->envname(EnvironmentName(option->get_lnames().front()));
    // A variable holds all values of one that may be given again.
    if (option->get_expected_max() > 1 && option->get_delimiter() == '\0') option->delimiter(' ');
  }
}

// The value of --NAME VALUE or --NAME=VALUE; of the model's short name too.
std::optional<std::string> FindOption(const std::vector<std::string>& arguments, const std::string& name) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (name == "model" && arguments[i].starts_with("-m")) return arguments[i].substr(2);
    if (arguments[i] == "--" + name) return i + 1 < arguments.size() ? arguments[i + 1] : "";
    if (arguments[i].starts_with("--" + name + "=")) return arguments[i].substr(name.size() + 3);
  }
  return std::nullopt;
}

}  // namespace

// CLI11 reads files for the whole program only, not for one of its commands.
void ExpandServeConfig(std::vector<std::string>& arguments) {
  if (arguments.empty() || arguments.front() != "serve") return;
  std::optional<std::string> path = FindOption(arguments, "config");
  if (!path) {
    const char* environment = std::getenv("JOINTKV_SERVE_CONFIG");
    if (environment == nullptr || *environment == 0) return;
    path = environment;
  }
  std::vector<std::string> from_file;
  for (const CLI::ConfigItem& item : CLI::ConfigBase().from_file(*path)) {
    if (!item.parents.empty()) throw CLI::ConfigError("--config " + *path + ": sections are not supported");
    const bool given = FindOption(arguments, item.name) || std::getenv(EnvironmentName(item.name).c_str()) != nullptr;
    if (given) continue;
    for (const std::string& value : item.inputs) from_file.push_back("--" + item.name + "=" + value);
  }
  arguments.insert(arguments.begin() + 1, from_file.begin(), from_file.end());
}

void AddServe(CLI::App& app, Command& run) {
  const auto flags = std::make_shared<ServeFlags>();
  flags->server.version = JOINTKV_VERSION;
  CLI::App* command = app.add_subcommand("serve", "an HTTP server with OpenAI's API");
  AddAddressFlags(*command, flags->server);
  command->add_option("--api-keys", flags->server.api_keys, "JSON with keys, tenants and their limits")
      ->type_name("FILE");
  command->add_option("--served-model-name", flags->server.model_name, "what clients call the model")
      ->type_name("NAME")
      ->default_str("the file's name");
  command
      ->add_option("--drain-timeout-s", flags->server.drain_timeout_s,
                   "after SIGTERM: how long requests may take to finish")
      ->check(CLI::Range(0.0, 86400.0))
      ->type_name("S")
      ->capture_default_str();
  const auto format = [flags](const std::string& text) {
    flags->server.log_format = text == "json" ? server::LogFormat::kJson : server::LogFormat::kText;
  };
  command->add_option_function<std::string>("--log-format", format, "a line for each request, on standard error")
      ->check(CLI::IsMember({"text", "json"}).description(""))
      ->type_name("text|json")
      ->default_str("text");
  command
      ->add_option("--shadow-rate", flags->server.shadow_rate,
                   "share of requests that run again with exact K and V when idle, to see what fusion costs")
      ->check(CLI::Range(0.0, 1.0))
      ->type_name("R")
      ->capture_default_str();
  AddChatTemplateFlag(*command, flags->server.chat_template);
  AddLimitFlags(*command, flags->server.limits);
  AddEngineFlags(*command, flags->engine);
  command
      ->add_option("--config", flags->config, "options as NAME = VALUE lines; command line and environment come first")
      ->type_name("FILE");
  AddEnvironment(*command);
  command->callback([&run, flags] { run = [flags] { return Serve(*flags); }; });
}

}  // namespace jointkv::cli
