#include "text/detokenizer.h"

#include "text/tokenizer.h"

namespace jointkv::text {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

enum class Utf8 { kComplete, kIncomplete, kInvalid };

struct Utf8Step {
  Utf8 kind;
  size_t length;  // bytes: of the character, of what is there of it, or of the maximal subpart
};

// The first character of `bytes` (not empty), by the table of well-formed sequences in Unicode 15, section 3.9.
Utf8Step NextCharacter(std::string_view bytes) {
  const auto at = [&](size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const unsigned char lead = at(0);
  if (lead < 0x80) return {Utf8::kComplete, 1};
  const size_t length = lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
  if (length == 0) return {Utf8::kInvalid, 1};
  unsigned char low = 0x80;
  unsigned char high = 0xbf;
  if (lead == 0xe0) low = 0xa0;
  if (lead == 0xed) high = 0x9f;
  if (lead == 0xf0) low = 0x90;
  if (lead == 0xf4) high = 0x8f;
  for (size_t i = 1; i < length; ++i) {
    if (i == bytes.size()) return {Utf8::kIncomplete, i};
    if (at(i) < low || at(i) > high) return {Utf8::kInvalid, i};
    low = 0x80;
    high = 0xbf;
  }
  return {Utf8::kComplete, length};
}

// Appends all that is decided and returns the length of an incomplete sequence at the end.
size_t AppendDecided(std::string_view bytes, std::string& out) {
  size_t valid_from = 0;
  size_t i = 0;
  while (i < bytes.size()) {
    const Utf8Step step = NextCharacter(bytes.substr(i));
    if (step.kind == Utf8::kIncomplete) break;
    if (step.kind == Utf8::kInvalid) {
      out.append(bytes.substr(valid_from, i - valid_from));
      out.append(kReplacement);
      valid_from = i + step.length;
    }
    i += step.length;
  }
  out.append(bytes.substr(valid_from, i - valid_from));
  return bytes.size() - i;
}

}  // namespace

void StreamDetokenizer::Append(TokenId token, std::string& out) {
  if (!with_special_ && tokenizer_->IsControl(token)) return;
  AppendBytes(tokenizer_->Piece(token), out);
}

std::string StreamDetokenizer::Append(TokenId token) {
  std::string out;
  Append(token, out);
  return out;
}

void StreamDetokenizer::AppendBytes(std::string_view bytes, std::string& out) {
  // Finish the held-back sequence byte by byte: it is decided after at most three more.
  while (n_held_ > 0 && !bytes.empty()) {
    held_[n_held_] = bytes.front();
    const std::string_view held(held_.data(), n_held_ + 1);
    const Utf8Step step = NextCharacter(held);
    if (step.kind == Utf8::kInvalid) {
      out.append(kReplacement);
      n_held_ = 0;
      break;  // this byte starts anew
    }
    bytes.remove_prefix(1);
    if (step.kind == Utf8::kComplete) {
      out.append(held);
      n_held_ = 0;
    } else {
      ++n_held_;
    }
  }
  if (bytes.empty()) return;
  const size_t rest = AppendDecided(bytes, out);
  bytes.substr(bytes.size() - rest).copy(held_.data(), rest);
  n_held_ = rest;
}

void StreamDetokenizer::Flush(std::string& out) {
  if (n_held_ > 0) out.append(kReplacement);
  n_held_ = 0;
}

std::string StreamDetokenizer::Flush() {
  std::string out;
  Flush(out);
  return out;
}

std::string SanitizeUtf8(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  if (AppendDecided(bytes, out) > 0) out.append(kReplacement);
  return out;
}

bool IsValidUtf8(std::string_view bytes) {
  for (size_t i = 0; i < bytes.size();) {
    const Utf8Step step = NextCharacter(bytes.substr(i));
    if (step.kind != Utf8::kComplete) return false;
    i += step.length;
  }
  return true;
}

}  // namespace jointkv::text
