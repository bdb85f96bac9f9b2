#include "kv/cutter.h"

#include "base/check.h"
#include "codec/layout.h"

namespace jointkv::kv {
namespace {

// splitmix64's finaliser (Steele, Lea, Flood 2014) over the pair. Unkeyed on purpose: equal text must be cut equally by
// every process, or stored blocks could never be exchanged between them.
uint64_t MixPair(TokenId a, TokenId b) {
  uint64_t x = (static_cast<uint64_t>(static_cast<uint32_t>(a)) << 32) | static_cast<uint32_t>(b);
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

BlockCutter BlockCutter::Grid(int tokens) {
  CHECK(tokens >= kMinTokens && tokens <= codec::kBlockTokensMax);
  BlockCutter cutter({});
  cutter.grid_ = tokens;
  return cutter;
}

bool BlockCutter::EndsAfter(int length, TokenId previous, TokenId token) const {
  if (grid_ > 0) return length >= grid_;
  if (length >= codec::kBlockTokensMax) return true;
  if (length < kMinTokens) return false;
  if (token >= 0 && static_cast<size_t>(token) < ends_block_.size() && ends_block_[token] != 0) return true;
  return length >= kMinHashTokens && MixPair(previous, token) % kPairOdds == 0;
}

int BlockCutter::FirstBlock(std::span<const TokenId> tokens) const {
  for (size_t i = 0; i < tokens.size(); ++i) {
    const TokenId previous = i == 0 ? -1 : tokens[i - 1];
    if (EndsAfter(static_cast<int>(i) + 1, previous, tokens[i])) return static_cast<int>(i) + 1;
  }
  return 0;
}

}  // namespace jointkv::kv
