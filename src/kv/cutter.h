// BlockCutter: where a logical block ends, decided by its tokens alone (content-defined chunking, as in LBFS), so equal
// text is cut equally wherever it stands.
//
// A block ends after a token whose text ends a line or that is chat markup once it has kMinTokens tokens; after a pair
// of tokens whose hash hits (1 in kPairOdds) once it has kMinHashTokens; and at codec::kBlockTokensMax.
//
// Threads: any (const after construction). Owns: one byte per vocabulary entry. Fails how: never.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"

namespace jointkv::kv {

class BlockCutter {
 public:
  static constexpr int kMinTokens = 4;
  static constexpr int kMinHashTokens = 16;
  static constexpr int kPairOdds = 8;

  // ends_block[token] != 0: its text ends a line or is chat markup. Tokens past its end count as ordinary text.
  explicit BlockCutter(std::vector<uint8_t> ends_block) : ends_block_(std::move(ends_block)) {}

  // Blocks of `tokens` tokens each, whatever they are.
  static BlockCutter Grid(int tokens);

  // Whether a block of `length` tokens ends after `token`, which `previous` precedes in the block.
  bool EndsAfter(int length, TokenId previous, TokenId token) const;

  // Length of the block that starts with tokens[0]; 0 when it does not end within them.
  int FirstBlock(std::span<const TokenId> tokens) const;

 private:
  std::vector<uint8_t> ends_block_;
  int grid_ = 0;  // 0: by content
};

}  // namespace jointkv::kv
