#include "cli/bench_serve_dataset.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <random>
#include <system_error>

#include "cli/lines.h"
#include "cli/rag_pool.h"
#include "text/template_guard.h"

namespace jointkv::cli {
namespace {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

constexpr size_t kLineBytesMax = 16 << 20;
constexpr size_t kRowsMax = 1 << 20;
constexpr size_t kFileBytesMax = size_t{1} << 30;
constexpr size_t kMessagesMax = 4096;
constexpr int kOutputTokensMax = 1 << 20;
constexpr int kCustomOutputTokens = 256;
constexpr int kWorkloadOutputTokens = 64;
constexpr size_t kWordsLeast = 256;

Status Bad(const std::string& what) { return {StatusCode::kInvalidArgument, what}; }

Expected<std::vector<text::ChatMessage>> MessagesOf(const Json& value) {
  if (!value.is_array() || value.empty() || value.size() > kMessagesMax) {
    return Bad("messages: expected an array of 1 to " + std::to_string(kMessagesMax) + " messages");
  }
  std::vector<text::ChatMessage> messages;
  for (const Json& message : value) {
    const auto string = [&](const char* key) {
      return message.is_object() && message.contains(key) && message[key].is_string();
    };
    if (!string("role") || !string("content")) return Bad("messages: expected role and content, both strings");
    messages.push_back({.role = message["role"].get<std::string>(), .content = message["content"].get<std::string>()});
  }
  return messages;
}

Expected<ServeRequest> ParseRow(const std::string& line) {
  if (line.size() > kLineBytesMax)
    return Status(StatusCode::kOutOfRange, "more than " + std::to_string(kLineBytesMax) + " bytes");
  RETURN_IF_ERROR(text::CheckJsonDepth(line, "row"));
  const Json row = Json::parse(line, nullptr, false);
  if (!row.is_object()) return Bad("not a JSON object");
  ServeRequest request;
  request.output_tokens = kCustomOutputTokens;
  const auto prompt = row.find("prompt");
  const auto messages = row.find("messages");
  if ((prompt == row.end()) == (messages == row.end())) return Bad("expected either prompt or messages");
  if (prompt != row.end()) {
    if (!prompt->is_string()) return Bad("prompt: expected a string");
    request.messages = {{"user", prompt->get<std::string>()}};
  } else {
    ASSIGN_OR_RETURN(request.messages, MessagesOf(*messages));
  }
  if (const auto tokens = row.find("output_tokens"); tokens != row.end() && !tokens->is_null()) {
    const bool fits = tokens->is_number_integer() && *tokens >= 1 && *tokens <= kOutputTokensMax;
    if (!fits) return Bad("output_tokens: expected 1 to " + std::to_string(kOutputTokensMax));
    request.output_tokens = tokens->get<int>();
  }
  return request;
}

Expected<std::vector<ServeRequest>> ReadCustom(const std::string& path) {
  std::vector<ServeRequest> rows;
  size_t bytes = 0;
  Status bad;
  const Status read = ReadLines(path, kLineBytesMax, [&](int number, const std::string& line) {
    bytes += line.size();
    if (rows.size() == kRowsMax || bytes > kFileBytesMax) {
      bad = Status(StatusCode::kOutOfRange, "'" + path + "' has more than " + std::to_string(kRowsMax) + " rows or " +
                                                std::to_string(kFileBytesMax) + " bytes");
      return false;
    }
    Expected<ServeRequest> row = ParseRow(line);
    if (!row.ok()) {
      bad = Status(row.status().code(), path + ":" + std::to_string(number) + ": " + row.status().message());
      return false;
    }
    rows.push_back(std::move(row).value());
    return true;
  });
  RETURN_IF_ERROR(read);
  RETURN_IF_ERROR(bad);
  if (rows.empty()) return Status(StatusCode::kInvalidArgument, "'" + path + "' has no rows");
  return rows;
}

Expected<std::vector<ServeRequest>> CustomDataset(const DatasetOptions& options) {
  if (options.path.empty()) return Bad("data set custom needs a file (--dataset-path)");
  ASSIGN_OR_RETURN(const std::vector<ServeRequest> rows, ReadCustom(options.path));
  if (rows.size() < options.num_prompts && !options.oversample) {
    return Status(StatusCode::kOutOfRange, "'" + options.path + "' has " + std::to_string(rows.size()) + " rows, " +
                                               std::to_string(options.num_prompts) + " are needed");
  }
  std::mt19937_64 random(options.seed);
  std::vector<size_t> order = DrawOrder(rows.size(), options.shuffle ? rows.size() : 0, random);
  for (size_t i = order.size(); i < rows.size(); ++i) order.push_back(i);
  std::vector<ServeRequest> requests;
  for (size_t i = 0; i < options.num_prompts; ++i) requests.push_back(rows[order[i % order.size()]]);
  return requests;
}

Expected<std::vector<ServeRequest>> WorkloadDataset(const DatasetOptions& options, Workload workload) {
  WorkloadOptions made = options.workload;
  made.workload = workload;
  made.docs_path = options.path;
  made.requests = options.num_prompts;
  ASSIGN_OR_RETURN(const WorkloadMaker maker, WorkloadMaker::Create(made));
  std::vector<ServeRequest> requests;
  for (WorkloadRequest& request : maker.Draw(options.seed)) {
    requests.push_back({std::move(request.messages), kWorkloadOutputTokens});
  }
  return requests;
}

// Lower case letters behind a space. Such a word stays one token between others of its kind.
bool IsWord(const std::string& piece) {
  return piece.size() > 1 && piece.front() == ' ' &&
         std::all_of(piece.begin() + 1, piece.end(), [](char c) { return c >= 'a' && c <= 'z'; });
}

int DrawLength(int length, double range_ratio, std::mt19937_64& random) {
  const auto least = static_cast<int>(std::floor(length * (1 - range_ratio)));
  const auto most = static_cast<int>(std::ceil(length * (1 + range_ratio)));
  return std::uniform_int_distribution<int>(std::max(least, 1), std::max(most, 1))(random);
}

OrderedJson ToJson(const std::vector<text::ChatMessage>& messages) {
  OrderedJson json = OrderedJson::array();
  for (const text::ChatMessage& message : messages) {
    json.push_back({{"role", message.role}, {"content", message.content}});
  }
  return json;
}

std::string OneText(const std::vector<text::ChatMessage>& messages) {
  std::string text;
  for (const text::ChatMessage& message : messages) text += (text.empty() ? "" : "\n\n") + message.content;
  return text;
}

std::string Dump(const OrderedJson& json) { return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace); }

}  // namespace

