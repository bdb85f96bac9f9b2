// Tokens to text for streaming: never half a character.
//
// StreamDetokenizer. Threads: one at a time. Owns: at most 3 held-back bytes; the Tokenizer must outlive it.
// Fails how: never. Invalid bytes become U+FFFD, one for each maximal subpart, as in the WHATWG Encoding Standard (a
// browser's TextDecoder), so the stream does not depend on how tokens split the bytes.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>

#include "base/ids.h"

namespace jointkv::text {

class Tokenizer;

class StreamDetokenizer {
 public:
  // with_special = false: control tokens give no text.
  explicit StreamDetokenizer(const Tokenizer& tokenizer, bool with_special = false)
      : tokenizer_(&tokenizer), with_special_(with_special) {}

  // Appends to `out` the characters that this token completes; grows nothing but `out`.
  void Append(TokenId token, std::string& out);
  std::string Append(TokenId token);
  // The same for bytes that came from elsewhere.
  void AppendBytes(std::string_view bytes, std::string& out);

  // The stream has ended: an incomplete rest becomes U+FFFD.
  void Flush(std::string& out);
  std::string Flush();

  size_t held_bytes() const { return n_held_; }
  void Reset() { n_held_ = 0; }

 private:
  const Tokenizer* tokenizer_;
  bool with_special_;
  std::array<char, 4> held_{};  // a valid but incomplete sequence
  size_t n_held_ = 0;
};

// The same replacement on whole strings.
std::string SanitizeUtf8(std::string_view bytes);
bool IsValidUtf8(std::string_view bytes);

}  // namespace jointkv::text
