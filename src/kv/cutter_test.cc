#include "kv/cutter.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "codec/layout.h"

namespace jointkv::kv {
namespace {

constexpr int kVocabulary = 1000;
constexpr TokenId kLineEnd = 7;

BlockCutter PlainCutter() { return BlockCutter({}); }
BlockCutter LineCutter() {
  std::vector<uint8_t> ends(kVocabulary);
  ends[kLineEnd] = 1;
  return BlockCutter(std::move(ends));
}

std::vector<TokenId> RandomTokens(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<TokenId> tokens(n);
  for (TokenId& token : tokens) {
    token = static_cast<TokenId>(random() % kVocabulary);
    if (token == kLineEnd) ++token;
  }
  return tokens;
}

// Ends of all whole blocks.
std::vector<int> Cut(const BlockCutter& cutter, std::span<const TokenId> tokens) {
  std::vector<int> ends;
  int at = 0;
  while (const int length = cutter.FirstBlock(tokens.subspan(at))) ends.push_back(at += length);
  return ends;
}

// Tokens after `shift` until the cuts of the shifted text fall on those of the original for good.
int TokensToResync(const BlockCutter& cutter, std::span<const TokenId> text, std::span<const TokenId> before) {
  std::vector<TokenId> shifted(before.begin(), before.end());
  shifted.insert(shifted.end(), text.begin(), text.end());
  const int shift = static_cast<int>(before.size());
  const std::vector<int> ends = Cut(cutter, text);
  std::vector<int> moved = Cut(cutter, shifted);
  for (int& end : moved) end -= shift;
  std::erase_if(moved, [](int end) { return end <= 0; });
  for (const int end : moved) {
    const auto known = std::ranges::lower_bound(ends, end);
    if (known == ends.end() || *known != end) continue;
    EXPECT_TRUE(std::ranges::equal(std::ranges::lower_bound(moved, end), moved.end(), known, ends.end()));
    return end;
  }
  return static_cast<int>(text.size());
}

TEST(BlockCutter, LengthsStayInTheirBounds) {
  const auto tokens = RandomTokens(100'000, 1);
  int before = 0;
  for (const int end : Cut(PlainCutter(), tokens)) {
    ASSERT_GE(end - before, BlockCutter::kMinHashTokens);
    ASSERT_LE(end - before, codec::kBlockTokensMax);
    before = end;
  }
  auto lines = tokens;
  std::mt19937 random(2);
  for (TokenId& token : lines) token = random() % 5 == 0 ? kLineEnd : token;
  before = 0;
  for (const int end : Cut(LineCutter(), lines)) {
    ASSERT_GE(end - before, BlockCutter::kMinTokens);
    ASSERT_LE(end - before, codec::kBlockTokensMax);
    before = end;
  }
}

// With a hit of odds 1/8 from the 16th token on: E = 16 + sum over j = 1..16 of (7/8)^j = 22.17.
TEST(BlockCutter, MeanLengthOfRandomTokens) {
  double expected = BlockCutter::kMinHashTokens;
  for (int j = 1; j <= codec::kBlockTokensMax - BlockCutter::kMinHashTokens; ++j) {
    expected += std::pow(1.0 - 1.0 / BlockCutter::kPairOdds, j);
  }
  const auto tokens = RandomTokens(1'000'000, 3);
  const auto ends = Cut(PlainCutter(), tokens);
  // The standard deviation of a length is below 6, of the mean of 45,000 lengths below 0.03: five of those.
  EXPECT_NEAR(static_cast<double>(ends.back()) / static_cast<double>(ends.size()), expected, 0.15);
}

TEST(BlockCutter, LineEndsCutFromTheFourthTokenOn) {
  const BlockCutter cutter = LineCutter();
  const TokenId a = 100;
  EXPECT_EQ(cutter.FirstBlock(std::vector<TokenId>{a, a, a, kLineEnd, a}), 4);
  EXPECT_EQ(cutter.FirstBlock(std::vector<TokenId>{a, a, kLineEnd, a, a}), 0);
  EXPECT_EQ(cutter.FirstBlock(std::vector<TokenId>{a, a, kLineEnd, a, kLineEnd}), 5);
  EXPECT_EQ(cutter.FirstBlock(std::vector<TokenId>{kLineEnd, kLineEnd, kLineEnd, kLineEnd}), 4);
  EXPECT_EQ(cutter.FirstBlock({}), 0);
}

TEST(BlockCutter, TokensOutsideTheTableAreOrdinary) {
  const BlockCutter cutter = LineCutter();
  EXPECT_EQ(cutter.FirstBlock(std::vector<TokenId>{1, 2, 3, kVocabulary, -1, INT32_MIN, INT32_MAX}), 0);
}

TEST(BlockCutter, MonotonousTextIsCutAtTheLimit) {
  int at_limit = 0;
  for (TokenId token = 0; token < 64; ++token) {
    const int length = PlainCutter().FirstBlock(std::vector<TokenId>(100, token));
    EXPECT_TRUE(length == BlockCutter::kMinHashTokens || length == codec::kBlockTokensMax);
    at_limit += length == codec::kBlockTokensMax;
  }
  EXPECT_GT(at_limit, 32);
}

// Token by token, as decode appends, or at once, as prefill does: the same cuts.
TEST(BlockCutter, EndsAfterAgreesWithFirstBlock) {
  const BlockCutter cutter = LineCutter();
  auto tokens = RandomTokens(20'000, 4);
  for (size_t i = 0; i < tokens.size(); i += 37) tokens[i] = kLineEnd;
  std::vector<int> ends;
  int length = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    ++length;
    if (!cutter.EndsAfter(length, length == 1 ? -1 : tokens[i - 1], tokens[i])) continue;
    ends.push_back(static_cast<int>(i) + 1);
    length = 0;
  }
  EXPECT_EQ(ends, Cut(cutter, tokens));
}

// Two cuts of the same text meet at the first pair that hits where both are past their minimum.
TEST(BlockCutter, AnyShiftResynchronises) {
  const auto text = RandomTokens(2'000, 5);
  double sum = 0;
  int worst = 0;
  for (int shift = 0; shift < 256; ++shift) {
    const int tokens = TokensToResync(PlainCutter(), text, RandomTokens(shift, 1000 + shift));
    sum += tokens;
    worst = std::max(worst, tokens);
  }
  EXPECT_LT(worst, 128);
  EXPECT_LT(sum / 256, 64);
}

TEST(BlockCutter, TextWithLinesResynchronisesWithinLines) {
  auto text = RandomTokens(2'000, 6);
  for (size_t i = 11; i < text.size(); i += 12) text[i] = kLineEnd;
  for (int shift = 0; shift < 256; ++shift) {
    // The first line end may fall on a block too short to end; the second cannot, for 12 >= kMinTokens.
    EXPECT_LE(TokensToResync(LineCutter(), text, RandomTokens(shift, 2000 + shift)), 24) << shift;
  }
}

}  // namespace
}  // namespace jointkv::kv
