#include "server/http_server.h"

#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>

#include <algorithm>
#include <chrono>
#include <limits>
#include <unordered_map>
#include <utility>

#include "base/clock.h"
#include "server/connection_impl.h"

namespace jointkv::server {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;
using Local = asio::local::stream_protocol;

constexpr auto kTick = std::chrono::milliseconds(250);
constexpr int kBacklog = 1024;
constexpr int kRefusedMax = 64;  // connections above the limit that are told so
constexpr int kOtherFiles = 32;  // that are no connections: standard streams, listener, epoll, files being read

// As many files as the system allows: each connection takes one. Returns how many connections that leaves room for.
int RaiseFileLimit() {
  rlimit files{};
  if (getrlimit(RLIMIT_NOFILE, &files) != 0) return std::numeric_limits<int>::max();
  files.rlim_cur = std::min<rlim_t>(files.rlim_max, rlim_t{1} << 16);
  setrlimit(RLIMIT_NOFILE, &files);
  return std::max(1, static_cast<int>(files.rlim_cur) - kOtherFiles - kRefusedMax);
}

Status Failed(const std::string& what, const error_code& error) {
  return {StatusCode::kIo, what + ": " + error.message()};
}

}  // namespace

struct HttpServer::Sockets {
  asio::io_context io{1};
  asio::thread_pool helper{1};
  asio::basic_socket_acceptor<asio::generic::stream_protocol> acceptor{io};
  asio::steady_timer tick{io};
  asio::steady_timer accept_again{io};
  asio::signal_set signals{io};
  std::function<void(int)> on_signal;
  CommonHeaders headers;
  std::unique_ptr<asio::ssl::context> tls;
  std::unordered_map<Connection*, std::shared_ptr<Connection>> connections;
  asio::executor_work_guard<asio::io_context::executor_type> work = asio::make_work_guard(io);

  void WaitForSignal() {
    signals.async_wait([this](error_code error, int number) {
      if (error) return;
      on_signal(number);
      WaitForSignal();
    });
  }
};

HttpServer::HttpServer(
    const ServerOptions& options, std::string server_name,
    std::function<void(HttpRequest, std::shared_ptr<ReplyChannel>)> on_request,
    std::function<void(const HttpRequest&, const ApiError&, std::shared_ptr<ReplyChannel>)> on_refused)
    : options_(options), held_(options.limits.held_bytes_max), sockets_(std::make_unique<Sockets>()) {
  sockets_->headers.server = std::move(server_name);
  callbacks_.on_request = std::move(on_request);
  callbacks_.on_refused = std::move(on_refused);
  // Later: the caller is one of the connection's own functions.
  callbacks_.on_closed = [this](Connection* connection) {
    asio::post(sockets_->io, [this, connection] { sockets_->connections.erase(connection); });
  };
}

HttpServer::~HttpServer() {
  sockets_->helper.join();
  RemoveSocketFile();
}

void HttpServer::RemoveSocketFile() {
  if (std::exchange(bound_unix_socket_, false)) unlink(options_.unix_socket.c_str());
}

Status HttpServer::Listen() {
  connections_max_ = std::min(options_.limits.connections_max, RaiseFileLimit());
  RETURN_IF_ERROR(LoadCertificate());
  RETURN_IF_ERROR(options_.unix_socket.empty() ? ListenTcp() : ListenUnix());
  Accept();
  return Status::Ok();
}

Status HttpServer::ListenTcp() {
  const std::string where = options_.host + ":" + std::to_string(options_.port);
  error_code error;
  tcp::resolver resolver(sockets_->io);
  const auto found = resolver.resolve(options_.host, std::to_string(options_.port), tcp::resolver::passive, error);
  if (error) return Failed("cannot listen on " + where, error);
  const tcp::endpoint endpoint = found.begin()->endpoint();
  auto& acceptor = sockets_->acceptor;
  acceptor.open(endpoint.protocol(), error);
  if (!error) acceptor.set_option(asio::socket_base::reuse_address(true), error);
  if (!error) acceptor.bind(endpoint, error);
  if (!error) acceptor.listen(kBacklog, error);
  if (error) return Failed("cannot listen on " + where, error);
  sockaddr_storage bound{};
  socklen_t bytes = sizeof(bound);
  getsockname(acceptor.native_handle(), reinterpret_cast<sockaddr*>(&bound), &bytes);
  const bool six = bound.ss_family == AF_INET6;
  const uint16_t port = ntohs(six ? reinterpret_cast<const sockaddr_in6&>(bound).sin6_port
                                  : reinterpret_cast<const sockaddr_in&>(bound).sin_port);
  address_ = std::string(sockets_->tls ? "https://" : "http://") + (six ? "[" + options_.host + "]" : options_.host) +
             ":" + std::to_string(port);
  return Status::Ok();
}

