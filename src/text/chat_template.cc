#include "text/chat_template.h"

#include <algorithm>
#include <exception>
#include <optional>
#include <string_view>
#include <utility>

#include "text/chat_format.h"
#include "text/client_text.h"
#include "text/cut_json.h"
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

// What the template will see: checked, valid UTF-8, and JSON without escapes that could hide what it spells.
struct Conversation {
  std::vector<ChatMessage> messages;
  std::vector<Tool> tools;
};

Expected<ChatMessage> Prepare(const ChatMessage& message) {
  ChatMessage out{.role = SanitizeUtf8(message.role),
                  .content = SanitizeUtf8(message.content),
                  .name = SanitizeUtf8(message.name),
                  .tool_call_id = SanitizeUtf8(message.tool_call_id),
                  .tool_calls = {}};
  for (const ToolCall& call : message.tool_calls) {
    RETURN_IF_ERROR(CheckJsonDepth(call.arguments_json, "chat: arguments of a tool call"));
    std::string arguments = call.arguments_json.empty() ? "{}" : SanitizeUtf8(call.arguments_json);
    const common_json parsed = common_json::parse_no_throw(arguments);
    if (!parsed.is_discarded()) arguments = parsed.dump();
    out.tool_calls.push_back({SanitizeUtf8(call.id), SanitizeUtf8(call.name), std::move(arguments)});
  }
  return out;
}

Expected<Tool> Prepare(const Tool& tool) {
  if (tool.name.empty() || tool.name.size() > kToolNameBytesMax) {
    return Status(StatusCode::kInvalidArgument,
                  "tools: a name must have 1 to " + std::to_string(kToolNameBytesMax) + " bytes");
  }
  Tool out{SanitizeUtf8(tool.name), SanitizeUtf8(tool.description), R"({"type":"object","properties":{}})"};
  if (!tool.parameters_json.empty()) {
    ASSIGN_OR_RETURN(out.parameters_json,
                     ExpressibleSchema(SanitizeUtf8(tool.parameters_json), "parameters of tool '" + out.name + "'"));
    RETURN_IF_ERROR(JsonSchemaToGbnf(out.parameters_json, "parameters of tool '" + out.name + "'").status());
  }
  return out;
}

Expected<Conversation> Prepare(std::span<const ChatMessage> messages, std::span<const Tool> tools,
                               const ChatOptions& options) {
  Conversation out;
  for (const ChatMessage& message : messages) {
    ASSIGN_OR_RETURN(ChatMessage prepared, Prepare(message));
    out.messages.push_back(std::move(prepared));
  }
  if (tools.size() > kToolsMax) {
    return Status(StatusCode::kOutOfRange,
                  "tools: " + std::to_string(tools.size()) + ", limit " + std::to_string(kToolsMax));
  }
  for (const Tool& tool : tools) {
    if (!options.tool_name.empty() && tool.name != options.tool_name) continue;
    ASSIGN_OR_RETURN(Tool prepared, Prepare(tool));
    out.tools.push_back(std::move(prepared));
  }
  if (!options.tool_name.empty() && out.tools.empty()) {
    return Status(StatusCode::kInvalidArgument, "tools: there is no tool '" + SanitizeUtf8(options.tool_name) + "'");
  }
  if (options.tool_choice == ToolChoice::kRequired && out.tools.empty()) {
    return Status(StatusCode::kInvalidArgument, "tool_choice: a call is required, but there are no tools");
  }
  return out;
}

