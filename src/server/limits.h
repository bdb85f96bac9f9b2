// What one server gives at most to its clients. Each is a flag of `jointkv serve`.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jointkv::server {

struct Limits {
  int connections_max = 2048;
  size_t header_bytes_max = size_t{16} << 10;
  size_t body_bytes_max = size_t{8} << 20;    // above any context in text
  size_t held_bytes_max = size_t{256} << 20;  // of all bodies and grammars that have not been answered yet
  int json_depth_max = 64;

  double header_timeout_s = 10;  // from a request's first byte (from the connection, for its first request)
  double body_timeout_s = 60;
  double idle_timeout_s = 75;   // between requests of a connection
  double write_timeout_s = 30;  // without a byte taken by the client
  double ping_s = 10;           // a stream that is quiet for so long gets a comment

  // What a client that does not read costs: this much here, and one step of its events, and about twice
  // `socket_send_bytes` in the kernel.
  size_t output_bytes_max = size_t{64} << 10;
  int socket_send_bytes = 32 << 10;
  size_t response_bytes_max = size_t{32} << 20;  // of an answer that is not streamed, estimated beforehand

  // Requests that wait for their first token, over all tenants.
  int queued_requests_max = 512;
  int64_t queued_tokens_max = int64_t{1} << 20;

  int prompts_max = 256;  // of one call; each counts as a request
  int messages_max = 4096;
};

}  // namespace jointkv::server
