#include "server/answer.h"

#include <algorithm>
#include <bit>
#include <utility>

#include <boost/beast/core/detail/base64.hpp>

#include "text/detokenizer.h"

namespace jointkv::server {
namespace {

using OrderedJson = nlohmann::ordered_json;

constexpr float kLeastLogprob = -9999;  // JSON has no infinity

std::string Dump(const OrderedJson& json) { return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace); }
std::string Quoted(const std::string& text) { return Dump(OrderedJson(text)); }

float Finite(float logprob) { return logprob > kLeastLogprob ? logprob : kLeastLogprob; }

// Those that begin in it: what a token of half a character goes on with is counted once.
int Characters(const std::string& text) {
  return static_cast<int>(std::ranges::count_if(text, [](char c) { return (c & 0xC0) != 0x80; }));
}

OrderedJson TokenEntry(const text::Tokenizer& tokenizer, TokenId token, float logprob) {
  const std::string& piece = tokenizer.Piece(token);
  OrderedJson bytes = OrderedJson::array();
  for (const char c : piece) bytes.push_back(static_cast<unsigned char>(c));
  return {{"token", text::SanitizeUtf8(piece)}, {"logprob", Finite(logprob)}, {"bytes", std::move(bytes)}};
}

// 32-bit floats, least significant byte first, as OpenAI's clients read them.
std::string Base64(const std::vector<float>& vector) {
  static_assert(std::endian::native == std::endian::little);
  std::string text(boost::beast::detail::base64::encoded_size(vector.size() * sizeof(float)), '\0');
  text.resize(boost::beast::detail::base64::encode(text.data(), vector.data(), vector.size() * sizeof(float)));
  return text;
}

text::ChatDelta Content(const std::string& text) {
  text::ChatDelta delta;
  delta.content = text;
  return delta;
}

// Adds what came later.
void Join(text::ChatDelta&& later, text::ChatDelta& delta) {
  delta.reasoning += later.reasoning;
  delta.content += later.content;
  for (text::ToolCallDelta& call : later.tool_calls) delta.tool_calls.push_back(std::move(call));
}

std::string DeltaText(const text::ChatDelta& delta) {
  OrderedJson json = OrderedJson::object();
  if (!delta.reasoning.empty()) json["reasoning_content"] = delta.reasoning;
  if (!delta.content.empty()) json["content"] = delta.content;
  for (const text::ToolCallDelta& call : delta.tool_calls) {
    OrderedJson row = {{"index", call.index}};
    if (!call.id.empty()) row.update({{"id", call.id}, {"type", "function"}});
    if (!call.name.empty()) row["function"]["name"] = call.name;
    row["function"]["arguments"] = call.arguments;
    json["tool_calls"].push_back(std::move(row));
  }
  return Dump(json);
}

OrderedJson NoCompletionLogprobs() {
  const OrderedJson none = OrderedJson::array();
  return {{"text_offset", none}, {"token_logprobs", none}, {"tokens", none}, {"top_logprobs", none}};
}

}  // namespace

Answer::Answer(const GenerationCall& call, Head head, const Prepared& prepared, const text::Tokenizer& tokenizer)
    : tokenizer_(tokenizer),
      head_(std::move(head)),
      chat_(call.chat),
      stream_(call.stream),
      include_usage_(call.include_usage),
      usage_in_chunks_(call.usage_in_chunks),
      reports_kv_(call.reports_kv),
      embeds_(call.embed),
      base64_(call.base64),
      has_logprobs_(call.sampling.logprobs >= 0),
      n_(call.sampling.n),
      prompts_(prepared.echoed),
      cached_tokens_(prepared.requests.size(), 0),
      choices_(prepared.requests.size() * static_cast<size_t>(call.sampling.n)),
      open_choices_(choices_.size()) {
  for (const engine::Request& request : prepared.requests) {
    prompt_tokens_.push_back(static_cast<int>(request.prompt.size()));
  }
  if (call.echo) {
    for (const TextOrTokens& prompt : call.prompts) {
      const auto* tokens = std::get_if<std::vector<TokenId>>(&prompt);
      echoes_.push_back(
          text::SanitizeUtf8(tokens != nullptr ? tokenizer.Decode(*tokens, true) : std::get<std::string>(prompt)));
    }
  }
  for (size_t i = 0; i < choices_.size(); ++i) {
    Choice& choice = choices_[i];
    if (prepared.format != nullptr) choice.parser.emplace(prepared.format);
    if (has_logprobs_) choice.logprobs = chat_ ? OrderedJson::array() : NoCompletionLogprobs();
    if (echoes_.empty()) continue;
    choice.text = echoes_[i / static_cast<size_t>(n_)];
    choice.text_offset = Characters(choice.text);
  }
  const OrderedJson begin = {{"id", head_.id},
                             {"object", chat_ ? "chat.completion.chunk" : "text_completion"},
                             {"created", head_.created_s},
                             {"model", head_.model}};
  chunk_begin_ = "data: " + Dump(begin);
  chunk_begin_.pop_back();
  chunk_begin_ += ",\"choices\":[";
}

