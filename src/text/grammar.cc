#include "text/grammar.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <regex>
#include <utility>

#include "base/check.h"
#include "text/gbnf.h"
#include "text/grammar_automaton.h"
#include "text/json_schema.h"
#include "text/token_trie.h"

namespace jointkv::text {
namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();
constexpr size_t kMaskBytesMax = size_t{8} << 20;
// Text before a trigger that is looked at: std::regex recurses once per character.
constexpr size_t kBufferBytes = 512;
constexpr size_t kTriggersMax = 256;
constexpr size_t kTriggerBytesMax = 256;
constexpr size_t kPrefillBytesMax = 4096;
constexpr size_t kVisibleTokensMax = 1024;

Status TooMany(const std::string& what, size_t value, size_t limit) {
  return {StatusCode::kOutOfRange,
          "grammar: " + what + ": " + std::to_string(value) + ", limit " + std::to_string(limit)};
}

Status CheckSpec(const Tokenizer& tokenizer, const GrammarSpec& spec) {
  for (const auto* list : {&spec.trigger_words, &spec.trigger_patterns}) {
    if (list->size() > kTriggersMax) return TooMany("triggers", list->size(), kTriggersMax);
    for (const std::string& trigger : *list) {
      if (trigger.empty()) return {StatusCode::kInvalidArgument, "grammar: an empty trigger"};
      if (trigger.size() > kTriggerBytesMax) return TooMany("bytes of a trigger", trigger.size(), kTriggerBytesMax);
    }
  }
  if (spec.lazy && spec.trigger_words.empty() && spec.trigger_patterns.empty()) {
    return {StatusCode::kInvalidArgument, "grammar: it waits for a trigger, but names none"};
  }
  if (spec.prefill.size() > kPrefillBytesMax) return TooMany("bytes of prefill", spec.prefill.size(), kPrefillBytesMax);
  if (std::max(spec.think_begin.size(), spec.think_end.size()) > kTriggerBytesMax) {
    return TooMany("bytes of a tag", std::max(spec.think_begin.size(), spec.think_end.size()), kTriggerBytesMax);
  }
  if (spec.visible_tokens.size() > kVisibleTokensMax) {
    return TooMany("visible tokens", spec.visible_tokens.size(), kVisibleTokensMax);
  }
  for (const TokenId token : spec.visible_tokens) {
    if (!tokenizer.IsValid(token)) {
      return {StatusCode::kOutOfRange, "grammar: visible token " + std::to_string(token) + " does not exist"};
    }
  }
  return Status::Ok();
}

}  // namespace

struct Grammar::Automaton {
  GrammarAutomaton machine;
};

struct Grammar::Triggers {
  std::vector<std::regex> patterns;

  // Where the grammar begins in `text`, or npos. `begins_text`: ^ may match.
  size_t Find(const GrammarSpec& spec, const std::string& text, bool begins_text) const try {
    size_t first = std::string::npos;
    for (const std::string& word : spec.trigger_words) first = std::min(first, text.find(word));
    if (first != std::string::npos) return first;
    const auto flags = begins_text ? std::regex_constants::match_default : std::regex_constants::match_not_bol;
    for (const std::regex& pattern : patterns) {
      // By pointers: the tokenizer's library counts on the stack that its own instance, by iterators, takes.
      std::cmatch match;
      if (!std::regex_search(text.data(), text.data() + text.size(), match, pattern, flags)) continue;
      for (size_t group = 1; group < match.size(); ++group) {
        if (match.length(group) > 0) return static_cast<size_t>(match.position(group));
      }
      return static_cast<size_t>(match.position(0));
    }
    return std::string::npos;
  } catch (const std::regex_error&) {  // too complex for this text
    return std::string::npos;
  }
};

Grammar::Grammar(const Tokenizer& tokenizer, GrammarSpec spec) : tokenizer_(&tokenizer), spec_(std::move(spec)) {}
Grammar::~Grammar() = default;

Expected<std::shared_ptr<Grammar>> Grammar::Compile(const Tokenizer& tokenizer, GrammarSpec spec) try {
  RETURN_IF_ERROR(CheckSpec(tokenizer, spec));
  std::shared_ptr<Grammar> out(new Grammar(tokenizer, std::move(spec)));
  RETURN_IF_ERROR(out->Prepare());
  return out;
} catch (const std::exception& error) {
  return Status(StatusCode::kInvalidArgument, std::string("grammar: ") + error.what());
}

