#include "server/openai_schema.h"

#include <algorithm>
#include <charconv>
#include <limits>

namespace jointkv::server {
namespace {

constexpr int kCompletionTokens = 16;  // OpenAI's default of /v1/completions
constexpr size_t kSchemaKeys = 8192;
constexpr size_t kListMax = 4096;  // the engine's own limits are lower and name the field

// What the engine behind this server does not do. One place, so that it shrinks easily.
void RefuseUnsupported(const Json& body, bool chat) {
  const auto refuse = [](const char* field, const std::string& what) {
    throw ApiError{.message = std::string(field) + ": " + what, .param = field, .code = "unsupported_value"};
  };
  // What would make another answer than the one asked for.
  for (const char* field : {"guided_regex", "guided_choice", "guided_grammar", "prompt_logprobs"}) {
    if (Find(body, field) != nullptr) refuse(field, "is not supported");
  }
  if (BoolOr(body, "use_beam_search", false)) refuse("use_beam_search", "is not supported");
  if (chat) {
    for (const char* field : {"functions", "function_call"}) {
      if (Find(body, field) != nullptr) refuse(field, "is superseded by tools and not supported");
    }
    return;
  }
  if (!StringOr(body, "suffix", "").empty()) refuse("suffix", "is not supported");
  if (const Json* best_of = Find(body, "best_of")) {
    const Json* n = Find(body, "n");
    if (Integer(*best_of, "best_of") != (n == nullptr ? 1 : Integer(*n, "n"))) {
      refuse("best_of", "is only supported equal to n");
    }
  }
}

// A string, or the text parts of an array of parts.
std::string Content(const Json& value, const std::string& field) {
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) {
    throw ApiError{.message = field + ": expected a string or an array of parts, got " + value.type_name(),
                   .param = field,
                   .code = "invalid_type"};
  }
  std::string text;
  const Json& parts = Array(value, field, kListMax);
  for (size_t i = 0; i < parts.size(); ++i) {
    const std::string at = At(field, i);
    const Json& part = Object(parts[i], at);
    if (StringOr(part, "type", at) != "text") throw BadField(at + ".type", "only parts of type text are supported");
    if (Find(part, "text") == nullptr) throw BadField(at + ".text", "is missing");
    text += StringOr(part, "text", at);
  }
  return text;
}

text::ChatMessage Message(const Json& value, const std::string& field) {
  Object(value, field);
  text::ChatMessage message;
  message.role = StringOr(value, "role", field);
  if (message.role.empty()) throw BadField(field + ".role", "is missing");
  constexpr const char* kRoles[] = {"system", "developer", "user", "assistant", "tool", "function"};
  if (std::ranges::find(kRoles, message.role) == std::end(kRoles)) {
    throw BadField(field + ".role", "'" + message.role.substr(0, 64) + "' is none of system, developer, user, " +
                                        "assistant, tool and function");
  }
  if (message.role == "developer") message.role = "system";  // OpenAI's newer name
  const Json* content = Find(value, "content");
  const Json* calls = Find(value, "tool_calls");
  if (content == nullptr && calls == nullptr) throw BadField(field + ".content", "is missing");
  if (content != nullptr) message.content = Content(*content, field + ".content");
  message.name = StringOr(value, "name", field);
  message.tool_call_id = StringOr(value, "tool_call_id", field);
  if (message.role == "tool" && message.tool_call_id.empty()) throw BadField(field + ".tool_call_id", "is missing");
  if (calls == nullptr) return message;
  Array(*calls, field + ".tool_calls", kListMax);
  for (size_t i = 0; i < calls->size(); ++i) {
    const std::string at = At(field + ".tool_calls", i);
    const Json* function = Find(Object((*calls)[i], at), "function");
    if (function == nullptr) throw BadField(at + ".function", "is missing");
    Object(*function, at + ".function");
    if (StringOr(*function, "name", at + ".function").empty()) throw BadField(at + ".function.name", "is missing");
    message.tool_calls.push_back({StringOr((*calls)[i], "id", at), StringOr(*function, "name", at + ".function"),
                                  StringOr(*function, "arguments", at + ".function")});
  }
  return message;
}

void ReadLogitBias(const Json& value, engine::SamplingParams& sampling) {
  Object(value, "logit_bias");
  for (const auto& [key, bias] : value.items()) {
    TokenId token = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token);
    if (error != std::errc() || end != key.data() + key.size()) {
      throw BadField("logit_bias", "'" + key.substr(0, 64) + "' is not a token id");
    }
    sampling.logit_bias.emplace_back(token, Number(bias, "logit_bias"));
  }
}