common_chat_templates_inputs MakeInputs(const Conversation& conversation, const ChatOptions& options) {
  common_chat_templates_inputs inputs;
  for (const ChatMessage& message : conversation.messages) {
    common_chat_msg& out = inputs.messages.emplace_back();
    out.role = message.role;
    out.content = message.content;
    out.tool_name = message.name;
    out.tool_call_id = message.tool_call_id;
    for (const ToolCall& call : message.tool_calls) {
      out.tool_calls.push_back({.name = call.name, .arguments = call.arguments_json, .id = call.id});
    }
  }
  for (const Tool& tool : conversation.tools) {
    inputs.tools.push_back({.name = tool.name, .description = tool.description, .parameters = tool.parameters_json});
  }
  inputs.add_generation_prompt = options.add_generation_prompt;
  inputs.enable_thinking = options.enable_thinking;
  inputs.parallel_tool_calls = options.parallel_tool_calls;
  inputs.reasoning_format = COMMON_REASONING_FORMAT_AUTO;
  inputs.use_jinja = true;
  if (options.tool_choice == ToolChoice::kRequired || !options.tool_name.empty()) {
    inputs.tool_choice = COMMON_CHAT_TOOL_CHOICE_REQUIRED;
  } else if (options.tool_choice == ToolChoice::kNone) {
    inputs.tool_choice = COMMON_CHAT_TOOL_CHOICE_NONE;
  }
  return inputs;
}

// The library's grammar of a required call has any text before it, in which a small model loses itself, and calls
// without end where one was asked for. Its rules are known by their names; without them the grammar stays as it is.
void HoldToChoice(const common_chat_templates_inputs& inputs, bool thinks, std::string& gbnf) {
  const auto replace = [&gbnf](std::string_view from, std::string_view to) {
    const size_t at = gbnf.find(from);
    if (at != std::string::npos) gbnf.replace(at, from.size(), to);
  };
  if (!inputs.parallel_tool_calls) {
    replace("\ntool-calls ::= (tool-call space)+", "\ntool-calls ::= tool-call space");
    replace("\ntool-calls ::= (tool-call? space)+", "\ntool-calls ::= tool-call? space");
  }
  if (inputs.tool_choice != COMMON_CHAT_TOOL_CHOICE_REQUIRED || thinks) return;
  static constexpr std::string_view kRoot = "\nroot ::=";
  const size_t root = gbnf.find(kRoot);
  if (root == std::string::npos) return;
  const size_t until = gbnf.find(" until-", root);
  if (until == std::string::npos || until > gbnf.find('\n', root + kRoot.size())) return;
  const size_t end = gbnf.find_first_not_of("0123456789", until + std::string_view(" until-").size());
  if (gbnf.compare(end, 1, "?") == 0) gbnf.erase(until, end + 1 - until);
}

// Arguments that are no JSON, of a call that was cut off, as far as they are complete. False: there were none.
bool CompleteArguments(common_chat_templates_inputs& inputs) {
  bool any = false;
  for (common_chat_msg& message : inputs.messages) {
    for (common_chat_tool_call& call : message.tool_calls) {
      if (IsJson(call.arguments)) continue;
      call.arguments = CompletedJson(call.arguments);
      any = true;
    }
  }
  return any;
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
  bool shows_tools = false;
  std::vector<std::string> thought_marks;
  std::optional<ClientText> client_text;

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

  // As for a conversation with tools. A template that fails on this one shows none.
  bool ShowsTools() const try {
    constexpr char kName[] = "name_of_a_tool";
    const Tool tool{kName, "Does it.", R"({"type":"object","properties":{}})"};
    const auto inputs = MakeInputs({{{.role = "user", .content = "Hello"}}, {tool}}, {});
    return Apply(inputs, true).prompt.find(kName) != std::string::npos;
  } catch (const std::exception&) {
    return false;
  }

  // Parses `source` ("" for the model's own) and renders one exchange. Throws what the library throws.
  static std::unique_ptr<Parsed> Make(const llama_model* model, const std::string& source) {
    auto out = std::make_unique<Parsed>();
    out->templates = common_chat_templates_init(model, source);
    const auto inputs = MakeInputs({{{.role = "user", .content = "Hello"}}, {}}, {});
    out->Apply(inputs, false);
    const common_chat_params adapted = out->Apply(inputs, true);
    out->stops = adapted.additional_stops;
    out->thinks = adapted.supports_thinking;
    out->thought_marks = adapted.thinking_end_tags;
    out->thought_marks.push_back(adapted.thinking_start_tag);
    out->shows_tools = out->ShowsTools();
    return out;
  }
};

