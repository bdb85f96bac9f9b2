#include "text/token_trie.h"

#include <algorithm>
#include <string_view>

#include "text/tokenizer.h"

namespace jointkv::text {

TokenTrie::TokenTrie(const Tokenizer& tokenizer) {
  for (TokenId id = 0; id < tokenizer.n_vocab(); ++id) {
    if (tokenizer.GivesText(id)) tokens_.push_back(id);
  }
  std::ranges::sort(tokens_, [&](TokenId a, TokenId b) {
    const int order = tokenizer.Piece(a).compare(tokenizer.Piece(b));
    return order != 0 ? order < 0 : a < b;
  });
  std::vector<int32_t> path;  // nodes from the root to the last one
  std::string_view last;
  const auto close = [&](size_t depth) {
    while (path.size() > depth) {
      nodes_[path.back()].end = static_cast<int32_t>(nodes_.size());
      path.pop_back();
    }
  };
  for (size_t i = 0; i < tokens_.size(); ++i) {
    const std::string_view piece = tokenizer.Piece(tokens_[i]);
    const size_t common = std::ranges::mismatch(piece, last).in1 - piece.begin();
    close(common);
    for (size_t depth = common; depth < piece.size(); ++depth) {
      path.push_back(static_cast<int32_t>(nodes_.size()));
      nodes_.push_back({.end = 0,
                        .first_token = static_cast<int32_t>(i),
                        .depth = static_cast<uint16_t>(depth + 1),
                        .byte = static_cast<unsigned char>(piece[depth])});
      depth_ = std::max(depth_, static_cast<int>(depth) + 1);
    }
    last = piece;
  }
  close(0);
  nodes_.push_back({.end = 0, .first_token = static_cast<int32_t>(tokens_.size()), .depth = 0, .byte = 0});
}

}  // namespace jointkv::text