// A socket that a dead server left behind is replaced; anything else at that path is not touched.
Status HttpServer::ListenUnix() {
  const std::string& path = options_.unix_socket;
  const std::string what = "cannot listen on " + path;
  error_code error;
  if (path.size() > 100) return {StatusCode::kOutOfRange, what + ": more than 100 bytes"};
  struct stat there {};
  if (lstat(path.c_str(), &there) == 0) {
    if (!S_ISSOCK(there.st_mode)) return {StatusCode::kInvalidArgument, what + ": the path exists and is no socket"};
    Local::socket probe(sockets_->io);
    probe.connect(Local::endpoint(path), error);
    if (!error) return {StatusCode::kIo, what + ": another server listens there"};
    if (error != asio::error::connection_refused) return Failed(what + ": who listens there cannot be told", error);
    unlink(path.c_str());
  }
  auto& acceptor = sockets_->acceptor;
  const Local::endpoint endpoint(path);
  error = {};
  acceptor.open(endpoint.protocol(), error);
  if (!error) acceptor.bind(endpoint, error);
  bound_unix_socket_ = !error;
  if (!error) acceptor.listen(kBacklog, error);
  if (error) return Failed(what, error);
  address_ = "unix:" + path;
  return Status::Ok();
}

Status HttpServer::LoadCertificate() {
  if (options_.tls_cert.empty() && options_.tls_key.empty()) return Status::Ok();
  if (options_.tls_cert.empty() || options_.tls_key.empty()) {
    return {StatusCode::kInvalidArgument, "--tls-cert and --tls-key belong together"};
  }
  auto tls = std::make_unique<asio::ssl::context>(asio::ssl::context::tls_server);
  error_code error;
  tls->set_options(asio::ssl::context::default_workarounds | asio::ssl::context::no_tlsv1 |
                       asio::ssl::context::no_tlsv1_1 | asio::ssl::context::no_compression,
                   error);
  tls->use_certificate_chain_file(options_.tls_cert, error);
  if (error) return Failed("--tls-cert '" + options_.tls_cert + "'", error);
  tls->use_private_key_file(options_.tls_key, asio::ssl::context::pem, error);
  if (error) return Failed("--tls-key '" + options_.tls_key + "'", error);
  sockets_->tls = std::move(tls);
  return Status::Ok();
}

void HttpServer::Accept() {
  sockets_->acceptor.async_accept(sockets_->io, [this](error_code error, Socket socket) {
    if (error == asio::error::operation_aborted) return;
    if (error) {  // no file descriptor left, mostly
      sockets_->accept_again.expires_after(std::chrono::milliseconds(100));
      sockets_->accept_again.async_wait([this](error_code cancelled) {
        if (!cancelled) Accept();
      });
      return;
    }
    const auto limit = static_cast<size_t>(connections_max_);
    const size_t present = sockets_->connections.size();
    if (present < limit + kRefusedMax) {
      error_code ignored;
      if (options_.unix_socket.empty()) socket.set_option(tcp::no_delay(true), ignored);
      socket.set_option(asio::socket_base::send_buffer_size(options_.limits.socket_send_bytes), ignored);
      const auto connection =
          MakeConnection(std::move(socket), sockets_->tls.get(), callbacks_, options_.limits, held_, sockets_->headers);
      sockets_->connections.emplace(connection.get(), connection);
      if (present < limit) {
        connection->Start();
      } else {
        connection->StartRefused(
            Unavailable("too_many_connections", "the server has " + std::to_string(limit) + " connections, its limit"));
      }
    }
    Accept();
  });
}

void HttpServer::OnSignal(std::function<void(int)> callback) {
  sockets_->on_signal = std::move(callback);
  sockets_->signals.add(SIGINT);
  sockets_->signals.add(SIGTERM);
  sockets_->WaitForSignal();
}

void HttpServer::OnTick(std::function<void(double)> callback) { on_tick_ = std::move(callback); }

void HttpServer::Tick() {
  sockets_->tick.expires_after(kTick);
  sockets_->tick.async_wait([this](error_code error) {
    if (error) return;
    const double now_s = MonotonicSeconds();
    for (const auto& [pointer, connection] : sockets_->connections) {
      connection->Tick(now_s);
      if (draining_) connection->Drain();
    }
    if (on_tick_) on_tick_(now_s);
    Tick();
  });
}

void HttpServer::Run() {
  Tick();
  sockets_->io.run();
  sockets_->helper.join();
}

void HttpServer::Stop() {
  error_code ignored;
  sockets_->acceptor.close(ignored);
  for (const auto& [pointer, connection] : sockets_->connections) connection->Close();
  sockets_->io.stop();
}

void HttpServer::Post(std::function<void()> work) { asio::post(sockets_->io, std::move(work)); }
void HttpServer::InBackground(std::function<void()> work) { asio::post(sockets_->helper, std::move(work)); }

void HttpServer::Drain() {
  draining_ = true;
  for (const auto& [pointer, connection] : sockets_->connections) connection->Drain();
}

size_t HttpServer::connections() const { return sockets_->connections.size(); }

}  // namespace jointkv::server