Answer::Counts Answer::counts() const {
  Counts counts;
  for (const int tokens : prompt_tokens_) counts.prompt_tokens += tokens;
  for (const int tokens : cached_tokens_) counts.cached_tokens += tokens;
  for (const Choice& choice : choices_) counts.output_tokens += choice.output_tokens;
  return counts;
}

void Answer::Take(size_t prompt, const Delivery& delivery, std::string& events) {
  const engine::Event& event = delivery.event;
  const size_t index = IndexOf(prompt, event.choice);
  Choice& choice = choices_[index];
  if (delivery.kv) kv_ = delivery.kv;
  if (event.token >= 0) ++choice.output_tokens;
  text::ChatDelta delta = choice.parser ? choice.parser->Append(event.text) : Content(event.text);
  if (event.finish != engine::FinishReason::kNone) {
    cached_tokens_[prompt] = event.cached_tokens;
    if (choice.parser) Join(choice.parser->Finish(), delta);
    const bool calls = choice.parser && !choice.parser->tool_calls().empty();
    const bool stops = event.finish == engine::FinishReason::kStop;
    finish_reason_ = choice.finish_reason = calls && stops ? "tool_calls" : engine::FinishReasonName(event.finish);
    --open_choices_;
  }
  OrderedJson prompt_logprobs;
  if (has_logprobs_ && !event.prompt_logprobs.empty()) {
    if (stream_) prompt_logprobs = NoCompletionLogprobs();
    AddPromptLogprobs(prompt, event, choice, stream_ ? prompt_logprobs : choice.logprobs);
  }
  OrderedJson logprobs;
  if (has_logprobs_ && event.token >= 0) {
    OrderedJson& target = stream_ ? logprobs : choice.logprobs;
    if (chat_) {
      if (stream_) target = OrderedJson::array();
      target.push_back(ChatLogprob(event));
    } else {
      if (stream_) target = NoCompletionLogprobs();
      AddCompletionLogprob(event.token, event.logprobs, choice, target);
    }
  }
  if (!event.embedding.empty()) choice.embedding = event.embedding;
  if (!stream_) {
    if (!choice.parser) choice.text += event.text;
    return;
  }
  if (!choice.began) AppendFirstChunk(index, prompt_logprobs, events);
  choice.began = true;
  if (delta.empty() && logprobs.is_null() && choice.finish_reason == nullptr) return;
  AppendChunk(index, delta, logprobs, choice.finish_reason, events);
}

OrderedJson Answer::ChatLogprob(const engine::Event& event) const {
  OrderedJson entry = TokenEntry(tokenizer_, event.token, event.logprobs.chosen);
  OrderedJson& top = entry["top_logprobs"] = OrderedJson::array();
  for (const engine::TokenLogprob& other : event.logprobs.top) {
    top.push_back(TokenEntry(tokenizer_, other.token, other.logprob));
  }
  return entry;
}

void Answer::AddCompletionLogprob(TokenId token, const engine::SampledLogprobs& logprobs, Choice& choice,
                                  OrderedJson& arrays) const {
  const std::string piece = text::SanitizeUtf8(tokenizer_.Piece(token));
  OrderedJson top = OrderedJson::object();
  for (const engine::TokenLogprob& other : logprobs.top) {
    top.emplace(text::SanitizeUtf8(tokenizer_.Piece(other.token)), Finite(other.logprob));
  }
  top.emplace(piece, Finite(logprobs.chosen));
  arrays["text_offset"].push_back(choice.text_offset);
  arrays["token_logprobs"].push_back(Finite(logprobs.chosen));
  arrays["tokens"].push_back(piece);
  arrays["top_logprobs"].push_back(std::move(top));
  choice.text_offset += Characters(tokenizer_.Piece(token));
}

// The first token has none: null.
void Answer::AddPromptLogprobs(size_t prompt, const engine::Event& event, Choice& choice, OrderedJson& arrays) const {
  const int end = choice.text_offset;
  const std::vector<TokenId>& tokens = prompts_[prompt];
  // One that the tokenizer put before the text is not of it.
  const std::string& first = tokenizer_.Piece(tokens[0]);
  const bool added = tokenizer_.bos() == tokens[0] && !echoes_.empty() && !echoes_[prompt].starts_with(first);
  choice.text_offset = added ? -Characters(first) : 0;
  for (size_t i = 0; i < event.prompt_logprobs.size(); ++i) {
    AddCompletionLogprob(tokens[i], event.prompt_logprobs[i], choice, arrays);
  }
  if (added) arrays["text_offset"][0] = 0;
  arrays["token_logprobs"][0] = nullptr;
  arrays["top_logprobs"][0] = nullptr;
  choice.text_offset = end;
}

void Answer::AppendChunk(size_t index, const text::ChatDelta& delta, const OrderedJson& logprobs,
                         const char* finish_reason, std::string& events) const {
  events += chunk_begin_;
  events += "{\"index\":" + std::to_string(index);
  if (chat_) {
    events += ",\"delta\":" + DeltaText(delta);
  } else {
    events += ",\"text\":" + Quoted(delta.content);
  }
  if (logprobs.is_null()) {
    events += ",\"logprobs\":null";
  } else {
    events += ",\"logprobs\":" + Dump(chat_ ? OrderedJson{{"content", logprobs}} : logprobs);
  }
  events += ",\"finish_reason\":";
  events += finish_reason == nullptr ? std::string("null") : "\"" + std::string(finish_reason) + "\"";
  events += "}" + ChunkEnd();
}

