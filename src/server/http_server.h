// Listens, keeps the connections, and runs the I/O thread's loop.
//
// HttpServer. Threads: Run's is the I/O thread; Post and InBackground may be called from any. Owns: the listening
// socket, the connections, one helper thread. Fails how: Listen returns a Status; whatever a client does ends at most
// its own connection.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "base/status.h"
#include "server/connection.h"
#include "server/held_bytes.h"
#include "server/limits.h"
#include "server/options.h"

namespace jointkv::server {

class HttpServer {
 public:
  HttpServer(const ServerOptions& options, std::string server_name,
             std::function<void(HttpRequest, std::shared_ptr<ReplyChannel>)> on_request,
             std::function<void(const HttpRequest&, const ApiError&, std::shared_ptr<ReplyChannel>)> on_refused);
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  Status Listen();
  // --max-connections, or less where the system allows the process fewer files. After Listen.
  int connections_max() const { return connections_max_; }
  // Where: "http://127.0.0.1:8080", "https://...", "unix:/path". After Listen.
  const std::string& address() const { return address_; }

  void OnSignal(std::function<void(int signal)> callback);  // SIGINT and SIGTERM
  void OnTick(std::function<void(double now_s)> callback);  // several times a second

  // Nothing that another server could trip over stays behind. The destructor does it too.
  void RemoveSocketFile();

  void Run();   // until Stop
  void Stop();  // on the I/O thread
  void Post(std::function<void()> work);
  void InBackground(std::function<void()> work);

  // Closes connections as soon as their present request is answered. New ones are still taken, for one request.
  void Drain();
  size_t connections() const;

 private:
  struct Sockets;

  Status ListenUnix();
  Status ListenTcp();
  Status LoadCertificate();
  void Accept();
  void Tick();

  const ServerOptions& options_;
  std::string address_;
  bool bound_unix_socket_ = false;
  Connection::Callbacks callbacks_;
  std::function<void(double)> on_tick_;
  bool draining_ = false;
  int connections_max_ = 0;
  HeldBytes held_;
  std::unique_ptr<Sockets> sockets_;
};

}  // namespace jointkv::server