void ReadStop(const Json& value, engine::SamplingParams& sampling) {
  if (value.is_string()) {
    sampling.stop.push_back(value.get<std::string>());
    return;
  }
  if (!value.is_array()) {
    throw ApiError{.message = std::string("stop: expected a string or an array of strings, got ") + value.type_name(),
                   .param = "stop",
                   .code = "invalid_type"};
  }
  Array(value, "stop", kListMax);
  for (size_t i = 0; i < value.size(); ++i) sampling.stop.push_back(String(value[i], At("stop", i)));
}

void ReadSampling(const Json& body, engine::SamplingParams& sampling) {
  const auto number = [&](const char* key, float& target) {
    if (const Json* value = Find(body, key)) target = Number(*value, key);
  };
  const auto integer = [&](const char* key, int& target) {
    if (const Json* value = Find(body, key)) target = Integer(*value, key);
  };
  number("temperature", sampling.temperature);
  integer("top_k", sampling.top_k);
  if (sampling.top_k == -1) sampling.top_k = 0;  // vLLM's way to say off
  number("top_p", sampling.top_p);
  number("min_p", sampling.min_p);
  number("repetition_penalty", sampling.repetition_penalty);
  number("presence_penalty", sampling.presence_penalty);
  number("frequency_penalty", sampling.frequency_penalty);
  integer("min_tokens", sampling.min_tokens);
  integer("n", sampling.n);
  sampling.ignore_eos = BoolOr(body, "ignore_eos", false);
  if (const Json* value = Find(body, "seed")) {
    if (!value->is_number_integer()) {
      // Numbers beyond 64 bits are read as inexact ones.
      if (value->is_number()) throw BadField("seed", value->dump() + " is not a whole number of 64 bits");
      throw ApiError{.message = std::string("seed: expected a whole number, got ") + value->type_name(),
                     .param = "seed",
                     .code = "invalid_type"};
    }
    sampling.seed = value->is_number_unsigned() ? value->get<uint64_t>() : static_cast<uint64_t>(value->get<int64_t>());
  }
  if (const Json* value = Find(body, "stop")) ReadStop(*value, sampling);
  if (const Json* value = Find(body, "stop_token_ids"))
    sampling.stop_tokens = Tokens(*value, "stop_token_ids", kListMax);
  if (const Json* value = Find(body, "logit_bias")) ReadLogitBias(*value, sampling);
}

// max_completion_tokens is OpenAI's newer name.
void ReadMaxTokens(const Json& body, int least, GenerationCall& call) {
  for (const char* key : {"max_tokens", "max_completion_tokens"}) {
    const Json* value = Find(body, key);
    if (value == nullptr) continue;
    call.sampling.max_tokens = Integer(*value, key);
    if (call.sampling.max_tokens < least) {
      throw BadField(key, std::to_string(call.sampling.max_tokens) + " is less than " + std::to_string(least));
    }
    call.max_tokens_field = key;
  }
}

// A schema is an object, or the text of one.
std::string SchemaText(const OrderedJson& schema, const std::string& field) {
  if (schema.is_string()) return schema.get<std::string>();
  if (schema.is_object()) return schema.dump();
  throw ApiError{
      .message = field + ": expected an object, got " + schema.type_name(), .param = field, .code = "invalid_type"};
}

