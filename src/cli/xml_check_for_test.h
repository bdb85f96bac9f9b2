// Whether a text is well-formed XML, as far as this room's pictures use it: elements, quoted attributes, entities.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace jointkv::cli {

// Empty, or what is wrong.
inline std::string XmlError(std::string_view text) {
  std::vector<std::string> open;
  size_t at = 0;
  const auto name = [&] {
    const size_t begin = at;
    while (at < text.size() && (std::isalnum(static_cast<unsigned char>(text[at])) != 0 || text[at] == '-')) ++at;
    return std::string(text.substr(begin, at - begin));
  };
  const auto spaces = [&] {
    while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at])) != 0) ++at;
  };
  const auto entity = [&] {
    for (const char* known : {"&amp;", "&lt;", "&gt;", "&quot;", "&apos;"}) {
      if (text.substr(at).starts_with(known)) return true;
    }
    return false;
  };
  while (at < text.size()) {
    if (text[at] == '&' && !entity()) return "bare &";
    if (text[at] == '>') return "bare >";
    if (text[at] != '<') {
      ++at;
      continue;
    }
    ++at;
    if (at < text.size() && text[at] == '/') {
      ++at;
      const std::string closed = name();
      if (open.empty() || open.back() != closed) return "</" + closed + "> closes nothing";
      open.pop_back();
      if (at >= text.size() || text[at++] != '>') return "end tag without >";
      continue;
    }
    const std::string element = name();
    if (element.empty()) return "tag without name";
    for (spaces(); at < text.size() && text[at] != '>' && text[at] != '/'; spaces()) {
      if (name().empty()) return "attribute without name in " + element;
      if (text.substr(at, 2) != "=\"") return "attribute without quotes in " + element;
      for (at += 2; at < text.size() && text[at] != '"'; ++at) {
        if (text[at] == '<' || (text[at] == '&' && !entity())) return "bad attribute in " + element;
      }
      if (at++ >= text.size()) return "open quotes in " + element;
    }
    const bool empty = at < text.size() && text[at] == '/';
    at += empty;
    if (at >= text.size() || text[at++] != '>') return "open tag " + element;
    if (!empty) open.push_back(element);
  }
  return open.empty() ? "" : "<" + open.back() + "> is never closed";
}

}  // namespace jointkv::cli
