// Workloads: the requests that evaluations run, each with a continuation to be forced on the model.
//
//   rag-pool       a question about one of k documents, drawn in random order from a pool
//   unique         the same, no document twice
//   few-shot       k worked problems of a pool in random order, then another problem
//   system-prompt  k documents in one order for all requests, then a question
//   wiki           pages of unrelated text
//   samples        groups of 8 requests with equal prompts, as 8 choices of one request would be; their continuations
//                  differ, which choices of one request with a forced output could not
//
// WorkloadMaker. Threads: const calls from any number. Owns: the documents. Fails how: Create with kNotFound, kIo,
// kInvalidArgument (a bad row, k above the pool) or kOutOfRange (too few documents in the file).
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "cli/rag_pool.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace jointkv::cli {

enum class Workload : uint8_t { kRagPool, kUnique, kFewShot, kSystemPrompt, kWiki, kSamples };

const char* WorkloadName(Workload workload);
std::optional<Workload> ParseWorkload(std::string_view name);

inline constexpr size_t kSamplesPerPrompt = 8;

struct WorkloadOptions {
  Workload workload = Workload::kRagPool;
  // JSONL: title, text, question, answers; for few-shot question, answer (its result after ####); for wiki a plain
  // text. Empty: documents are made up.
  std::string docs_path = {};
  size_t requests = 16;
  size_t pool = 20;
  size_t documents = 8;  // k; of about 100 words
};

struct WorkloadRequest {
  std::vector<text::ChatMessage> messages;
  std::vector<std::string> continuation;  // the answer with its passage, then what may follow
  std::vector<std::string> answers;       // any of them is right
};

class WorkloadMaker {
 public:
  static Expected<WorkloadMaker> Create(const WorkloadOptions& options);

  // The same requests for the same seed, others for another.
  std::vector<WorkloadRequest> Draw(uint64_t seed) const;

  const WorkloadOptions& options() const { return options_; }

 private:
  explicit WorkloadMaker(WorkloadOptions options) : options_(std::move(options)) {}
  size_t Needed() const;
  Status ReadFile();
  std::vector<Document> DrawDocuments(uint64_t seed, std::mt19937_64& random) const;
  std::vector<WorkloadRequest> DrawPages(uint64_t seed, std::mt19937_64& random) const;

  WorkloadOptions options_;
  std::vector<Document> documents_;  // from the file
  std::string text_;                 // from the file, for wiki
  std::vector<size_t> words_;        // where they begin in text_
};

struct EncodedRequest {
  std::vector<TokenId> prompt;
  std::vector<TokenId> continuation;  // cut or extended to the wanted length
  std::vector<std::string> answers;
};

Expected<std::vector<EncodedRequest>> EncodeWorkload(const std::vector<WorkloadRequest>& requests,
                                                     const text::Tokenizer& tokenizer,
                                                     const text::ChatTemplate& chat_template, size_t continuation);

// Rows with question and answer, as GSM8K has them; the text of a document is the worked answer. Fails as
// ReadDocuments.
Expected<std::vector<Document>> ReadProblems(const std::string& path, size_t least);
std::vector<Document> MakeUpProblems(int count, uint64_t seed);

}  // namespace jointkv::cli
