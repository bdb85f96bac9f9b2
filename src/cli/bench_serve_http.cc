#include "cli/bench_serve_http.h"

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

}  // namespace

Expected<HttpServer> HttpServer::Resolve(const std::string& base_url) {
  constexpr std::string_view kScheme = "http://";
  if (base_url.starts_with("https://")) {
    return Status(StatusCode::kUnsupported, "'" + base_url + "': only http is supported");
  }
  if (!base_url.starts_with(kScheme)) return BadUrl(base_url, "expected http://host:port");
  const std::string rest = base_url.substr(kScheme.size());
  const size_t slash = std::min(rest.find('/'), rest.size());
  std::string authority = rest.substr(0, slash);
  HttpServer server;
  server.path = rest.substr(slash);
  while (server.path.ends_with('/')) server.path.pop_back();
  server.port = "80";
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
  const bool is_v6 = server_.host.find(':') != std::string::npos;
  request_.set(http::field::host, (is_v6 ? "[" + server_.host + "]" : server_.host) + ":" + server_.port);
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
    Write();
  });
}

void HttpConnection::Write() {
  http::async_write(stream_, request_, [this](Error error, size_t) {
    if (!error) return ReadHeader();
    if (!Retry(error)) End(error);
  });
}

void HttpConnection::ReadHeader() {
  buffer_.clear();
  parser_.emplace();
  parser_->body_limit(std::numeric_limits<uint64_t>::max());  // the reader of the body bounds what it keeps
  http::async_read_header(stream_, buffer_, *parser_, [this](Error error, size_t) {
    if (error) {
      if (!Retry(error)) End(error);
      return;
    }
    http_status_ = static_cast<int>(parser_->get().result_int());
    ReadBody();
  });
}

void HttpConnection::ReadBody() {
  if (parser_->is_done()) return End({});
  parser_->get().body().data = chunk_.data();
  parser_->get().body().size = chunk_.size();
  http::async_read_some(stream_, buffer_, *parser_, [this](Error error, size_t) {
    const size_t got = chunk_.size() - parser_->get().body().size;
    if (got > 0) on_data_({chunk_.data(), got});
    if (cancelled_ || (error && error != http::error::need_buffer)) return End(error);
    ReadBody();
  });
}

bool HttpConnection::Retry(const Error& error) {
  const bool hung_up = error == http::error::end_of_stream || error == asio::error::connection_reset ||
                       error == asio::error::broken_pipe || error == asio::error::eof;
  if (!reused_ || !hung_up || cancelled_) return false;
  reused_ = false;
  stream_.close();
  stream_.expires_after(timeout_);
  Connect();
  return true;
}

void HttpConnection::End(const Error& error) {
  const bool keep = !error && !cancelled_ && parser_->keep_alive();
  if (!keep) stream_.close();
  stream_.expires_never();
  Status status;
  if (cancelled_) {
    status = Status(StatusCode::kCancelled, "cancelled");
  } else if (error == beast::error::timeout) {
    status = Status(StatusCode::kIo, "no whole answer in time");
  } else if (error) {
    status = Status(StatusCode::kIo, server_.host + ":" + server_.port + ": " + error.message());
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
