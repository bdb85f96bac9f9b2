// Text to tokens and back, as the model file says.
//
// Tokenizer. Threads: const calls from any number of threads. Owns: the vocabulary (the model file's weights are never
// read). Fails how: Open and Encode return a Status; a file's tokenizer metadata is checked before the library behind
// it sees the file, because that library aborts on some bad vocabularies.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.h"
#include "base/status.h"

namespace jointkv::text {

class TokenTrie;

class Tokenizer {
 public:
  static Expected<std::unique_ptr<Tokenizer>> Open(const std::string& gguf_path);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  int n_vocab() const { return static_cast<int>(pieces_.size()); }
  bool IsValid(TokenId id) const { return id >= 0 && id < n_vocab(); }

  // add_special: begin (and end) of sequence as the file says. parse_special: markup such as <|im_start|> in the text
  // becomes its token; leave it false for text that a client sent, or the client can forge roles.
  Expected<std::vector<TokenId>> Encode(std::string_view text, bool add_special, bool parse_special) const;

  // Bytes of one token; may be a part of a UTF-8 sequence. Special tokens give their text. Empty for an invalid id.
  const std::string& Piece(TokenId id) const;

  // All pieces joined; with_special = false leaves control tokens out. Invalid UTF-8 stays as it is.
  std::string Decode(const std::vector<TokenId>& tokens, bool with_special) const;

  bool IsSpecial(TokenId id) const { return HasFlag(id, kControl | kMarkup | kUnknown); }
  bool IsControl(TokenId id) const { return HasFlag(id, kControl); }
  bool IsEndOfGeneration(TokenId id) const { return HasFlag(id, kEndOfGeneration); }
  // Ordinary text, that does not end the output: neither control nor unknown tokens, nor empty ones.
  bool GivesText(TokenId id) const {
    return IsValid(id) && !HasFlag(id, kControl | kUnknown | kEndOfGeneration) && !Piece(id).empty();
  }
  // The piece ends with '\n'. Together with IsMarkup: where a KV block may end early.
  bool EndsLine(TokenId id) const { return HasFlag(id, kEndsLine); }
  // Chat markup: control tokens, and user-defined ones of the form <|...|> or <start_of_turn>, <end_of_turn>.
  bool IsMarkup(TokenId id) const { return HasFlag(id, kMarkup); }

  std::optional<TokenId> bos() const { return bos_; }
  std::optional<TokenId> eos() const { return eos_; }
  bool adds_bos() const { return adds_bos_; }
  bool adds_eos() const { return adds_eos_; }

  // Of all tokens that give text; made at the first call.
  const TokenTrie& trie() const;

 private:
  friend class ChatTemplate;
  struct Vocabulary;  // the library's objects

  enum Flag : unsigned char {
    kControl = 1,
    kMarkup = 2,
    kUnknown = 4,
    kEndOfGeneration = 8,
    kEndsLine = 16,
  };

  explicit Tokenizer(std::unique_ptr<Vocabulary> vocabulary);
  Status ReadTokens(const std::string& gguf_path);
  bool HasFlag(TokenId id, int flags) const { return IsValid(id) && (flags_[static_cast<size_t>(id)] & flags) != 0; }

  std::unique_ptr<Vocabulary> vocabulary_;
  std::vector<std::string> pieces_;   // (n_vocab)
  std::vector<unsigned char> flags_;  // (n_vocab)
  std::optional<TokenId> bos_;
  std::optional<TokenId> eos_;
  bool adds_bos_ = false;
  bool adds_eos_ = false;
  mutable std::once_flag trie_once_;
  mutable std::unique_ptr<TokenTrie> trie_;
};

}  // namespace jointkv::text
