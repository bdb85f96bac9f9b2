#include "cli/lines.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string_view>
#include <vector>

namespace jointkv::cli {
namespace {

struct CloseFile {
  void operator()(std::FILE* file) const { std::fclose(file); }
};

}  // namespace

Status ReadLines(const std::string& path, size_t line_bytes_max,
                 const std::function<bool(int number, const std::string& line)>& take) {
  const std::unique_ptr<std::FILE, CloseFile> opened(path == "-" ? nullptr : std::fopen(path.c_str(), "rb"));
  std::FILE* file = path == "-" ? stdin : opened.get();
  if (file == nullptr) {
    return {errno == ENOENT ? StatusCode::kNotFound : StatusCode::kIo, "'" + path + "': " + std::strerror(errno)};
  }
  std::string line;
  int number = 1;
  const auto finish_line = [&] {
    const bool more = line.find_first_not_of(" \t\r") == std::string::npos || take(number, line);
    line.clear();
    ++number;
    return more;
  };
  std::vector<char> buffer(1 << 16);
  size_t got = 0;
  while ((got = std::fread(buffer.data(), 1, buffer.size(), file)) > 0) {
    for (std::string_view rest(buffer.data(), got); !rest.empty();) {
      const size_t end = rest.find('\n');
      const std::string_view piece = rest.substr(0, end);
      if (line.size() <= line_bytes_max) line += piece.substr(0, line_bytes_max + 1 - line.size());
      if (end == std::string_view::npos) break;
      if (!finish_line()) return Status::Ok();
      rest.remove_prefix(end + 1);
    }
  }
  if (std::ferror(file) != 0) return {StatusCode::kIo, "'" + path + "': " + std::strerror(errno)};
  finish_line();
  return Status::Ok();
}

}  // namespace jointkv::cli
