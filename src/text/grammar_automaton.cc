#include "text/grammar_automaton.h"

#include <algorithm>
#include <string>
#include <unordered_set>

#include "base/hash.h"

namespace jointkv::text {
namespace {

Status TooLarge(const std::string& what, int64_t limit) {
  return {StatusCode::kOutOfRange, "grammar: more than " + std::to_string(limit) + " " + what};
}

uint64_t TableKey() {
  static const uint64_t key = RandomKey();
  return key;
}

// A range of code points as sequences of byte ranges. `first` and `last` have UTF-8 of the same length, and each
// sequence matches all combinations of its bytes (Thompson's UTF-8 automaton, as in Cox's RE2).
using ByteRanges = std::vector<std::pair<unsigned char, unsigned char>>;

void SplitUtf8(uint32_t first, uint32_t last, std::vector<ByteRanges>& out) {
  static constexpr uint32_t kLastOfLength[] = {0x7f, 0x7ff, 0xffff};
  for (const uint32_t limit : kLastOfLength) {
    if (first > limit || last <= limit) continue;
    SplitUtf8(first, limit, out);
    SplitUtf8(limit + 1, last, out);
    return;
  }
  // Surrogates have no UTF-8.
  if (first < 0xd800 && last >= 0xd800) {
    SplitUtf8(first, 0xd7ff, out);
    if (last > 0xdfff) SplitUtf8(0xe000, last, out);
    return;
  }
  if (first >= 0xd800 && first <= 0xdfff) {
    if (last > 0xdfff) SplitUtf8(0xe000, last, out);
    return;
  }
  // Lower bytes must run over their whole range wherever a higher one varies.
  if (last > 0x7f) {
    for (int shift = 6; shift <= 18; shift += 6) {
      const uint32_t mask = (1u << shift) - 1;
      if (first >> shift == last >> shift) continue;
      if ((first & mask) != 0) {
        SplitUtf8(first, first | mask, out);
        SplitUtf8((first | mask) + 1, last, out);
        return;
      }
      if ((last & mask) != mask) {
        SplitUtf8(first, (last & ~mask) - 1, out);
        SplitUtf8(last & ~mask, last, out);
        return;
      }
    }
  }
  std::string low;
  std::string high;
  AppendUtf8(first, low);
  AppendUtf8(last, high);
  ByteRanges ranges;
  for (size_t i = 0; i < low.size(); ++i) {
    ranges.emplace_back(static_cast<unsigned char>(low[i]), static_cast<unsigned char>(high[i]));
  }
  out.push_back(std::move(ranges));
}

}  // namespace

// From the tree to states.
class GrammarAutomaton::Builder {
 public:
  Builder(const Gbnf& grammar, GrammarAutomaton& out) : grammar_(grammar), out_(out) {}

  Status Build() {
    for (size_t i = 0; i < grammar_.rules.size(); ++i) out_.rule_start_.push_back(NewState());
    for (size_t i = 0; i < grammar_.rules.size(); ++i) {
      const int32_t end = Emit(grammar_.rules[i], out_.rule_start_[i]);
      if (too_large_) return TooLarge("states", out_.limits_.states_max);
      out_.states_[end].final = true;
    }
    return CheckLeftRecursion();
  }

 private:
  int32_t NewState() {
    if (static_cast<int>(out_.states_.size()) >= out_.limits_.states_max) {
      too_large_ = true;
      return 0;
    }
    out_.states_.emplace_back();
    return static_cast<int32_t>(out_.states_.size()) - 1;
  }

  void Link(int32_t from, int32_t to) {
    if (from != to) out_.states_[from].empty.push_back(to);
  }

  // Adds what `node` reads behind `from`; returns the state after it.
  int32_t Emit(const GbnfNode& node, int32_t from) {
    if (too_large_) return 0;
    switch (node.kind) {
      case GbnfNode::Kind::kLiteral: {
        for (const char c : node.literal) {
          const int32_t next = NewState();
          out_.states_[from].bytes.push_back({static_cast<unsigned char>(c), static_cast<unsigned char>(c), next});
          from = next;
        }
        return from;
      }
      case GbnfNode::Kind::kChars: return EmitChars(node, from);
      case GbnfNode::Kind::kRule: {
        const int32_t next = NewState();
        out_.states_[from].calls.emplace_back(node.rule, next);
        return next;
      }
      case GbnfNode::Kind::kSequence: {
        for (const GbnfNode& child : node.children) from = Emit(child, from);
        return from;
      }
      case GbnfNode::Kind::kChoice: {
        const int32_t end = NewState();
        for (const GbnfNode& child : node.children) Link(Emit(child, from), end);
        return end;
      }
      case GbnfNode::Kind::kRepeat: return EmitRepeat(node, from);
    }
    return from;
  }

