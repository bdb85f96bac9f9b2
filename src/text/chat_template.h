// Conversations to prompts, by the Jinja template in the model file.
//
// ChatTemplate. Threads: const calls from any number of threads. Owns: the parsed template; the Tokenizer must outlive
// it. Fails how: a template that does not parse, or fails on a simple conversation, is replaced by ChatML and says so
// in warning(); Render returns a Status when the template rejects the messages. Invalid UTF-8 becomes U+FFFD.
//
// What a client wrote (contents, names, arguments, tools) never becomes markup: "<|im_end|>" in it stays these ten
// characters. EncodeChat and EncodePrompt see to it; ChatPrompt::text alone does not say it.
//
// How a model writes tool calls and thoughts, llama.cpp's `common` reads from its template; Render hands out a grammar
// that holds the model to it, and what ChatOutputParser (chat_output.h) needs to read it back.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "text/grammar.h"
#include "text/tokenizer.h"

struct common_chat_params;
struct common_chat_templates_inputs;

namespace jointkv::text {

struct ToolCall {
  std::string id;
  std::string name;
  std::string arguments_json;  // may be cut off, as an output may be
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

enum class ToolChoice {
  kAuto,      // text, calls or both, as the model likes
  kNone,      // the model sees the tools, its output is text
  kRequired,  // at least one call
};

struct ChatOptions {
  bool add_generation_prompt = true;
  bool enable_thinking = true;  // where the template has a switch for it
  bool parallel_tool_calls = false;
  ToolChoice tool_choice = ToolChoice::kAuto;
  std::string tool_name = {};    // only this one may be called, and must be; it is the only one that the model sees
  std::string json_schema = {};  // the answer (after thoughts, where the template has them) is JSON of this schema
};

struct ChatFormat;  // how to read the output; private to this room

struct ChatPrompt {
  std::string text;
  bool has_bos = false;  // text begins with the beginning-of-sequence token: Encode must not add another
  // Where a client's text spells markup that must not become a token: Encode must not look across. Bytes, ascending.
  std::vector<size_t> breaks;
  std::vector<std::string> stops;       // further stop strings that this template implies
  GrammarSpec grammar;                  // for Grammar::Compile, unless empty()
  std::vector<TokenId> visible_tokens;  // for engine::Request: markup that the parser has to see
  // For ChatOutputParser; none: all output is content.
  std::shared_ptr<const ChatFormat> format;
};

class ChatTemplate {
 public:
  // An empty override_template means the one in the model file.
  static Expected<std::unique_ptr<ChatTemplate>> Create(const Tokenizer& tokenizer,
                                                        const std::string& override_template = "");
  // As Create, but an override_template that fails is a Status: whoever names one does not want another.
  static Expected<std::unique_ptr<ChatTemplate>> CreateAsGiven(const Tokenizer& tokenizer,
                                                               const std::string& override_template);
  ~ChatTemplate();
  ChatTemplate(const ChatTemplate&) = delete;
  ChatTemplate& operator=(const ChatTemplate&) = delete;

  Expected<ChatPrompt> Render(std::span<const ChatMessage> messages, std::span<const Tool> tools = {},
                              const ChatOptions& options = {}) const;

  // False: it leaves tools out, so that the model cannot know of them.
  bool shows_tools() const { return shows_tools_; }

  // Render and Encode with exactly one beginning-of-sequence token where the model wants one.
  Expected<std::vector<TokenId>> EncodeChat(std::span<const ChatMessage> messages, std::span<const Tool> tools = {},
                                            const ChatOptions& options = {}) const;
  Expected<std::vector<TokenId>> EncodePrompt(const ChatPrompt& prompt) const;

  // The template separates thoughts from the answer; its output comes with a format.
  bool thinks() const { return thinks_; }
  const std::string& source() const { return source_; }
  bool is_fallback() const { return is_fallback_; }
  // Why the fallback is in use; empty otherwise.
  const std::string& warning() const { return warning_; }

 private:
  struct Parsed;  // the library's objects

  ChatTemplate(const Tokenizer& tokenizer, std::unique_ptr<Parsed> parsed);
  // Without a fallback.
  static Expected<std::unique_ptr<ChatTemplate>> FromSource(const Tokenizer& tokenizer,
                                                            const std::string& override_template);
  Expected<std::vector<TokenId>> EncodeRest(std::string_view text) const;
  Status AddFormat(const common_chat_params& params, const common_chat_templates_inputs& inputs, ChatPrompt& out) const;
  std::vector<TokenId> TokensOf(const std::vector<std::string>& marks) const;

  const Tokenizer* tokenizer_;
  std::unique_ptr<Parsed> parsed_;
  std::string source_;
  std::string warning_;
  bool is_fallback_ = false;
  bool thinks_ = false;
  bool shows_tools_ = false;
  bool begins_with_space_ = false;  // the tokenizer puts a space before a text
};

}  // namespace jointkv::text
