// Inside this room: the automaton behind a grammar, over bytes.
//
// Each rule is a nondeterministic automaton whose edges read a byte or call a rule. Where a text may stand is a
// *configuration*: a set of (state, stack) pairs, the stacks shared as a graph, so that an ambiguous grammar merges
// alternatives instead of multiplying them. Configurations and stacks are interned and their steps remembered: what a
// grammar has seen once costs a table lookup, and a sequence's place in a grammar is one integer.
//
// Threads: one at a time. Owns: what it has computed so far, within GrammarLimits. Fails how: Create returns a Status
// for a grammar that is left-recursive or too large; Step answers kOverLimit when a limit is reached, from then on.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "base/status.h"
#include "text/gbnf.h"

namespace jointkv::text {

struct GrammarLimits {
  int states_max = 1 << 17;
  int configurations_max = 1 << 15;  // about 400 bytes each
  int64_t cells_max = 1 << 20;       // entries of configurations and stacks, 8 bytes each
  int64_t work_max = 1 << 23;        // steps of search in the grammar's whole life: less than a second
  int64_t work_of_byte_max = 1 << 16;
};

class GrammarAutomaton {
 public:
  using Configuration = int32_t;
  static constexpr Configuration kDead = -1;  // no text goes on from here
  static constexpr Configuration kOverLimit = -2;

  static Expected<GrammarAutomaton> Create(const Gbnf& grammar, const GrammarLimits& limits = {});

  Configuration start() const { return start_; }
  Configuration Step(Configuration from, unsigned char byte);
  Configuration Walk(Configuration from, std::string_view bytes);
  // The text up to here is complete.
  bool Accepts(Configuration at) const { return configurations_[at].accepts; }
  bool over_limit() const { return over_limit_; }
  size_t bytes() const;  // of its states
  // Complete, and nothing may follow.
  bool Ends(Configuration at) const { return Accepts(at) && configurations_[at].heads.empty(); }

 private:
  struct ByteEdge {
    unsigned char first;
    unsigned char last;
    int32_t target;
  };
  struct State {
    std::vector<ByteEdge> bytes;
    std::vector<std::pair<int32_t, int32_t>> calls;  // rule, state to return to
    std::vector<int32_t> empty;                      // targets of edges that read nothing
    bool final = false;
    bool drained = false;  // nothing is read from here on: only final states are reached
  };
  struct Stack {
    int32_t returns_to = 0;
    std::vector<int32_t> below;  // ascending
  };
  // A stack id below 0 is one that the present closure is still adding to: -1 - index in open_.
  struct Head {
    int32_t state;
    int32_t stack;
    auto operator<=>(const Head&) const = default;
  };
  struct OpenStack {
    int32_t returns_to = 0;
    std::vector<int32_t> below;
    bool popped = false;  // its rule may be empty here
    int32_t interned = -1;
  };
  struct Interned {
    std::vector<Head> heads;  // those with byte edges, ascending
    bool accepts = false;
  };
  class Builder;
  static constexpr int32_t kBottom = 0;

  GrammarAutomaton() = default;
  void MakeByteClasses();
  void FindDrained();
  Configuration Compute(Configuration from, unsigned char byte);
  Configuration Close(std::span<const Head> kernel);
  void Push(Head head);
  void Visit(Head head);
  void Pop(int32_t stack);
  int32_t Intern(int32_t stack);
  Configuration InternConfiguration(bool accepts);
  bool Spend(int64_t steps);

  GrammarLimits limits_;
  std::vector<State> states_;
  std::vector<int32_t> rule_start_;
  std::array<uint8_t, 256> class_of_{};  // bytes that no edge tells apart
  int n_classes_ = 0;
  Configuration start_ = 0;

  std::vector<Stack> stacks_;
  std::unordered_multimap<uint64_t, int32_t> stack_index_;
  std::vector<Interned> configurations_;
  std::unordered_multimap<uint64_t, Configuration> configuration_index_;
  static constexpr Configuration kUnknown = -3;
  std::vector<Configuration> steps_;  // (configurations, n_classes)
  int64_t cells_ = 0;
  int64_t work_ = 0;
  int64_t work_of_byte_ = 0;
  bool over_limit_ = false;

  // The present closure.
  std::vector<Head> pending_;
  std::unordered_set<uint64_t> seen_;
  std::vector<OpenStack> open_;
  std::unordered_map<int32_t, int32_t> open_by_return_;
  std::vector<Head> heads_;
  bool accepts_ = false;
};

}  // namespace jointkv::text
