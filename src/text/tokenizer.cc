#include "text/tokenizer.h"

#include <cstdint>
#include <exception>
#include <set>
#include <utility>

#include "text/detokenizer.h"
#include "text/token_trie.h"
#include "text/vocabulary.h"

namespace jointkv::text {
namespace {

constexpr size_t kTextBytesMax = size_t{64} << 20;
// std::regex recurses once per matched character; 8 MB of stack hold about 80,000 of its frames.
constexpr size_t kRegexRunBytesMax = 8192;

// The library's search for special tokens takes time quadratic in how many there are, so long texts go in parts.
constexpr size_t kPartBytes = 8192;

bool IsSpace(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// The longest run of bytes that are all white space, or all not.
size_t LongestRun(std::string_view text) {
  size_t longest = 0;
  size_t start = 0;
  for (size_t i = 1; i <= text.size(); ++i) {
    if (i < text.size() && IsSpace(text[i]) == IsSpace(text[start])) continue;
    longest = i - start > longest ? i - start : longest;
    start = i;
  }
  return longest;
}

bool LooksLikeMarkup(std::string_view piece) {
  return (piece.size() > 4 && piece.starts_with("<|") && piece.ends_with("|>")) || piece == "<start_of_turn>" ||
         piece == "<end_of_turn>";
}

std::optional<TokenId> OptionalToken(llama_token token) {
  return token == LLAMA_TOKEN_NULL ? std::nullopt : std::optional<TokenId>(token);
}

std::string LibraryPiece(const llama_vocab* vocab, TokenId id) {
  std::string piece(32, '\0');
  int32_t n = llama_token_to_piece(vocab, id, piece.data(), static_cast<int32_t>(piece.size()), 0, true);
  if (n < 0) {
    piece.resize(static_cast<size_t>(-n));
    n = llama_token_to_piece(vocab, id, piece.data(), static_cast<int32_t>(piece.size()), 0, true);
  }
  piece.resize(static_cast<size_t>(n < 0 ? 0 : n));
  return piece;
}

// The end of the first part of `text`: behind the first mark past kPartBytes, or the whole.
template <typename Vocabulary>  // Tokenizer's own, which has no public name
size_t PartEnd(const Vocabulary& vocabulary, std::string_view text, bool parse_special) {
  if (text.size() <= kPartBytes) return text.size();
  for (size_t at = text.find('>', kPartBytes); at != std::string_view::npos; at = text.find('>', at + 1)) {
    for (const size_t length : vocabulary.cut_lengths) {
      if (length > at + 1) continue;
      const auto mark = vocabulary.cut_marks.find(std::string(text.substr(at + 1 - length, length)));
      if (mark != vocabulary.cut_marks.end() && (parse_special || !mark->second)) return at + 1;
    }
  }
  return text.size();
}

Status AppendTokens(const llama_vocab* vocab, std::string_view text, bool parse_special, std::vector<TokenId>& out) {
  const size_t n_before = out.size();
  const auto tokenize = [&](size_t n_max) {
    out.resize(n_before + n_max);
    return llama_tokenize(vocab, text.data(), static_cast<int32_t>(text.size()), out.data() + n_before,
                          static_cast<int32_t>(n_max), false, parse_special);
  };
  int32_t n = tokenize(text.size() / 2 + 8);
  if (n < 0 && n != INT32_MIN) n = tokenize(static_cast<size_t>(-n));
  if (n < 0) return {StatusCode::kOutOfRange, "tokenizer: too many tokens for one text"};
  out.resize(n_before + static_cast<size_t>(n));
  return Status::Ok();
}

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<Vocabulary> vocabulary) : vocabulary_(std::move(vocabulary)) {}
Tokenizer::~Tokenizer() = default;

Expected<std::unique_ptr<Tokenizer>> Tokenizer::Open(const std::string& gguf_path) {
  ASSIGN_OR_RETURN(auto vocabulary, Vocabulary::Open(gguf_path));
  std::unique_ptr<Tokenizer> out(new Tokenizer(std::move(vocabulary)));
  RETURN_IF_ERROR(out->ReadTokens(gguf_path));
  return out;
}

Status Tokenizer::ReadTokens(const std::string& gguf_path) try {
  const llama_vocab* vocab = vocabulary_->vocab();
  const auto n = static_cast<size_t>(llama_vocab_n_tokens(vocab));
  pieces_.resize(n);
  flags_.resize(n);
  std::set<size_t> lengths;
  for (size_t i = 0; i < n; ++i) {
    const auto id = static_cast<TokenId>(i);
    const llama_token_attr attr = llama_vocab_get_attr(vocab, id);
    std::string piece = LibraryPiece(vocab, id);
    int flags = 0;
    if (attr & LLAMA_TOKEN_ATTR_CONTROL) flags |= kControl | kMarkup;
    if (attr & LLAMA_TOKEN_ATTR_UNKNOWN) flags |= kUnknown;
    if ((attr & LLAMA_TOKEN_ATTR_USER_DEFINED) && LooksLikeMarkup(piece)) flags |= kMarkup;
    if (llama_vocab_is_eog(vocab, id)) flags |= kEndOfGeneration;
    if (piece.ends_with('\n')) flags |= kEndsLine;
    const bool is_mark = (attr & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_USER_DEFINED)) != 0;
    if (is_mark && piece.ends_with('>') && !(attr & LLAMA_TOKEN_ATTR_RSTRIP)) {
      vocabulary_->cut_marks.emplace(piece, (attr & LLAMA_TOKEN_ATTR_CONTROL) != 0);
      lengths.insert(piece.size());
    }
    flags_[i] = static_cast<unsigned char>(flags);
    pieces_[i] = std::move(piece);
  }
  vocabulary_->cut_lengths.assign(lengths.begin(), lengths.end());
  bos_ = OptionalToken(llama_vocab_bos(vocab));
  eos_ = OptionalToken(llama_vocab_eos(vocab));
  adds_bos_ = llama_vocab_get_add_bos(vocab);
  adds_eos_ = llama_vocab_get_add_eos(vocab);
  if ((adds_bos_ && !bos_) || (adds_eos_ && !eos_)) {
    return {StatusCode::kDataLoss, "tokenizer: '" + gguf_path + "' wants a begin or end token but names none"};
  }
  return Status::Ok();
} catch (const std::exception& error) {
  return {StatusCode::kDataLoss, "tokenizer: cannot use '" + gguf_path + "': " + error.what()};
}

Expected<std::vector<TokenId>> Tokenizer::Encode(std::string_view text, bool add_special, bool parse_special) const
    try {
  if (text.size() > kTextBytesMax) {
    return Status(StatusCode::kOutOfRange, "tokenizer: text of " + std::to_string(text.size()) + " bytes, limit " +
                                               std::to_string(kTextBytesMax));
  }
  // The library would replace each invalid byte in its own way, which a detokenizer then could not agree with.
  std::string sanitized;
  if (!IsValidUtf8(text)) {
    sanitized = SanitizeUtf8(text);
    text = sanitized;
  }
  if (vocabulary_->splits_by_std_regex && LongestRun(text) > kRegexRunBytesMax) {
    return Status(StatusCode::kOutOfRange, "tokenizer: a run of " + std::to_string(LongestRun(text)) +
                                               " bytes without a change between white space and other text, limit " +
                                               std::to_string(kRegexRunBytesMax) + " for this model's pre-tokenizer");
  }
  std::vector<TokenId> out;
  if (add_special && adds_bos_) out.push_back(*bos_);
  while (!text.empty()) {
    const size_t end = PartEnd(*vocabulary_, text, parse_special);
    RETURN_IF_ERROR(AppendTokens(vocabulary_->vocab(), text.substr(0, end), parse_special, out));
    text.remove_prefix(end);
  }
  if (add_special && adds_eos_) out.push_back(*eos_);
  return out;
} catch (const std::exception& error) {
  return Status(StatusCode::kInternal,
                std::string("tokenizer: the vocabulary cannot encode this text: ") + error.what());
}

const TokenTrie& Tokenizer::trie() const {
  std::call_once(trie_once_, [this] { trie_ = std::make_unique<TokenTrie>(*this); });
  return *trie_;
}

const std::string& Tokenizer::Piece(TokenId id) const {
  static const std::string kNone;
  return IsValid(id) ? pieces_[static_cast<size_t>(id)] : kNone;
}

std::string Tokenizer::Decode(const std::vector<TokenId>& tokens, bool with_special) const {
  std::string out;
  for (const TokenId id : tokens) {
    if (with_special || !IsControl(id)) out += Piece(id);
  }
  return out;
}

}  // namespace jointkv::text
