// The demo's prompts: each asks about one of several documents that are drawn, in random order, from a small pool. That
// is the shape in which requests share most of their text but hardly any prefix.
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
};

// Documents of about 80 words, made of English words by fixed rules and a seed.
std::vector<Document> MakeUpDocuments(int count, uint64_t seed);

// The first `count` rows of a JSONL file with the fields title, text and question; others are ignored. Fails with
// kNotFound, kIo, kInvalidArgument (naming the line) or kOutOfRange (too few rows).
Expected<std::vector<Document>> ReadDocuments(const std::string& path, int count);

// System line, `per_prompt` of the documents, a question about one of them. Requires per_prompt <= documents.size().
std::vector<text::ChatMessage> RagPrompt(const std::vector<Document>& documents, int per_prompt,
                                         std::mt19937_64& random);

}  // namespace jointkv::cli
