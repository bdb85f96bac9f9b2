// A model's output as content, thoughts and tool calls, whole or as it comes.
//
// ChatOutputParser. Threads: one at a time. Owns: the output so far. Fails how: never: what does not parse stays
// content, as it is. Deltas joined are the message, but for text that the format gives another meaning after the fact.
//
// The library parses from the beginning each time. So that a long output does not cost time quadratic in its length,
// what arrives is parsed once it is a 32nd of what is there: deltas of a long text come in larger pieces.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text/chat_template.h"

namespace jointkv::text {

struct ToolCallDelta {
  int index = 0;
  std::string id;    // with the first delta of a call
  std::string name;  // likewise, whole
  std::string arguments;
};

struct ChatDelta {
  std::string reasoning;
  std::string content;
  std::vector<ToolCallDelta> tool_calls;

  bool empty() const { return reasoning.empty() && content.empty() && tool_calls.empty(); }
};

class ChatOutputParser {
 public:
  // None: all output is content.
  explicit ChatOutputParser(std::shared_ptr<const ChatFormat> format = nullptr);

  // The next piece of the output, in whole UTF-8 characters; returns what it adds.
  ChatDelta Append(std::string_view text);
  // The output has ended: what was held back.
  ChatDelta Finish();

  // All that deltas have said.
  const std::string& reasoning() const { return reasoning_; }
  const std::string& content() const { return content_; }
  const std::vector<ToolCall>& tool_calls() const { return calls_; }

 private:
  struct Message;

  void CountNesting(std::string_view text);
  ChatDelta Parse(bool partial);
  ChatDelta Advance(const Message& message);
  ChatDelta TakeRest();

  std::shared_ptr<const ChatFormat> format_;
  std::string text_;
  size_t parsed_bytes_ = 0;
  int nesting_ = 0;
  bool gave_up_ = false;
  std::string reasoning_;
  std::string content_;
  std::vector<ToolCall> calls_;
};

// For one output that is complete.
struct ChatOutput {
  std::string reasoning;
  std::string content;
  std::vector<ToolCall> tool_calls;
};
ChatOutput ParseChatOutput(std::shared_ptr<const ChatFormat> format, std::string_view text);

}  // namespace jointkv::text
