// How a server is set up.
#pragma once

#include <string>
#include <vector>

#include "server/limits.h"
#include "server/request_log.h"

namespace jointkv::server {

struct ServerOptions {
  std::string host = "127.0.0.1";
  int port = 8080;          // 0: any that is free
  std::string unix_socket;  // instead of host and port
  std::string tls_cert;     // PEM files; both or neither
  std::string tls_key;
  std::vector<std::string> cors_origins;
  std::string api_keys;       // file; empty: no keys
  std::string model_name;     // as clients name it; empty: the file's
  std::string chat_template;  // text; empty: the model file's
  double drain_timeout_s = 30;
  LogFormat log_format = LogFormat::kText;
  double shadow_rate = 0;  // share of requests that run again with exact K and V when the engine is idle
  Limits limits;
  std::string version;
};

}  // namespace jointkv::server
