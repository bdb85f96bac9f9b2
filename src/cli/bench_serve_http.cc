#include "cli/bench_serve_http.h"

#include <openssl/ssl.h>
#include <openssl/x509_vfy.h>

#include <boost/asio/ssl/error.hpp>
#include <boost/beast/core/error.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/read.hpp>
#include <boost/beast/http/write.hpp>

#include <algorithm>
#include <chrono>
#include <limits>

#include "base/check.h"

namespace jointkv::cli {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;

constexpr size_t kBodyBytesMax = size_t{16} << 20;  // of a call that wants all of it at once
constexpr double kTimeoutMaxS = 1e6;

Status BadUrl(const std::string& url, const std::string& what) {
  return {StatusCode::kInvalidArgument, "'" + url + "': " + what};
}

bool IsAddress(const std::string& host) {
  beast::error_code error;
  asio::ip::make_address(host, error);
  return !error;
}

Expected<std::shared_ptr<asio::ssl::context>> MakeTls(TlsCheck check) {
  const auto tls = std::make_shared<asio::ssl::context>(asio::ssl::context::tls_client);
  beast::error_code error;
  tls->set_options(asio::ssl::context::default_workarounds | asio::ssl::context::no_tlsv1 |
                       asio::ssl::context::no_tlsv1_1 | asio::ssl::context::no_compression,
                   error);
  if (!error) tls->set_verify_mode(check == TlsCheck::kNone ? asio::ssl::verify_none : asio::ssl::verify_peer, error);
  if (!error && check != TlsCheck::kNone) tls->set_default_verify_paths(error);
  if (error) return Status(StatusCode::kIo, "TLS: " + error.message());
  return tls;
}

}  // namespace

std::string HttpServer::authority() const {
  const std::string name = host.find(':') == std::string::npos ? host : "[" + host + "]";
  return port == (tls == nullptr ? "80" : "443") ? name : name + ":" + port;
}

Expected<HttpServer> HttpServer::Resolve(const std::string& base_url, TlsCheck check) {
  const size_t scheme = base_url.find("://") + 3;
  const bool https = base_url.starts_with("https://");
  if (!https && !base_url.starts_with("http://")) return BadUrl(base_url, "expected http://host:port or https://");
  const std::string rest = base_url.substr(scheme);
  const size_t slash = std::min(rest.find('/'), rest.size());
  std::string authority = rest.substr(0, slash);
  HttpServer server;
  server.path = rest.substr(slash);
  while (server.path.ends_with('/')) server.path.pop_back();
  server.port = https ? "443" : "80";
  const size_t colon = authority.rfind(':');
  if (colon != std::string::npos && authority.find(']', colon) == std::string::npos) {
    server.port = authority.substr(colon + 1);
    authority.resize(colon);
  }
  const bool is_number =
      !server.port.empty() && std::ranges::all_of(server.port, [](char c) { return c >= '0' && c <= '9'; });
  if (!is_number || server.port.size() > 5 || std::stoi(server.port) > std::numeric_limits<uint16_t>::max()) {
    return BadUrl(base_url, "'" + server.port + "' is not a port");
  }
  if (authority.starts_with('[') && authority.ends_with(']')) authority = authority.substr(1, authority.size() - 2);
  if (authority.empty()) return BadUrl(base_url, "has no host");
  server.host = authority;
  if (https) {
    ASSIGN_OR_RETURN(server.tls, MakeTls(check));
  }

  asio::io_context io;
  asio::ip::tcp::resolver resolver(io);
  beast::error_code error;
  for (const auto& found : resolver.resolve(server.host, server.port, error)) server.endpoints.push_back(found);
  if (error || server.endpoints.empty()) {
    return Status(StatusCode::kNotFound, "host '" + server.host + "': " + error.message());
  }
  return server;
}

HttpConnection::HttpConnection(asio::io_context& io, const HttpServer& server) : server_(server), stream_(io) {}

void HttpConnection::Start(HttpCall call, OnData on_data, OnEnd on_end) {
  CHECK(!on_end_);
  on_data_ = std::move(on_data);
  on_end_ = std::move(on_end);
  cancelled_ = false;
  http_status_ = 0;
  request_ = {};
  request_.version(11);
  request_.method(call.method);
  request_.target(server_.path + call.path);
  request_.set(http::field::host, server_.authority());
  request_.set(http::field::user_agent, "jointkv-bench");
  if (!call.body.empty()) request_.set(http::field::content_type, "application/json");
  for (const auto& [name, value] : call.headers) request_.set(name, value);
  request_.body() = std::move(call.body);
  request_.prepare_payload();
  timeout_ = std::chrono::duration_cast<std::chrono::steady_clock::duration>(
      std::chrono::duration<double>(std::clamp(call.timeout_s, 0.0, kTimeoutMaxS)));
  stream_.expires_after(timeout_);
  reused_ = stream_.socket().is_open();
  if (reused_) {
    Write();
  } else {
    Connect();
  }
}

void HttpConnection::Cancel() {
  if (!on_end_) return;
  cancelled_ = true;
  stream_.cancel();
}