// After a chunk's choice. OpenAI's chunks have a usage, of null, where the last one has it.
std::string Answer::ChunkEnd() const {
  if (!include_usage_) return "]}\n\n";
  return "],\"usage\":" + (usage_in_chunks_ ? Dump(Usage()) : "null") + "}\n\n";
}

void Answer::AppendFirstChunk(size_t index, const OrderedJson& prompt_logprobs, std::string& events) const {
  if (!chat_) {
    if (!echoes_.empty()) AppendChunk(index, Content(choices_[index].text), prompt_logprobs, nullptr, events);
    return;
  }
  events += chunk_begin_ + "{\"index\":" + std::to_string(index) +
            ",\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}" +
            ChunkEnd();
}

void Answer::AppendEnd(std::string& events) const {
  if (include_usage_ || reports_kv_) {
    events += chunk_begin_ + "]";
    if (include_usage_) events += ",\"usage\":" + Dump(Usage());
    if (reports_kv_) events += ",\"kv\":" + Dump(Kv());
    events += "}\n\n";
  }
  events += "data: [DONE]\n\n";
}

std::string Answer::Body() const {
  if (embeds_) return Embeddings();
  OrderedJson body = {{"id", head_.id},
                      {"object", chat_ ? "chat.completion" : "text_completion"},
                      {"created", head_.created_s},
                      {"model", head_.model},
                      {"choices", OrderedJson::array()}};
  for (size_t i = 0; i < choices_.size(); ++i) {
    const Choice& choice = choices_[i];
    OrderedJson row = {{"index", i}};
    if (chat_) {
      row["message"] = Message(choice);
    } else {
      row["text"] = choice.text;
    }
    row["logprobs"] = !has_logprobs_ ? OrderedJson(nullptr)
                      : chat_        ? OrderedJson{{"content", choice.logprobs}}
                                     : choice.logprobs;
    row["finish_reason"] = choice.finish_reason == nullptr ? "stop" : choice.finish_reason;
    body["choices"].push_back(std::move(row));
  }
  body["usage"] = Usage();
  if (reports_kv_) body["kv"] = Kv();
  return Dump(body);
}

std::string Answer::Embeddings() const {
  OrderedJson body = {{"object", "list"}, {"data", OrderedJson::array()}, {"model", head_.model}};
  for (size_t i = 0; i < choices_.size(); ++i) {
    const std::vector<float>& vector = choices_[i].embedding;
    body["data"].push_back({{"object", "embedding"}, {"index", i}});
    OrderedJson& row = body["data"].back()["embedding"];
    if (base64_) {
      row = Base64(vector);
    } else {
      row = vector;
    }
  }
  const int tokens = counts().prompt_tokens;
  body["usage"] = {{"prompt_tokens", tokens}, {"total_tokens", tokens}};
  return Dump(body);
}

OrderedJson Answer::Message(const Choice& choice) const {
  if (!choice.parser) return {{"role", "assistant"}, {"content", choice.text}};
  const text::ChatOutputParser& parsed = *choice.parser;
  OrderedJson message = {{"role", "assistant"}, {"content", parsed.content()}};
  if (!parsed.reasoning().empty()) message["reasoning_content"] = parsed.reasoning();
  if (parsed.tool_calls().empty()) return message;
  if (parsed.content().empty()) message["content"] = nullptr;
  OrderedJson& calls = message["tool_calls"] = OrderedJson::array();
  for (const text::ToolCall& call : parsed.tool_calls()) {
    calls.push_back({{"id", call.id},
                     {"type", "function"},
                     {"function", {{"name", call.name}, {"arguments", call.arguments_json}}}});
  }
  return message;
}

OrderedJson Answer::Usage() const {
  const Counts sum = counts();
  return {{"prompt_tokens", sum.prompt_tokens},
          {"completion_tokens", sum.output_tokens},
          {"total_tokens", sum.prompt_tokens + sum.output_tokens},
          {"prompt_tokens_details", {{"cached_tokens", sum.cached_tokens}}}};
}

// Of all that ran beside this call; null where it ended with its first token.
OrderedJson Answer::Kv() const {
  if (!kv_) return nullptr;
  const auto ratio = [](double a, double b) { return b > 0 ? OrderedJson(a / b) : OrderedJson(nullptr); };
  return {{"compression", ratio(static_cast<double>(kv_->logical_bytes), static_cast<double>(kv_->running_bytes))},
          {"logical_bytes", kv_->logical_bytes},
          {"physical_bytes", kv_->running_bytes},
          {"fused_share", ratio(static_cast<double>(kv_->fused), static_cast<double>(kv_->offered))}};
}

std::string ErrorEvent(const ApiError& error) { return "data: " + ErrorBody(error) + "\n\n"; }

}  // namespace jointkv::server
