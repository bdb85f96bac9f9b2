#include "text/template_guard.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <new>
#include <string>
#include <thread>
#include <vector>

namespace jointkv::text {
namespace {

constexpr size_t kTemplateBytesMax = size_t{256} << 10;  // the longest published templates have about 30 KB
constexpr size_t kTagBytesMax = 16384;                   // one {{ }} or {% %}: the parser recurses inside it
constexpr size_t kNestingMax = 100;
constexpr auto kChildTimeMax = std::chrono::seconds(5);
constexpr rlim_t kChildMemoryBytes = rlim_t{1} << 30;  // beyond what this process has mapped

Status TooBig(std::string_view what, size_t value, size_t limit) {
  return {StatusCode::kOutOfRange,
          "chat template: " + std::string(what) + " is " + std::to_string(value) + ", limit " + std::to_string(limit)};
}

// Counts how deep the parser recurses into statements: blocks that are open, and the elifs of each.
class StatementNesting {
 public:
  void Add(std::string_view tag) {
    const size_t begin = tag.find_first_not_of(" \t\r\n-+");
    if (begin == std::string_view::npos) return;
    const std::string_view word = tag.substr(begin, tag.find_first_of(" \t\r\n-+(", begin) - begin);
    const bool set_block = word == "set" && tag.find('=') == std::string_view::npos;
    if (word == "if" || word == "for" || word == "macro" || word == "call" || word == "filter" || set_block) {
      open_.push_back(1);
      ++depth_;
    } else if (word == "elif" && !open_.empty()) {
      ++open_.back();
      ++depth_;
    } else if (word.starts_with("end") && !open_.empty()) {
      depth_ -= open_.back();
      open_.pop_back();
    }
  }
  size_t depth() const { return depth_; }

 private:
  std::vector<size_t> open_;  // levels of each open block
  size_t depth_ = 0;
};

// Deepest nesting of brackets outside of quotes.
size_t BracketDepth(std::string_view text, bool single_quotes) {
  size_t depth = 0;
  size_t deepest = 0;
  char quote = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quote != 0) {
      if (c == '\\') ++i;
      if (c == quote) quote = 0;
    } else if (c == '"' || (single_quotes && c == '\'')) {
      quote = c;
    } else if (c == '(' || c == '[' || c == '{') {
      deepest = ++depth > deepest ? depth : deepest;
    } else if (c == ')' || c == ']' || c == '}') {
      if (depth > 0) --depth;
    }
  }
  return deepest;
}

// The end of a tag that starts at `begin`: past its closing mark, quotes respected.
size_t TagEnd(std::string_view source, size_t begin, std::string_view close) {
  char quote = 0;
  for (size_t i = begin; i < source.size(); ++i) {
    const char c = source[i];
    if (quote != 0) {
      if (c == '\\') ++i;
      if (c == quote) quote = 0;
    } else if (c == '"' || c == '\'') {
      quote = c;
    } else if (source.substr(i).starts_with(close)) {
      return i + close.size();
    }
  }
  return source.size();
}

rlim_t MappedBytes() {
  unsigned long pages = 0;
  if (std::FILE* file = std::fopen("/proc/self/statm", "re")) {
    if (std::fscanf(file, "%lu", &pages) != 1) pages = 0;
    std::fclose(file);
  }
  return static_cast<rlim_t>(pages) * static_cast<rlim_t>(sysconf(_SC_PAGESIZE));
}

[[noreturn]] void RunChild(const std::function<void()>& work, rlim_t memory_bytes) {
  const rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  const rlimit cpu{static_cast<rlim_t>(kChildTimeMax.count()), static_cast<rlim_t>(kChildTimeMax.count())};
  setrlimit(RLIMIT_CPU, &cpu);
  if (kLimitsChildMemory) {
    const rlimit memory{memory_bytes, memory_bytes};
    setrlimit(RLIMIT_AS, &memory);
  }
  for (const int number : {SIGSEGV, SIGABRT, SIGBUS, SIGXCPU, SIGTERM}) std::signal(number, SIG_DFL);
  const int null = open("/dev/null", O_RDWR);
  if (null >= 0) {
    dup2(null, STDOUT_FILENO);
    dup2(null, STDERR_FILENO);
  }
  try {
    work();
  } catch (const std::bad_alloc&) {
    _exit(2);
  } catch (...) {
    _exit(0);
  }
  _exit(0);
}

}  // namespace

Status CheckTemplateShape(std::string_view source) {
  if (source.size() > kTemplateBytesMax) return TooBig("its size in bytes", source.size(), kTemplateBytesMax);
  StatementNesting nesting;
  for (size_t at = source.find('{'); at != std::string_view::npos && at + 1 < source.size();
       at = source.find('{', at)) {
    const char kind = source[at + 1];
    if (kind == '#') {
      const size_t end = source.find("#}", at + 2);
      if (end == std::string_view::npos) break;
      at = end + 2;
      continue;
    }
    if (kind != '{' && kind != '%') {
      ++at;
      continue;
    }
    const size_t end = TagEnd(source, at + 2, kind == '{' ? "}}" : "%}");
    const std::string_view tag = source.substr(at + 2, end - at - 2);
    if (tag.size() > kTagBytesMax) return TooBig("the length of a tag in bytes", tag.size(), kTagBytesMax);
    if (const size_t depth = BracketDepth(tag, true); depth > kNestingMax) {
      return TooBig("the nesting of brackets", depth, kNestingMax);
    }
    if (kind == '%') nesting.Add(tag);
    if (nesting.depth() > kNestingMax) return TooBig("the nesting of statements", nesting.depth(), kNestingMax);
    at = end;
  }
  return Status::Ok();
}

Status CheckJsonDepth(std::string_view json, std::string_view what, size_t limit) {
  const size_t depth = BracketDepth(json, false);
  if (depth <= limit) return Status::Ok();
  return {StatusCode::kOutOfRange,
          std::string(what) + " is nested " + std::to_string(depth) + " deep, limit " + std::to_string(limit)};
}

Status TryInChild(const std::function<void()>& work) {
  const rlim_t memory_bytes = MappedBytes() + kChildMemoryBytes;
  const pid_t child = fork();
  if (child < 0) return Status::Ok();
  if (child == 0) RunChild(work, memory_bytes);

  const auto deadline = std::chrono::steady_clock::now() + kChildTimeMax;
  int state = 0;
  while (true) {
    const pid_t done = waitpid(child, &state, WNOHANG);
    if (done == child) break;
    if (done < 0 && errno != EINTR) return Status::Ok();  // someone else ignores or collects children
    if (std::chrono::steady_clock::now() > deadline) {
      kill(child, SIGKILL);
      waitpid(child, &state, 0);
      return {StatusCode::kOutOfRange,
              "chat template: a simple conversation took more than " + std::to_string(kChildTimeMax.count()) + " s"};
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  if (WIFSIGNALED(state)) {
    return {StatusCode::kOutOfRange,
            "chat template: a simple conversation ended its interpreter by signal " + std::to_string(WTERMSIG(state))};
  }
  if (WEXITSTATUS(state) != 0) {
    return {StatusCode::kOutOfRange, "chat template: a simple conversation ran out of memory"};
  }
  return Status::Ok();
}

}  // namespace jointkv::text
