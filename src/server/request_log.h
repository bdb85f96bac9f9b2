// One line for each request that was answered, without what it said.
//
// RequestLog. Threads: any. Owns: the logger of the program's standard error. Fails how: never.
#pragma once

#include <memory>
#include <string>

namespace spdlog {
class logger;
}

namespace jointkv::server {

enum class LogFormat { kText, kJson };

struct RequestLine {
  bool quiet = false;  // logged only where it fails
  std::string id;
  std::string tenant;  // empty: not known
  std::string method;
  std::string path;
  int status = 0;  // 499: the client left first
  double duration_s = 0;
  // Generations:
  bool generates = false;
  int prompt_tokens = 0;
  int cached_tokens = 0;
  int output_tokens = 0;
  double ttft_s = 0;  // 0: no token
  std::string finish;
};

class RequestLog {
 public:
  explicit RequestLog(LogFormat format);

  void Write(const RequestLine& line);
  void Info(const std::string& message);

 private:
  LogFormat format_;
  std::shared_ptr<spdlog::logger> logger_;
};

}  // namespace jointkv::server
