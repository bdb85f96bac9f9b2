#include "text/chat_template.h"

#include <algorithm>
#include <exception>
#include <string_view>
#include <utility>

#include "text/chat_format.h"
#include "text/detokenizer.h"
#include "text/json_schema.h"
#include "text/template_guard.h"
#include "text/vocabulary.h"

namespace jointkv::text {
namespace {

constexpr char kChatMl[] = "chatml";  // the library's name for its built-in ChatML template
constexpr char kChatMlStop[] = "<|im_end|>";
constexpr size_t kWarningBytesMax = 400;
constexpr size_t kToolsMax = 128;
constexpr size_t kToolNameBytesMax = 128;

// The interpreter's messages quote the source over many lines; the last line has the reason.
std::string Reason(std::string_view what) {
  while (!what.empty() && what.back() == '\n') what.remove_suffix(1);
  const size_t line = what.rfind('\n');
  if (line != std::string_view::npos) what.remove_prefix(line + 1);
  return SanitizeUtf8(what.substr(0, kWarningBytesMax));
}

common_chat_msg ToLibrary(const ChatMessage& message) {
  common_chat_msg out;
  out.role = SanitizeUtf8(message.role);
  out.content = SanitizeUtf8(message.content);
  out.tool_name = SanitizeUtf8(message.name);
  out.tool_call_id = SanitizeUtf8(message.tool_call_id);
  for (const ToolCall& call : message.tool_calls) {
    out.tool_calls.push_back({.name = SanitizeUtf8(call.name),
                              .arguments = call.arguments_json.empty() ? "{}" : SanitizeUtf8(call.arguments_json),
                              .id = SanitizeUtf8(call.id)});
  }
  return out;
}

// The tools that the model may see, in the library's form; with options.tool_name the one.
Expected<std::vector<common_chat_tool>> ToLibrary(std::span<const Tool> tools, const ChatOptions& options) {
  std::vector<common_chat_tool> out;
  if (tools.size() > kToolsMax) {
    return Status(StatusCode::kOutOfRange,
                  "tools: " + std::to_string(tools.size()) + ", limit " + std::to_string(kToolsMax));
  }
  for (const Tool& tool : tools) {
    if (!options.tool_name.empty() && tool.name != options.tool_name) continue;
    if (tool.name.empty() || tool.name.size() > kToolNameBytesMax) {
      return Status(StatusCode::kInvalidArgument,
                    "tools: a name must have 1 to " + std::to_string(kToolNameBytesMax) + " bytes");
    }
    std::string parameters = R"({"type":"object","properties":{}})";
    if (!tool.parameters_json.empty()) {
      ASSIGN_OR_RETURN(parameters,
                       ExpressibleSchema(SanitizeUtf8(tool.parameters_json), "parameters of tool '" + tool.name + "'"));
    }
    out.push_back({.name = SanitizeUtf8(tool.name),
                   .description = SanitizeUtf8(tool.description),
                   .parameters = std::move(parameters)});
  }
  if (!options.tool_name.empty() && out.empty()) {
    return Status(StatusCode::kInvalidArgument, "tools: there is no tool '" + SanitizeUtf8(options.tool_name) + "'");
  }
  return out;
}

Expected<common_chat_templates_inputs> MakeInputs(std::span<const ChatMessage> messages, std::span<const Tool> tools,
                                                  const ChatOptions& options) {
  common_chat_templates_inputs inputs;
  for (const ChatMessage& message : messages) {
    for (const ToolCall& call : message.tool_calls) {
      RETURN_IF_ERROR(CheckJsonDepth(call.arguments_json, "chat: arguments of a tool call"));
    }
    inputs.messages.push_back(ToLibrary(message));
  }
  ASSIGN_OR_RETURN(inputs.tools, ToLibrary(tools, options));
  inputs.add_generation_prompt = options.add_generation_prompt;
  inputs.enable_thinking = options.enable_thinking;
  inputs.parallel_tool_calls = options.parallel_tool_calls;
  inputs.reasoning_format = COMMON_REASONING_FORMAT_AUTO;
  inputs.use_jinja = true;
  const bool required = options.tool_choice == ToolChoice::kRequired || !options.tool_name.empty();
  inputs.tool_choice = required                                   ? COMMON_CHAT_TOOL_CHOICE_REQUIRED
                       : options.tool_choice == ToolChoice::kNone ? COMMON_CHAT_TOOL_CHOICE_NONE
                                                                  : COMMON_CHAT_TOOL_CHOICE_AUTO;
  if (required && inputs.tools.empty()) {
    return Status(StatusCode::kInvalidArgument, "tool_choice: a call is required, but there are no tools");
  }
  return inputs;
}

// Only then do the library's adaptations to a model's tool format matter; they cost many renderings of the template.
bool UsesTools(std::span<const ChatMessage> messages, std::span<const Tool> tools) {
  return !tools.empty() || std::any_of(messages.begin(), messages.end(), [](const ChatMessage& message) {
    return !message.tool_calls.empty() || message.role == "tool";
  });
}

}  // namespace

struct ChatTemplate::Parsed {
  common_chat_templates_ptr templates;
  std::vector<std::string> stops;
  bool thinks = false;