Status Grammar::Prepare() {
  ASSIGN_OR_RETURN(const Gbnf parsed, ParseGbnf(spec_.gbnf));
  ASSIGN_OR_RETURN(GrammarAutomaton machine, GrammarAutomaton::Create(parsed));
  automaton_ = std::make_unique<Automaton>(Automaton{std::move(machine)});
  triggers_ = std::make_unique<Triggers>();
  for (const std::string& pattern : spec_.trigger_patterns) triggers_->patterns.emplace_back(pattern);
  start_ = automaton_->machine.start();
  if (!spec_.lazy) {
    start_ = automaton_->machine.Walk(start_, spec_.prefill);
    if (start_ < 0) {
      return {StatusCode::kInvalidArgument, "grammar: the prompt's end '" + spec_.prefill + "' does not fit it"};
    }
  }
  for (TokenId id = 0; id < tokenizer_->n_vocab(); ++id) {
    if (tokenizer_->IsEndOfGeneration(id)) end_tokens_.push_back(id);
  }
  path_.resize(static_cast<size_t>(tokenizer_->trie().depth()) + 1);
  return Status::Ok();
}

Expected<std::shared_ptr<Grammar>> Grammar::FromGbnf(const Tokenizer& tokenizer, std::string gbnf) {
  GrammarSpec spec;
  spec.gbnf = std::move(gbnf);
  return Compile(tokenizer, std::move(spec));
}

Expected<std::shared_ptr<Grammar>> Grammar::FromJsonSchema(const Tokenizer& tokenizer, std::string_view schema) {
  ASSIGN_OR_RETURN(std::string gbnf, JsonSchemaToGbnf(schema, "json_schema"));
  return FromGbnf(tokenizer, std::move(gbnf));
}

Expected<std::shared_ptr<Grammar>> Grammar::AnyJsonObject(const Tokenizer& tokenizer) {
  return FromJsonSchema(tokenizer, R"({"type":"object"})");
}

size_t Grammar::bytes() const { return spec_.gbnf.size() + automaton_->machine.bytes(); }

bool Grammar::IsVisible(TokenId token) const {
  return std::ranges::find(spec_.visible_tokens, token) != spec_.visible_tokens.end();
}

void Grammar::Fail() {
  if (!status_.ok()) return;
  status_ = {StatusCode::kInvalidArgument,
             "grammar: it is too ambiguous, or the text nests too deep in it, to go on within its memory and time"};
  masks_.clear();
}

int32_t Grammar::StepToken(int32_t from, TokenId token) {
  if (!tokenizer_->GivesText(token) && !IsVisible(token)) return GrammarAutomaton::kDead;
  const int32_t to = automaton_->machine.Walk(from, tokenizer_->Piece(token));
  if (to == GrammarAutomaton::kOverLimit) Fail();
  return to;
}

bool Grammar::Allows(int32_t at, TokenId token) {
  if (!status_.ok()) return false;
  if (tokenizer_->IsEndOfGeneration(token)) return automaton_->machine.Accepts(at);
  return StepToken(at, token) >= 0;
}

const std::vector<uint64_t>& Grammar::MaskAt(int32_t at) {
  const auto found = masks_.find(at);
  if (found != masks_.end()) return found->second;
  const size_t words = (static_cast<size_t>(tokenizer_->n_vocab()) + 63) / 64;
  if ((masks_.size() + 1) * words * sizeof(uint64_t) > kMaskBytesMax) masks_.clear();
  std::vector<uint64_t>& mask = masks_.emplace(at, std::vector<uint64_t>(words)).first->second;
  const auto allow = [&](TokenId token) { mask[static_cast<size_t>(token) / 64] |= uint64_t{1} << (token % 64); };

  GrammarAutomaton& machine = automaton_->machine;
  const TokenTrie& trie = tokenizer_->trie();
  path_[0] = at;
  const auto& nodes = trie.nodes();
  for (size_t i = 0; i + 1 < nodes.size();) {
    const TokenTrie::Node& node = nodes[i];
    const int32_t here = machine.Step(path_[node.depth - 1], node.byte);
    if (here < 0) {
      if (here == GrammarAutomaton::kOverLimit) break;
      i = static_cast<size_t>(node.end);
      continue;
    }
    path_[node.depth] = here;
    for (int32_t t = node.first_token; t < nodes[i + 1].first_token; ++t) allow(trie.tokens()[t]);
    ++i;
  }
  for (const TokenId token : spec_.visible_tokens) {
    if (!tokenizer_->GivesText(token) && !tokenizer_->IsEndOfGeneration(token) && StepToken(at, token) >= 0) {
      allow(token);
    }
  }
  if (machine.Accepts(at)) {
    for (const TokenId token : end_tokens_) allow(token);
  }
  return mask;
}

