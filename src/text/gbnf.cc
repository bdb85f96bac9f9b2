#include "text/gbnf.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "text/detokenizer.h"

namespace jointkv::text {
namespace {

constexpr uint32_t kLastCodePoint = 0x10ffff;
constexpr size_t kQuotedBytesMax = 40;  // of the source, in messages

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsNameChar(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || c == '_' || IsDigit(c);
}

// Sorts, joins and, where asked, inverts; surrogates are not characters.
std::vector<CodePointRange> Normalise(std::vector<CodePointRange> ranges, bool negated) {
  std::ranges::sort(ranges, {}, &CodePointRange::first);
  std::vector<CodePointRange> joined;
  for (const CodePointRange& range : ranges) {
    if (!joined.empty() && range.first <= joined.back().last + 1) {
      joined.back().last = std::max(joined.back().last, range.last);
    } else {
      joined.push_back(range);
    }
  }
  if (!negated) return joined;
  std::vector<CodePointRange> rest;
  uint32_t next = 0;
  for (const CodePointRange& range : joined) {
    if (range.first > next) rest.push_back({next, range.first - 1});
    next = range.last + 1;
  }
  if (next <= kLastCodePoint) rest.push_back({next, kLastCodePoint});
  return rest;
}

// Recursive descent; the first error stops it.
class Parser {
 public:
  Parser(std::string_view source, const GbnfLimits& limits) : source_(source), limits_(limits) {}

  Expected<Gbnf> Parse(std::string_view root) {
    SkipSpace(true);
    while (ok() && !AtEnd()) ParseRule();
    if (ok()) CheckRules(root);
    if (!ok()) return error_;
    out_.root = ids_.find(root)->second;
    return std::move(out_);
  }

 private:
  bool ok() const { return error_.ok(); }
  bool AtEnd() const { return at_ >= source_.size(); }
  char Peek(size_t ahead = 0) const { return at_ + ahead < source_.size() ? source_[at_ + ahead] : '\0'; }

  void Fail(StatusCode code, const std::string& what) {
    if (!ok()) return;
    const auto line = 1 + std::ranges::count(source_.substr(0, at_), '\n');
    error_ = Status(code, "grammar: line " + std::to_string(line) + ": " + what);
  }
  void Fail(const std::string& what) { Fail(StatusCode::kInvalidArgument, what); }
  void FailAt(const std::string& expected) {
    std::string_view rest = source_.substr(std::min(at_, source_.size()), kQuotedBytesMax);
    rest = rest.substr(0, rest.find('\n'));
    Fail("expected " + expected + (AtEnd() ? " before the end" : " at '" + std::string(rest) + "'"));
  }

  void SkipSpace(bool newlines) {
    while (!AtEnd()) {
      const char c = Peek();
      if (c == '#') {
        while (!AtEnd() && Peek() != '\n' && Peek() != '\r') ++at_;
      } else if (c == ' ' || c == '\t' || (newlines && (c == '\n' || c == '\r'))) {
        ++at_;
      } else {
        return;
      }
    }
  }

  std::string_view Name() {
    const size_t begin = at_;
    while (IsNameChar(Peek())) ++at_;
    if (at_ == begin) FailAt("a rule name");
    return source_.substr(begin, at_ - begin);
  }

  int RuleId(std::string_view name) {
    const auto found = ids_.find(name);
    if (found != ids_.end()) return found->second;
    const int id = static_cast<int>(out_.names.size());
    if (id >= limits_.rules_max) {
      Fail(StatusCode::kOutOfRange, "more than " + std::to_string(limits_.rules_max) + " rules");
      return 0;
    }
    ids_.emplace(name, id);
    out_.names.emplace_back(name);
    out_.rules.emplace_back();
    defined_.push_back(false);
    return id;
  }

  void ParseRule() {
    const std::string_view name = Name();
    SkipSpace(false);
    if (!ok()) return;
    if (source_.substr(at_, 3) != "::=") return FailAt("'::='");
    at_ += 3;
    SkipSpace(true);
    const int id = RuleId(name);
    GbnfNode body = Choice(false, 0);
    if (!ok()) return;
    if (!AtEnd() && Peek() != '\n' && Peek() != '\r') return FailAt("the end of the rule");
    SkipSpace(true);
    out_.rules[id] = std::move(body);
    defined_[id] = true;
  }