// OpenAI's response_format, vLLM's structured_outputs and its older guided_json.
void ReadOutputFormat(const Json& body, std::string_view text, GenerationCall& call) {
  const auto schema_at = [&](const char* field, const std::vector<const char*>& path) {
    OrderedJson schema = InOrder(text.empty() ? body.dump() : text, field, kSchemaKeys);
    call.schema_field = field;
    for (const char* key : path) {
      call.schema_field += std::string(".") + key;
      if (!schema.is_object() || !schema.contains(key)) throw BadField(call.schema_field, "is missing");
      schema = OrderedJson(schema[key]);
    }
    call.json_schema = SchemaText(schema, call.schema_field);
  };
  int formats = 0;
  if (const Json* format = Find(body, "response_format")) {
    const std::string type = StringOr(Object(*format, "response_format"), "type", "response_format");
    if (type == "json_object") {
      call.schema_field = "response_format";
      call.json_schema = R"({"type": "object"})";
    } else if (type == "json_schema") {
      const Json* schema = Find(*format, "json_schema");
      if (schema == nullptr) throw BadField("response_format.json_schema", "is missing");
      Object(*schema, "response_format.json_schema");
      schema_at("response_format", {"json_schema", "schema"});
    } else if (type != "text") {
      throw BadField("response_format.type", "must be text, json_object or json_schema");
    }
    formats += type == "text" ? 0 : 1;
  }
  if (const Json* outputs = Find(body, "structured_outputs")) {
    if (Find(Object(*outputs, "structured_outputs"), "json") == nullptr) {
      throw ApiError{.message = "structured_outputs: only json is supported",
                     .param = "structured_outputs",
                     .code = "unsupported_value"};
    }
    schema_at("structured_outputs", {"json"});
    ++formats;
  }
  if (Find(body, "guided_json") != nullptr) {
    schema_at("guided_json", {});
    ++formats;
  }
  if (formats > 1) throw BadField(call.schema_field, "is one format too many: give one");
}

text::Tool ReadTool(const Json& value, const OrderedJson& in_order, const std::string& field) {
  if (StringOr(Object(value, field), "type", field, "function") != "function") {
    throw BadField(field + ".type", "must be function");
  }
  const Json* function = Find(value, "function");
  const std::string at = field + ".function";
  if (function == nullptr) throw BadField(at, "is missing");
  text::Tool tool;
  tool.name = StringOr(Object(*function, at), "name", at);
  if (tool.name.empty()) throw BadField(at + ".name", "is missing");
  tool.description = StringOr(*function, "description", at);
  if (const Json* parameters = Find(*function, "parameters")) {
    Object(*parameters, at + ".parameters");
    tool.parameters_json = in_order.at("function").at("parameters").dump();
  }
  return tool;
}

void ReadToolChoice(const Json& choice, GenerationCall& call) {
  if (choice == "none" || choice == "auto" || choice == "required") {
    call.tool_choice = choice == "none"   ? text::ToolChoice::kNone
                       : choice == "auto" ? text::ToolChoice::kAuto
                                          : text::ToolChoice::kRequired;
  } else if (choice.is_object()) {
    const Json* function = Find(choice, "function");
    if (function == nullptr) throw BadField("tool_choice.function", "is missing");
    call.tool_name = StringOr(Object(*function, "tool_choice.function"), "name", "tool_choice.function");
    if (call.tool_name.empty()) throw BadField("tool_choice.function.name", "is missing");
    const auto named = std::ranges::find(call.tools, call.tool_name, &text::Tool::name);
    if (named == call.tools.end()) throw BadField("tool_choice.function.name", "is none of tools");
  } else {
    throw BadField("tool_choice", "expected \"none\", \"auto\", \"required\" or a function");
  }
  if (call.tools.empty() && call.tool_choice == text::ToolChoice::kRequired) {
    throw BadField("tool_choice", "needs tools");
  }
}

