// The text of a grammar in llama.cpp's GBNF, as a tree.
//
// ParseGbnf. Threads: any. Owns: nothing. Fails how: a Status that names the line; texts, nesting, rules and
// repetitions are bounded, because clients write grammars. Token elements (<...> outside of quotes) are not supported.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace jointkv::text {

struct GbnfLimits {
  size_t bytes_max = size_t{256} << 10;
  int nesting_max = 100;       // of parentheses: the parser recurses
  int rules_max = 8192;        // named ones
  int repetitions_max = 2000;  // llama.cpp's: {0,3000} means {0,}, {3000} is refused
};

struct CodePointRange {
  uint32_t first = 0;
  uint32_t last = 0;  // inclusive
};

struct GbnfNode {
  enum class Kind { kLiteral, kChars, kRule, kSequence, kChoice, kRepeat };
  static constexpr int kUnbounded = -1;

  Kind kind = Kind::kSequence;
  std::string literal;                 // kLiteral: bytes
  std::vector<CodePointRange> ranges;  // kChars: ascending and disjoint; negation is resolved
  int rule = 0;                        // kRule
  int repeat_min = 0;                  // kRepeat of the only child
  int repeat_max = kUnbounded;
  std::vector<GbnfNode> children;
};

struct Gbnf {
  std::vector<GbnfNode> rules;
  std::vector<std::string> names;
  int root = 0;
};

Expected<Gbnf> ParseGbnf(std::string_view source, std::string_view root = "root", const GbnfLimits& limits = {});

void AppendUtf8(uint32_t code_point, std::string& out);

}  // namespace jointkv::text
