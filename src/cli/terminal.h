// The terminal: messages on stderr, the Ctrl-C flag, and one line of progress.
//
// Threads: the main thread; the signal handler only sets a flag. Owns: the SIGINT action while armed. Fails how: never.
#pragma once

#include <string>

namespace jointkv::cli {

inline constexpr int kExitOk = 0;
inline constexpr int kExitFailed = 1;  // some request failed
inline constexpr int kExitUsage = 2;
inline constexpr int kExitInterrupted = 130;

// "jointkv: message" on stderr, above the line of progress.
void Complain(const std::string& message);

// From now on the next Ctrl-C makes Interrupted() true; the one after it ends the process. Arm again to start over.
void ArmInterrupt();
bool Interrupted();

// Lines of standard input, read so that Ctrl-C (armed) returns to the caller. Threads: one. Owns: what was read ahead.
// Fails how: a line beyond kLineBytesMax is cut there.
class LineReader {
 public:
  static constexpr size_t kLineBytesMax = size_t{1} << 20;
  enum class Result { kLine, kInterrupted, kEnd };

  Result Next(std::string& line);

 private:
  std::string ahead_;
  bool ended_ = false;
};

// Rewrites one line on stderr, at most ten times a second; shows nothing when stderr is not a terminal.
class ProgressLine {
 public:
  ProgressLine();
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  // Whether Show would show something now: saves composing the text.
  bool due() const;
  void Show(const std::string& text);

 private:
  bool terminal_;
  double shown_s_ = 0;
};

}  // namespace jointkv::cli