void ReadTools(const Json& body, std::string_view text, GenerationCall& call) {
  if (const Json* tools = Find(body, "tools"); tools != nullptr && !Array(*tools, "tools", kListMax).empty()) {
    const OrderedJson in_order = InOrder(text.empty() ? body.dump() : text, "tools", kSchemaKeys);
    for (size_t i = 0; i < tools->size(); ++i) {
      call.tools.push_back(ReadTool((*tools)[i], in_order.at(i), At("tools", i)));
    }
  }
  if (const Json* choice = Find(body, "tool_choice")) ReadToolChoice(*choice, call);
  if (!call.tools.empty() && call.tool_choice != text::ToolChoice::kNone && !call.json_schema.empty()) {
    throw BadField(call.schema_field, "is not supported together with tools");
  }
  call.parallel_tool_calls = BoolOr(body, "parallel_tool_calls", true);
  if (const Json* kwargs = Find(body, "chat_template_kwargs")) {
    const Json* thinking = Find(Object(*kwargs, "chat_template_kwargs"), "enable_thinking");
    if (thinking != nullptr) call.enable_thinking = Bool(*thinking, "chat_template_kwargs.enable_thinking");
  }
}

void ReadConversation(const Json& body, const Limits& limits, std::string_view text, GenerationCall& call) {
  call.chat = true;
  call.messages = Messages(body, limits);
  ReadTools(body, text, call);
}

bool FusionSwitch(const Json& value) {
  if (value.is_boolean()) return value.get<bool>();
  if (value == "on" || value == "off") return value == "on";
  throw BadField("kv_fusion", "expected \"on\" or \"off\"");
}

GenerationCall ParseCommon(const Json& body, std::string_view text, int least_tokens = 1) {
  GenerationCall call;
  call.model = StringOr(body, "model", "");
  ReadSampling(body, call.sampling);
  ReadMaxTokens(body, least_tokens, call);
  call.stream = BoolOr(body, "stream", false);
  if (const Json* options = Find(body, "stream_options")) {
    if (!call.stream) throw BadField("stream_options", "is only allowed when stream is true");
    const Json* usage = Find(Object(*options, "stream_options"), "include_usage");
    call.include_usage = usage != nullptr && Bool(*usage, "stream_options.include_usage");
    const Json* always = Find(*options, "continuous_usage_stats");
    call.usage_in_chunks =
        always != nullptr && Bool(*always, "stream_options.continuous_usage_stats") && call.include_usage;
  }
  if (const Json* fusion = Find(body, "kv_fusion")) call.kv_fusion = FusionSwitch(*fusion);
  call.reports_kv = BoolOr(body, "kv", false);
  ReadOutputFormat(body, text, call);
  return call;
}

std::vector<TextOrTokens> Prompts(const Json& value, const std::string& name, const Limits& limits) {
  const auto wrong = [&name](const std::string& field, const Json& got) {
    return ApiError{.message = field + ": expected a string, token ids, or a list of either, got " + got.type_name(),
                    .param = name,
                    .code = "invalid_type"};
  };
  if (value.is_string()) return {value.get<std::string>()};
  if (!value.is_array()) throw wrong(name, value);
  if (value.empty()) throw BadField(name, "is empty");
  if (value[0].is_number()) return {Tokens(value, name, limits.body_bytes_max)};
  std::vector<TextOrTokens> prompts;
  Array(value, name, static_cast<size_t>(limits.prompts_max));
  for (size_t i = 0; i < value.size(); ++i) {
    if (value[i].is_string()) {
      prompts.emplace_back(value[i].get<std::string>());
    } else if (value[i].is_array()) {
      prompts.emplace_back(Tokens(value[i], At(name, i), limits.body_bytes_max));
    } else {
      throw wrong(At(name, i), value[i]);
    }
  }
  return prompts;
}

}  // namespace

text::ChatOptions GenerationCall::chat_options() const {
  text::ChatOptions options;
  options.enable_thinking = enable_thinking;
  options.parallel_tool_calls = parallel_tool_calls;
  options.tool_choice = tool_choice;
  options.tool_name = tool_name;
  options.json_schema = json_schema;
  return options;
}

