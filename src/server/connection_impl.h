// For http_server.cc: makes connections of accepted sockets. The only headers with Asio types are this and those of
// the .cc files.
#pragma once

#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/ssl/context.hpp>

#include <memory>
#include <string>

#include "server/connection.h"
#include "server/held_bytes.h"
#include "server/http_text.h"

namespace jointkv::server {

using Socket = boost::asio::generic::stream_protocol::socket;

// Headers of every answer.
struct CommonHeaders {
  std::string server;
  HttpDate date;
};

// What it is given by reference must outlive it. `tls` null: none.
std::shared_ptr<Connection> MakeConnection(Socket socket, boost::asio::ssl::context* tls,
                                           const Connection::Callbacks& callbacks, const Limits& limits,
                                           HeldBytes& held, CommonHeaders& headers);

}  // namespace jointkv::server
