// Bodies of OpenAI's API, and of vLLM's additions to it, as values. Unknown fields are ignored.
//
// Threads: free functions, any number of threads. Owns: nothing. Fails how: an ApiError is thrown that names the field.
#pragma once

#include <string>
#include <variant>
#include <vector>

#include "base/ids.h"
#include "engine/sampling.h"
#include "server/json_fields.h"
#include "server/limits.h"
#include "text/chat_template.h"

namespace jointkv::server {

using TextOrTokens = std::variant<std::string, std::vector<TokenId>>;

// A body of /v1/chat/completions or /v1/completions.
struct GenerationCall {
  bool chat = false;
  std::string model;                        // empty: not named
  std::vector<text::ChatMessage> messages;  // chat
  std::vector<TextOrTokens> prompts;        // completions; one or more
  engine::SamplingParams sampling;
  bool names_max_tokens = false;  // else sampling.max_tokens is a default, cut to what the context leaves
  bool stream = false;
  bool include_usage = false;
  bool echo = false;        // completions: the text begins with the prompt
  bool kv_fusion = true;    // "kv_fusion": "on" or "off"
  bool reports_kv = false;  // "kv": true
};

GenerationCall ParseChat(const Json& body, const Limits& limits);
GenerationCall ParseCompletion(const Json& body, const Limits& limits);

// The field `messages` of an object.
std::vector<text::ChatMessage> Messages(const Json& body, const Limits& limits);

}  // namespace jointkv::server
