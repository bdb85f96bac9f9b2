// From a call to the engine's requests: chat template, tokens, and all that can be checked before the queue.
//
// Threads: free functions, any number of threads. Owns: nothing. Fails how: an ApiError is thrown.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/request.h"
#include "server/engine_thread.h"
#include "server/held_bytes.h"
#include "server/openai_schema.h"

namespace jointkv::server {

struct Prepared {
  std::vector<engine::Request> requests;           // one for each prompt
  std::vector<std::vector<TokenId>> echoed;        // the prompts, where their logprobs are asked for
  std::shared_ptr<const text::ChatFormat> format;  // of a chat's output; none: all of it is content
  HeldBytes::Hold held;                            // of the grammar
};

// `held`: the body's, of which a share is kept for what the call holds while it is open.
Prepared Prepare(const GenerationCall& call, const ModelInfo& model, const Limits& limits, HeldBytes::Hold held);

// Refused without tokenising when it is certainly longer than the context.
std::vector<TokenId> Encode(const std::string& text, const std::string& field, const ModelInfo& model,
                            bool add_special = true);
// The prompt of a chat's call.
std::vector<TokenId> EncodeConversation(const GenerationCall& call, const ModelInfo& model, bool add_generation_prompt);

}  // namespace jointkv::server