  GbnfNode Choice(bool nested, int depth) {
    GbnfNode first = Sequence(nested, depth);
    if (Peek() != '|') return first;
    GbnfNode out;
    out.kind = GbnfNode::Kind::kChoice;
    out.children.push_back(std::move(first));
    while (ok() && Peek() == '|') {
      ++at_;
      SkipSpace(true);
      out.children.push_back(Sequence(nested, depth));
    }
    return out;
  }

  GbnfNode Sequence(bool nested, int depth) {
    GbnfNode out;
    while (ok()) {
      if (Repeats(Peek())) {
        if (out.children.empty()) {
          FailAt("something to repeat");
          break;
        }
        Repeat(out.children.back());
      } else {
        std::optional<GbnfNode> item = Item(depth);
        if (!item) break;
        out.children.push_back(std::move(*item));
      }
      SkipSpace(nested);
    }
    return out;
  }

  static bool Repeats(char c) { return c == '*' || c == '+' || c == '?' || c == '{'; }

  std::optional<GbnfNode> Item(int depth) {
    const char c = Peek();
    if (c == '"') return Literal();
    if (c == '[') return Chars();
    if (c == '<' || c == '!') {
      Fail(StatusCode::kUnsupported, "token elements (<...>) are not supported");
      return std::nullopt;
    }
    GbnfNode out;
    if (IsNameChar(c)) {
      out.kind = GbnfNode::Kind::kRule;
      out.rule = RuleId(Name());
    } else if (c == '.') {
      ++at_;
      out.kind = GbnfNode::Kind::kChars;
      out.ranges = Normalise({}, true);
    } else if (c == '(') {
      if (depth >= limits_.nesting_max) {
        Fail(StatusCode::kOutOfRange, "parentheses nested more than " + std::to_string(limits_.nesting_max) + " deep");
        return std::nullopt;
      }
      ++at_;
      SkipSpace(true);
      out = Choice(true, depth + 1);
      if (Peek() != ')') {
        FailAt("')'");
        return std::nullopt;
      }
      ++at_;
    } else {
      return std::nullopt;
    }
    return out;
  }

  GbnfNode Literal() {
    GbnfNode out;
    out.kind = GbnfNode::Kind::kLiteral;
    ++at_;
    while (ok() && Peek() != '"') AppendUtf8(Char(), out.literal);
    ++at_;
    return out;
  }

  GbnfNode Chars() {
    GbnfNode out;
    out.kind = GbnfNode::Kind::kChars;
    ++at_;
    const bool negated = Peek() == '^';
    if (negated) ++at_;
    std::vector<CodePointRange> ranges;
    while (ok() && Peek() != ']') {
      const uint32_t first = Char();
      uint32_t last = first;
      if (Peek() == '-' && Peek(1) != ']') {
        ++at_;
        last = Char();
      }
      if (last < first) Fail("a character range that ends before it begins");
      ranges.push_back({first, last});
    }
    ++at_;
    out.ranges = Normalise(std::move(ranges), negated);
    return out;
  }

  uint32_t Char() {
    if (AtEnd()) {
      FailAt("a character");
      return 0;
    }
    if (Peek() != '\\') return CodePoint();
    const char kind = Peek(1);
    at_ += 2;
    switch (kind) {
      case 'x': return Hex(2);
      case 'u': return Hex(4);
      case 'U': return Hex(8);
      case 't': return '\t';
      case 'r': return '\r';
      case 'n': return '\n';
      case '\\':
      case '"':
      case '[':
      case ']':
      case '-': return static_cast<uint32_t>(kind);
      default: Fail("unknown escape '\\" + std::string(1, kind) + "'"); return 0;
    }
  }

  uint32_t Hex(int digits) {
    uint32_t value = 0;
    for (int i = 0; i < digits; ++i, ++at_) {
      const char c = Peek();
      const int digit = IsDigit(c)               ? c - '0'
                        : (c >= 'a' && c <= 'f') ? c - 'a' + 10
                        : (c >= 'A' && c <= 'F') ? c - 'A' + 10
                                                 : -1;
      if (digit < 0) {
        FailAt(std::to_string(digits) + " hexadecimal digits");
        return 0;
      }
      value = value << 4 | static_cast<uint32_t>(digit);
    }
    if (value > kLastCodePoint) Fail("an escape beyond U+10FFFF");
    return std::min(value, kLastCodePoint);
  }

