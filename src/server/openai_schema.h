// Bodies of OpenAI's API, and of vLLM's additions to it, as values. Unknown fields are ignored.
//
// Threads: free functions, any number of threads. Owns: nothing. Fails how: an ApiError is thrown that names the field.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/ids.h"
#include "engine/sampling.h"
#include "server/json_fields.h"
#include "server/limits.h"
#include "text/chat_template.h"

namespace jointkv::server {

using TextOrTokens = std::variant<std::string, std::vector<TokenId>>;

// A body of /v1/chat/completions, /v1/completions or /v1/embeddings.
struct GenerationCall {
  bool chat = false;
  std::string model;                        // empty: not named
  std::vector<text::ChatMessage> messages;  // chat
  std::vector<text::Tool> tools;            // chat
  text::ToolChoice tool_choice = text::ToolChoice::kAuto;
  std::string tool_name;  // the only one that may be called, and must be
  bool parallel_tool_calls = true;
  bool enable_thinking = true;        // "chat_template_kwargs": {"enable_thinking": ..}
  std::vector<TextOrTokens> prompts;  // completions; one or more
  engine::SamplingParams sampling;
  std::string
      max_tokens_field;  // as the client named it; empty: sampling.max_tokens is a default, cut to what is allowed
  bool stream = false;
  bool include_usage = false;
  bool usage_in_chunks = false;  // vLLM's continuous_usage_stats
  bool echo = false;             // completions: the text begins with the prompt
  bool kv_fusion = true;         // "kv_fusion": "on" or "off"
  bool reports_kv = false;       // "kv": true
  bool embed = false;            // embeddings: `prompts` as vectors
  bool base64 = false;
  std::optional<int> dimensions;
  std::string json_schema;  // of the output; empty: any text
  std::string schema_field;

  text::ChatOptions chat_options() const;
  // Preparing it compiles a grammar, which may take a while.
  bool has_grammar() const { return !json_schema.empty() || !tools.empty(); }
};

// `text` is the body's own, for the order of keys in schemas; without it they are in alphabetical order.
GenerationCall ParseChat(const Json& body, const Limits& limits, std::string_view text = {});
GenerationCall ParseCompletion(const Json& body, const Limits& limits, std::string_view text = {});

GenerationCall ParseEmbedding(const Json& body, const Limits& limits);

// The fields of a chat that its prompt is made of, alone.
GenerationCall ParseConversation(const Json& body, const Limits& limits, std::string_view text = {});
// The field `messages` of an object.
std::vector<text::ChatMessage> Messages(const Json& body, const Limits& limits);

}  // namespace jointkv::server