  int32_t EmitRepeat(const GbnfNode& node, int32_t from) {
    const GbnfNode& child = node.children[0];
    for (int i = 0; i < node.repeat_min && !too_large_; ++i) from = Emit(child, from);
    const int32_t end = NewState();
    if (node.repeat_max == GbnfNode::kUnbounded) {
      const int32_t loop = NewState();
      Link(from, loop);
      Link(Emit(child, loop), loop);
      Link(loop, end);
      return end;
    }
    for (int i = node.repeat_min; i < node.repeat_max && !too_large_; ++i) {
      Link(from, end);
      from = Emit(child, from);
    }
    Link(from, end);
    return end;
  }

  int32_t EmitChars(const GbnfNode& node, int32_t from) {
    std::vector<ByteRanges> sequences;
    for (const CodePointRange& range : node.ranges) SplitUtf8(range.first, range.last, sequences);
    const int32_t end = NewState();
    for (const ByteRanges& sequence : sequences) {
      int32_t at = from;
      for (size_t i = 0; i < sequence.size() && !too_large_; ++i) {
        const int32_t next = i + 1 == sequence.size() ? end : NewState();
        out_.states_[at].bytes.push_back({sequence[i].first, sequence[i].second, next});
        at = next;
      }
    }
    return end;
  }

  // A rule that reaches itself before it has read a byte would call itself for ever. One search over states, where a
  // rule's call goes on to the state behind it once the rule is known to read nothing, repeated until nothing changes.
  Status CheckLeftRecursion() {
    const size_t n_rules = out_.rule_start_.size();
    std::vector<bool> may_be_empty(n_rules);
    std::vector<std::vector<int32_t>> first_calls(n_rules);  // rules called before a byte is read
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t rule = 0; rule < n_rules; ++rule) {
        std::vector<int32_t> calls;
        const bool empty = Explore(out_.rule_start_[rule], may_be_empty, calls);
        if (explored_ > out_.limits_.work_max) return TooLarge("steps to look for recursion", out_.limits_.work_max);
        if (empty && !may_be_empty[rule]) {
          may_be_empty[rule] = true;
          changed = true;
        }
        first_calls[rule] = std::move(calls);
      }
    }
    // Kahn's order exists when there is no cycle.
    std::vector<int> callers(n_rules);
    for (const auto& calls : first_calls) {
      for (const int32_t callee : calls) ++callers[callee];
    }
    std::vector<int32_t> ready;
    for (size_t rule = 0; rule < n_rules; ++rule) {
      if (callers[rule] == 0) ready.push_back(static_cast<int32_t>(rule));
    }
    size_t ordered = 0;
    while (!ready.empty()) {
      const int32_t rule = ready.back();
      ready.pop_back();
      ++ordered;
      for (const int32_t callee : first_calls[rule]) {
        if (--callers[callee] == 0) ready.push_back(callee);
      }
    }
    if (ordered == n_rules) return Status::Ok();
    const auto culprit = std::ranges::find_if(callers, [](int n) { return n > 0; }) - callers.begin();
    return {StatusCode::kInvalidArgument,
            "grammar: left recursion around rule '" + grammar_.names[culprit].substr(0, 64) + "'"};
  }

  bool Explore(int32_t start, const std::vector<bool>& may_be_empty, std::vector<int32_t>& calls) {
    std::unordered_set<int32_t> seen = {start};
    std::unordered_set<int32_t> called;
    std::vector<int32_t> todo = {start};
    bool empty = false;
    const auto add = [&](int32_t state) {
      if (seen.insert(state).second) todo.push_back(state);
    };
    while (!todo.empty()) {
      const State& state = out_.states_[todo.back()];
      todo.pop_back();
      explored_ += static_cast<int64_t>(1 + state.empty.size() + state.calls.size());
      empty = empty || state.final;
      for (const int32_t next : state.empty) add(next);
      for (const auto& [rule, returns_to] : state.calls) {
        if (called.insert(rule).second) calls.push_back(rule);
        if (may_be_empty[rule]) add(returns_to);
      }
    }
    return empty;
  }

  const Gbnf& grammar_;
  GrammarAutomaton& out_;
  bool too_large_ = false;
  int64_t explored_ = 0;
};

