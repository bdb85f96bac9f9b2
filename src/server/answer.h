// What a call is answered with, in OpenAI's shapes: collected and given at the end, or as server-sent events.
//
// Answer. Threads: one at a time. Owns: texts and logprobs so far when it collects, counts only when it streams; the
// tokenizer must outlive it. Fails how: never.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "server/engine_thread.h"
#include "server/openai_schema.h"
#include "server/prepare.h"
#include "text/chat_output.h"
#include "text/tokenizer.h"

namespace jointkv::server {

class Answer {
 public:
  struct Head {
    std::string id;
    std::string model;
    int64_t created_s = 0;  // Unix time
  };
  struct Counts {
    int prompt_tokens = 0;
    int cached_tokens = 0;
    int output_tokens = 0;
  };

  Answer(const GenerationCall& call, Head head, const Prepared& prepared, const text::Tokenizer& tokenizer);

  bool streams() const { return stream_; }
  bool complete() const { return open_choices_ == 0; }
  Counts counts() const;
  const char* finish_reason() const { return finish_reason_; }  // of the choice that ended last

  // Adds what happened to a choice of prompt number `prompt`; in a stream, `events` grows by what is to be sent.
  void Take(size_t prompt, const Delivery& delivery, std::string& events);

  void AppendEnd(std::string& events) const;  // stream: usage, [DONE]
  std::string Body() const;                   // not a stream: when complete

 private:
  using OrderedJson = nlohmann::ordered_json;

  struct Choice {
    std::string text;
    std::vector<float> embedding;
    OrderedJson logprobs;  // chat: entries; completions: the four arrays
    std::optional<text::ChatOutputParser> parser;
    int text_offset = 0;  // completions: characters before the next token
    int output_tokens = 0;
    bool began = false;  // a stream's first chunk is out
    const char* finish_reason = nullptr;
  };

  size_t IndexOf(size_t prompt, int choice) const {
    return prompt * static_cast<size_t>(n_) + static_cast<size_t>(choice);
  }
  OrderedJson ChatLogprob(const engine::Event& event) const;
  void AddCompletionLogprob(TokenId token, const engine::SampledLogprobs& logprobs, Choice& choice,
                            OrderedJson& arrays) const;
  void AddPromptLogprobs(size_t prompt, const engine::Event& event, Choice& choice, OrderedJson& arrays) const;
  void AppendChunk(size_t index, const text::ChatDelta& delta, const OrderedJson& logprobs, const char* finish_reason,
                   std::string& events) const;
  OrderedJson Message(const Choice& choice) const;
  std::string Embeddings() const;
  void AppendFirstChunk(size_t index, const OrderedJson& prompt_logprobs, std::string& events) const;
  std::string ChunkEnd() const;
  OrderedJson Usage() const;
  OrderedJson Kv() const;

  const text::Tokenizer& tokenizer_;
  Head head_;
  bool chat_;
  bool stream_;
  bool include_usage_;
  bool usage_in_chunks_;
  bool reports_kv_;
  bool embeds_;
  bool base64_;
  bool has_logprobs_;
  int n_;
  std::string chunk_begin_;                    // "data: {...\"choices\":[{\"index\":"
  std::vector<std::string> echoes_;            // by prompt; empty: none
  std::vector<std::vector<TokenId>> prompts_;  // those whose logprobs are asked for
  std::vector<int> prompt_tokens_;             // by prompt
  std::vector<int> cached_tokens_;             // by prompt
  std::vector<Choice> choices_;                // (prompts, n)
  size_t open_choices_;
  const char* finish_reason_ = "none";
  std::optional<KvReport> kv_;
};

// "data: {"error": ...}", for a stream that has begun.
std::string ErrorEvent(const ApiError& error);

}  // namespace jointkv::server
