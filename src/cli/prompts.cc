#include "cli/prompts.h"

#include <charconv>
#include <set>

#include "cli/lines.h"
#include "server/json_fields.h"
#include "text/template_guard.h"

namespace jointkv::cli {
namespace {

using server::Array;
using server::At;
using server::Bool;
using server::Find;
using server::Integer;
using server::Json;
using server::Number;
using server::Object;
using server::String;
using server::StringOr;
using server::Tokens;

[[noreturn]] void Fail(const std::string& field, const std::string& what) { throw server::BadField(field, what); }

bool Switch(const Json& value, const std::string& field) {
  if (value.is_boolean()) return value.get<bool>();
  if (value == "on" || value == "off") return value == "on";
  Fail(field, "expected true, false, \"on\" or \"off\"");
}

// A string, or the text parts of an array of parts.
std::string Content(const Json& value, const std::string& field) {
  if (value.is_string()) return value.get<std::string>();
  std::string text;
  const Json& parts = Array(value, field, 4096);
  for (size_t i = 0; i < parts.size(); ++i) {
    const Json& part = Object(parts[i], At(field, i));
    if (StringOr(part, "type", At(field, i)) != "text") Fail(At(field, i), "only parts of type text are supported");
    text += StringOr(part, "text", At(field, i));
  }
  return text;
}

text::ChatMessage Message(const Json& value, const std::string& field) {
  Object(value, field);
  text::ChatMessage message;
  message.role = StringOr(value, "role", field);
  if (message.role.empty()) Fail(field + ".role", "is missing");
  if (const Json* content = Find(value, "content")) message.content = Content(*content, field + ".content");
  message.name = StringOr(value, "name", field);
  message.tool_call_id = StringOr(value, "tool_call_id", field);
  if (const Json* calls = Find(value, "tool_calls")) {
    Array(*calls, field + ".tool_calls", 1024);
    for (size_t i = 0; i < calls->size(); ++i) {
      const std::string at = At(field + ".tool_calls", i);
      const Json* function = Find(Object((*calls)[i], at), "function");
      if (function == nullptr) Fail(at + ".function", "is missing");
      Object(*function, at + ".function");
      message.tool_calls.push_back({StringOr((*calls)[i], "id", at), StringOr(*function, "name", at + ".function"),
                                    StringOr(*function, "arguments", at + ".function")});
    }
  }
  return message;
}

text::Tool ToolOf(const Json& value, const std::string& field) {
  const Json* function = Find(Object(value, field), "function");
  if (function == nullptr) Fail(field + ".function", "is missing");
  Object(*function, field + ".function");
  text::Tool tool;
  tool.name = StringOr(*function, "name", field + ".function");
  if (tool.name.empty()) Fail(field + ".function.name", "is missing");
  tool.description = StringOr(*function, "description", field + ".function");
  if (const Json* parameters = Find(*function, "parameters")) tool.parameters_json = parameters->dump();
  return tool;
}

Conversation ConversationOf(const Json& row, const PromptLimits& limits) {
  Conversation conversation;
  const Json& messages = Array(row["messages"], "messages", limits.messages_max);
  if (messages.empty()) Fail("messages", "is empty");
  for (size_t i = 0; i < messages.size(); ++i) {
    conversation.messages.push_back(Message(messages[i], At("messages", i)));
  }
  const Json* choice = Find(row, "tool_choice");
  const std::string tool_choice = choice == nullptr ? "auto" : choice->is_string() ? choice->get<std::string>() : "?";
  if (tool_choice != "auto" && tool_choice != "none") Fail("tool_choice", "only auto and none are supported");
  const Json* tools = Find(row, "tools");
  if (tools != nullptr && tool_choice == "auto") {
    Array(*tools, "tools", limits.tools_max);
    for (size_t i = 0; i < tools->size(); ++i) conversation.tools.push_back(ToolOf((*tools)[i], At("tools", i)));
  }
  if (const Json* parallel = Find(row, "parallel_tool_calls")) {
    conversation.parallel_tool_calls = Bool(*parallel, "parallel_tool_calls");
  }
  return conversation;
}

void ReadLogitBias(const Json& value, engine::SamplingParams& sampling) {
  Object(value, "logit_bias");
  sampling.logit_bias.clear();
  for (const auto& [key, bias] : value.items()) {
    TokenId token = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token);
    if (error != std::errc() || end != key.data() + key.size()) Fail("logit_bias", "'" + key + "' is not a token id");
    sampling.logit_bias.emplace_back(token, Number(bias, "logit_bias." + key));
  }
}

void ReadLogprobs(const Json& row, engine::SamplingParams& sampling) {
  const Json* logprobs = Find(row, "logprobs");
  const Json* top = Find(row, "top_logprobs");
  if (logprobs != nullptr && !logprobs->is_boolean()) {
    sampling.logprobs = Integer(*logprobs, "logprobs");
  } else if (logprobs != nullptr) {
    sampling.logprobs = logprobs->get<bool>() ? 0 : -1;
  }
  if (top == nullptr) return;
  if (sampling.logprobs < 0) Fail("top_logprobs", "needs \"logprobs\": true");
  sampling.logprobs = Integer(*top, "top_logprobs");
}

engine::SamplingParams SamplingOf(const Json& row, const engine::SamplingParams& defaults) {
  engine::SamplingParams sampling = defaults;
  const auto number = [&](const char* key, float& target) {
    if (const Json* value = Find(row, key)) target = Number(*value, key);
  };
  const auto integer = [&](const char* key, int& target) {
    if (const Json* value = Find(row, key)) target = Integer(*value, key);
  };
  number("temperature", sampling.temperature);
  integer("top_k", sampling.top_k);
  number("top_p", sampling.top_p);
  number("min_p", sampling.min_p);
  number("repetition_penalty", sampling.repetition_penalty);
  number("presence_penalty", sampling.presence_penalty);
  number("frequency_penalty", sampling.frequency_penalty);
  integer("max_tokens", sampling.max_tokens);
  integer("max_completion_tokens", sampling.max_tokens);
  integer("min_tokens", sampling.min_tokens);
  integer("n", sampling.n);
  if (const Json* value = Find(row, "ignore_eos")) sampling.ignore_eos = Bool(*value, "ignore_eos");
  if (const Json* value = Find(row, "seed")) {
    if (!value->is_number_integer()) Fail("seed", "expected a whole number");
    sampling.seed = value->is_number_unsigned() ? value->get<uint64_t>() : static_cast<uint64_t>(value->get<int64_t>());
  }
  if (const Json* value = Find(row, "stop")) {
    sampling.stop.clear();
    if (value->is_string()) {
      sampling.stop.push_back(value->get<std::string>());
    } else {
      Array(*value, "stop", 1024);
      for (size_t i = 0; i < value->size(); ++i) sampling.stop.push_back(String((*value)[i], At("stop", i)));
    }
  }
  if (const Json* value = Find(row, "stop_token_ids")) sampling.stop_tokens = Tokens(*value, "stop_token_ids", 4096);
  if (const Json* value = Find(row, "logit_bias")) ReadLogitBias(*value, sampling);
  ReadLogprobs(row, sampling);
  return sampling;
}

// A misspelt parameter must not pass in silence. The last line: part of an OpenAI body, but no business of a file's.
void CheckFields(const Json& row) {
  static const std::set<std::string, std::less<>> kKnown = {"prompt",
                                                            "messages",
                                                            "tokens",
                                                            "tools",
                                                            "tool_choice",
                                                            "parallel_tool_calls",
                                                            "id",
                                                            "temperature",
                                                            "top_k",
                                                            "top_p",
                                                            "min_p",
                                                            "repetition_penalty",
                                                            "max_tokens",
                                                            "min_tokens",
                                                            "presence_penalty",
                                                            "n",
                                                            "seed",
                                                            "frequency_penalty",
                                                            "stop",
                                                            "logit_bias",
                                                            "max_completion_tokens",
                                                            "logprobs",
                                                            "ignore_eos",
                                                            "kv_fusion",
                                                            "stop_token_ids",
                                                            "top_logprobs",
                                                            "model",
                                                            "user",
                                                            "metadata",
                                                            "stream",
                                                            "stream_options"};
  for (const auto& [key, value] : row.items()) {
    if (!kKnown.contains(key)) Fail("'" + key.substr(0, 64) + "'", "unknown field");
  }
}

Prompt PromptOf(const Json& row, const engine::SamplingParams& defaults, const PromptLimits& limits) {
  if (!row.is_object()) Fail("row", std::string("expected an object, got ") + row.type_name());
  CheckFields(row);
  Prompt prompt;
  if (const Json* id = Find(row, "id")) prompt.id = id->is_number_integer() ? id->dump() : String(*id, "id");
  const Json* text = Find(row, "prompt");
  const Json* messages = Find(row, "messages");
  const Json* tokens = Find(row, "tokens");
  if ((text != nullptr) + (messages != nullptr) + (tokens != nullptr) != 1) {
    Fail("row", "expected exactly one of prompt, messages and tokens");
  }
  if (text != nullptr) {
    prompt.content = String(*text, "prompt");
  } else if (messages != nullptr) {
    prompt.content = ConversationOf(row, limits);
  } else {
    prompt.content = Tokens(*tokens, "tokens", limits.line_bytes_max);
  }
  prompt.sampling = SamplingOf(row, defaults);
  if (const Json* fusion = Find(row, "kv_fusion")) prompt.kv_fusion = Switch(*fusion, "kv_fusion");
  return prompt;
}

}  // namespace

Expected<Prompt> ParsePrompt(std::string_view line, const engine::SamplingParams& defaults,
                             const PromptLimits& limits) {
  if (line.size() > limits.line_bytes_max) {
    return Status(StatusCode::kOutOfRange, "row: more than " + std::to_string(limits.line_bytes_max) + " bytes");
  }
  RETURN_IF_ERROR(text::CheckJsonDepth(line, "row"));
  try {
    return PromptOf(Json::parse(line), defaults, limits);
  } catch (const server::ApiError& error) {
    return Status(error.status_code, error.message);
  } catch (const Json::exception& error) {
    return Status(StatusCode::kInvalidArgument, std::string("not JSON: ") + error.what());
  }
}

Status ReadPrompts(const std::string& path, const engine::SamplingParams& defaults,
                   const std::function<void(int line, Expected<Prompt> prompt)>& take, const PromptLimits& limits) {
  return ReadLines(path, limits.line_bytes_max, [&](int number, const std::string& line) {
    take(number, ParsePrompt(line, defaults, limits));
    return true;
  });
}

}  // namespace jointkv::cli
