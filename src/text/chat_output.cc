#include "text/chat_output.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "base/hash.h"
#include "text/chat_format.h"
#include "text/detokenizer.h"

namespace jointkv::text {
namespace {

// The library recurses into nested brackets. Counted without regard to quotes.
constexpr int kNestingMax = 200;
constexpr size_t kToolCallsMax = 128;
constexpr size_t kPieceShare = 32;

std::string NewCallId() {
  static constexpr char kAlphabet[] = "0123456789abcdefghijklmnopqrstuv";
  std::string id = "call_";
  for (int half = 0; half < 2; ++half) {
    uint64_t random = RandomKey();
    for (int i = 0; i < 12; ++i, random >>= 5) id.push_back(kAlphabet[random & 31]);
  }
  return id;
}

// Brings `said` to `now` where that only adds; returns what was added.
std::string Extend(std::string& said, const std::string& now) {
  if (now.size() <= said.size() || !now.starts_with(said)) return {};
  std::string added = now.substr(said.size());
  said = now;
  return added;
}

// A prefix of UTF-8 whose last character may be cut.
std::string WholeCharacters(std::string text) {
  size_t begin = text.size();
  while (begin > 0 && text.size() - begin < 3 && (static_cast<unsigned char>(text[begin - 1]) & 0xc0) == 0x80) --begin;
  if (begin == 0) return text;
  const auto lead = static_cast<unsigned char>(text[begin - 1]);
  const size_t length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  if (lead >= 0xc0 && text.size() - (begin - 1) < length) text.resize(begin - 1);
  return text;
}

}  // namespace

struct ChatOutputParser::Message {
  common_chat_msg value;
};

ChatOutputParser::ChatOutputParser(std::shared_ptr<const ChatFormat> format) : format_(std::move(format)) {}

void ChatOutputParser::CountNesting(std::string_view text) {
  for (const char c : text) {
    if (c == '{' || c == '[') ++nesting_;
    if ((c == '}' || c == ']') && nesting_ > 0) --nesting_;
    if (nesting_ > kNestingMax) gave_up_ = true;
  }
}

ChatDelta ChatOutputParser::Append(std::string_view text) {
  if (format_ == nullptr) {
    content_ += text;
    return {.reasoning = {}, .content = std::string(text), .tool_calls = {}};
  }
  text_ += text;
  CountNesting(text);
  if (gave_up_ || text_.size() - parsed_bytes_ < parsed_bytes_ / kPieceShare) return {};
  return Parse(true);
}

ChatDelta ChatOutputParser::Finish() {
  if (format_ == nullptr) return {};
  return gave_up_ ? TakeRest() : Parse(false);
}

ChatDelta ChatOutputParser::Parse(bool partial) {
  parsed_bytes_ = text_.size();
  try {
    return Advance({common_chat_parse(text_, partial, format_->params)});
  } catch (const std::exception&) {
    // Half a text may fail where the whole does not.
    return partial ? ChatDelta() : TakeRest();
  }
}

ChatDelta ChatOutputParser::Advance(const Message& message) {
  ChatDelta delta;
  delta.reasoning = Extend(reasoning_, WholeCharacters(message.value.reasoning_content));
  delta.content = Extend(content_, WholeCharacters(message.value.content));
  const auto& calls = message.value.tool_calls;
  for (size_t i = 0; i < std::min(calls.size(), kToolCallsMax); ++i) {
    if (calls[i].name.empty()) break;
    ToolCallDelta call;
    call.index = static_cast<int>(i);
    if (i == calls_.size()) {
      call.id = calls[i].id.empty() ? NewCallId() : SanitizeUtf8(calls[i].id);
      call.name = SanitizeUtf8(calls[i].name);
      calls_.push_back({.id = call.id, .name = call.name, .arguments_json = {}});
    }
    call.arguments = Extend(calls_[i].arguments_json, WholeCharacters(calls[i].arguments));
    if (!call.name.empty() || !call.arguments.empty()) delta.tool_calls.push_back(std::move(call));
  }
  return delta;
}

// What cannot be parsed is content, unless it has begun to be something else.
ChatDelta ChatOutputParser::TakeRest() {
  ChatDelta delta;
  if (reasoning_.empty() && calls_.empty()) delta.content = Extend(content_, text_);
  return delta;
}

ChatOutput ParseChatOutput(std::shared_ptr<const ChatFormat> format, std::string_view text) {
  ChatOutputParser parser(std::move(format));
  parser.Append(text);
  parser.Finish();
  return {parser.reasoning(), parser.content(), parser.tool_calls()};
}

}  // namespace jointkv::text
