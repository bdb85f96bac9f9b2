#include "cli/workloads.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <set>
#include <utility>

#include "cli/lines.h"

namespace jointkv::cli {
namespace {

constexpr std::array<std::pair<Workload, const char*>, 6> kNames = {{{Workload::kRagPool, "rag-pool"},
                                                                     {Workload::kUnique, "unique"},
                                                                     {Workload::kFewShot, "few-shot"},
                                                                     {Workload::kSystemPrompt, "system-prompt"},
                                                                     {Workload::kWiki, "wiki"},
                                                                     {Workload::kSamples, "samples"}}};

constexpr size_t kLineBytesMax = 1 << 20;
constexpr size_t kTextBytesMax = 64 << 20;
constexpr size_t kWordsPerDocument = 100;
constexpr size_t kWordsLeast = 80;  // of a document, where the file has enough of those
constexpr size_t kWordsMost = 120;
constexpr size_t kWordsAfterPage = 200;  // of a page, kept for its continuation

bool IsSpace(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

std::vector<size_t> WordStarts(const std::string& text) {
  std::vector<size_t> starts;
  for (size_t i = 0; i < text.size(); ++i) {
    if (!IsSpace(text[i]) && (i == 0 || IsSpace(text[i - 1]))) starts.push_back(i);
  }
  return starts;
}

std::string WithoutWords(const std::string& text, size_t words) {
  const std::vector<size_t> starts = WordStarts(text);
  return words < starts.size() ? text.substr(starts[words]) : text;
}

// The answer and passage of the document asked about, or of the one `shift` further on, and the documents after it.
std::vector<std::string> Continuation(const std::vector<Document>& documents, const RagPrompt& prompt, size_t shift) {
  const size_t k = prompt.documents.size();
  std::vector<std::string> pieces;
  for (size_t i = 0; i < k; ++i) {
    const Document& document = documents[prompt.documents[(prompt.asked + shift + i) % k]];
    const bool first = i == 0 && !document.answers.empty();
    pieces.push_back((first ? document.answers.front() + ". " : "") + document.text);
  }
  // With fewer documents than samples, later samples start further on in the same passage.
  if (shift >= k) pieces.front() = WithoutWords(pieces.front(), 7 * (shift / k));
  return pieces;
}

WorkloadRequest RagRequest(const std::vector<Document>& documents, RagPrompt prompt, size_t shift = 0) {
  WorkloadRequest request;
  request.continuation = Continuation(documents, prompt, shift);
  request.answers = documents[prompt.documents[prompt.asked]].answers;
  request.messages = std::move(prompt.messages);
  return request;
}

std::vector<WorkloadRequest> RagPool(const WorkloadOptions& options, const std::vector<Document>& pool,
                                     std::mt19937_64& random) {
  std::vector<WorkloadRequest> requests;
  for (size_t i = 0; i < options.requests; ++i) {
    requests.push_back(RagRequest(pool, DrawRagPrompt(pool, options.documents, random)));
  }
  return requests;
}

// Documents [k i, k (i + 1)) for prompt i, which `copies` requests have.
std::vector<WorkloadRequest> Apart(const WorkloadOptions& options, const std::vector<Document>& documents,
                                   size_t copies, std::mt19937_64& random) {
  std::vector<WorkloadRequest> requests;
  RagPrompt prompt;
  for (size_t i = 0; i < options.requests; ++i) {
    if (i % copies == 0) {
      std::vector<size_t> drawn(options.documents);
      for (size_t j = 0; j < drawn.size(); ++j) drawn[j] = i / copies * options.documents + j;
      prompt = MakeRagPrompt(documents, std::move(drawn), random() % options.documents);
    }
    requests.push_back(RagRequest(documents, prompt, i % copies));
  }
  return requests;
}

std::vector<WorkloadRequest> SystemPrompt(const WorkloadOptions& options, const std::vector<Document>& documents,
                                          std::mt19937_64& random) {
  std::string system = "You answer questions of visitors in a few words, from these notes.\n\n";
  std::vector<size_t> order;
  for (size_t i = 0; i < options.documents; ++i) {
    system += "Note: " + documents[i].title + "\n" + documents[i].text + "\n\n";
    order.push_back(i);
  }
  std::vector<WorkloadRequest> requests;
  for (size_t i = 0; i < options.requests; ++i) {
    const size_t asked = random() % order.size();
    RagPrompt prompt = {{{"system", system}, {"user", documents[asked].question}}, order, asked};
    requests.push_back(RagRequest(documents, std::move(prompt)));
  }
  return requests;
}

// The pool's problems as examples, then one of the others.
std::vector<WorkloadRequest> FewShot(const WorkloadOptions& options, const std::vector<Document>& problems,
                                     std::mt19937_64& random) {
  std::vector<WorkloadRequest> requests;
  for (size_t i = 0; i < options.requests; ++i) {
    const std::vector<size_t> examples = DrawOrder(options.pool, options.documents, random);
    const size_t others = problems.size() - options.pool;
    const Document& asked = problems[options.pool + i % others];
    std::string content;
    WorkloadRequest request;
    request.continuation.push_back(asked.text);
    for (const size_t example : examples) {
      content += "Problem: " + problems[example].question + "\nSolution: " + problems[example].text + "\n\n";
      request.continuation.push_back("\nProblem: " + problems[example].question);
    }
    content += "Problem: " + asked.question + "\nSolution:";
    request.messages = {{"system", "Solve the problem step by step. The last line is #### and the result."},
                        {"user", content}};
    request.answers = asked.answers;
    requests.push_back(std::move(request));
  }
  return requests;
}

WorkloadRequest PageRequest(const std::string& page, const std::string& rest) {
  WorkloadRequest request;
  request.messages = {{"system", "Continue the text."}, {"user", page}};
  request.continuation = {rest, page};
  return request;
}

Status ReadText(const std::string& path, std::string& text) {
  Status bad;
  const Status read = ReadLines(path, kLineBytesMax, [&](int number, const std::string& line) {
    if (line.size() > kLineBytesMax || text.size() + line.size() > kTextBytesMax) {
      bad = Status(StatusCode::kOutOfRange, path + ":" + std::to_string(number) + ": more than " +
                                                std::to_string(kLineBytesMax) + " bytes in a line or " +
                                                std::to_string(kTextBytesMax) + " in all");
      return false;
    }
    text += line + "\n";
    return true;
  });
  RETURN_IF_ERROR(read);
  RETURN_IF_ERROR(bad);
  // WikiText's mark for a rare word is a special token of some vocabularies.
  for (size_t at = 0; (at = text.find("<unk>", at)) != std::string::npos;) text.replace(at, 5, "unknown");
  return Status::Ok();
}

// No text twice, and only those of about a hundred words where there are enough.
std::vector<Document> Choose(std::vector<Document> documents, size_t needed) {
  std::set<std::string> seen;
  std::erase_if(documents, [&seen](const Document& d) { return !seen.insert(d.text).second; });
  const auto fits = [](const Document& document) {
    const size_t words = WordStarts(document.text).size();
    return words >= kWordsLeast && words <= kWordsMost;
  };
  if (static_cast<size_t>(std::ranges::count_if(documents, fits)) >= needed) {
    std::erase_if(documents, [&fits](const Document& d) { return !fits(d); });
  }
  return documents;
}

}  // namespace

const char* WorkloadName(Workload workload) {
  for (const auto& [value, name] : kNames) {
    if (value == workload) return name;
  }
  return "?";
}

std::optional<Workload> ParseWorkload(std::string_view name) {
  for (const auto& [value, known] : kNames) {
    if (name == known) return value;
  }
  return std::nullopt;
}

Expected<WorkloadMaker> WorkloadMaker::Create(const WorkloadOptions& options) {
  const bool pooled = options.workload == Workload::kRagPool || options.workload == Workload::kFewShot;
  if (options.requests < 1 || options.documents < 1) {
    return Status(StatusCode::kInvalidArgument, "requests and documents: must be at least 1");
  }
  if (pooled && options.documents > options.pool) {
    return Status(StatusCode::kInvalidArgument, "documents " + std::to_string(options.documents) +
                                                    ": more than the pool of " + std::to_string(options.pool));
  }
  WorkloadMaker maker(options);
  if (!options.docs_path.empty()) RETURN_IF_ERROR(maker.ReadFile());
  return maker;
}

size_t WorkloadMaker::Needed() const {
  const size_t prompts = options_.workload == Workload::kSamples
                             ? (options_.requests + kSamplesPerPrompt - 1) / kSamplesPerPrompt
                             : options_.requests;
  switch (options_.workload) {
    case Workload::kRagPool: return options_.pool;
    case Workload::kFewShot: return options_.pool + 1;
    case Workload::kSystemPrompt: return options_.documents;
    default: return prompts * options_.documents;
  }
}

Status WorkloadMaker::ReadFile() {
  if (options_.workload == Workload::kWiki) {
    RETURN_IF_ERROR(ReadText(options_.docs_path, text_));
    words_ = WordStarts(text_);
    const size_t needed = options_.requests * (options_.documents * kWordsPerDocument + kWordsAfterPage);
    if (words_.size() < needed) {
      return {StatusCode::kOutOfRange, "'" + options_.docs_path + "' has " + std::to_string(words_.size()) +
                                           " words, " + std::to_string(needed) + " are needed"};
    }
    return Status::Ok();
  }
  if (options_.workload == Workload::kFewShot) {
    ASSIGN_OR_RETURN(documents_, ReadProblems(options_.docs_path, Needed()));
    return Status::Ok();
  }
  ASSIGN_OR_RETURN(std::vector<Document> all, ReadDocuments(options_.docs_path, Needed()));
  documents_ = Choose(std::move(all), Needed());
  if (documents_.size() < Needed()) {
    return {StatusCode::kOutOfRange, "'" + options_.docs_path + "' has " + std::to_string(documents_.size()) +
                                         " different documents, " + std::to_string(Needed()) + " are needed"};
  }
  return Status::Ok();
}

std::vector<Document> WorkloadMaker::DrawDocuments(uint64_t seed, std::mt19937_64& random) const {
  const bool problems = options_.workload == Workload::kFewShot;
  if (documents_.empty()) {
    const size_t count = problems ? options_.pool + options_.requests : Needed();
    return problems ? MakeUpProblems(static_cast<int>(count), seed) : MakeUpDocuments(static_cast<int>(count), seed);
  }
  const size_t count = problems ? documents_.size() : Needed();
  std::vector<Document> drawn;
  for (const size_t index : DrawOrder(documents_.size(), count, random)) drawn.push_back(documents_[index]);
  return drawn;
}

std::vector<WorkloadRequest> WorkloadMaker::DrawPages(uint64_t seed, std::mt19937_64& random) const {
  std::vector<WorkloadRequest> requests;
  if (words_.empty()) {
    const std::vector<Document> made =
        MakeUpDocuments(static_cast<int>(options_.requests * (options_.documents + 1)), seed);
    for (size_t i = 0; i < options_.requests; ++i) {
      const Document* next = made.data() + i * (options_.documents + 1);
      std::string page;
      for (size_t j = 0; j < options_.documents; ++j, ++next) page += next->title + "\n" + next->text + "\n\n";
      requests.push_back(PageRequest(page, next->text));
    }
    return requests;
  }
  const size_t page_words = options_.documents * kWordsPerDocument;
  const size_t stride = page_words + kWordsAfterPage;
  for (const size_t index : DrawOrder(words_.size() / stride, options_.requests, random)) {
    const size_t begin = words_[index * stride];
    const size_t middle = words_[index * stride + page_words];
    const size_t last = (index + 1) * stride;
    const size_t end = last < words_.size() ? words_[last] : text_.size();
    requests.push_back(PageRequest(text_.substr(begin, middle - begin), text_.substr(middle, end - middle)));
  }
  return requests;
}

std::vector<WorkloadRequest> WorkloadMaker::Draw(uint64_t seed) const {
  std::mt19937_64 random(seed);
  if (options_.workload == Workload::kWiki) return DrawPages(seed, random);
  const std::vector<Document> documents = DrawDocuments(seed, random);
  switch (options_.workload) {
    case Workload::kFewShot: return FewShot(options_, documents, random);
    case Workload::kSystemPrompt: return SystemPrompt(options_, documents, random);
    case Workload::kSamples: return Apart(options_, documents, kSamplesPerPrompt, random);
    case Workload::kUnique: return Apart(options_, documents, 1, random);
    default: return RagPool(options_, documents, random);
  }
}

Expected<std::vector<EncodedRequest>> EncodeWorkload(const std::vector<WorkloadRequest>& requests,
                                                     const text::Tokenizer& tokenizer,
                                                     const text::ChatTemplate& chat_template, size_t continuation) {
  std::vector<EncodedRequest> encoded;
  for (const WorkloadRequest& request : requests) {
    EncodedRequest next;
    ASSIGN_OR_RETURN(next.prompt, chat_template.EncodeChat(request.messages));
    // Over and over, where all that may follow is too short.
    for (size_t i = 0; next.continuation.size() < continuation; ++i) {
      const std::string& piece = request.continuation[i % request.continuation.size()];
      ASSIGN_OR_RETURN(const std::vector<TokenId> tokens,
                       tokenizer.Encode(i == 0 ? piece : "\n" + piece, false, false));
      if (tokens.empty() && i > 0) {
        return Status(StatusCode::kUnsupported, "the vocabulary has no token for a line break");
      }
      next.continuation.insert(next.continuation.end(), tokens.begin(), tokens.end());
    }
    next.continuation.resize(continuation);
    next.answers = request.answers;
    encoded.push_back(std::move(next));
  }
  return encoded;
}

}  // namespace jointkv::cli
