// Data sets for `bench serve`: what each request asks, and its body on the wire.
//
//   random         words of a vocabulary, each one token, in random order
//   custom         JSONL: {"prompt": "..."} or {"messages": [...]}, and "output_tokens" where wanted
//   rag-pool, ...  the workloads of cli/workloads.h
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "base/status.h"
#include "cli/workloads.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace jointkv::cli {

struct ServeRequest {
  std::vector<text::ChatMessage> messages;
  int output_tokens = 0;
};

struct RandomLengths {
  int prefix = 0;  // tokens that all requests begin with
  int input = 1024;
  int output = 128;
  double range_ratio = 0;  // input and output lie evenly within (1 +- this) of the above
};

struct DatasetOptions {
  std::string name = "random";
  std::string path;
  size_t num_prompts = 1000;
  uint64_t seed = 0;
  std::optional<int> output_tokens;  // of each request, against what the data set says
  RandomLengths random;
  std::string tokenizer_path;  // a GGUF file, for random
  bool oversample = true;      // a custom file that is too short is repeated
  bool shuffle = true;         // rows of a custom file
  WorkloadOptions workload;
};

// Names that DatasetOptions::name may have.
std::vector<std::string> DatasetNames();

// Fails with kInvalidArgument (unknown name, a bad row, naming its line), kNotFound, kIo or kOutOfRange.
Expected<std::vector<ServeRequest>> MakeDataset(const DatasetOptions& options);

// Requests whose prompts have exactly as many tokens as asked for, apart from what a chat template adds. Fails with
// kUnsupported when the vocabulary has too few words.
Expected<std::vector<ServeRequest>> RandomDataset(const text::Tokenizer& tokenizer, size_t num_prompts, uint64_t seed,
                                                  const RandomLengths& lengths);

// The requests as rows of a custom data set.
std::string ToRows(const std::vector<ServeRequest>& requests);

enum class ServeApi : uint8_t { kCompletions, kChat, kEmbeddings };

struct BodyOptions {
  ServeApi api = ServeApi::kCompletions;  // chat: messages as they are; otherwise their contents as one text
  std::string model = {};
  bool ignore_eos = false;
  nlohmann::ordered_json extra = nlohmann::ordered_json::object();  // further fields, or other values of those above
};
std::string ToBody(const ServeRequest& request, const BodyOptions& options);

}  // namespace jointkv::cli