std::vector<std::string> DatasetNames() {
  std::vector<std::string> names = {"random", "custom"};
  for (const Workload workload : {Workload::kRagPool, Workload::kUnique, Workload::kFewShot, Workload::kSystemPrompt,
                                  Workload::kWiki, Workload::kSamples}) {
    names.emplace_back(WorkloadName(workload));
  }
  return names;
}

Expected<std::vector<ServeRequest>> RandomDataset(const text::Tokenizer& tokenizer, size_t num_prompts, uint64_t seed,
                                                  const RandomLengths& lengths) {
  std::vector<const std::string*> words;
  for (TokenId id = 0; id < tokenizer.n_vocab(); ++id) {
    if (!tokenizer.IsSpecial(id) && IsWord(tokenizer.Piece(id))) words.push_back(&tokenizer.Piece(id));
  }
  if (words.size() < kWordsLeast) {
    return Status(StatusCode::kUnsupported, "the vocabulary has " + std::to_string(words.size()) + " words, " +
                                                std::to_string(kWordsLeast) + " are needed");
  }
  std::mt19937_64 random(seed);
  const auto append = [&](std::string& text, int count) {
    for (int i = 0; i < count; ++i) text += *words[random() % words.size()];
  };
  std::string prefix;
  append(prefix, lengths.prefix);
  std::vector<ServeRequest> requests;
  for (size_t i = 0; i < num_prompts; ++i) {
    std::string text = prefix;
    append(text, DrawLength(lengths.input, lengths.range_ratio, random));
    requests.push_back({{{"user", std::move(text)}}, DrawLength(lengths.output, lengths.range_ratio, random)});
  }
  return requests;
}

Expected<std::vector<ServeRequest>> MakeDataset(const DatasetOptions& options) {
  std::vector<ServeRequest> requests;
  if (options.name == "random") {
    if (!options.path.empty()) return Bad("data set random takes no file");
    std::error_code error;
    if (!std::filesystem::is_regular_file(options.tokenizer_path, error)) {
      return Status(StatusCode::kNotFound, "--tokenizer '" + options.tokenizer_path +
                                               "': there is no such file; `make setup` fetches the default model, and "
                                               "other data sets need none");
    }
    ASSIGN_OR_RETURN(const auto tokenizer, text::Tokenizer::Open(options.tokenizer_path));
    ASSIGN_OR_RETURN(requests, RandomDataset(*tokenizer, options.num_prompts, options.seed, options.random));
  } else if (options.name == "custom") {
    ASSIGN_OR_RETURN(requests, CustomDataset(options));
  } else {
    const std::optional<Workload> workload = ParseWorkload(options.name);
    if (!workload) return Bad("there is no data set '" + options.name + "'");
    ASSIGN_OR_RETURN(requests, WorkloadDataset(options, *workload));
  }
  if (options.output_tokens) {
    for (ServeRequest& request : requests) request.output_tokens = *options.output_tokens;
  }
  return requests;
}

std::string ToRows(const std::vector<ServeRequest>& requests) {
  std::string rows;
  for (const ServeRequest& request : requests) {
    rows += Dump({{"messages", ToJson(request.messages)}, {"output_tokens", request.output_tokens}}) + "\n";
  }
  return rows;
}

std::string ToBody(const ServeRequest& request, const BodyOptions& options) {
  OrderedJson body = {{"model", options.model}};
  switch (options.api) {
    case ServeApi::kCompletions:
      body["prompt"] = OneText(request.messages);
      body["max_tokens"] = request.output_tokens;
      break;
    case ServeApi::kChat:
      body["messages"] = ToJson(request.messages);
      body["max_completion_tokens"] = request.output_tokens;
      break;
    case ServeApi::kEmbeddings: body["input"] = OneText(request.messages); break;
  }
  if (options.api != ServeApi::kEmbeddings) {
    body["stream"] = true;
    body["stream_options"] = {{"include_usage", true}};
  }
  if (options.ignore_eos) body["ignore_eos"] = true;
  body.update(options.extra);
  return Dump(body);
}

}  // namespace jointkv::cli
