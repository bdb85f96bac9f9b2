#include "base/hash.h"

#include <array>
#include <set>
#include <vector>

#include <gtest/gtest.h>

namespace jointkv {
namespace {

TEST(HashTest, DependsOnEveryByteAndTheKey) {
  std::set<uint64_t> hashes;
  std::vector<int32_t> tokens(33, 5);
  hashes.insert(HashSpan<int32_t>(tokens, 1));
  hashes.insert(HashSpan<int32_t>(tokens, 2));
  for (size_t i = 0; i < tokens.size(); ++i) {
    std::vector<int32_t> other = tokens;
    ++other[i];
    hashes.insert(HashSpan<int32_t>(other, 1));
    hashes.insert(HashSpan<int32_t>(std::span(tokens).first(i), 1));
  }
  EXPECT_EQ(hashes.size(), 2 + 2 * tokens.size());
}

TEST(HashTest, IsTheSameForTheSameBytes) {
  const std::array<int32_t, 4> tokens = {1, 2, 3, 4};
  const std::vector<int32_t> copy(tokens.begin(), tokens.end());
  EXPECT_EQ(HashSpan<int32_t>(tokens, 9), HashSpan<int32_t>(copy, 9));
}

TEST(HashTest, KeysDiffer) { EXPECT_NE(RandomKey(), RandomKey()); }

}  // namespace
}  // namespace jointkv
