#include "engine/stop_strings.h"

#include <gtest/gtest.h>

#include <random>

namespace jointkv::engine {
namespace {

StopStringMatcher Make(std::vector<std::string> stops) {
  auto matcher = StopStringMatcher::Create(std::move(stops));
  CHECK(matcher.ok());
  return std::move(matcher).value();
}

TEST(StopStrings, EmptyIsRejectedByIndex) {
  auto matcher = StopStringMatcher::Create({"a", ""});
  ASSERT_FALSE(matcher.ok());
  EXPECT_EQ(matcher.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(matcher.status().message().find("stop[1]"), std::string::npos);
}

TEST(StopStrings, WithoutStopsTextPassesAtOnce) {
  auto matcher = Make({});
  EXPECT_EQ(matcher.Feed("abc"), "abc");
  EXPECT_EQ(matcher.Feed(""), "");
  EXPECT_EQ(matcher.Feed("d"), "d");
  EXPECT_EQ(matcher.Finish(), "");
  EXPECT_FALSE(matcher.stopped());
}

TEST(StopStrings, HoldsBackAPossibleStartAndReleasesIt) {
  auto matcher = Make({"\n\nUser:"});
  EXPECT_EQ(matcher.Feed("Hello\n"), "Hello");
  EXPECT_EQ(matcher.held_bytes(), 1u);
  EXPECT_EQ(matcher.Feed("\nUs"), "");
  EXPECT_EQ(matcher.Feed("age"), "\n\nUsage");
  EXPECT_EQ(matcher.Feed("\n"), "");
  EXPECT_EQ(matcher.Finish(), "\n");
  EXPECT_EQ(matcher.Finish(), "");
}

TEST(StopStrings, StopsAcrossPiecesAndStaysSilent) {
  auto matcher = Make({"END", "stop"});
  EXPECT_EQ(matcher.Feed("a s"), "a ");
  EXPECT_EQ(matcher.Feed("to"), "");
  EXPECT_EQ(matcher.Feed("p and END"), "");
  EXPECT_TRUE(matcher.stopped());
  EXPECT_EQ(matcher.matched(), 1);
  EXPECT_EQ(matcher.Feed("more"), "");
  EXPECT_EQ(matcher.Finish(), "");
}

TEST(StopStrings, OverlappingCandidates) {
  // After "aab" fails at 'a', the start of the next candidate lies inside the first.
  auto matcher = Make({"aabaac"});
  EXPECT_EQ(matcher.Feed("aabaa"), "");
  EXPECT_EQ(matcher.Feed("b"), "aab");
  EXPECT_EQ(matcher.Feed("aac"), "");
  EXPECT_TRUE(matcher.stopped());

  // A short stop string inside a longer one ends first.
  auto inner = Make({"abcd", "bc"});
  EXPECT_EQ(inner.Feed("xabcd"), "xa");
  EXPECT_EQ(inner.matched(), 1);

  // Two that end together: the longer one starts earlier and takes more away.
  auto together = Make({"cd", "abcd"});
  EXPECT_EQ(together.Feed("xabcd"), "x");
  EXPECT_EQ(together.matched(), 1);
}

TEST(StopStrings, Utf8IsNotSplit) {
  auto matcher = Make({"é!"});
  EXPECT_EQ(matcher.Feed("caf\u00e9"), "caf");
  EXPECT_EQ(matcher.Feed("s"), "\u00e9s");
}

// Byte by byte over every prefix: the definition itself.
std::string Reference(const std::string& text, const std::vector<std::string>& stops) {
  for (size_t end = 1; end <= text.size(); ++end) {
    size_t cut = 0;
    for (const std::string& stop : stops) {
      if (stop.size() <= end && text.compare(end - stop.size(), stop.size(), stop) == 0)
        cut = std::max(cut, stop.size());
    }
    if (cut > 0) return text.substr(0, end - cut);
  }
  return text;
}

TEST(StopStrings, AnySplitGivesTheReferenceAndHoldsNoMoreThanNeeded) {
  std::mt19937 random(7);
  const auto word = [&](size_t length) {
    std::string out(length, 'a');
    for (char& c : out) c = static_cast<char>('a' + random() % 2);
    return out;
  };
  for (int round = 0; round < 20000; ++round) {
    std::vector<std::string> stops(1 + random() % 3);
    size_t longest = 0;
    for (std::string& stop : stops) {
      stop = word(1 + random() % 6);
      longest = std::max(longest, stop.size());
    }
    const std::string text = word(random() % 24);
    auto matcher = Make(stops);
    std::string got;
    for (size_t at = 0; at < text.size();) {
      const size_t length = std::min<size_t>(1 + random() % 5, text.size() - at);
      got += matcher.Feed(text.substr(at, length));
      ASSERT_LT(matcher.held_bytes(), longest);
      at += length;
    }
    got += matcher.Finish();
    ASSERT_EQ(got, Reference(text, stops));
    ASSERT_EQ(matcher.stopped(), got.size() < text.size());
  }
}

}  // namespace
}  // namespace jointkv::engine