  // The source is valid UTF-8.
  uint32_t CodePoint() {
    const auto lead = static_cast<unsigned char>(Peek());
    const size_t length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    uint32_t value = length == 1 ? lead : lead & (0x7fu >> length);
    for (size_t i = 1; i < length; ++i) value = value << 6 | (static_cast<unsigned char>(Peek(i)) & 0x3f);
    at_ += length;
    return value;
  }

  std::optional<int> Count() {
    if (!IsDigit(Peek())) return std::nullopt;
    int64_t value = 0;
    for (; IsDigit(Peek()); ++at_) value = std::min<int64_t>(value * 10 + (Peek() - '0'), 1 << 30);
    return static_cast<int>(value);
  }

  void Repeat(GbnfNode& last) {
    if (last.kind == GbnfNode::Kind::kRepeat && last.children[0].kind == GbnfNode::Kind::kRepeat) {
      return Fail("three repetitions in a row");
    }
    GbnfNode out;
    out.kind = GbnfNode::Kind::kRepeat;
    const char c = Peek();
    ++at_;
    if (c == '+') out.repeat_min = 1;
    if (c == '?') out.repeat_max = 1;
    if (c == '{') {
      SkipSpace(true);
      const std::optional<int> low = Count();
      SkipSpace(true);
      if (!low) return FailAt("a number");
      out.repeat_min = out.repeat_max = *low;
      if (Peek() == ',') {
        ++at_;
        SkipSpace(true);
        out.repeat_max = Count().value_or(GbnfNode::kUnbounded);
        SkipSpace(true);
      }
      if (Peek() != '}') return FailAt("'}'");
      ++at_;
      if (out.repeat_min > limits_.repetitions_max) {
        return Fail(StatusCode::kOutOfRange,
                    std::to_string(out.repeat_min) + " repetitions, limit " + std::to_string(limits_.repetitions_max));
      }
      if (out.repeat_max > limits_.repetitions_max) out.repeat_max = GbnfNode::kUnbounded;
      if (out.repeat_max != GbnfNode::kUnbounded && out.repeat_max < out.repeat_min) {
        return Fail("a repetition whose maximum is below its minimum");
      }
    }
    out.children.push_back(std::move(last));
    last = std::move(out);
  }

  void CheckRules(std::string_view root) {
    for (size_t i = 0; i < defined_.size(); ++i) {
      if (!defined_[i]) Fail("rule '" + out_.names[i].substr(0, kQuotedBytesMax) + "' is not defined");
    }
    if (ids_.find(root) == ids_.end()) Fail("there is no rule '" + std::string(root) + "'");
  }

  std::string_view source_;
  const GbnfLimits& limits_;
  size_t at_ = 0;
  Gbnf out_;
  std::map<std::string, int, std::less<>> ids_;
  std::vector<bool> defined_;
  Status error_;
};

}  // namespace

void AppendUtf8(uint32_t c, std::string& out) {
  const auto byte = [&](uint32_t value) { out.push_back(static_cast<char>(value)); };
  if (c < 0x80) return byte(c);
  if (c < 0x800) {
    byte(0xc0 | c >> 6);
  } else {
    if (c < 0x10000) {
      byte(0xe0 | c >> 12);
    } else {
      byte(0xf0 | c >> 18);
      byte(0x80 | (c >> 12 & 0x3f));
    }
    byte(0x80 | (c >> 6 & 0x3f));
  }
  byte(0x80 | (c & 0x3f));
}

Expected<Gbnf> ParseGbnf(std::string_view source, std::string_view root, const GbnfLimits& limits) {
  if (source.size() > limits.bytes_max) {
    return Status(StatusCode::kOutOfRange,
                  "grammar: " + std::to_string(source.size()) + " bytes, limit " + std::to_string(limits.bytes_max));
  }
  if (!IsValidUtf8(source)) return Status(StatusCode::kInvalidArgument, "grammar: not valid UTF-8");
  return Parser(source, limits).Parse(root);
}

}  // namespace jointkv::text
