// Prompts from JSONL, one request a line; the file is treated as hostile.
//
//   {"prompt": "text"} or {"messages": [...], "tools": [...]} or {"tokens": [1, 2, 3]}
//
// and in each: "id", and the OpenAI and vLLM names of sampling parameters, which override the command line.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "engine/sampling.h"
#include "text/chat_template.h"

namespace jointkv::cli {

struct PromptLimits {
  size_t line_bytes_max = 16 << 20;  // far above any context in text
  size_t messages_max = 4096;
  size_t tools_max = 1024;
};

struct Conversation {
  std::vector<text::ChatMessage> messages;
  std::vector<text::Tool> tools;
  bool parallel_tool_calls = false;
};

struct Prompt {
  std::string id;  // as given, or empty
  std::variant<std::string, Conversation, std::vector<TokenId>> content;
  engine::SamplingParams sampling;
  bool kv_fusion = true;  // "kv_fusion": true, false, "on" or "off"
};

// Fails with kInvalidArgument (not JSON, unknown field, wrong type) or kOutOfRange, naming the field.
Expected<Prompt> ParsePrompt(std::string_view line, const engine::SamplingParams& defaults,
                             const PromptLimits& limits = {});

// Calls take(line number, prompt or why not) for each line that is not blank. Fails with kNotFound or kIo.
Status ReadPrompts(const std::string& path, const engine::SamplingParams& defaults,
                   const std::function<void(int line, Expected<Prompt> prompt)>& take, const PromptLimits& limits = {});

}  // namespace jointkv::cli
