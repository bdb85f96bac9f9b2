// HTTP/1.1 from the client's side, with TLS or without, no more than a load generator needs.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http/buffer_body.hpp>
#include <boost/beast/http/message.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"

namespace jointkv::cli {

using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

// Whether a server must show a certificate for its name that the system's store trusts, or SSL_CERT_FILE's.
enum class TlsCheck : bool { kNone, kCertificate };

// Where a server listens: from "http://127.0.0.1:8000/prefix".
struct HttpServer {
  std::string host;
  std::string port;
  std::string path;  // put before the path of each call; no '/' at its end
  std::vector<boost::asio::ip::tcp::endpoint> endpoints;
  std::shared_ptr<boost::asio::ssl::context> tls;  // null: http

  std::string authority() const;  // for the Host header

  // Resolves the name. Fails with kInvalidArgument (not such a URL), kNotFound, or kIo (no store of certificates).
  static Expected<HttpServer> Resolve(const std::string& base_url, TlsCheck check = TlsCheck::kCertificate);
};

struct HttpCall {
  boost::beast::http::verb method = boost::beast::http::verb::get;
  std::string path;
  HttpHeaders headers = {};
  std::string body = {};
  double timeout_s = 60;  // for the whole call
};

// A connection that makes one call after another, and connects anew when the server has hung up in between. Threads:
// the one that runs `io`. Owns: the socket. Fails how: the call's on_end gets a Status, kCancelled after Cancel. It
// must outlive its calls, so the last on_end comes before it goes.
class HttpConnection {
 public:
  using OnData = std::function<void(std::string_view bytes)>;
  using OnEnd = std::function<void(const Status& status, int http_status)>;

  HttpConnection(boost::asio::io_context& io, const HttpServer& server);
  HttpConnection(const HttpConnection&) = delete;
  HttpConnection& operator=(const HttpConnection&) = delete;

  // The HTTP status is known from the first on_data on. Requires that no call is under way.
  void Start(HttpCall call, OnData on_data, OnEnd on_end);
  void Cancel();
  int http_status() const { return http_status_; }

 private:
  using Error = boost::beast::error_code;

  using TlsStream = boost::asio::ssl::stream<boost::beast::tcp_stream&>;

  // Calls it with the stream that HTTP goes over.
  template <typename Function>
  void OnStream(const Function& function);
  void Connect();
  void Handshake();
  void Write();
  void ReadHeader();
  void ReadBody();
  // Whether the server hung up on a kept connection before it answered, which is its right; if so, connects again.
  bool Retry(const Error& error);
  void Close();
  void End(const Error& error);
  std::string What(const Error& error);

  const HttpServer& server_;
  boost::beast::tcp_stream stream_;
  std::optional<TlsStream> tls_;
  boost::beast::flat_buffer buffer_;
  boost::beast::http::request<boost::beast::http::string_body> request_;
  std::optional<boost::beast::http::response_parser<boost::beast::http::buffer_body>> parser_;
  std::array<char, 1 << 14> chunk_;
  std::chrono::steady_clock::duration timeout_{};
  OnData on_data_;
  OnEnd on_end_;
  bool reused_ = false;
  bool cancelled_ = false;
  int http_status_ = 0;
};

struct HttpAnswer {
  int status = 0;
  std::string body;
};

// One call by itself, on a connection of its own. Fails with kIo, or kOutOfRange for a body above 16 MiB.
Expected<HttpAnswer> HttpGet(const HttpServer& server, const std::string& path, const HttpHeaders& headers,
                             double timeout_s);

}  // namespace jointkv::cli
