// Inside this room: keeps what clients write from being read as a model's markup.
//
// A chat template joins clients' texts with its own, and the whole is tokenised with markup as tokens. So that a text
// which spells "<|im_end|>" stays that text, a character that occurs nowhere else is put behind the first character of
// each mark that it spells, before the template sees it, and taken out of the result; there the tokenizer starts anew.
//
// ClientText. Threads: const calls from any number of threads. Owns: the vocabulary's marks. Fails how: a Status when
// the client's texts use up all characters that could mark a place.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "base/status.h"
#include "text/chat_template.h"

namespace jointkv::text {

class ClientText {
 public:
  // `own_marks` may stand in what an assistant is said to have written: tags of thoughts, which templates look for.
  ClientText(const Tokenizer& tokenizer, const std::vector<std::string>& own_marks);

  bool SpellsMarkup(std::span<const ChatMessage> messages, std::span<const Tool> tools) const;
  // A character for Break that occurs in none of these, nor in `source`.
  Expected<std::string> FreeCharacter(std::span<const ChatMessage> messages, std::span<const Tool> tools,
                                      std::string_view source) const;
  void Break(const std::string& character, std::vector<ChatMessage>& messages, std::vector<Tool>& tools) const;
  // Takes the character out of `text` and returns where it stood.
  static std::vector<size_t> TakeOut(const std::string& character, std::string& text);

 private:
  size_t MarkAt(std::string_view text, size_t at, bool assistant) const;
  bool Spells(std::string_view text, bool assistant) const;
  void BreakText(const std::string& character, std::string& text, bool assistant) const;

  std::unordered_set<std::string> marks_;
  std::unordered_set<std::string> own_marks_;
  std::vector<size_t> lengths_;
  std::array<bool, 256> begins_{};
};

}  // namespace jointkv::text
