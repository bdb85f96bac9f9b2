// A server of a few lines for tests: it reads requests and answers with whatever bytes the test wants.
#pragma once

#include <sys/socket.h>

#include <boost/asio/buffer.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/read_until.hpp>
#include <boost/asio/write.hpp>

#include <algorithm>
#include <atomic>
#include <functional>
#include <list>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

namespace jointkv::cli {

// Threads: one per connection, which call `answer` at the same time. Owns: them. Fails how: a connection that breaks
// ends.
class TestServer {
 public:
  struct Request {
    std::string head;  // up to the empty line
    std::string body;
    int connection = 0;
    int number = 0;  // on its connection
  };
  // Sends bytes; false once the client is gone.
  using Send = std::function<bool(std::string_view bytes)>;
  // Returns whether to keep the connection.
  using Answer = std::function<bool(const Request& request, const Send& send)>;

  explicit TestServer(Answer answer) : answer_(std::move(answer)) {
    acceptor_.listen();
    accepting_ = std::thread([this] { Accept(); });
  }

  ~TestServer() {
    stopping_ = true;
    ::shutdown(acceptor_.native_handle(), SHUT_RDWR);
    accepting_.join();
    for (Connection& connection : connections_) ::shutdown(connection.socket.native_handle(), SHUT_RDWR);
    for (Connection& connection : connections_) connection.thread.join();
  }

  TestServer(const TestServer&) = delete;
  TestServer& operator=(const TestServer&) = delete;

  std::string url() const { return "http://127.0.0.1:" + std::to_string(acceptor_.local_endpoint().port()); }
  int requests() const { return requests_; }
  int connections() const { return accepted_; }
  int most_at_once() const { return most_at_once_; }

 private:
  using Tcp = boost::asio::ip::tcp;
  struct Connection {
    Tcp::socket socket;
    std::thread thread;
  };

  void Accept() {
    while (!stopping_) {
      boost::system::error_code error;
      Tcp::socket socket(io_);
      acceptor_.accept(socket, error);
      if (error) return;
      connections_.push_back({std::move(socket), {}});
      Connection& connection = connections_.back();
      connection.thread = std::thread([this, &connection, number = accepted_++] { Serve(connection.socket, number); });
    }
  }

  static size_t ContentLength(const std::string& head) {
    const size_t at = head.find("Content-Length: ");
    return at == std::string::npos ? 0 : std::stoul(head.substr(at + 16));
  }

  void Serve(Tcp::socket& socket, int connection) {
    boost::system::error_code error;
    std::string ahead;
    bool keep = true;
    for (int number = 0; keep; ++number) {
      const size_t head = boost::asio::read_until(socket, boost::asio::dynamic_buffer(ahead), "\r\n\r\n", error);
      if (error) break;
      Request request = {ahead.substr(0, head), "", connection, number};
      ahead.erase(0, head);
      const size_t length = ContentLength(request.head);
      if (ahead.size() < length) {
        boost::asio::read(socket, boost::asio::dynamic_buffer(ahead),
                          boost::asio::transfer_exactly(length - ahead.size()), error);
      }
      if (error) break;
      request.body = ahead.substr(0, length);
      ahead.erase(0, length);
      ++requests_;
      Count(1);
      keep = answer_(request, [&](std::string_view bytes) {
        boost::asio::write(socket, boost::asio::buffer(bytes), error);
        return !error;
      });
      Count(-1);
    }
    socket.shutdown(Tcp::socket::shutdown_both, error);
  }

  void Count(int change) {
    const std::lock_guard lock(mutex_);
    at_once_ += change;
    most_at_once_ = std::max<int>(most_at_once_, at_once_);
  }

  Answer answer_;
  boost::asio::io_context io_;
  Tcp::acceptor acceptor_{io_, Tcp::endpoint(boost::asio::ip::address_v4::loopback(), 0)};
  std::atomic<bool> stopping_ = false;
  std::atomic<int> requests_ = 0;
  std::atomic<int> accepted_ = 0;
  std::mutex mutex_;
  int at_once_ = 0;
  std::atomic<int> most_at_once_ = 0;
  std::list<Connection> connections_;
  std::thread accepting_;
};

inline std::string Chunk(std::string_view bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string size;
  for (size_t left = bytes.size(); left > 0; left /= 16) size.insert(size.begin(), kDigits[left % 16]);
  return size + "\r\n" + std::string(bytes) + "\r\n";
}

inline constexpr std::string_view kEventStreamHead =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
inline constexpr std::string_view kLastChunk = "0\r\n\r\n";

inline std::string JsonAnswer(int status, std::string_view body) {
  return "HTTP/1.1 " + std::to_string(status) +
         " Any\r\nContent-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" +
         std::string(body);
}

}  // namespace jointkv::cli
