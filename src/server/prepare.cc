#include "server/prepare.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "text/grammar.h"

namespace jointkv::server {
namespace {

// An upper bound of the JSON for one token of an answer that is not streamed.
constexpr uint64_t kTokenBytes = 16;
constexpr uint64_t kLogprobBytes = 160;
constexpr uint64_t kFloatBytes = 24;

std::string TokensText(size_t tokens) { return std::to_string(tokens) + " tokens"; }

// Tokenising takes time in proportion to the text: only what may fit is worth it.
void CheckTextLength(size_t bytes, const std::string& field, const ModelInfo& model) {
  const size_t most = static_cast<size_t>(model.context_max) * std::max<size_t>(model.longest_piece_bytes, 1);
  if (bytes <= most) return;
  throw ContextExceeded(field, std::to_string(bytes) + " bytes are more than a context of " +
                                   TokensText(static_cast<size_t>(model.context_max)) + " can hold");
}

void CheckContext(const std::vector<TokenId>& prompt, GenerationCall& call, const std::string& field,
                  const ModelInfo& model) {
  const int room = model.context_max - static_cast<int>(std::min<size_t>(prompt.size(), 1U << 30));
  if (prompt.empty()) throw BadField(field, "is empty");
  if (room < 1) {
    throw ContextExceeded(field, TokensText(prompt.size()) + " leave no room in a context of " +
                                     TokensText(static_cast<size_t>(model.context_max)));
  }
  int& most = call.sampling.max_tokens;
  if (most <= room) return;
  if (!call.max_tokens_field.empty()) {
    throw ContextExceeded(call.max_tokens_field, std::to_string(most) + " and a prompt of " +
                                                     TokensText(prompt.size()) + " exceed a context of " +
                                                     TokensText(static_cast<size_t>(model.context_max)));
  }
  most = room;
}

// An answer that is collected before it is sent must have a bound: one that the client set, or as many tokens as may be
// sent.
void CheckAnswerSize(GenerationCall& call, size_t prompts, size_t prompt_tokens, int embedding_size,
                     const Limits& limits) {
  if (call.stream && !call.echo) return;
  if (call.embed) {
    const uint64_t bytes = prompts * static_cast<uint64_t>(embedding_size) * kFloatBytes;
    if (bytes <= limits.response_bytes_max) return;
    throw BadField("input", "an answer of up to " + std::to_string(bytes) + " bytes is above the limit of " +
                                std::to_string(limits.response_bytes_max));
  }
  engine::SamplingParams& sampling = call.sampling;
  const uint64_t token_bytes =
      kTokenBytes + (sampling.logprobs < 0 ? 0 : kLogprobBytes * static_cast<uint64_t>(sampling.logprobs + 1));
  const uint64_t echoed = call.echo ? prompt_tokens : 0;
  const uint64_t all = prompts * static_cast<uint64_t>(sampling.n) * token_bytes;  // for one token of each answer
  const uint64_t bytes = (static_cast<uint64_t>(sampling.max_tokens) + echoed) * all;
  if (bytes <= limits.response_bytes_max) return;
  if (call.max_tokens_field.empty() && limits.response_bytes_max / all > echoed) {
    sampling.max_tokens = static_cast<int>(limits.response_bytes_max / all - echoed);
    return;
  }
  throw BadField(call.max_tokens_field.empty() ? "max_tokens" : call.max_tokens_field,
                 "an answer of up to " + std::to_string(bytes) + " bytes is above the limit of " +
                     std::to_string(limits.response_bytes_max) +
                     ": ask for fewer tokens, choices or logprobs, or for a stream");
}

// What the room text says of a chat, by the API's name.
ApiError ChatError(const Status& status, const std::string& schema_field) {
  const std::string& message = status.message();
  const std::string field = message.substr(0, message.find_first_of(":[ "));
  if (field == "parameters") return BadField("tools", message);  // of a tool
  for (const char* name : {"tools", "tool_choice"}) {
    if (field == name) return {.message = message, .param = name, .code = "invalid_value"};
  }
  return BadField(field == "json_schema" ? schema_field : "messages", message);
}

text::ChatPrompt Render(const std::vector<text::ChatMessage>& messages, const std::vector<text::Tool>& tools,
                        const text::ChatOptions& options, const ModelInfo& model,
                        const std::string& schema_field = "") {
  size_t bytes = 0;
  for (const text::ChatMessage& message : messages) {
    bytes += message.content.size();
    for (const text::ToolCall& call : message.tool_calls) bytes += call.name.size() + call.arguments_json.size();
  }
  for (const text::Tool& tool : tools) bytes += tool.description.size() + tool.parameters_json.size();
  CheckTextLength(bytes, "messages", model);
  Expected<text::ChatPrompt> prompt = model.chat_template->Render(messages, tools, options);
  if (!prompt.ok()) throw ChatError(prompt.status(), schema_field);
  return std::move(prompt).value();
}

std::vector<TokenId> EncodePrompt(const text::ChatPrompt& prompt, const ModelInfo& model) {
  Expected<std::vector<TokenId>> tokens = model.chat_template->EncodePrompt(prompt);
  if (!tokens.ok()) throw BadField("messages", tokens.status().message());
  return std::move(tokens).value();
}

std::shared_ptr<text::Grammar> CompileGrammar(const GenerationCall& call, const text::ChatPrompt& chat,
                                              const ModelInfo& model) {
  if (!call.has_grammar()) return nullptr;
  const auto checked = [&](Expected<std::shared_ptr<text::Grammar>> grammar) {
    if (!grammar.ok()) throw BadField(call.tools.empty() ? call.schema_field : "tools", grammar.status().message());
    return std::move(grammar).value();
  };
  if (!call.chat) return checked(text::Grammar::FromJsonSchema(*model.tokenizer, call.json_schema));
  if (chat.grammar.empty()) return nullptr;
  return checked(text::Grammar::Compile(*model.tokenizer, chat.grammar));
}

}  // namespace

std::vector<TokenId> Encode(const std::string& text, const std::string& field, const ModelInfo& model,
                            bool add_special) {
  CheckTextLength(text.size(), field, model);
  Expected<std::vector<TokenId>> tokens = model.tokenizer->Encode(text, add_special, true);
  if (!tokens.ok()) throw BadField(field, tokens.status().message());
  return std::move(tokens).value();
}

std::vector<TokenId> EncodeConversation(const GenerationCall& call, const ModelInfo& model,
                                        bool add_generation_prompt) {
  text::ChatOptions options = call.chat_options();
  options.add_generation_prompt = add_generation_prompt;
  return EncodePrompt(Render(call.messages, call.tools, options, model), model);
}

Prepared Prepare(const GenerationCall& call, const ModelInfo& model, const Limits& limits, HeldBytes::Hold held) {
  GenerationCall checked = call;
  engine::SamplingParams with_output = call.sampling;
  with_output.max_tokens = std::max(with_output.max_tokens, 1);
  if (const Status status = Validate(with_output, model.n_vocab, model.sampling_limits); !status.ok()) {
    throw FromEngine(status);
  }
  if (call.sampling.n > model.choices_max) {
    throw BadField("n", std::to_string(call.sampling.n) + " is more than " + std::to_string(model.choices_max) +
                            ", what runs at once");
  }
  if (call.dimensions.value_or(model.embedding_size) != model.embedding_size) {
    throw BadField("dimensions",
                   std::to_string(*call.dimensions) + " is not the model's " + std::to_string(model.embedding_size));
  }
  std::vector<std::vector<TokenId>> prompts;
  text::ChatPrompt chat;
  if (call.chat) {
    chat = Render(call.messages, call.tools, call.chat_options(), model, call.schema_field);
    prompts.push_back(EncodePrompt(chat, model));
  }
  const std::string name = call.chat ? "messages" : call.embed ? "input" : "prompt";
  for (size_t i = 0; i < call.prompts.size(); ++i) {
    const std::string field = call.prompts.size() == 1 ? name : At(name, i);
    const auto* tokens = std::get_if<std::vector<TokenId>>(&call.prompts[i]);
    prompts.push_back(tokens != nullptr ? *tokens : Encode(std::get<std::string>(call.prompts[i]), field, model));
    for (const TokenId token : prompts.back()) {
      if (token >= 0 && token < model.n_vocab) continue;
      throw BadField(
          field, "token " + std::to_string(token) + " is not in the vocabulary of " + std::to_string(model.n_vocab));
    }
  }
  Prepared prepared;
  prepared.format = chat.format;
  const std::shared_ptr<text::Grammar> grammar = CompileGrammar(call, chat, model);
  prepared.held = std::move(held);
  if (!prepared.held.Set(grammar == nullptr ? 0 : grammar->bytes())) {
    throw Unavailable("server_busy", "the server holds as many grammars and requests as --max-held-bytes allows");
  }
  for (std::vector<TokenId>& prompt : prompts) {
    checked.sampling = call.sampling;
    CheckContext(prompt, checked, name, model);
    CheckAnswerSize(checked, prompts.size(), prompt.size(), model.embedding_size, limits);
    engine::Request& request = prepared.requests.emplace_back();
    request.prompt = std::move(prompt);
    request.sampling = checked.sampling;
    request.sampling.stop.insert(request.sampling.stop.end(), chat.stops.begin(), chat.stops.end());
    request.visible_tokens = chat.visible_tokens;
    request.grammar = grammar;
    request.kv_fusion = call.kv_fusion;
    request.embed = call.embed;
    if (call.echo && call.sampling.logprobs >= 0) request.prompt_logprobs = call.sampling.logprobs;
    if (call.echo && call.sampling.max_tokens == 0) request.prompt_logprobs = std::max(call.sampling.logprobs, 0);
    if (request.prompt_logprobs >= 0) prepared.echoed.push_back(request.prompt);
  }
  return prepared;
}

}  // namespace jointkv::server
