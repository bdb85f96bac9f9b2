#include "text/chat_template.h"

#include <algorithm>
#include <exception>
#include <string_view>
#include <utility>

#include "chat.h"
#include "text/detokenizer.h"
#include "text/template_guard.h"
#include "text/vocabulary.h"

namespace jointkv::text {
namespace {

constexpr char kChatMl[] = "chatml";  // the library's name for its built-in ChatML template
constexpr char kChatMlStop[] = "<|im_end|>";
constexpr size_t kWarningBytesMax = 400;

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

common_chat_tool ToLibrary(const Tool& tool) {
  return {.name = SanitizeUtf8(tool.name),
          .description = SanitizeUtf8(tool.description),
          .parameters = tool.parameters_json.empty() ? R"({"type":"object","properties":{}})"
                                                     : SanitizeUtf8(tool.parameters_json)};
}

Status CheckInputs(std::span<const ChatMessage> messages, std::span<const Tool> tools) {
  for (const ChatMessage& message : messages) {
    for (const ToolCall& call : message.tool_calls) {
      RETURN_IF_ERROR(CheckJsonDepth(call.arguments_json, "chat: arguments of a tool call"));
    }
  }
  for (const Tool& tool : tools) RETURN_IF_ERROR(CheckJsonDepth(tool.parameters_json, "chat: parameters of a tool"));
  return Status::Ok();
}

common_chat_templates_inputs MakeInputs(std::span<const ChatMessage> messages, std::span<const Tool> tools,
                                        const ChatOptions& options) {
  common_chat_templates_inputs inputs;
  for (const ChatMessage& message : messages) inputs.messages.push_back(ToLibrary(message));
  for (const Tool& tool : tools) inputs.tools.push_back(ToLibrary(tool));
  inputs.add_generation_prompt = options.add_generation_prompt;
  inputs.enable_thinking = options.enable_thinking;
  inputs.parallel_tool_calls = options.parallel_tool_calls;
  inputs.use_jinja = true;
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

  common_chat_params Apply(common_chat_templates_inputs inputs, bool adapts_to_tools) const {
    if (adapts_to_tools) {
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
    out->Apply(inputs, false);
    out->stops = out->Apply(inputs, true).additional_stops;
    return out;
  }
};

ChatTemplate::ChatTemplate(const Tokenizer& tokenizer, std::unique_ptr<Parsed> parsed)
    : tokenizer_(&tokenizer), parsed_(std::move(parsed)) {
  source_ = common_chat_templates_source(parsed_->templates.get());
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
  RETURN_IF_ERROR(CheckInputs(messages, tools));
  ChatPrompt out;
  out.text = parsed_->Apply(MakeInputs(messages, tools, options), UsesTools(messages, tools)).prompt;
  out.stops = parsed_->stops;
  if (const auto bos = tokenizer_->bos()) {
    const std::string& piece = tokenizer_->Piece(*bos);
    out.has_bos = !piece.empty() && out.text.starts_with(piece);
  }
  return out;
} catch (const std::exception& error) {
  return Status(StatusCode::kInvalidArgument, "chat: the template rejects these messages: " + Reason(error.what()));
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
