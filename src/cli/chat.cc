#include <spdlog/fmt/fmt.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/clock.h"
#include "cli/chat_template_option.h"
#include "cli/commands.h"
#include "cli/engine_options.h"
#include "cli/help_groups.h"
#include "cli/sampling_options.h"
#include "cli/summary.h"
#include "cli/terminal.h"
#include "text/chat_template.h"

namespace jointkv::cli {
namespace {

using engine::Event;
using engine::FinishReason;

constexpr const char* kHelp =
    "/system TEXT  set the system message and start over; without TEXT: show it\n"
    "/reset        forget the conversation\n"
    "/stats        speed, tokens and memory so far\n"
    "/help         this list\n"
    "/exit, /quit  leave; Ctrl-D does too, Ctrl-C stops an answer\n"
    "//TEXT        send /TEXT; a line such as /etc/hosts, whose first word is no command's, is sent as it is\n";

struct ChatFlags {
  engine::EngineOptions engine;
  engine::SamplingParams sampling;
  std::string system;
  std::string chat_template;  // text; empty: the model file's
};

class Chat {
 public:
  explicit Chat(const ChatFlags& flags) : flags_(flags), system_(flags.system) {}
  int Run();

 private:
  void Reset();
  bool Command(const std::string& line);  // false: leave
  void RefuseCommand(const std::string& command);
  void Turn(const std::string& line);
  Expected<engine::Request> NextRequest();
  Status Answer(engine::Request request, std::string& answer);
  void PrintStats() const;

  const ChatFlags& flags_;
  std::string system_;
  std::unique_ptr<engine::Engine> engine_;
  std::unique_ptr<text::ChatTemplate> chat_template_;
  std::vector<text::ChatMessage> messages_;
  SummaryBuilder builder_;
  double busy_s_ = 0;
  bool terminal_ = false;
  bool failed_ = false;
};

// Whether a line is meant as a command, known or not: one whose first word is a slash and letters.
bool IsCommand(const std::string& line) {
  const size_t end = std::min(line.find_first_of(" \t"), line.size());
  return end > 1 && line.front() == '/' &&
         std::all_of(line.begin() + 1, line.begin() + static_cast<ptrdiff_t>(end),
                     [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); });
}

int Chat::Run() {
  if (const Status status = Validate(flags_.sampling, std::numeric_limits<int>::max(), flags_.engine.sampling_limits);
      !status.ok()) {
    Complain(status.message());
    return kExitUsage;
  }
  int exit_code = kExitOk;
  engine_ = LoadEngine(flags_.engine, exit_code);
  if (engine_ == nullptr) return exit_code;
  Expected<std::unique_ptr<text::ChatTemplate>> chat_template =
      text::ChatTemplate::CreateAsGiven(engine_->tokenizer(), flags_.chat_template);
  if (!chat_template.ok()) {
    Complain(chat_template.status().message());
    return kExitFailed;
  }
  chat_template_ = std::move(chat_template).value();
  if (!chat_template_->warning().empty()) Complain(chat_template_->warning());
  Reset();

  terminal_ = isatty(STDIN_FILENO) == 1;
  if (terminal_)
    fmt::print("{}, {} tokens of context. /help lists the commands.\n", engine_->file().path(), engine_->max_context());
  LineReader reader;
  std::string line;
  while (true) {
    ArmInterrupt();
    if (terminal_) fmt::print("\n> ");
    std::fflush(stdout);
    const LineReader::Result result = reader.Next(line);
    if (result == LineReader::Result::kEnd) break;
    if (result == LineReader::Result::kInterrupted) {
      if (!terminal_) return kExitInterrupted;
      fmt::print("\n(Ctrl-D or /exit leaves)");
      continue;
    }
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.find_first_not_of(" \t") == std::string::npos) continue;
    if (IsCommand(line)) {
      if (!Command(line)) break;
    } else {
      Turn(line.starts_with("//") ? line.substr(1) : line);
      if (Interrupted() && !terminal_) return kExitInterrupted;
    }
  }
  if (terminal_) fmt::print("\n");
  return failed_ ? kExitFailed : kExitOk;
}

void Chat::Reset() {
  messages_.clear();
  if (!system_.empty()) messages_.push_back({"system", system_});
}

