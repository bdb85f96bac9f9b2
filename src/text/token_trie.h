// Inside this room: the texts of a vocabulary as a tree of bytes, to find the tokens that a grammar allows in one walk.
//
// TokenTrie. Threads: const from any number of threads. Owns: about 12 bytes for each of its nodes, at most one node
// per byte of the vocabulary. Fails how: never. Control and unknown tokens, those that end the text and those without
// text are left out.
#pragma once

#include <cstdint>
#include <vector>

#include "base/ids.h"

namespace jointkv::text {

class Tokenizer;

class TokenTrie {
 public:
  explicit TokenTrie(const Tokenizer& tokenizer);

  // Nodes in the order of a depth-first walk.
  struct Node {
    int32_t end;          // the node after this one's descendants
    int32_t first_token;  // its tokens are tokens()[first_token, the next node's first_token)
    uint16_t depth;       // 1 for the first byte
    unsigned char byte;
  };
  const std::vector<Node>& nodes() const { return nodes_; }  // one more at the end, for its first_token
  const std::vector<TokenId>& tokens() const { return tokens_; }
  int depth() const { return depth_; }

 private:
  std::vector<Node> nodes_;
  std::vector<TokenId> tokens_;
  int depth_ = 0;
};

}  // namespace jointkv::text
