// One client's connection: reads requests one after the other, writes their answers, and notices when the client
// leaves.
//
// Connection. Threads: the I/O thread. Owns: the socket and bounded buffers. Fails how: it closes itself and calls
// on_closed once; a request that is being answered then hears of it through its channel.
//
// It reads all the time, also while a request is answered: the end of the stream means that nobody waits any more. So
// whoever sends more than a little ahead of the answer is cut: an end behind it would not be seen.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "server/api_error.h"
#include "server/http_message.h"
#include "server/limits.h"

namespace jointkv::server {

class Connection {
 public:
  struct Callbacks {
    std::function<void(HttpRequest, std::shared_ptr<ReplyChannel>)> on_request;
    // To be answered with this error; the request holds what was read of it.
    std::function<void(const HttpRequest&, const ApiError&, std::shared_ptr<ReplyChannel>)> on_refused;
    std::function<void(Connection*)> on_closed;
  };

  virtual ~Connection() = default;

  virtual void Start() = 0;
  // Has this error answered without reading a request. One of the two starts it.
  virtual void StartRefused(const ApiError& error) = 0;
  // Several times a second: deadlines and comments on quiet streams.
  virtual void Tick(double now_s) = 0;
  // No further request: closes when it has none, or when its present one is answered.
  virtual void Drain() = 0;
  virtual void Close() = 0;
};

}  // namespace jointkv::server