bool Chat::Command(const std::string& line) {
  const size_t space = std::min(line.find_first_of(" \t"), line.size());
  const std::string command = line.substr(0, space);
  const std::string argument = line.substr(std::min(space + 1, line.size()));
  if (command == "/exit" || command == "/quit") return false;
  if (command == "/help") {
    fmt::print("{}", kHelp);
  } else if (command == "/reset") {
    Reset();
  } else if (command == "/stats") {
    PrintStats();
  } else if (command == "/system" && argument.empty()) {
    fmt::print("{}\n", system_.empty() ? "(none)" : system_);
  } else if (command == "/system") {
    system_ = argument;
    Reset();
  } else {
    RefuseCommand(command);
  }
  return true;
}

// From a pipe it is a failure: nobody reads the answer and types the line again.
void Chat::RefuseCommand(const std::string& command) {
  Complain(fmt::format("unknown command {0}: there are /system, /reset, /stats, /help, /exit and /quit; /{0} sends it",
                       command));
  failed_ = failed_ || !terminal_;
}

// A turn that fails leaves the conversation as it was.
void Chat::Turn(const std::string& line) {
  const std::vector<text::ChatMessage> before = messages_;
  messages_.push_back({"user", line});
  std::string answer;
  Expected<engine::Request> request = NextRequest();
  const Status status = request.ok() ? Answer(std::move(request).value(), answer) : request.status();
  if (!status.ok()) {
    Complain(status.message());
    failed_ = true;
    messages_ = before;
    return;
  }
  messages_.push_back({"assistant", answer});
}

// Renders the conversation, without its oldest turns where it has outgrown the context.
Expected<engine::Request> Chat::NextRequest() {
  const int room = std::min(flags_.sampling.max_tokens, engine_->max_context() / 4);
  while (true) {
    ASSIGN_OR_RETURN(const text::ChatPrompt rendered, chat_template_->Render(messages_));
    engine::Request request;
    ASSIGN_OR_RETURN(request.prompt, chat_template_->EncodePrompt(rendered));
    request.sampling = flags_.sampling;
    request.sampling.stop.insert(request.sampling.stop.end(), rendered.stops.begin(), rendered.stops.end());
    const size_t oldest = system_.empty() ? 0 : 1;
    const bool fits = static_cast<int>(request.prompt.size()) + room <= engine_->max_context();
    if (fits || messages_.size() < oldest + 3) return request;
    Complain("the oldest turn no longer fits the context and is forgotten");
    messages_.erase(messages_.begin() + static_cast<ptrdiff_t>(oldest),
                    messages_.begin() + static_cast<ptrdiff_t>(oldest + 2));
  }
}

Status Chat::Answer(engine::Request request, std::string& answer) {
  const double start_s = MonotonicSeconds();
  ASSIGN_OR_RETURN(const engine::RequestId id, engine_->Submit(std::move(request)));
  std::vector<Event> events;
  Status failed;
  while (!engine_->idle()) {
    if (Interrupted()) engine_->Cancel(id);
    events.clear();
    engine_->Step(events);
    for (const Event& event : events) {
      answer += event.text;
      std::fwrite(event.text.data(), 1, event.text.size(), stdout);
      if (event.finish != FinishReason::kNone) builder_.Add(event);
      if (event.finish == FinishReason::kError) failed = event.error;
    }
    std::fflush(stdout);
  }
  busy_s_ += MonotonicSeconds() - start_s;
  fmt::print("{}\n", Interrupted() ? " (stopped)" : "");
  std::fflush(stdout);
  return failed;
}

void Chat::PrintStats() const {
  const kv::KvStats kv = engine_->kv_stats();
  fmt::print("{}", ToTable(builder_.Build(engine_->stats(), busy_s_)));
  fmt::print("{:<22}{} of {}\n", "KV memory, now", FormatBytes(kv.held_bytes), FormatBytes(kv.capacity_bytes));
}

}  // namespace

void AddChat(CLI::App& app, Command& run) {
  const auto flags = std::make_shared<ChatFlags>();
  flags->sampling.temperature = 0.7F;
  flags->sampling.top_p = 0.95F;
  flags->sampling.max_tokens = 1024;
  CLI::App* command = app.add_subcommand("chat", "a conversation on the terminal, or a turn a line from a pipe");
  command->footer(std::string("Lines that are commands:\n") + kHelp);
  SetGroup(*command, "Conversation");
  command->add_option("--system", flags->system, "system message")->type_name("TEXT");
  SetGroup(*command, "Sampling");
  AddSamplingFlags(*command, flags->sampling, false);
  SetGroup(*command, "Engine");
  AddChatTemplateFlag(*command, flags->chat_template);
  AddEngineFlags(*command, flags->engine);
  PutHelpLast(*command);
  command->callback([&run, flags] { run = [flags] { return Chat(*flags).Run(); }; });
}

}  // namespace jointkv::cli
