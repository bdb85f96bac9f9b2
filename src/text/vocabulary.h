// Inside this room only, for .cc files: the one header here that names llama.cpp's types.
//
// Tokenizer::Vocabulary. Threads: const after Open. Owns: a llama_model that holds nothing but a vocabulary, and the
// metadata keys beginning with "tokenizer.". Fails how: Open returns a Status for every file it will not pass on.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "llama.h"
#include "text/tokenizer.h"

namespace jointkv::text {

struct LlamaModelDeleter {
  void operator()(llama_model* model) const { llama_model_free(model); }
};

struct Tokenizer::Vocabulary {
  static Expected<std::unique_ptr<Vocabulary>> Open(const std::string& gguf_path);

  const llama_vocab* vocab() const { return llama_model_get_vocab(model.get()); }

  std::unique_ptr<llama_model, LlamaModelDeleter> model;
  // The pre-tokenizer runs on std::regex, whose recursion is as deep as the longest match.
  bool splits_by_std_regex = false;
  // Texts of special tokens after which a long text may be cut without changing its tokens, by whether they need
  // parse_special, and their lengths in bytes.
  std::unordered_map<std::string, bool> cut_marks;
  std::vector<size_t> cut_lengths;
};

// The library's last error on this thread, and forget it.
std::string TakeLibraryError();

}  // namespace jointkv::text
