#include "text/detokenizer.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/test_model.h"
#include "text/tokenizer.h"

namespace jointkv::text {
namespace {

#define FFFD "\xEF\xBF\xBD"

class DetokenizerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_MODEL();
    auto opened = Tokenizer::Open(DefaultModelPath());
    ASSERT_TRUE(opened.ok()) << opened.status().ToString();
    tokenizer_ = std::move(opened).value();
  }

  // Feeds the parts and returns the whole text; every intermediate text must be valid.
  std::string Stream(const std::vector<std::string_view>& parts) {
    StreamDetokenizer stream(*tokenizer_);
    std::string out;
    for (const std::string_view part : parts) {
      stream.AppendBytes(part, out);
      EXPECT_TRUE(IsValidUtf8(out));
      EXPECT_LE(stream.held_bytes(), 3u);
    }
    stream.Flush(out);
    return out;
  }

  std::unique_ptr<Tokenizer> tokenizer_;
};

// Input and what a browser's TextDecoder makes of it.
const std::vector<std::pair<std::string, std::string>> kCases = {
    {"plain", "plain"},
    {"a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z", "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z"},
    {"\x80", FFFD},
    {"\xFF\xFE", FFFD FFFD},
    {"\xC0\xAF", FFFD FFFD},
    {"\xC1", FFFD},
    {"\xC3", FFFD},
    {"\xC3(", FFFD "("},
    {"\xE2\x82", FFFD},
    {"\xE2\x82x", FFFD "x"},
    {"\xE0\x80\x80", FFFD FFFD FFFD},
    {"\xE0\x9F\xBF", FFFD FFFD FFFD},
    {"\xED\xA0\x80", FFFD FFFD FFFD},
    {"\xF0\x80\x80\x80", FFFD FFFD FFFD FFFD},
    {"\xF4\x90\x80\x80", FFFD FFFD FFFD FFFD},
    {"\xF0\x9F\x98", FFFD},
    {"\xF0\x9F\x98\xF0\x9F\x98\x80", FFFD "\xF0\x9F\x98\x80"},
    {"\xF0\x9F\xE2\x82\xAC", FFFD "\xE2\x82\xAC"},
    {"\xF5\x80\x80\x80", FFFD FFFD FFFD FFFD},
    {"\xE2\xE2\xE2\x82\xAC", FFFD FFFD "\xE2\x82\xAC"},
    {"\xF4\x8F\xBF\xBF", "\xF4\x8F\xBF\xBF"},
    {"a\xF0\x9F\x98z\xC3\xA9\xE0", "a" FFFD "z\xC3\xA9" FFFD},
};

TEST(Utf8, ReplacesAsTheEncodingStandardDoes) {
  for (const auto& [input, expected] : kCases) {
    EXPECT_EQ(SanitizeUtf8(input), expected) << input;
    EXPECT_EQ(IsValidUtf8(input), input == expected);
    EXPECT_TRUE(IsValidUtf8(expected));
  }
  EXPECT_TRUE(IsValidUtf8(""));
}

TEST_F(DetokenizerTest, EverySplitGivesTheSameText) {
  for (const auto& [text, expected] : kCases) {
    const std::string_view input = text;
    for (size_t i = 0; i <= input.size(); ++i) {
      for (size_t j = i; j <= input.size(); ++j) {
        EXPECT_EQ(Stream({input.substr(0, i), input.substr(i, j - i), input.substr(j)}), expected) << i << " " << j;
      }
    }
  }
}

TEST_F(DetokenizerTest, RandomBytesByteByByte) {
  std::mt19937 random(5);
  const std::string_view leads =
      "\xC2\xC3\xE0\xE2\xED\xEF\xF0\xF1\xF4\x80\x8F\x90\x9F\xA0\xBF"
      "a";
  for (int i = 0; i < 20000; ++i) {
    std::string bytes(random() % 12, '\0');
    for (char& c : bytes) c = leads[random() % leads.size()];
    std::vector<std::string_view> parts;
    for (size_t k = 0; k < bytes.size(); ++k) parts.push_back(std::string_view(bytes).substr(k, 1));
    ASSERT_EQ(Stream(parts), SanitizeUtf8(bytes));
  }
}

TEST_F(DetokenizerTest, HoldsBackHalfACharacter) {
  StreamDetokenizer stream(*tokenizer_);
  const auto tokens = tokenizer_->Encode("\U0001F9FF", false, false);
  ASSERT_TRUE(tokens.ok());
  ASSERT_GT(tokens->size(), 1u) << "this emoji is expected to take several tokens";
  for (size_t i = 0; i + 1 < tokens->size(); ++i) EXPECT_EQ(stream.Append((*tokens)[i]), "");
  EXPECT_EQ(stream.Append(tokens->back()), "\U0001F9FF");
  EXPECT_EQ(stream.Append(tokens->front()), "");
  EXPECT_EQ(stream.Flush(), FFFD);
  EXPECT_EQ(stream.Flush(), "");
}

TEST_F(DetokenizerTest, ControlTokensAreSilentUnlessAskedFor) {
  StreamDetokenizer silent(*tokenizer_);
  StreamDetokenizer loud(*tokenizer_, true);
  ASSERT_TRUE(tokenizer_->eos().has_value());
  EXPECT_EQ(silent.Append(*tokenizer_->eos()), "");
  EXPECT_EQ(loud.Append(*tokenizer_->eos()), "<|im_end|>");
  EXPECT_EQ(silent.Append(-1), "");
}

}  // namespace
}  // namespace jointkv::text
