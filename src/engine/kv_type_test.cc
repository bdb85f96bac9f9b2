#include "engine/kv_type.h"

#include <gtest/gtest.h>

#include "codec/layout.h"

namespace jointkv::engine {
namespace {

using codec::Codec;

TEST(KvTypeTest, KnowsNamesAndFactors) {
  for (const char* name : {"bf16", "f16", "f32", "q8", "q4", "q8/q4"}) {
    const Expected<KvType> type = ParseKvType(name);
    ASSERT_TRUE(type.ok()) << name;
    EXPECT_EQ(type->name(), name);
  }
  EXPECT_EQ(*ParseKvType("q8,q4"), *ParseKvType("q8/q4"));
  EXPECT_EQ(ParseKvType("bf16")->factor(64), 1);
  EXPECT_EQ(ParseKvType("f32")->factor(64), 0.5);
  // Bytes of a head vector: its levels, its scale, and a 32nd of the scales' unit.
  constexpr double kShared = 2.0 / codec::kBlockTokensMax;
  EXPECT_NEAR(ParseKvType("q4")->factor(64), 128.0 / (33 + kShared), 1e-12);
  EXPECT_NEAR(ParseKvType("q8/q4")->factor(64), 256.0 / (65 + 33 + 2 * kShared), 1e-12);
}

TEST(KvTypeTest, RefusesWhatItDoesNotKnow) {
  for (const char* text : {"", "none", "q5", "q4,", ",q4", "q4,q4,q4", "q4:q4", "3-1:q4", "-1:q4", "1-:q4", "a:q4",
                           "99999999999:q4", "1-2-3:q4", "0-1:"}) {
    const Expected<KvTypeRule> rule = ParseKvTypeRule(text);
    ASSERT_FALSE(rule.ok()) << text;
    EXPECT_EQ(rule.status().code(), StatusCode::kInvalidArgument);
    EXPECT_NE(rule.status().message().find("kv-type"), std::string::npos) << rule.status().message();
  }
}

TEST(KvTypeTest, LaterRulesCount) {
  const std::vector<KvTypeRule> rules = {*ParseKvTypeRule("q4"), *ParseKvTypeRule("1-2:q8,q4"),
                                         *ParseKvTypeRule("2:bf16")};
  const Expected<KvCodecs> codecs = ResolveKvTypes(rules, 4, Codec::kBf16);
  ASSERT_TRUE(codecs.ok());
  EXPECT_EQ(codecs->written, Codec::kBf16);
  EXPECT_EQ(codecs->sealed, (std::vector{Codec::kQ4, Codec::kQ4, Codec::kQ8, Codec::kQ4, Codec::kBf16, Codec::kBf16,
                                         Codec::kQ4, Codec::kQ4}));
}

TEST(KvTypeTest, NothingToEncodeWithoutQuantisedTypes) {
  EXPECT_TRUE(ResolveKvTypes({}, 2, Codec::kF32)->sealed.empty());
  EXPECT_EQ(ResolveKvTypes({}, 2, Codec::kF32)->written, Codec::kF32);
  const std::vector<KvTypeRule> f16 = {*ParseKvTypeRule("f16")};
  EXPECT_EQ(ResolveKvTypes(f16, 2, Codec::kBf16)->written, Codec::kF16);
}

TEST(KvTypeTest, RefusesMixturesThatNothingWrites) {
  for (const char* text : {"0:f16", "f32,q4", "f16,bf16"}) {
    const std::vector<KvTypeRule> rules = {*ParseKvTypeRule(text)};
    EXPECT_EQ(ResolveKvTypes(rules, 2, Codec::kBf16).status().code(), StatusCode::kUnsupported) << text;
  }
  const std::vector<KvTypeRule> behind = {*ParseKvTypeRule("2-3:q4")};
  EXPECT_EQ(ResolveKvTypes(behind, 2, Codec::kBf16).status().code(), StatusCode::kOutOfRange);
}

}  // namespace
}  // namespace jointkv::engine
