#include "text/client_text.h"

#include <algorithm>
#include <set>

#include "text/detokenizer.h"
#include "text/gbnf.h"

namespace jointkv::text {
namespace {

// Private use: no text has a meaning for them.
constexpr uint32_t kFirstPrivate = 0xf6c0;
constexpr uint32_t kLastPrivate = 0xf6ff;

// All that a client writes of a message or tool. A role is a word that the template compares; it is data as well.
template <typename Message, typename Visit>
void VisitTexts(Message& message, const Visit& visit) {
  const bool assistant = message.role == "assistant";
  visit(message.content, assistant);
  visit(message.role, false);
  visit(message.name, false);
  visit(message.tool_call_id, false);
  for (auto& call : message.tool_calls) {
    visit(call.id, false);
    visit(call.name, false);
    visit(call.arguments_json, false);
  }
}

template <typename AnyTool, typename Visit>
void VisitToolTexts(AnyTool& tool, const Visit& visit) {
  visit(tool.name, false);
  visit(tool.description, false);
  visit(tool.parameters_json, false);
}

template <typename Visit>
void VisitAll(std::span<const ChatMessage> messages, std::span<const Tool> tools, const Visit& visit) {
  for (const ChatMessage& message : messages) VisitTexts(message, visit);
  for (const Tool& tool : tools) VisitToolTexts(tool, visit);
}

}  // namespace

ClientText::ClientText(const Tokenizer& tokenizer, const std::vector<std::string>& own_marks) {
  std::set<size_t> lengths;
  for (TokenId id = 0; id < tokenizer.n_vocab(); ++id) {
    const std::string& piece = tokenizer.Piece(id);
    // One character alone is no markup, and could not be broken.
    if (!tokenizer.IsSpecial(id) || piece.size() < 2 || !IsValidUtf8(piece)) continue;
    marks_.insert(piece);
    lengths.insert(piece.size());
    begins_[static_cast<unsigned char>(piece[0])] = true;
  }
  lengths_.assign(lengths.begin(), lengths.end());
  own_marks_.insert(own_marks.begin(), own_marks.end());
}

// The length of a mark that begins there, or 0.
size_t ClientText::MarkAt(std::string_view text, size_t at, bool assistant) const {
  if (!begins_[static_cast<unsigned char>(text[at])]) return 0;
  for (const size_t length : lengths_) {
    if (length > text.size() - at) break;
    const std::string candidate(text.substr(at, length));
    if (marks_.contains(candidate) && !(assistant && own_marks_.contains(candidate))) return length;
  }
  return 0;
}

bool ClientText::Spells(std::string_view text, bool assistant) const {
  for (size_t i = 0; i < text.size(); ++i) {
    if (MarkAt(text, i, assistant) > 0) return true;
  }
  return false;
}

bool ClientText::SpellsMarkup(std::span<const ChatMessage> messages, std::span<const Tool> tools) const {
  bool any = false;
  VisitAll(messages, tools, [&](const std::string& text, bool assistant) { any = any || Spells(text, assistant); });
  return any;
}

Expected<std::string> ClientText::FreeCharacter(std::span<const ChatMessage> messages, std::span<const Tool> tools,
                                                std::string_view source) const {
  for (uint32_t code_point = kFirstPrivate; code_point <= kLastPrivate; ++code_point) {
    std::string character;
    AppendUtf8(code_point, character);
    bool used = source.find(character) != std::string_view::npos;
    VisitAll(messages, tools,
             [&](const std::string& text, bool) { used = used || text.find(character) != std::string::npos; });
    if (!used) return character;
  }
  return Status(StatusCode::kInvalidArgument, "chat: the messages spell markup and use all of U+F6C0 to U+F6FF");
}

void ClientText::BreakText(const std::string& character, std::string& text, bool assistant) const {
  if (!Spells(text, assistant)) return;
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool breaks = MarkAt(text, i, assistant) > 0;
    out += text[i];
    if (!breaks) continue;
    // Behind the whole first character.
    while (i + 1 < text.size() && (static_cast<unsigned char>(text[i + 1]) & 0xc0) == 0x80) out += text[++i];
    out += character;
  }
  text = std::move(out);
}

void ClientText::Break(const std::string& character, std::vector<ChatMessage>& messages,
                       std::vector<Tool>& tools) const {
  const auto visit = [&](std::string& text, bool assistant) { BreakText(character, text, assistant); };
  for (ChatMessage& message : messages) VisitTexts(message, visit);
  for (Tool& tool : tools) VisitToolTexts(tool, visit);
}

std::vector<size_t> ClientText::TakeOut(const std::string& character, std::string& text) {
  std::vector<size_t> places;
  std::string out;
  size_t from = 0;
  for (size_t at = text.find(character); at != std::string::npos; at = text.find(character, from)) {
    out += text.substr(from, at - from);
    places.push_back(out.size());
    from = at + character.size();
  }
  out += text.substr(from);
  text = std::move(out);
  return places;
}

}  // namespace jointkv::text
