// Constrained output: which tokens may come next so that the whole text is in a grammar.
//
// Grammar. Threads: Compile on any thread; then, with all of its GrammarStates, one thread at a time. So a request
// compiles its own and its choices share it. Owns: the automaton and what it has learnt of it, up to about 40 MB for a
// hostile grammar and 1 for a usual one. Fails how: Compile returns a Status (bad syntax, left recursion, a limit); a
// grammar that turns out too ambiguous allows no token any more, and status() says so.
//
// GrammarState: a sequence's place. Threads: as its Grammar. Owns: an integer and, before a trigger, at most 1 KB of
// text; copying it forks the sequence, and it does not care about recomputation of K and V. Fails how: never.
//
// Control tokens are no text, so no grammar allows them, save those that it lists as visible. Tokens that end the text
// are allowed where the grammar is complete.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "text/tokenizer.h"

namespace jointkv::text {

struct GrammarSpec {
  std::string gbnf;  // the text begins with its rule "root"; empty: no constraint
  // Free text until a trigger is seen; from where that begins, the grammar. Else from the first token on.
  bool lazy = false;
  std::vector<std::string> trigger_words;
  std::vector<std::string> trigger_patterns;  // ECMAScript regular expressions; a group says where the grammar begins
  std::string prefill;                        // what the prompt already holds of the grammar's text
  std::vector<TokenId> visible_tokens;        // control tokens that count as their text
  // While the text is between these, triggers do not count (a model thinks aloud). Empty: never.
  std::string think_begin;
  std::string think_end;

  bool empty() const { return gbnf.empty(); }
};

class Grammar {
 public:
  static Expected<std::shared_ptr<Grammar>> Compile(const Tokenizer& tokenizer, GrammarSpec spec);
  static Expected<std::shared_ptr<Grammar>> FromGbnf(const Tokenizer& tokenizer, std::string gbnf);
  static Expected<std::shared_ptr<Grammar>> FromJsonSchema(const Tokenizer& tokenizer, std::string_view schema);
  static Expected<std::shared_ptr<Grammar>> AnyJsonObject(const Tokenizer& tokenizer);
  ~Grammar();
  Grammar(const Grammar&) = delete;
  Grammar& operator=(const Grammar&) = delete;

  // Not ok once a limit was reached.
  const Status& status() const { return status_; }
  const GrammarSpec& spec() const { return spec_; }
  // Roughly what it takes as compiled; what it learns while it runs comes on top.
  size_t bytes() const;

 private:
  friend class GrammarState;
  struct Triggers;
  struct Automaton;

  Grammar(const Tokenizer& tokenizer, GrammarSpec spec);
  Status Prepare();
  int32_t StepToken(int32_t from, TokenId token);
  bool Allows(int32_t at, TokenId token);
  void Mask(int32_t at, std::span<float> logits);
  const std::vector<uint64_t>& MaskAt(int32_t at);
  bool IsVisible(TokenId token) const;
  void Fail();

  const Tokenizer* tokenizer_;
  GrammarSpec spec_;
  std::unique_ptr<Automaton> automaton_;
  std::unique_ptr<Triggers> triggers_;
  std::vector<TokenId> end_tokens_;
  int32_t start_ = 0;
  std::unordered_map<int32_t, std::vector<uint64_t>> masks_;  // a bit per token
  std::vector<int32_t> path_;                                 // of the walk over the vocabulary, by depth
  Status status_;
};

class GrammarState {
 public:
  explicit GrammarState(std::shared_ptr<Grammar> grammar);

  // False while it waits for a trigger: then all tokens are allowed.
  bool constrains() const { return mode_ == Mode::kInside; }
  bool Allows(TokenId token) const;
  // Sets the logits of tokens that may not come next to -infinity.
  void Mask(std::span<float> logits) const;
  // The next token of the text. One that is not allowed (a forced one) ends the constraint.
  void Accept(TokenId token);
  // The text is complete, and nothing may follow.
  bool finished() const;
  // Not ok: no token will be allowed any more.
  const Status& status() const { return grammar_->status(); }
  const Grammar& grammar() const { return *grammar_; }

 private:
  enum class Mode : uint8_t { kWaiting, kInside, kOff };
  void AcceptFree(TokenId token);

  std::shared_ptr<Grammar> grammar_;
  int32_t at_ = 0;
  Mode mode_ = Mode::kInside;
  bool thinking_ = false;
  bool buffer_begins_text_ = true;
  std::string buffer_;  // kWaiting: the end of the text
};

}  // namespace jointkv::text