Expected<GrammarAutomaton> GrammarAutomaton::Create(const Gbnf& grammar, const GrammarLimits& limits) {
  GrammarAutomaton out;
  out.limits_ = limits;
  RETURN_IF_ERROR(Builder(grammar, out).Build());
  out.MakeByteClasses();
  out.FindDrained();
  out.stacks_.emplace_back();  // kBottom
  const Head first{out.rule_start_[grammar.root], kBottom};
  out.start_ = out.Close({&first, 1});
  if (out.start_ < 0) return TooLarge("ways to begin", limits.work_of_byte_max);
  return out;
}

size_t GrammarAutomaton::bytes() const {
  size_t sum = states_.capacity() * sizeof(State);
  for (const State& state : states_) {
    sum += state.bytes.capacity() * sizeof(state.bytes[0]) + state.calls.capacity() * sizeof(state.calls[0]) +
           state.empty.capacity() * sizeof(state.empty[0]);
  }
  return sum;
}

void GrammarAutomaton::MakeByteClasses() {
  std::array<bool, 257> begins{};
  begins[0] = true;
  for (const State& state : states_) {
    for (const ByteEdge& edge : state.bytes) {
      begins[edge.first] = true;
      begins[edge.last + 1] = true;
    }
  }
  n_classes_ = 0;
  for (int byte = 0; byte < 256; ++byte) {
    if (begins[byte]) ++n_classes_;
    class_of_[byte] = static_cast<uint8_t>(n_classes_ - 1);
  }
}

void GrammarAutomaton::FindDrained() {
  std::vector<std::vector<int32_t>> reached_from(states_.size());
  std::vector<size_t> open(states_.size());  // targets that are not known to be drained
  std::vector<int32_t> found;
  for (size_t i = 0; i < states_.size(); ++i) {
    const State& state = states_[i];
    for (const int32_t target : state.empty) reached_from[target].push_back(static_cast<int32_t>(i));
    open[i] = state.empty.size();
    if (state.final && state.bytes.empty() && state.calls.empty() && state.empty.empty()) {
      found.push_back(static_cast<int32_t>(i));
    }
  }
  while (!found.empty()) {
    const int32_t drained = found.back();
    found.pop_back();
    states_[drained].drained = true;
    for (const int32_t before : reached_from[drained]) {
      const State& state = states_[before];
      if (--open[before] == 0 && state.bytes.empty() && state.calls.empty()) found.push_back(before);
    }
  }
}

GrammarAutomaton::Configuration GrammarAutomaton::Step(Configuration from, unsigned char byte) {
  if (from < 0) return from;
  const size_t slot = static_cast<size_t>(from) * n_classes_ + class_of_[byte];
  if (steps_[slot] != kUnknown) return steps_[slot];
  const Configuration to = over_limit_ ? kOverLimit : Compute(from, byte);
  if (to != kOverLimit) steps_[slot] = to;
  return to;
}

GrammarAutomaton::Configuration GrammarAutomaton::Walk(Configuration from, std::string_view bytes) {
  for (const char c : bytes) from = Step(from, static_cast<unsigned char>(c));
  return from;
}

GrammarAutomaton::Configuration GrammarAutomaton::Compute(Configuration from, unsigned char byte) {
  std::vector<Head> kernel;
  for (const Head& head : configurations_[from].heads) {
    for (const ByteEdge& edge : states_[head.state].bytes) {
      if (byte >= edge.first && byte <= edge.last) kernel.push_back({edge.target, head.stack});
    }
  }
  return Close(kernel);
}

bool GrammarAutomaton::Spend(int64_t steps) {
  work_ += steps;
  work_of_byte_ += steps;
  if (work_ > limits_.work_max || work_of_byte_ > limits_.work_of_byte_max) over_limit_ = true;
  return !over_limit_;
}

// Follows all edges that read nothing: into rules that are called, out of those that may end. As in generalised LL
// parsing (Scott, Johnstone 2010), a call that several heads make at one place is one entry of the stacks' graph.
GrammarAutomaton::Configuration GrammarAutomaton::Close(std::span<const Head> kernel) {
  pending_.clear();
  seen_.clear();
  open_.clear();
  open_by_return_.clear();
  heads_.clear();
  accepts_ = false;
  work_of_byte_ = 0;
  for (const Head& head : kernel) Push(head);
  while (!pending_.empty()) {
    const Head head = pending_.back();
    pending_.pop_back();
    if (!Spend(1)) return kOverLimit;
    Visit(head);
  }
  if (heads_.empty() && !accepts_) return kDead;
  for (Head& head : heads_) head.stack = Intern(head.stack);
  if (over_limit_) return kOverLimit;
  std::ranges::sort(heads_);
  heads_.erase(std::unique(heads_.begin(), heads_.end()), heads_.end());
  return InternConfiguration(accepts_);
}