std::vector<text::ChatMessage> Messages(const Json& body, const Limits& limits) {
  const Json* value = Find(body, "messages");
  if (value == nullptr) throw BadField("messages", "is missing");
  std::vector<text::ChatMessage> messages;
  Array(*value, "messages", static_cast<size_t>(limits.messages_max));
  if (value->empty()) throw BadField("messages", "is empty");
  for (size_t i = 0; i < value->size(); ++i) messages.push_back(Message((*value)[i], At("messages", i)));
  return messages;
}

GenerationCall ParseConversation(const Json& body, const Limits& limits, std::string_view text) {
  GenerationCall call;
  ReadConversation(body, limits, text, call);
  return call;
}

GenerationCall ParseChat(const Json& body, const Limits& limits, std::string_view text) {
  RefuseUnsupported(body, true);
  GenerationCall call = ParseCommon(body, text);
  if (call.max_tokens_field.empty()) call.sampling.max_tokens = engine::SamplingLimits().max_tokens_max;
  ReadConversation(body, limits, text, call);
  const bool logprobs = BoolOr(body, "logprobs", false);
  call.sampling.logprobs = logprobs ? 0 : -1;
  if (const Json* top = Find(body, "top_logprobs")) {
    const int count = Integer(*top, "top_logprobs");
    if (!logprobs && count != 0) throw BadField("top_logprobs", "needs logprobs to be true");
    const int most = engine::SamplingLimits().logprobs_max;
    if (count < 0 || count > most) {
      throw BadField("top_logprobs", std::to_string(count) + " is not from 0 to " + std::to_string(most));
    }
    if (logprobs) call.sampling.logprobs = count;
  }
  return call;
}

GenerationCall ParseCompletion(const Json& body, const Limits& limits, std::string_view text) {
  RefuseUnsupported(body, false);
  // A prompt that comes back with its logprobs may be all that is asked for.
  const bool echo = BoolOr(body, "echo", false);
  GenerationCall call = ParseCommon(body, text, echo ? 0 : 1);
  if (call.max_tokens_field.empty()) call.sampling.max_tokens = kCompletionTokens;
  const Json* prompt = Find(body, "prompt");
  if (prompt == nullptr) throw BadField("prompt", "is missing");
  call.prompts = Prompts(*prompt, "prompt", limits);
  if (call.has_grammar() && call.prompts.size() > 1) throw BadField(call.schema_field, "needs a call of one prompt");
  call.echo = echo;
  if (const Json* logprobs = Find(body, "logprobs")) {
    call.sampling.logprobs = Integer(*logprobs, "logprobs");
    if (call.sampling.logprobs < 0)
      throw BadField("logprobs", std::to_string(call.sampling.logprobs) + " is less than 0");
  }
  const bool prompt_logprobs = echo && (call.sampling.logprobs >= 0 || call.sampling.max_tokens == 0);
  if (prompt_logprobs && call.sampling.n != 1) {
    throw BadField("n", "must be 1 with echo and logprobs, or without output");
  }
  return call;
}

GenerationCall ParseEmbedding(const Json& body, const Limits& limits) {
  GenerationCall call;
  call.embed = true;
  call.model = StringOr(body, "model", "");
  call.sampling.max_tokens = 0;
  if (const Json* fusion = Find(body, "kv_fusion")) call.kv_fusion = FusionSwitch(*fusion);
  const Json* input = Find(body, "input");
  if (input == nullptr) throw BadField("input", "is missing");
  call.prompts = Prompts(*input, "input", limits);
  const std::string format = StringOr(body, "encoding_format", "", "float");
  if (format != "float" && format != "base64") throw BadField("encoding_format", "must be float or base64");
  call.base64 = format == "base64";
  if (const Json* dimensions = Find(body, "dimensions")) call.dimensions = Integer(*dimensions, "dimensions");
  return call;
}

}  // namespace jointkv::server
