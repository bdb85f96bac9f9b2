// Conversations to prompts, by the Jinja template in the model file.
//
// ChatTemplate. Threads: const calls from any number of threads. Owns: the parsed template; the Tokenizer must outlive
// it. Fails how: a template that does not parse, or fails on a simple conversation, is replaced by ChatML and says so
// in warning(); Render returns a Status when the template rejects the messages. Invalid UTF-8 becomes U+FFFD.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "text/tokenizer.h"

namespace jointkv::text {

struct ToolCall {
  std::string id;
  std::string name;
  std::string arguments_json;
};

struct ChatMessage {
  std::string role;  // system, user, assistant, tool, or what the template knows
  std::string content;
  std::string name = {};
  std::string tool_call_id = {};
  std::vector<ToolCall> tool_calls = {};
};

struct Tool {
  std::string name;
  std::string description;
  std::string parameters_json;  // a JSON schema; empty: no parameters
};

struct ChatOptions {
  bool add_generation_prompt = true;
  bool enable_thinking = true;
  bool parallel_tool_calls = false;
};

struct ChatPrompt {
  std::string text;
  bool has_bos = false;            // text begins with the beginning-of-sequence token: Encode must not add another
  std::vector<std::string> stops;  // further stop strings that this template implies
};

class ChatTemplate {
 public:
  // An empty override_template means the one in the model file.
  static Expected<std::unique_ptr<ChatTemplate>> Create(const Tokenizer& tokenizer,
                                                        const std::string& override_template = "");
  ~ChatTemplate();
  ChatTemplate(const ChatTemplate&) = delete;
  ChatTemplate& operator=(const ChatTemplate&) = delete;

  Expected<ChatPrompt> Render(std::span<const ChatMessage> messages, std::span<const Tool> tools = {},
                              const ChatOptions& options = {}) const;

  // Render and Encode with exactly one beginning-of-sequence token where the model wants one.
  Expected<std::vector<TokenId>> EncodeChat(std::span<const ChatMessage> messages, std::span<const Tool> tools = {},
                                            const ChatOptions& options = {}) const;
  Expected<std::vector<TokenId>> EncodePrompt(const ChatPrompt& prompt) const;

  const std::string& source() const { return source_; }
  bool is_fallback() const { return is_fallback_; }
  // Why the fallback is in use; empty otherwise.
  const std::string& warning() const { return warning_; }

 private:
  struct Parsed;  // the library's objects

  ChatTemplate(const Tokenizer& tokenizer, std::unique_ptr<Parsed> parsed);

  const Tokenizer* tokenizer_;
  std::unique_ptr<Parsed> parsed_;
  std::string source_;
  std::string warning_;
  bool is_fallback_ = false;
};

}  // namespace jointkv::text
