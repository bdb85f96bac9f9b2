#include "cli/terminal.h"

#include <poll.h>
#include <signal.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string_view>

#include "base/clock.h"

namespace jointkv::cli {
namespace {

volatile std::sig_atomic_t interrupted = 0;
int interrupt_event = -1;  // readable after a Ctrl-C, whichever thread took the signal
bool line_shown = false;

void OnInterrupt(int) {
  const int saved = errno;
  interrupted = 1;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(interrupt_event, &one, sizeof(one));
  errno = saved;
}

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
  if (interrupt_event < 0) interrupt_event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  uint64_t count = 0;
  while (read(interrupt_event, &count, sizeof(count)) > 0) {
  }
  interrupted = 0;
  struct sigaction action = {};
  action.sa_handler = OnInterrupt;
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
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
    std::array<pollfd, 2> waited = {{{STDIN_FILENO, POLLIN, 0}, {interrupt_event, POLLIN, 0}}};
    if (poll(waited.data(), waited.size(), -1) < 0 && errno != EINTR) return Result::kEnd;
    if (Interrupted()) return Result::kInterrupted;
    if (waited[0].revents == 0) continue;
    const ssize_t got = read(STDIN_FILENO, buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
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