  common_chat_params Apply(common_chat_templates_inputs inputs, bool adapts) const {
    if (adapts) {
      try {
        return common_chat_templates_apply(templates.get(), inputs);
      } catch (const std::exception&) {
        // The template itself may still accept the conversation: the plain rendering below decides.
      }
    }
    inputs.force_pure_content = true;
    return common_chat_templates_apply(templates.get(), inputs);
  }

  // Parses `source` ("" for the model's own) and renders one exchange. Throws what the library throws.
  static std::unique_ptr<Parsed> Make(const llama_model* model, const std::string& source) {
    static const ChatMessage kHello{.role = "user", .content = "Hello"};
    auto out = std::make_unique<Parsed>();
    out->templates = common_chat_templates_init(model, source);
    const auto inputs = MakeInputs({&kHello, 1}, {}, {});
    out->Apply(*inputs, false);
    const common_chat_params adapted = out->Apply(*inputs, true);
    out->stops = adapted.additional_stops;
    out->thinks = adapted.supports_thinking;
    return out;
  }
};

ChatTemplate::ChatTemplate(const Tokenizer& tokenizer, std::unique_ptr<Parsed> parsed)
    : tokenizer_(&tokenizer), parsed_(std::move(parsed)) {
  source_ = common_chat_templates_source(parsed_->templates.get());
  thinks_ = parsed_->thinks;
}
ChatTemplate::~ChatTemplate() = default;

Expected<std::unique_ptr<ChatTemplate>> ChatTemplate::Create(const Tokenizer& tokenizer,
                                                             const std::string& override_template) try {
  const llama_model* model = tokenizer.vocabulary_->model.get();
  const auto text_of = [&](const char* name) {
    const char* text = llama_model_chat_template(model, name);
    return std::string(text == nullptr ? "" : text);
  };
  const std::string own = text_of(nullptr);
  const std::string tool_use = text_of("tool_use");
  std::string warning;
  if (override_template.empty() && own.empty() && tool_use.empty()) {
    warning = "the model file has no chat template";
  } else {
    const auto try_out = [&]() -> Status {
      if (override_template.empty()) {
        RETURN_IF_ERROR(CheckTemplateShape(own));
        RETURN_IF_ERROR(CheckTemplateShape(tool_use));
      } else {
        RETURN_IF_ERROR(CheckTemplateShape(override_template));
      }
      return TryInChild([&] { Parsed::Make(model, override_template); });
    };
    const Status status = try_out();
    if (status.ok()) {
      try {
        // The library's own initialisation drops the parser's message, so parse once for it.
        const std::string& main = !override_template.empty() ? override_template : own.empty() ? tool_use : own;
        if (main != kChatMl) common_chat_template(main, "", "");
        return std::unique_ptr<ChatTemplate>(new ChatTemplate(tokenizer, Parsed::Make(model, override_template)));
      } catch (const std::exception& error) {
        warning = "the chat template failed: " + Reason(error.what());
      }
    } else {
      warning = status.message();
    }
  }
  std::unique_ptr<ChatTemplate> out(new ChatTemplate(tokenizer, Parsed::Make(model, kChatMl)));
  out->is_fallback_ = true;
  out->warning_ = warning + "; using ChatML";
  // A model that never saw the marker as one token writes it as text.
  out->parsed_->stops.push_back(kChatMlStop);
  return out;
} catch (const std::exception& error) {
  return Status(StatusCode::kInternal, "chat template: " + Reason(error.what()));
}

Expected<ChatPrompt> ChatTemplate::Render(std::span<const ChatMessage> messages, std::span<const Tool> tools,
                                          const ChatOptions& options) const try {
  ASSIGN_OR_RETURN(common_chat_templates_inputs inputs, MakeInputs(messages, tools, options));
  const bool adapts = UsesTools(messages, tools) || thinks_;
  ChatPrompt out;
  if (!options.json_schema.empty()) {
    ASSIGN_OR_RETURN(out.grammar.gbnf, JsonSchemaToGbnf(options.json_schema, "json_schema"));
    if (adapts) inputs.json_schema = options.json_schema;
  }
  const common_chat_params params = parsed_->Apply(inputs, adapts);
  out.text = params.prompt;
  out.stops = parsed_->stops;
  for (const std::string& stop : params.additional_stops) {
    if (std::ranges::find(out.stops, stop) == out.stops.end()) out.stops.push_back(stop);
  }
  if (adapts) RETURN_IF_ERROR(AddFormat(params, inputs, out));
  if (const auto bos = tokenizer_->bos()) {
    const std::string& piece = tokenizer_->Piece(*bos);
    out.has_bos = !piece.empty() && out.text.starts_with(piece);
  }
  return out;
} catch (const std::exception& error) {
  return Status(StatusCode::kInvalidArgument, "chat: the template rejects these messages: " + Reason(error.what()));
}

// What the library knows of the template's output.
Status ChatTemplate::AddFormat(const common_chat_params& params, const common_chat_templates_inputs& inputs,
                               ChatPrompt& out) const {
  if (inputs.tool_choice == COMMON_CHAT_TOOL_CHOICE_REQUIRED && params.grammar.empty()) {
    return {StatusCode::kUnsupported,
            "tool_choice: the model's chat template has no tool calls, so none can be required"};
  }
  auto format = std::make_shared<ChatFormat>();
  format->params = common_chat_parser_params(params);
  format->params.reasoning_format = inputs.reasoning_format;
  if (!params.parser.empty()) format->params.parser.load(params.parser);
  out.format = std::move(format);

  std::vector<std::string> marks = params.preserved_tokens;
  marks.push_back(params.thinking_start_tag);
  marks.insert(marks.end(), params.thinking_end_tags.begin(), params.thinking_end_tags.end());
  out.visible_tokens = TokensOf(marks);
  if (params.grammar.empty()) return Status::Ok();
  out.grammar.gbnf = params.grammar;
  out.grammar.lazy = params.grammar_lazy;
  out.grammar.prefill = params.generation_prompt;
  out.grammar.visible_tokens = out.visible_tokens;
  out.grammar.think_begin = params.thinking_start_tag;
  if (!params.thinking_end_tags.empty()) out.grammar.think_end = params.thinking_end_tags.front();
  for (const common_grammar_trigger& trigger : params.grammar_triggers) {
    switch (trigger.type) {
      case COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN:
      case COMMON_GRAMMAR_TRIGGER_TYPE_WORD: out.grammar.trigger_words.push_back(trigger.value); break;
      case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN: out.grammar.trigger_patterns.push_back(trigger.value); break;
      case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL:
        out.grammar.trigger_patterns.push_back("^(?:" + trigger.value + ")$");
        break;
    }
  }
  return Status::Ok();
}

// Of those marks that are a control token each.
std::vector<TokenId> ChatTemplate::TokensOf(const std::vector<std::string>& marks) const {
  std::vector<TokenId> out;
  for (const std::string& mark : marks) {
    const auto tokens = tokenizer_->Encode(mark, false, true);
    if (!tokens.ok() || tokens->size() != 1) continue;
    const TokenId token = tokens->front();
    if (tokenizer_->IsControl(token) && !tokenizer_->IsEndOfGeneration(token)) out.push_back(token);
  }
  return out;
}

Expected<std::vector<TokenId>> ChatTemplate::EncodePrompt(const ChatPrompt& prompt) const {
  // Not by add_special: that would end the prompt where the model wants an end token.
  ASSIGN_OR_RETURN(std::vector<TokenId> tokens, tokenizer_->Encode(prompt.text, false, true));
  if (tokenizer_->adds_bos() && !prompt.has_bos) tokens.insert(tokens.begin(), *tokenizer_->bos());
  return tokens;
}

Expected<std::vector<TokenId>> ChatTemplate::EncodeChat(std::span<const ChatMessage> messages,
                                                        std::span<const Tool> tools, const ChatOptions& options) const {
  ASSIGN_OR_RETURN(const ChatPrompt prompt, Render(messages, tools, options));
  return EncodePrompt(prompt);
}

}  // namespace jointkv::text