void Grammar::Mask(int32_t at, std::span<float> logits) {
  if (status_.ok()) {
    const std::vector<uint64_t>& mask = MaskAt(at);
    if (automaton_->machine.over_limit()) Fail();
    if (status_.ok()) {
      for (size_t token = 0; token < logits.size(); ++token) {
        const bool allowed = token / 64 < mask.size() && (mask[token / 64] >> (token % 64) & 1) != 0;
        if (!allowed) logits[token] = kForbidden;
      }
      return;
    }
  }
  std::ranges::fill(logits, kForbidden);
}

GrammarState::GrammarState(std::shared_ptr<Grammar> grammar) : grammar_(std::move(grammar)) {
  CHECK(grammar_ != nullptr);
  at_ = grammar_->start_;
  const GrammarSpec& spec = grammar_->spec_;
  if (!spec.lazy) return;
  mode_ = Mode::kWaiting;
  buffer_.reserve(2 * kBufferBytes);
  if (!spec.think_begin.empty() && !spec.think_end.empty()) {
    const size_t begin = spec.prefill.rfind(spec.think_begin);
    thinking_ = begin != std::string::npos && spec.prefill.find(spec.think_end, begin) == std::string::npos;
  }
}

bool GrammarState::Allows(TokenId token) const { return !constrains() || grammar_->Allows(at_, token); }

void GrammarState::Mask(std::span<float> logits) const {
  if (constrains()) grammar_->Mask(at_, logits);
}

void GrammarState::Accept(TokenId token) {
  if (mode_ == Mode::kWaiting) return AcceptFree(token);
  if (mode_ != Mode::kInside) return;
  if (grammar_->tokenizer_->IsEndOfGeneration(token)) return;
  at_ = grammar_->StepToken(at_, token);
  if (at_ < 0) {
    mode_ = Mode::kOff;
    at_ = 0;
  }
}

bool GrammarState::finished() const { return constrains() && grammar_->automaton_->machine.Ends(at_); }

void GrammarState::AcceptFree(TokenId token) {
  const Tokenizer& tokenizer = *grammar_->tokenizer_;
  if (!tokenizer.GivesText(token) && !grammar_->IsVisible(token)) return;
  const GrammarSpec& spec = grammar_->spec_;
  buffer_ += tokenizer.Piece(token);
  if (thinking_) {
    const size_t end = buffer_.find(spec.think_end);
    if (end != std::string::npos) {
      buffer_.erase(0, end + spec.think_end.size());
      buffer_begins_text_ = false;
      thinking_ = false;
    }
  } else if (buffer_begins_text_ && !spec.think_begin.empty() && !spec.think_end.empty()) {
    const size_t text = buffer_.find_first_not_of(" \t\r\n");
    thinking_ = text != std::string::npos && buffer_.compare(text, spec.think_begin.size(), spec.think_begin) == 0;
  }
  const size_t begin = thinking_ ? std::string::npos : grammar_->triggers_->Find(spec, buffer_, buffer_begins_text_);
  if (begin != std::string::npos) {
    at_ = grammar_->automaton_->machine.Walk(grammar_->start_, std::string_view(buffer_).substr(begin));
    if (at_ == GrammarAutomaton::kOverLimit) grammar_->Fail();
    mode_ = at_ < 0 ? Mode::kOff : Mode::kInside;
    at_ = std::max(at_, 0);
    buffer_.clear();
    return;
  }
  if (buffer_.size() > kBufferBytes) {
    buffer_.erase(0, buffer_.size() - kBufferBytes / 2);
    buffer_begins_text_ = false;
  }
}

}  // namespace jointkv::text