void GrammarAutomaton::Push(Head head) {
  const uint64_t key = static_cast<uint64_t>(head.state) << 32 | static_cast<uint32_t>(head.stack);
  if (seen_.insert(key).second) pending_.push_back(head);
}

void GrammarAutomaton::Visit(Head head) {
  const State& state = states_[head.state];
  Spend(static_cast<int64_t>(state.empty.size() + state.calls.size()));
  if (!state.bytes.empty()) heads_.push_back(head);
  for (const int32_t next : state.empty) Push({next, head.stack});
  for (const auto& [rule, returns_to] : state.calls) {
    if (states_[returns_to].drained) {
      // Nothing is left to do after the call, so it needs no entry: lists that recurse to the right stay flat.
      Push({rule_start_[rule], head.stack});
      continue;
    }
    const auto [found, is_new] = open_by_return_.emplace(returns_to, static_cast<int32_t>(open_.size()));
    const int32_t index = found->second;
    if (is_new) open_.emplace_back().returns_to = returns_to;
    OpenStack& open = open_[index];
    if (std::ranges::find(open.below, head.stack) != open.below.end()) continue;
    Spend(static_cast<int64_t>(open.below.size()));
    open.below.push_back(head.stack);
    if (open.popped) Push({returns_to, head.stack});
    if (is_new) Push({rule_start_[rule], -1 - index});
  }
  if (state.final) Pop(head.stack);
}

void GrammarAutomaton::Pop(int32_t stack) {
  if (stack == kBottom) {
    accepts_ = true;
  } else if (stack < 0) {
    OpenStack& open = open_[-1 - stack];
    open.popped = true;
    for (const int32_t below : open.below) Push({open.returns_to, below});
  } else {
    const Stack& closed = stacks_[stack];
    Spend(static_cast<int64_t>(closed.below.size()));
    for (const int32_t below : closed.below) Push({closed.returns_to, below});
  }
}

// Without left recursion open entries refer to each other without a cycle, at most as deep as there are rules.
int32_t GrammarAutomaton::Intern(int32_t stack) {
  if (stack >= 0) return stack;
  OpenStack& open = open_[-1 - stack];
  if (open.interned >= 0) return open.interned;
  std::vector<int32_t> below = open.below;
  for (int32_t& item : below) item = Intern(item);
  std::ranges::sort(below);
  below.erase(std::unique(below.begin(), below.end()), below.end());
  const uint64_t hash = HashSpan(std::span<const int32_t>(below), TableKey() + static_cast<uint64_t>(open.returns_to));
  const auto [first, last] = stack_index_.equal_range(hash);
  for (auto it = first; it != last; ++it) {
    const Stack& known = stacks_[it->second];
    if (known.returns_to == open.returns_to && known.below == below) return open.interned = it->second;
  }
  cells_ += static_cast<int64_t>(below.size()) + 4;
  if (cells_ > limits_.cells_max) over_limit_ = true;
  open.interned = static_cast<int32_t>(stacks_.size());
  stack_index_.emplace(hash, open.interned);
  stacks_.push_back({open.returns_to, std::move(below)});
  return open.interned;
}

GrammarAutomaton::Configuration GrammarAutomaton::InternConfiguration(bool accepts) {
  const uint64_t hash = HashSpan(std::span<const Head>(heads_), TableKey() + (accepts ? 1 : 0));
  const auto [first, last] = configuration_index_.equal_range(hash);
  for (auto it = first; it != last; ++it) {
    const Interned& known = configurations_[it->second];
    if (known.accepts == accepts && known.heads == heads_) return it->second;
  }
  cells_ += static_cast<int64_t>(heads_.size());
  if (cells_ > limits_.cells_max || static_cast<int>(configurations_.size()) >= limits_.configurations_max) {
    over_limit_ = true;
    return kOverLimit;
  }
  const auto id = static_cast<Configuration>(configurations_.size());
  configurations_.push_back({heads_, accepts});
  configuration_index_.emplace(hash, id);
  steps_.resize(steps_.size() + n_classes_, kUnknown);
  return id;
}

}  // namespace jointkv::text
