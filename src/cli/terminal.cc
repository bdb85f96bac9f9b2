#include "cli/terminal.h"

#include <signal.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <memory>
#include <string_view>

#include "base/clock.h"

namespace jointkv::cli {
namespace {

volatile std::sig_atomic_t interrupted = 0;
bool line_shown = false;

void OnInterrupt(int) { interrupted = 1; }

void ClearLine() {
  if (line_shown) std::fputs("\r\033[K", stderr);
  line_shown = false;
}

}  // namespace

void Complain(const std::string& message) {
  static const auto logger = [] {
    auto created = std::make_shared<spdlog::logger>("jointkv", std::make_shared<spdlog::sinks::stderr_sink_st>());
    created->set_pattern("%n: %v");
    return created;
  }();
  ClearLine();
  logger->error(message);
  logger->flush();
}

void ArmInterrupt() {
  interrupted = 0;
  struct sigaction action = {};
  action.sa_handler = OnInterrupt;
  action.sa_flags = static_cast<int>(SA_RESETHAND);  // and no SA_RESTART: a read at the prompt returns
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, nullptr);
}

bool Interrupted() { return interrupted != 0; }

LineReader::Result LineReader::Next(std::string& line) {
  std::array<char, 4096> buffer;
  while (true) {
    const size_t end = ahead_.find('\n');
    if (end != std::string::npos || (ended_ && !ahead_.empty())) {
      line = ahead_.substr(0, std::min(end, kLineBytesMax));
      ahead_.erase(0, end == std::string::npos ? end : end + 1);
      return Result::kLine;
    }
    if (ended_) return Result::kEnd;
    const ssize_t got = read(STDIN_FILENO, buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) {
      if (Interrupted()) return Result::kInterrupted;
      continue;
    }
    ended_ = got <= 0;
    // What is past the limit of one line is dropped, up to its end.
    const std::string_view piece(buffer.data(), static_cast<size_t>(std::max<ssize_t>(got, 0)));
    const bool too_long = ahead_.size() > kLineBytesMax;
    ahead_ += too_long ? piece.substr(std::min(piece.find('\n'), piece.size())) : piece;
  }
}

ProgressLine::ProgressLine() : terminal_(isatty(STDERR_FILENO) == 1) {}
ProgressLine::~ProgressLine() { ClearLine(); }

bool ProgressLine::due() const { return terminal_ && MonotonicSeconds() - shown_s_ >= 0.1; }

void ProgressLine::Show(const std::string& text) {
  if (!due()) return;
  shown_s_ = MonotonicSeconds();
  std::fprintf(stderr, "\r%s\033[K", text.c_str());
  line_shown = true;
}

}  // namespace jointkv::cli
