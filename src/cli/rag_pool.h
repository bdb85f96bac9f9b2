// Documents and prompts over them: each prompt asks about one of several documents that are drawn, in random order,
// from a small pool. That is the shape in which requests share most of their text but hardly any prefix.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "base/status.h"
#include "text/chat_template.h"

namespace jointkv::cli {

struct Document {
  std::string title;
  std::string text;
  std::string question;
  std::vector<std::string> answers = {};  // any of them is right; none: unknown
};

// Documents of about 80 words, made of English words by fixed rules and a seed.
std::vector<Document> MakeUpDocuments(int count, uint64_t seed);

// All rows of a JSONL file with the fields title, text and question, and answers (strings) where there are some; other
// fields are ignored. Fails with kNotFound, kIo, kInvalidArgument (naming the line) or kOutOfRange: fewer rows than
// `least`, or more than 65,536.
Expected<std::vector<Document>> ReadDocuments(const std::string& path, size_t least);

// k of [0, n) in random order. Requires k <= n.
std::vector<size_t> DrawOrder(size_t n, size_t k, std::mt19937_64& random);

struct RagPrompt {
  std::vector<text::ChatMessage> messages;
  std::vector<size_t> documents;  // as they stand in the prompt
  size_t asked = 0;               // which of those the question is about
};

// System line, the documents `drawn`, a question about number `asked` of them.
RagPrompt MakeRagPrompt(const std::vector<Document>& documents, std::vector<size_t> drawn, size_t asked);
// The same over `per_prompt` of the documents at random. Requires per_prompt <= documents.size().
RagPrompt DrawRagPrompt(const std::vector<Document>& documents, size_t per_prompt, std::mt19937_64& random);

}  // namespace jointkv::cli
