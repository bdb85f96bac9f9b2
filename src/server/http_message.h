// HTTP as the API sees it, free of the library that speaks it.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/held_bytes.h"

namespace jointkv::server {

struct HttpRequest {
  std::string method;
  std::string path;  // without the query
  std::string authorization;
  std::string content_type;
  std::string origin;
  std::string wanted_headers;  // Access-Control-Request-Headers
  std::string request_id;      // X-Request-Id as sent
  std::string body;
  HeldBytes::Hold held;  // the body's
};

using Headers = std::vector<std::pair<std::string, std::string>>;

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  Headers headers = {};
  std::string body = {};
};

// Where the answer to one request goes. Threads: the I/O thread. Owns: what the client has not taken yet, within its
// limit. Fails how: when the client has left or does not read, OnGone's callback is called once and the rest is
// dropped. Exactly one answer: Reply, or BeginStream, any number of Send and Flush, EndStream.
class ReplyChannel {
 public:
  virtual ~ReplyChannel() = default;

  virtual void Reply(HttpResponse response) = 0;
  virtual void BeginStream(Headers headers) = 0;  // server-sent events
  virtual void Send(std::string_view events) = 0;
  virtual void Flush() = 0;
  virtual void EndStream() = 0;
  // Until the answer is complete.
  virtual void OnGone(std::function<void()> callback) = 0;
};

}  // namespace jointkv::server
