#include "server/answer.h"

#include <algorithm>
#include <utility>

#include "text/detokenizer.h"

namespace jointkv::server {
namespace {

using OrderedJson = nlohmann::ordered_json;

constexpr float kLeastLogprob = -9999;  // JSON has no infinity

std::string Dump(const OrderedJson& json) { return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace); }
std::string Quoted(const std::string& text) { return Dump(OrderedJson(text)); }

float Finite(float logprob) { return logprob > kLeastLogprob ? logprob : kLeastLogprob; }

int Characters(const std::string& text) {
  return static_cast<int>(std::ranges::count_if(text, [](char c) { return (c & 0xC0) != 0x80; }));
}

OrderedJson TokenEntry(const text::Tokenizer& tokenizer, TokenId token, float logprob) {
  const std::string& piece = tokenizer.Piece(token);
  OrderedJson bytes = OrderedJson::array();
  for (const char c : piece) bytes.push_back(static_cast<unsigned char>(c));
  return {{"token", text::SanitizeUtf8(piece)}, {"logprob", Finite(logprob)}, {"bytes", std::move(bytes)}};
}

OrderedJson NoCompletionLogprobs() {
  const OrderedJson none = OrderedJson::array();
  return {{"text_offset", none}, {"token_logprobs", none}, {"tokens", none}, {"top_logprobs", none}};
}

}  // namespace

Answer::Answer(const GenerationCall& call, Head head, const std::vector<int>& prompt_tokens,
               const text::Tokenizer& tokenizer)
    : tokenizer_(tokenizer),
      head_(std::move(head)),
      chat_(call.chat),
      stream_(call.stream),
      include_usage_(call.include_usage),
      reports_kv_(call.reports_kv),
      has_logprobs_(call.sampling.logprobs >= 0),
      n_(call.sampling.n),
      prompt_tokens_(prompt_tokens),
      cached_tokens_(prompt_tokens.size(), 0),
      choices_(prompt_tokens.size() * static_cast<size_t>(call.sampling.n)),
      open_choices_(choices_.size()) {
  if (call.echo) {
    for (const TextOrTokens& prompt : call.prompts) {
      const auto* tokens = std::get_if<std::vector<TokenId>>(&prompt);
      echoes_.push_back(
          text::SanitizeUtf8(tokens != nullptr ? tokenizer.Decode(*tokens, true) : std::get<std::string>(prompt)));
    }
  }
  for (size_t i = 0; i < choices_.size(); ++i) {
    Choice& choice = choices_[i];
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
  if (event.finish != engine::FinishReason::kNone) {
    cached_tokens_[prompt] = event.cached_tokens;
    finish_reason_ = choice.finish_reason = engine::FinishReasonName(event.finish);
    --open_choices_;
  }
  OrderedJson logprobs;
  if (has_logprobs_ && event.token >= 0) {
    OrderedJson& target = stream_ ? logprobs : choice.logprobs;
    if (chat_) {
      if (stream_) target = OrderedJson::array();
      target.push_back(ChatLogprob(event));
    } else {
      if (stream_) target = NoCompletionLogprobs();
      AddCompletionLogprob(event, choice, target);
    }
  }
  if (!stream_) {
    choice.text += event.text;
    return;
  }
  if (!choice.began) AppendFirstChunk(index, events);
  choice.began = true;
  if (event.text.empty() && logprobs.is_null() && choice.finish_reason == nullptr) return;
  AppendChunk(index, event.text, logprobs, choice.finish_reason, events);
}

OrderedJson Answer::ChatLogprob(const engine::Event& event) const {
  OrderedJson entry = TokenEntry(tokenizer_, event.token, event.logprobs.chosen);
  OrderedJson& top = entry["top_logprobs"] = OrderedJson::array();
  for (const engine::TokenLogprob& other : event.logprobs.top) {
    top.push_back(TokenEntry(tokenizer_, other.token, other.logprob));
  }
  return entry;
}

void Answer::AddCompletionLogprob(const engine::Event& event, Choice& choice, OrderedJson& arrays) const {
  const std::string token = text::SanitizeUtf8(tokenizer_.Piece(event.token));
  OrderedJson top = OrderedJson::object();
  for (const engine::TokenLogprob& other : event.logprobs.top) {
    top.emplace(text::SanitizeUtf8(tokenizer_.Piece(other.token)), Finite(other.logprob));
  }
  top.emplace(token, Finite(event.logprobs.chosen));
  arrays["text_offset"].push_back(choice.text_offset);
  arrays["token_logprobs"].push_back(Finite(event.logprobs.chosen));
  arrays["tokens"].push_back(token);
  arrays["top_logprobs"].push_back(std::move(top));
  choice.text_offset += Characters(token);
}

void Answer::AppendChunk(size_t index, const std::string& text, const OrderedJson& logprobs, const char* finish_reason,
                         std::string& events) const {
  events += chunk_begin_;
  events += "{\"index\":" + std::to_string(index);
  if (chat_) {
    events += text.empty() ? std::string(",\"delta\":{}") : ",\"delta\":{\"content\":" + Quoted(text) + "}";
  } else {
    events += ",\"text\":" + Quoted(text);
  }
  if (logprobs.is_null()) {
    events += ",\"logprobs\":null";
  } else {
    events += ",\"logprobs\":" + Dump(chat_ ? OrderedJson{{"content", logprobs}} : logprobs);
  }
  events += ",\"finish_reason\":";
  events += finish_reason == nullptr ? std::string("null") : "\"" + std::string(finish_reason) + "\"";
  events += include_usage_ ? "}],\"usage\":null}\n\n" : "}]}\n\n";
}

void Answer::AppendFirstChunk(size_t index, std::string& events) const {
  if (!chat_) {
    if (!echoes_.empty()) AppendChunk(index, choices_[index].text, nullptr, nullptr, events);
    return;
  }
  events += chunk_begin_ + "{\"index\":" + std::to_string(index) +
            ",\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}]" +
            (include_usage_ ? ",\"usage\":null" : "") + "}\n\n";
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
  OrderedJson body = {{"id", head_.id},
                      {"object", chat_ ? "chat.completion" : "text_completion"},
                      {"created", head_.created_s},
                      {"model", head_.model},
                      {"choices", OrderedJson::array()}};
  for (size_t i = 0; i < choices_.size(); ++i) {
    const Choice& choice = choices_[i];
    OrderedJson row = {{"index", i}};
    if (chat_) {
      row["message"] = {{"role", "assistant"}, {"content", choice.text}};
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
