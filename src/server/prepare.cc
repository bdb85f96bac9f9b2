#include "server/prepare.h"

#include <algorithm>
#include <utility>

namespace jointkv::server {
namespace {

// An upper bound of the JSON for one token of an answer that is not streamed.
constexpr uint64_t kTokenBytes = 16;
constexpr uint64_t kLogprobBytes = 160;

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
  if (call.names_max_tokens) {
    throw ContextExceeded("max_tokens", std::to_string(most) + " and a prompt of " + TokensText(prompt.size()) +
                                            " exceed a context of " +
                                            TokensText(static_cast<size_t>(model.context_max)));
  }
  most = room;
}

// An answer that is collected before it is sent must have a bound.
void CheckAnswerSize(const GenerationCall& call, size_t prompts, const Limits& limits) {
  if (call.stream) return;
  const engine::SamplingParams& sampling = call.sampling;
  const uint64_t token_bytes =
      kTokenBytes + (sampling.logprobs < 0 ? 0 : kLogprobBytes * static_cast<uint64_t>(sampling.logprobs + 1));
  const uint64_t bytes =
      prompts * static_cast<uint64_t>(sampling.n) * static_cast<uint64_t>(sampling.max_tokens) * token_bytes;
  if (bytes <= limits.response_bytes_max) return;
  throw BadField("max_tokens", "an answer of up to " + std::to_string(bytes) + " bytes is above the limit of " +
                                   std::to_string(limits.response_bytes_max) +
                                   ": ask for fewer tokens, choices or logprobs, or for a stream");
}

}  // namespace

std::vector<TokenId> Encode(const std::string& text, const std::string& field, const ModelInfo& model,
                            bool add_special) {
  CheckTextLength(text.size(), field, model);
  Expected<std::vector<TokenId>> tokens = model.tokenizer->Encode(text, add_special, true);
  if (!tokens.ok()) throw BadField(field, tokens.status().message());
  return std::move(tokens).value();
}

std::vector<TokenId> EncodeMessages(const std::vector<text::ChatMessage>& messages, const ModelInfo& model,
                                    bool add_generation_prompt, std::vector<std::string>* stops) {
  size_t bytes = 0;
  for (const text::ChatMessage& message : messages) bytes += message.content.size();
  CheckTextLength(bytes, "messages", model);
  text::ChatOptions options;
  options.add_generation_prompt = add_generation_prompt;
  const Expected<text::ChatPrompt> prompt = model.chat_template->Render(messages, {}, options);
  if (!prompt.ok()) throw BadField("messages", prompt.status().message());
  Expected<std::vector<TokenId>> tokens = model.chat_template->EncodePrompt(*prompt);
  if (!tokens.ok()) throw BadField("messages", tokens.status().message());
  if (stops != nullptr) *stops = prompt->stops;
  return std::move(tokens).value();
}

std::vector<engine::Request> Prepare(const GenerationCall& call, const ModelInfo& model, const Limits& limits) {
  GenerationCall checked = call;
  if (const Status status = Validate(call.sampling, model.n_vocab, model.sampling_limits); !status.ok()) {
    throw FromEngine(status);
  }
  if (call.sampling.n > model.choices_max) {
    throw BadField("n", std::to_string(call.sampling.n) + " is more than " + std::to_string(model.choices_max) +
                            ", what runs at once");
  }
  std::vector<std::vector<TokenId>> prompts;
  std::vector<std::string> stops;
  if (call.chat) prompts.push_back(EncodeMessages(call.messages, model, true, &stops));
  for (size_t i = 0; i < call.prompts.size(); ++i) {
    const std::string field = call.prompts.size() == 1 ? "prompt" : At("prompt", i);
    const auto* tokens = std::get_if<std::vector<TokenId>>(&call.prompts[i]);
    prompts.push_back(tokens != nullptr ? *tokens : Encode(std::get<std::string>(call.prompts[i]), field, model));
    for (const TokenId token : prompts.back()) {
      if (token >= 0 && token < model.n_vocab) continue;
      throw BadField(
          field, "token " + std::to_string(token) + " is not in the vocabulary of " + std::to_string(model.n_vocab));
    }
  }
  std::vector<engine::Request> requests;
  for (std::vector<TokenId>& prompt : prompts) {
    checked.sampling = call.sampling;
    CheckContext(prompt, checked, call.chat ? "messages" : "prompt", model);
    CheckAnswerSize(checked, prompts.size(), limits);
    engine::Request& request = requests.emplace_back();
    request.prompt = std::move(prompt);
    request.sampling = checked.sampling;
    request.sampling.stop.insert(request.sampling.stop.end(), stops.begin(), stops.end());
    request.kv_fusion = call.kv_fusion;
  }
  return requests;
}

}  // namespace jointkv::server