ChatTemplate::ChatTemplate(const Tokenizer& tokenizer, std::unique_ptr<Parsed> parsed)
    : tokenizer_(&tokenizer), parsed_(std::move(parsed)) {
  source_ = common_chat_templates_source(parsed_->templates.get());
  thinks_ = parsed_->thinks;
  shows_tools_ = parsed_->shows_tools;
  parsed_->client_text.emplace(tokenizer, parsed_->thought_marks);
  const auto letter = tokenizer.Encode("a", false, false);
  begins_with_space_ = letter.ok() && tokenizer.Decode(*letter, false).starts_with(' ');
}
ChatTemplate::~ChatTemplate() = default;

Expected<std::unique_ptr<ChatTemplate>> ChatTemplate::FromSource(const Tokenizer& tokenizer,
                                                                 const std::string& override_template) {
  const llama_model* model = tokenizer.vocabulary_->model.get();
  const auto text_of = [&](const char* name) {
    const char* text = llama_model_chat_template(model, name);
    return std::string(text == nullptr ? "" : text);
  };
  std::string main = override_template;
  if (override_template.empty()) {
    const std::string own = text_of(nullptr);
    const std::string tool_use = text_of("tool_use");
    if (own.empty() && tool_use.empty()) return Status(StatusCode::kNotFound, "the model file has no chat template");
    RETURN_IF_ERROR(CheckTemplateShape(own));
    RETURN_IF_ERROR(CheckTemplateShape(tool_use));
    main = own.empty() ? tool_use : own;
  } else {
    RETURN_IF_ERROR(CheckTemplateShape(override_template));
  }
  RETURN_IF_ERROR(TryInChild([&] { Parsed::Make(model, override_template); }));
  try {
    // The library's own initialisation drops the parser's message, so parse once for it.
    if (main != kChatMl) common_chat_template(main, "", "");
    return std::unique_ptr<ChatTemplate>(new ChatTemplate(tokenizer, Parsed::Make(model, override_template)));
  } catch (const std::exception& error) {
    return Status(StatusCode::kInvalidArgument, "the chat template failed: " + Reason(error.what()));
  }
}

Expected<std::unique_ptr<ChatTemplate>> ChatTemplate::Create(const Tokenizer& tokenizer,
                                                             const std::string& override_template) try {
  Expected<std::unique_ptr<ChatTemplate>> wanted = FromSource(tokenizer, override_template);
  if (wanted.ok()) return wanted;
  std::unique_ptr<ChatTemplate> out(
      new ChatTemplate(tokenizer, Parsed::Make(tokenizer.vocabulary_->model.get(), kChatMl)));
  out->is_fallback_ = true;
  out->warning_ = wanted.status().message() + "; using ChatML";
  // A model that never saw the marker as one token writes it as text.
  out->parsed_->stops.push_back(kChatMlStop);
  return out;
} catch (const std::exception& error) {
  return Status(StatusCode::kInternal, "chat template: " + Reason(error.what()));
}

Expected<std::unique_ptr<ChatTemplate>> ChatTemplate::CreateAsGiven(const Tokenizer& tokenizer,
                                                                    const std::string& override_template) {
  return override_template.empty() ? Create(tokenizer) : FromSource(tokenizer, override_template);
}

