#include "text/cut_json.h"

#include <algorithm>

#include "text/chat_format.h"

namespace jointkv::text {

bool IsJson(const std::string& text) { return !common_json::parse_no_throw(text).is_discarded(); }

std::string CompletedJson(std::string_view cut) {
  std::string open;           // closing brackets of what is open, innermost last
  std::string open_at_comma;  // the same, before the last comma between values
  size_t comma = 0;
  bool in_string = false;
  size_t escape = cut.size();  // of the string's last character
  for (size_t i = 0; i < cut.size(); ++i) {
    const char c = cut[i];
    if (in_string) {
      if (c == '\\') {
        escape = i;
        i += i + 1 < cut.size() && cut[i + 1] == 'u' ? 5 : 1;
        if (i < cut.size()) escape = cut.size();
      } else if (c == '"') {
        in_string = false;
      }
      continue;
    }
    if (c == '"') in_string = true;
    if (c == '{' || c == '[') open += c == '{' ? '}' : ']';
    if ((c == '}' || c == ']') && !open.empty()) open.pop_back();
    if (c == ',') {
      comma = i;
      open_at_comma = open;
    }
  }
  const auto closed = [](std::string_view text, std::string brackets) {
    std::ranges::reverse(brackets);
    return std::string(text) + brackets;
  };
  const std::string_view text = cut.substr(0, escape);
  for (const std::string& candidate : {closed(in_string ? std::string(text) + '"' : std::string(text), open),
                                       closed(cut.substr(0, comma), open_at_comma)}) {
    if (candidate.starts_with('{') && IsJson(candidate)) return candidate;
  }
  return "{}";
}

}  // namespace jointkv::text
