// What HTTP's texts say: the path of a request's target, and the time.
//
// Threads: PathOf any; an HttpDate one. Owns: the text of the present second. Fails how: never.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace jointkv::server {

// Of "/path?query" or "http://host/path?query" (RFC 9112, 3.2): "/path". What is neither stays as it is.
std::string PathOf(std::string_view target);

// "Sun, 06 Nov 1994 08:49:37 GMT" (RFC 9110, 5.6.7), made once a second at most.
class HttpDate {
 public:
  const std::string& At(int64_t unix_s);
  const std::string& Now();

 private:
  int64_t made_s_ = -1;
  std::string text_;
};

}  // namespace jointkv::server
