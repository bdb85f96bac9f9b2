// One request on its way through the server, and what it is answered with.
//
// Exchange. Threads: the I/O thread. Owns: a share of the channel. Fails how: never. Answer it once.
#pragma once

#include <memory>
#include <string>

#include "server/api_error.h"
#include "server/http_message.h"
#include "server/request_log.h"

namespace jointkv::server {

class Exchange {
 public:
  // `log` must outlive it.
  Exchange(RequestLog& log, const HttpRequest& request, std::string id, std::shared_ptr<ReplyChannel> channel);

  const std::string& id() const { return line_.id; }
  ReplyChannel& channel() const { return *channel_; }
  RequestLine& line() { return line_; }
  // Headers of whatever the answer is.
  void AddHeader(std::string name, std::string value) { headers_.emplace_back(std::move(name), std::move(value)); }

  void Reply(HttpResponse response);
  void Reply(std::string json) { Reply({.status = 200, .body = std::move(json)}); }
  void ReplyError(const ApiError& error);
  void BeginStream();
  void EndStream();
  // The client has left: only the log hears of it.
  void Gone();

 private:
  void Log(int status);

  RequestLog* log_;
  std::shared_ptr<ReplyChannel> channel_;
  Headers headers_;
  RequestLine line_;
  double received_s_;
};

}  // namespace jointkv::server