Expected<ChatPrompt> ChatTemplate::Render(std::span<const ChatMessage> messages, std::span<const Tool> tools,
                                          const ChatOptions& options) const try {
  ASSIGN_OR_RETURN(Conversation conversation, Prepare(messages, tools, options));
  std::string mark;  // where a client's text spells markup
  const ClientText& client_text = *parsed_->client_text;
  if (client_text.SpellsMarkup(conversation.messages, conversation.tools)) {
    ASSIGN_OR_RETURN(mark, client_text.FreeCharacter(conversation.messages, conversation.tools, source_));
    client_text.Break(mark, conversation.messages, conversation.tools);
  }
  common_chat_templates_inputs inputs = MakeInputs(conversation, options);
  const bool adapts = UsesTools(messages, tools) || thinks_;
  ChatPrompt out;
  if (!options.json_schema.empty()) {
    ASSIGN_OR_RETURN(out.grammar.gbnf, JsonSchemaToGbnf(options.json_schema, "json_schema"));
    if (adapts) inputs.json_schema = options.json_schema;
  }
  common_chat_params params;
  try {
    params = parsed_->Apply(inputs, adapts);
  } catch (const std::exception&) {
    // A template that takes arguments as a text has had them as they are; one that wants an object has not.
    if (!CompleteArguments(inputs)) throw;
    params = parsed_->Apply(inputs, adapts);
  }
  if (!mark.empty()) {
    out.breaks = ClientText::TakeOut(mark, params.prompt);
    ClientText::TakeOut(mark, params.grammar);
    ClientText::TakeOut(mark, params.parser);
  }
  out.text = std::move(params.prompt);
  out.stops = parsed_->stops;
  for (const std::string& stop : params.additional_stops) {
    if (std::ranges::find(out.stops, stop) == out.stops.end()) out.stops.push_back(stop);
  }
  if (adapts) RETURN_IF_ERROR(AddFormat(params, inputs, out));
  if (const auto bos = tokenizer_->bos()) {
    const std::string& piece = tokenizer_->Piece(*bos);
    const bool is_own = out.breaks.empty() || out.breaks.front() >= piece.size();
    out.has_bos = is_own && !piece.empty() && out.text.starts_with(piece);
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
  HoldToChoice(inputs, thinks_, out.grammar.gbnf);
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
  const std::string_view text = prompt.text;
  const size_t first_end = prompt.breaks.empty() ? text.size() : prompt.breaks.front();
  ASSIGN_OR_RETURN(std::vector<TokenId> tokens, tokenizer_->Encode(text.substr(0, first_end), false, true));
  for (size_t i = 0; i < prompt.breaks.size(); ++i) {
    const size_t end = i + 1 < prompt.breaks.size() ? prompt.breaks[i + 1] : text.size();
    ASSIGN_OR_RETURN(const std::vector<TokenId> rest,
                     EncodeRest(text.substr(prompt.breaks[i], end - prompt.breaks[i])));
    tokens.insert(tokens.end(), rest.begin(), rest.end());
  }
  if (tokenizer_->adds_bos() && !prompt.has_bos) tokens.insert(tokens.begin(), *tokenizer_->bos());
  return tokens;
}

// Of a text that goes on: where the tokenizer would put a space before its first word, a line end takes that place.
Expected<std::vector<TokenId>> ChatTemplate::EncodeRest(std::string_view text) const {
  if (!begins_with_space_) return tokenizer_->Encode(text, false, true);
  ASSIGN_OR_RETURN(std::vector<TokenId> tokens, tokenizer_->Encode("\n" + std::string(text), false, true));
  std::string seen;
  size_t skipped = 0;
  while (skipped < tokens.size() && !seen.ends_with('\n')) seen += tokenizer_->Piece(tokens[skipped++]);
  if (seen != "\n" && seen != " \n") return tokenizer_->Encode(text, false, true);
  tokens.erase(tokens.begin(), tokens.begin() + static_cast<ptrdiff_t>(skipped));
  return tokens;
}

Expected<std::vector<TokenId>> ChatTemplate::EncodeChat(std::span<const ChatMessage> messages,
                                                        std::span<const Tool> tools, const ChatOptions& options) const {
  ASSIGN_OR_RETURN(const ChatPrompt prompt, Render(messages, tools, options));
  return EncodePrompt(prompt);
}

}  // namespace jointkv::text
