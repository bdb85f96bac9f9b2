#include "server/connection.h"

#include <sys/socket.h>
#include <boost/asio/buffer.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/beast/http/empty_body.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/message.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <boost/beast/http/write.hpp>

#include <algorithm>
#include <array>
#include <cstdio>
#include <optional>
#include <sstream>
#include <type_traits>
#include <utility>

#include "base/clock.h"
#include "server/connection_impl.h"

namespace jointkv::server {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;
using TlsStream = asio::ssl::stream<Socket>;

constexpr size_t kReadBytes = 8192;
constexpr size_t kPipelineBytesMax = 65536;          // sent ahead of the request that is being answered
constexpr size_t kLingerBytesMax = size_t{8} << 20;  // thrown away after an error, so that the client reads it
constexpr double kLingerS = 2;

std::string Text(boost::beast::string_view text) { return {text.data(), text.size()}; }

template <typename Stream>
class HttpConnection final : public Connection,
                             public ReplyChannel,
                             public std::enable_shared_from_this<HttpConnection<Stream>> {
 public:
  static constexpr bool kTls = std::is_same_v<Stream, TlsStream>;

  HttpConnection(Stream stream, const Callbacks& callbacks, const Limits& limits, HeldBytes& held,
                 CommonHeaders& headers)
      : stream_(std::move(stream)), callbacks_(callbacks), limits_(limits), budget_(held), common_headers_(headers) {
    NewRequest();
  }

  // Connection:
  void Start() override {
    Open([](HttpConnection& self) { self.Read(); });
  }

  void StartRefused(const ApiError& error) override {
    Open([error](HttpConnection& self) { self.Refuse(error); });
  }

  void Tick(double now_s) override {
    if (closed_) return;
    if (phase_ == Phase::kAnswering) {
      if (writing_ && now_s > write_deadline_s_) return Close();
      if (streaming_ && now_s - sent_s_ > limits_.ping_s) {
        Send(": ping\n\n");
        Flush();
      }
      return;
    }
    if (now_s <= deadline_s_) return;
    const bool idle = phase_ == Phase::kReceiving && !receiving_;
    if (phase_ == Phase::kLingering || idle) return Close();
    Refuse({.status = 408, .message = "the request did not arrive in time", .code = "request_timeout"});
  }

  void Drain() override {
    draining_ = true;
    if (phase_ == Phase::kReceiving && !receiving_) Close();
  }

  void Close() override {
    if (closed_) return;
    closed_ = true;
    error_code ignored;
    Lowest().close(ignored);
    TellGone();
    callbacks_.on_closed(this);
  }

  // ReplyChannel:
  void Reply(HttpResponse response) override {
    if (closed_) return;
    on_gone_ = nullptr;
    AppendHeader(response.status, response.content_type, response.headers, response.body.size());
    if (!head_) out_ += response.body;
    whole_ = true;
    Write();
  }

  void BeginStream(Headers headers) override {
    if (closed_) return;
    streaming_ = true;
    sent_s_ = MonotonicSeconds();
    headers.emplace_back("Cache-Control", "no-cache");
    headers.emplace_back("X-Accel-Buffering", "no");  // asks proxies to pass events on at once
    AppendHeader(200, "text/event-stream; charset=utf-8", headers, std::nullopt);
  }

  void Send(std::string_view events) override {
    if (!closed_) events_ += events;
  }

  // A client is cut for what it left unread, not for how much one step of its own request gave.
  void Flush() override {
    if (closed_) return;
    const size_t behind = out_.size() + written_ahead_.size() - written_;
    if (behind > limits_.output_bytes_max + largest_flush_) return Close();
    largest_flush_ = std::max(largest_flush_, events_.size());
    AppendChunk();
    sent_s_ = MonotonicSeconds();
    Write();
  }

  void EndStream() override {
    if (closed_) return;
    on_gone_ = nullptr;
    AppendChunk();
    if (chunked_) out_ += "0\r\n\r\n";
    streaming_ = false;
    whole_ = true;
    Write();
  }

  void OnGone(std::function<void()> callback) override {
    if (closed_) {
      callback();
    } else {
      on_gone_ = std::move(callback);
    }
  }

 private:
  enum class Phase { kReceiving, kAnswering, kLingering };
  using Parser = http::request_parser<http::string_body>;

  auto& Lowest() { return stream_.lowest_layer(); }

  // Calls f(*this) once the client can be spoken to.
  template <typename F>
  void Open(F f) {
    deadline_s_ = MonotonicSeconds() + limits_.header_timeout_s;
    if constexpr (kTls) {
      stream_.async_handshake(asio::ssl::stream_base::server, [self = this->shared_from_this(), f](error_code error) {
        if (error) {
          self->Close();
        } else {
          f(*self);
        }
      });
    } else {
      f(*this);
    }
  }

  void NewRequest() {
    phase_ = Phase::kReceiving;
    parser_.emplace();
    parser_->header_limit(static_cast<uint32_t>(limits_.header_bytes_max));
    parser_->body_limit(limits_.body_bytes_max);
    parser_->eager(true);
    held_ = HeldBytes::Hold(budget_);
    receiving_ = false;
    body_began_ = false;
    whole_ = false;
    head_ = false;
    chunked_ = false;
  }

  void Read() {
    if (closed_ || reading_ || TooFarAhead()) return;
    reading_ = true;
    stream_.async_read_some(asio::buffer(chunk_), [self = this->shared_from_this()](error_code error, size_t bytes) {
      self->OnRead(error, bytes);
    });
  }

  void OnRead(error_code error, size_t bytes) {
    reading_ = false;
    if (closed_) return;
    if (error) {
      // Half-closed after the whole answer was produced: the client may still read.
      ended_ = true;
      if (phase_ != Phase::kAnswering || !whole_) Close();
      return;
    }
    if (phase_ == Phase::kLingering) {
      lingered_bytes_ += bytes;
      if (lingered_bytes_ > kLingerBytesMax) return Close();
    } else {
      in_.append(chunk_.data(), bytes);
      if (phase_ == Phase::kReceiving) Parse();
      if (TooFarAhead() && !whole_) return Close();
    }
    Read();
  }

  bool TooFarAhead() const { return phase_ == Phase::kAnswering && in_.size() > kPipelineBytesMax; }

  // An empty line before a request is none of it (RFC 9112, 2.2).
  void SkipEmptyLines() {
    size_t begin = 0;
    while (in_.compare(begin, 2, "\r\n") == 0 || in_.compare(begin, 1, "\n") == 0) begin += in_[begin] == '\r' ? 2 : 1;
    in_.erase(0, begin);
  }

  void Parse() {
    if (!receiving_) {
      SkipEmptyLines();
      if (in_.empty() || in_ == "\r") return;
      receiving_ = true;
      deadline_s_ = MonotonicSeconds() + limits_.header_timeout_s;
    }
    error_code error;
    const size_t used = parser_->put(asio::buffer(in_), error);
    in_.erase(0, used);
    if (error && error != http::error::need_more) return Malformed(error);
    if (!held_.Set(parser_->get().body().size())) return Crowded();
    if (parser_->is_done()) return Dispatch();
    if (!parser_->is_header_done() || body_began_) return;
    body_began_ = true;
    deadline_s_ = MonotonicSeconds() + limits_.body_timeout_s;
    if (parser_->get().version() >= 11 && boost::beast::iequals(parser_->get()[http::field::expect], "100-continue")) {
      out_ += "HTTP/1.1 100 Continue\r\n\r\n";
      Write();
    }
  }

  // Has this error answered without reading the request any further.
  void Refuse(const ApiError& error) {
    phase_ = Phase::kAnswering;
    keep_alive_ = false;
    head_ = parser_->get().method() == http::verb::head;
    callbacks_.on_refused(Described(parser_->get()), error, this->shared_from_this());
  }

  void Malformed(error_code error) {
    in_.clear();
    if (error == http::error::header_limit) {
      Refuse({.status = 431,
              .message = "the headers are longer than " + std::to_string(limits_.header_bytes_max) + " bytes",
              .code = "headers_too_large"});
    } else if (error == http::error::body_limit) {
      Refuse({.status = 413,
              .message = "the body is longer than " + std::to_string(limits_.body_bytes_max) + " bytes",
              .code = "body_too_large"});
    } else {
      Refuse({.message = "not an HTTP request: " + error.message(), .code = "invalid_http"});
    }
  }

  void Crowded() {
    in_.clear();
    std::string().swap(parser_->get().body());
    held_.Set(0);
    Refuse(Unavailable("server_busy",
                       "the server holds " + std::to_string(budget_.bytes_max()) + " bytes of requests, its limit"));
  }

  void Dispatch() {
    auto& message = parser_->get();
    phase_ = Phase::kAnswering;
    version_ = message.version();
    keep_alive_ = message.keep_alive() && !draining_;
    head_ = message.method() == http::verb::head;
    if (version_ >= 11 && message.find(http::field::host) == message.end()) {
      return Refuse({.message = "an HTTP/1.1 request needs a Host header", .code = "invalid_http"});
    }
    HttpRequest request = Described(message);
    request.body = std::move(message.body());
    request.held = std::move(held_);
    callbacks_.on_request(std::move(request), this->shared_from_this());
  }

  // Without its body; as far as it was read.
  static HttpRequest Described(const http::request<http::string_body>& message) {
    HttpRequest request;
    request.method = Text(message.method_string());
    request.path = PathOf(Text(message.target()));
    request.authorization = Text(message[http::field::authorization]);
    request.content_type = Text(message[http::field::content_type]);
    request.origin = Text(message[http::field::origin]);
    request.wanted_headers = Text(message[http::field::access_control_request_headers]);
    request.request_id = Text(message["X-Request-Id"]);
    return request;
  }

  void AppendHeader(int status, const std::string& content_type, const Headers& headers,
                    std::optional<size_t> body_bytes) {
    http::response<http::empty_body> header;
    header.version(version_ >= 11 ? 11 : 10);
    header.result(static_cast<unsigned>(status));
    header.set(http::field::server, common_headers_.server);
    header.set(http::field::date, common_headers_.date.Now());
    if (!content_type.empty()) header.set(http::field::content_type, content_type);
    for (const auto& [name, value] : headers) header.insert(name, value);
    if (body_bytes) {
      if (status != 204) header.set(http::field::content_length, std::to_string(*body_bytes));
    } else if (version_ >= 11) {
      chunked_ = true;
      header.set(http::field::transfer_encoding, "chunked");
    } else {
      keep_alive_ = false;
    }
    if (draining_) keep_alive_ = false;
    header.keep_alive(keep_alive_);
    std::ostringstream text;
    text << header.base();
    out_ += text.str();
  }

  void AppendChunk() {
    if (events_.empty()) return;
    if (chunked_) {
      char size[20];
      std::snprintf(size, sizeof(size), "%zx\r\n", events_.size());
      out_ += size;
    }
    out_ += events_;
    if (chunked_) out_ += "\r\n";
    events_.clear();
  }

  void Write() {
    if (closed_ || writing_) return;
    if (written_ahead_.empty()) {
      if (out_.empty()) return OnAllWritten();
      std::swap(written_ahead_, out_);
      written_ = 0;
    }
    writing_ = true;
    write_deadline_s_ = MonotonicSeconds() + limits_.write_timeout_s;
    stream_.async_write_some(
        asio::buffer(written_ahead_) + written_,
        [self = this->shared_from_this()](error_code error, size_t bytes) { self->OnWritten(error, bytes); });
  }

  void OnWritten(error_code error, size_t bytes) {
    writing_ = false;
    if (closed_) return;
    if (error) return Close();
    written_ += bytes;
    if (written_ == written_ahead_.size()) {
      written_ahead_.clear();
      written_ = 0;
      if (written_ahead_.capacity() > limits_.output_bytes_max) written_ahead_ = {};
    }
    Write();
  }

  void OnAllWritten() {
    if (phase_ != Phase::kAnswering || !whole_) return;
    if (ended_) return Close();
    if (!keep_alive_) return Linger();
    if (draining_) return Close();
    NewRequest();
    deadline_s_ = MonotonicSeconds() + limits_.idle_timeout_s;
    if (!in_.empty()) Parse();
    Read();
  }

  // Says that the answer is complete, and gives the client time to read it: data that arrives on a closed socket would
  // make the system throw the answer away.
  void Linger() {
    phase_ = Phase::kLingering;
    deadline_s_ = MonotonicSeconds() + kLingerS;
    if constexpr (kTls) {
      stream_.async_shutdown([self = this->shared_from_this()](error_code) { self->Close(); });
    } else {
      error_code ignored;
      stream_.shutdown(asio::socket_base::shutdown_send, ignored);
      Read();
    }
  }

  void TellGone() {
    if (auto gone = std::exchange(on_gone_, nullptr)) gone();
  }

  Stream stream_;
  const Callbacks& callbacks_;
  const Limits& limits_;
  HeldBytes& budget_;
  CommonHeaders& common_headers_;

  std::array<char, kReadBytes> chunk_;
  std::string in_;  // read and not parsed yet
  std::optional<Parser> parser_;
  HeldBytes::Hold held_;  // of what it has parsed
  Phase phase_ = Phase::kReceiving;
  bool reading_ = false;
  bool receiving_ = false;  // a request's first byte is here
  bool body_began_ = false;
  bool ended_ = false;  // the client sends no more
  size_t lingered_bytes_ = 0;
  double deadline_s_ = 0;  // of receiving and lingering

  unsigned version_ = 11;
  bool keep_alive_ = true;
  bool head_ = false;
  bool chunked_ = false;
  bool streaming_ = false;
  bool whole_ = false;  // the answer is all in out_
  std::string events_;  // not framed yet
  std::string out_;
  std::string written_ahead_;  // being written
  size_t written_ = 0;         // of it
  size_t largest_flush_ = 0;   // of this connection's events
  bool writing_ = false;
  double write_deadline_s_ = 0;
  double sent_s_ = 0;

  bool draining_ = false;
  bool closed_ = false;
  std::function<void()> on_gone_;
};

}  // namespace

std::shared_ptr<Connection> MakeConnection(Socket socket, asio::ssl::context* tls,
                                           const Connection::Callbacks& callbacks, const Limits& limits,
                                           HeldBytes& held, CommonHeaders& headers) {
  if (tls == nullptr) {
    return std::make_shared<HttpConnection<Socket>>(std::move(socket), callbacks, limits, held, headers);
  }
  return std::make_shared<HttpConnection<TlsStream>>(TlsStream(std::move(socket), *tls), callbacks, limits, held,
                                                     headers);
}

}  // namespace jointkv::server
