#include "text/vocabulary.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "gguf.h"
#include "log.h"

namespace jointkv::text {
namespace {

constexpr int64_t kMetadataKeysMax = 16384;
constexpr size_t kTokensMax = size_t{1} << 24;
constexpr size_t kTokenBytesMax = 16384;
// Byte-level pieces that are not byte-encoded expand quadratically when the library precomputes them.
constexpr size_t kExpansionBytesMax = size_t{64} << 20;

constexpr char kModelKey[] = "tokenizer.ggml.model";
constexpr char kPreKey[] = "tokenizer.ggml.pre";
constexpr char kTokensKey[] = "tokenizer.ggml.tokens";
constexpr char kScoresKey[] = "tokenizer.ggml.scores";
constexpr char kTypesKey[] = "tokenizer.ggml.token_type";
constexpr char kMergesKey[] = "tokenizer.ggml.merges";

struct GgufDeleter {
  void operator()(gguf_context* file) const { gguf_free(file); }
};
using GgufPtr = std::unique_ptr<gguf_context, GgufDeleter>;

thread_local std::string library_error;

void KeepError(ggml_log_level level, const char* text, void*) {
  if (level != GGML_LOG_LEVEL_ERROR) return;
  // The first message names the cause; later ones say that loading failed.
  if (library_error.empty()) library_error = text;
}

void SilenceLibrary() {
  static std::once_flag once;
  std::call_once(once, [] {
    llama_log_set(KeepError, nullptr);
    common_log_set_verbosity_thold(-1);
  });
}

Status BadVocabulary(std::string what) { return {StatusCode::kDataLoss, "tokenizer: " + std::move(what)}; }

std::string StringValue(const gguf_context* file, const char* key) {
  const int64_t id = gguf_find_key(file, key);
  if (id < 0 || gguf_get_kv_type(file, id) != GGUF_TYPE_STRING) return {};
  return gguf_get_val_str(file, id);
}

// Elements of an array key of one of the given types; -1 when the key is missing.
Expected<int64_t> ArrayLength(const gguf_context* file, const char* key, std::vector<gguf_type> types) {
  const int64_t id = gguf_find_key(file, key);
  if (id < 0) return int64_t{-1};
  if (gguf_get_kv_type(file, id) != GGUF_TYPE_ARRAY) return BadVocabulary(std::string(key) + " is not an array");
  const gguf_type type = gguf_get_arr_type(file, id);
  if (std::find(types.begin(), types.end(), type) == types.end()) {
    return BadVocabulary(std::string(key) + " has elements of type " + gguf_type_name(type));
  }
  return static_cast<int64_t>(gguf_get_arr_n(file, id));
}

// Upper bound on what the library makes of a byte-level piece with characters outside the byte alphabet
// (U+0021..U+0143): each becomes a marker that repeats the whole token.
size_t ExpansionBytes(std::string_view token) {
  size_t outside = 0;
  for (size_t i = 0; i < token.size(); ++i) {
    const auto byte = static_cast<unsigned char>(token[i]);
    const bool leads_in_alphabet = (byte >= 0x21 && byte < 0x7f) || (byte >= 0xc2 && byte <= 0xc5);
    const bool continues = (byte & 0xc0) == 0x80;
    if (!leads_in_alphabet && !continues) ++outside;
  }
  return outside * (token.size() + 32);
}

// The library ends the process on two tokens of equal text, so their texts are compared as it reads them: up to the
// first NUL, an empty one renamed.
Status CheckTokens(const gguf_context* file, int64_t tokens_id, size_t n_tokens, bool byte_level) {
  std::unordered_set<std::string> seen;
  seen.reserve(n_tokens);
  size_t expansion = 0;
  for (size_t i = 0; i < n_tokens; ++i) {
    std::string token = gguf_get_arr_str(file, tokens_id, i);
    if (token.size() > kTokenBytesMax) {
      return BadVocabulary("token " + std::to_string(i) + " has " + std::to_string(token.size()) + " bytes, limit " +
                           std::to_string(kTokenBytesMax));
    }
    if (byte_level) expansion += ExpansionBytes(token);
    if (token.empty()) token = "[EMPTY_" + std::to_string(i) + "]";
    if (!seen.insert(std::move(token)).second) {
      return BadVocabulary("token " + std::to_string(i) + " repeats the text of an earlier one");
    }
  }
  if (expansion > kExpansionBytesMax) return BadVocabulary("tokens are not byte-level encoded");
  return Status::Ok();
}

Status CheckSpecialId(const gguf_context* file, const char* key, size_t n_tokens) {
  const int64_t id = gguf_find_key(file, key);
  if (id < 0) return Status::Ok();
  if (gguf_get_kv_type(file, id) != GGUF_TYPE_UINT32) return BadVocabulary(std::string(key) + " is not a uint32");
  const uint32_t token = gguf_get_val_u32(file, id);
  if (token >= n_tokens) {
    return BadVocabulary(std::string(key) + " is " + std::to_string(token) + ", vocabulary has " +
                         std::to_string(n_tokens) + " tokens");
  }
  return Status::Ok();
}

Status CheckMetadata(const gguf_context* file) {
  if (gguf_get_n_kv(file) > kMetadataKeysMax) {
    return BadVocabulary(std::to_string(gguf_get_n_kv(file)) + " metadata keys, limit " +
                         std::to_string(kMetadataKeysMax));
  }
  const std::string model = StringValue(file, kModelKey);
  const bool byte_level = model == "gpt2";
  if (model.empty()) return {StatusCode::kNotFound, std::string("tokenizer: the file has no ") + kModelKey};
  if (!byte_level && model != "llama") {
    return {StatusCode::kUnsupported, "tokenizer: model '" + model.substr(0, 64) + "' is not one of: llama, gpt2"};
  }
  ASSIGN_OR_RETURN(const int64_t n_tokens, ArrayLength(file, kTokensKey, {GGUF_TYPE_STRING}));
  if (n_tokens < 0) return {StatusCode::kNotFound, std::string("tokenizer: the file has no ") + kTokensKey};
  if (n_tokens == 0 || n_tokens > static_cast<int64_t>(kTokensMax)) {
    return BadVocabulary(std::to_string(n_tokens) + " tokens, must be 1 to " + std::to_string(kTokensMax));
  }
  ASSIGN_OR_RETURN(const int64_t n_scores, ArrayLength(file, kScoresKey, {GGUF_TYPE_FLOAT32, GGUF_TYPE_INT32}));
  ASSIGN_OR_RETURN(const int64_t n_types, ArrayLength(file, kTypesKey, {GGUF_TYPE_INT32}));
  for (const auto& [key, n] : {std::pair{kScoresKey, n_scores}, std::pair{kTypesKey, n_types}}) {
    if (n >= 0 && n != n_tokens) {
      return BadVocabulary(std::string(key) + " has " + std::to_string(n) + " elements for " +
                           std::to_string(n_tokens) + " tokens");
    }
  }
  ASSIGN_OR_RETURN(const int64_t n_merges, ArrayLength(file, kMergesKey, {GGUF_TYPE_STRING}));
  if (byte_level && n_merges < 0) return BadVocabulary(std::string("no ") + kMergesKey);
  const auto n = static_cast<size_t>(n_tokens);
  RETURN_IF_ERROR(CheckSpecialId(file, "tokenizer.ggml.bos_token_id", n));
  RETURN_IF_ERROR(CheckSpecialId(file, "tokenizer.ggml.eos_token_id", n));
  return CheckTokens(file, gguf_find_key(file, kTokensKey), n, byte_level);
}

// Leaves what the tokenizer and the chat template need. The architecture is replaced by one that the library knows, so
// that it reads the vocabulary of any model.
void KeepTokenizerKeys(gguf_context* file) {
  std::vector<std::string> others;
  for (int64_t i = 0; i < gguf_get_n_kv(file); ++i) {
    const std::string key = gguf_get_key(file, i);
    if (!key.starts_with("tokenizer.") && key != "general.name") others.push_back(key);
  }
  for (const std::string& key : others) gguf_remove_key(file, key.c_str());
  gguf_set_val_str(file, "general.architecture", "llama");
}

// Byte-level pre-tokenizers whose every long match is found by hand-written code in the library.
bool SplitsByStdRegex(const gguf_context* file) {
  if (StringValue(file, kModelKey) != "gpt2") return false;
  static constexpr std::array<std::string_view, 18> kByHand = {
      "gpt-2",   "gpt2", "smollm",    "llama3",  "llama-v3",  "llama-bpe", "qwen2",     "deepseek-r1-qwen", "qwen35",
      "falcon3", "lfm2", "falcon-h1", "pixtral", "stablelm2", "olmo",      "starcoder", "exaone",           "mpt"};
  const std::string pre = StringValue(file, kPreKey);
  return std::find(kByHand.begin(), kByHand.end(), pre) == kByHand.end();
}

}  // namespace

std::string TakeLibraryError() {
  std::string out = std::exchange(library_error, {});
  while (!out.empty() && out.back() == '\n') out.pop_back();
  return out.empty() ? "no reason given" : out;
}

Expected<std::unique_ptr<Tokenizer::Vocabulary>> Tokenizer::Vocabulary::Open(const std::string& gguf_path) try {
  SilenceLibrary();
  library_error.clear();
  const GgufPtr file(gguf_init_from_file(gguf_path.c_str(), {.no_alloc = true, .ctx = nullptr}));
  if (file == nullptr) {
    return Status(StatusCode::kDataLoss, "tokenizer: cannot read '" + gguf_path + "': " + TakeLibraryError());
  }
  RETURN_IF_ERROR(CheckMetadata(file.get()));
  KeepTokenizerKeys(file.get());

  llama_model_params params = llama_model_default_params();
  params.vocab_only = true;
  auto out = std::make_unique<Vocabulary>();
  out->splits_by_std_regex = SplitsByStdRegex(file.get());
  out->model.reset(llama_model_init_from_user(file.get(), nullptr, nullptr, params));
  if (out->model == nullptr) {
    return Status(StatusCode::kDataLoss, "tokenizer: cannot use '" + gguf_path + "': " + TakeLibraryError());
  }
  return out;
} catch (const std::exception& error) {
  return Status(StatusCode::kDataLoss, "tokenizer: cannot use '" + gguf_path + "': " + error.what());
}

}  // namespace jointkv::text