void HttpConnection::Connect() {
  stream_.async_connect(server_.endpoints, [this](Error error, const asio::ip::tcp::endpoint&) {
    if (error) return End(error);
    Error ignored;
    stream_.socket().set_option(asio::ip::tcp::no_delay(true), ignored);
    if (server_.tls != nullptr) return Handshake();
    Write();
  });
}

void HttpConnection::Handshake() {
  tls_.emplace(stream_, *server_.tls);
  SSL* ssl = tls_->native_handle();
  if (IsAddress(server_.host)) {
    X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), server_.host.c_str());
  } else {
    SSL_set1_host(ssl, server_.host.c_str());
    SSL_set_tlsext_host_name(ssl, server_.host.c_str());
  }
  tls_->async_handshake(asio::ssl::stream_base::client, [this](Error error) {
    if (error) return End(error);
    Write();
  });
}

template <typename Function>
void HttpConnection::OnStream(const Function& function) {
  if (tls_) {
    function(*tls_);
  } else {
    function(stream_);
  }
}

void HttpConnection::Write() {
  OnStream([this](auto& stream) {
    http::async_write(stream, request_, [this](Error error, size_t) {
      if (!error) return ReadHeader();
      if (!Retry(error)) End(error);
    });
  });
}

void HttpConnection::ReadHeader() {
  buffer_.clear();
  parser_.emplace();
  parser_->body_limit(std::numeric_limits<uint64_t>::max());  // the reader of the body bounds what it keeps
  OnStream([this](auto& stream) {
    http::async_read_header(stream, buffer_, *parser_, [this](Error error, size_t) {
      if (error) {
        if (!Retry(error)) End(error);
        return;
      }
      http_status_ = static_cast<int>(parser_->get().result_int());
      ReadBody();
    });
  });
}

void HttpConnection::ReadBody() {
  if (parser_->is_done()) return End({});
  parser_->get().body().data = chunk_.data();
  parser_->get().body().size = chunk_.size();
  OnStream([this](auto& stream) {
    http::async_read_some(stream, buffer_, *parser_, [this](Error error, size_t) {
      const size_t got = chunk_.size() - parser_->get().body().size;
      if (got > 0) on_data_({chunk_.data(), got});
      if (cancelled_ || (error && error != http::error::need_buffer)) return End(error);
      ReadBody();
    });
  });
}

bool HttpConnection::Retry(const Error& error) {
  const bool hung_up = error == http::error::end_of_stream || error == asio::error::connection_reset ||
                       error == asio::error::broken_pipe || error == asio::error::eof ||
                       error == asio::ssl::error::stream_truncated;
  if (!reused_ || !hung_up || cancelled_) return false;
  reused_ = false;
  Close();
  stream_.expires_after(timeout_);
  Connect();
  return true;
}

void HttpConnection::Close() {
  stream_.close();
  tls_.reset();
}

// For a certificate that is refused: why.
std::string HttpConnection::What(const Error& error) {
  const long verified = tls_ ? SSL_get_verify_result(tls_->native_handle()) : X509_V_OK;
  const bool refused = verified != X509_V_OK && error.category() == asio::error::get_ssl_category() &&
                       SSL_CTX_get_verify_mode(server_.tls->native_handle()) != SSL_VERIFY_NONE;
  if (!refused) return error.message();
  return std::string("the certificate is refused: ") + X509_verify_cert_error_string(verified);
}

void HttpConnection::End(const Error& error) {
  const bool keep = !error && !cancelled_ && parser_->keep_alive();
  const std::string what = error ? What(error) : std::string();
  if (!keep) Close();
  stream_.expires_never();
  Status status;
  if (cancelled_) {
    status = Status(StatusCode::kCancelled, "cancelled");
  } else if (error == beast::error::timeout) {
    status = Status(StatusCode::kIo, "no whole answer in time");
  } else if (error) {
    status = Status(StatusCode::kIo, server_.host + ":" + server_.port + ": " + what);
  }
  // The callback may start the next call.
  on_data_ = nullptr;
  const OnEnd on_end = std::exchange(on_end_, nullptr);
  on_end(status, http_status_);
}

Expected<HttpAnswer> HttpGet(const HttpServer& server, const std::string& path, const HttpHeaders& headers,
                             double timeout_s) {
  asio::io_context io;
  HttpConnection connection(io, server);
  HttpAnswer answer;
  Status failed;
  bool too_long = false;
  connection.Start(
      {.path = path, .headers = headers, .timeout_s = timeout_s},
      [&](std::string_view bytes) {
        too_long = too_long || answer.body.size() + bytes.size() > kBodyBytesMax;
        if (too_long) return connection.Cancel();
        answer.body += bytes;
      },
      [&](const Status& status, int http_status) {
        failed = status;
        answer.status = http_status;
      });
  io.run();
  if (too_long)
    return Status(StatusCode::kOutOfRange, path + ": more than " + std::to_string(kBodyBytesMax) + " bytes");
  RETURN_IF_ERROR(failed);
  return answer;
}

}  // namespace jointkv::cli
