#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "cli/analyze_report.h"
#include "cli/analyze_run.h"
#include "cli/xml_check_for_test.h"
#include "engine/test_models.h"

namespace jointkv::cli {
namespace {

using codec::Kind;
using Tokens = std::vector<TokenId>;

engine::EngineOptions Options(const std::string& model) {
  engine::EngineOptions options;
  options.model_path = engine::TestModelPath(model);
  options.threads = 2;
  options.kv_bytes = size_t{32} << 20;
  options.kv_type = {{.type = {codec::Codec::kF32, codec::Codec::kF32}}};
  return options;
}

Tokens RandomTokens(int n, uint64_t seed) {
  std::mt19937_64 random(seed);
  Tokens tokens(static_cast<size_t>(n));
  for (TokenId& token : tokens) token = static_cast<TokenId>(300 + random() % 700);
  return tokens;
}

// `shared` after a beginning of its own.
Tokens After(int n, uint64_t seed, const Tokens& shared) {
  Tokens tokens = RandomTokens(n, seed);
  tokens.insert(tokens.end(), shared.begin(), shared.end());
  return tokens;
}

TEST(DistributionTest, HasQuantilesAndTheShareThatPasses) {
  std::vector<double> values;
  for (int i = 100; i >= 0; --i) values.push_back(i);
  const Distribution d = DistributionOf(values, [](double value) { return value >= 76; });
  EXPECT_EQ(d.pairs, 101U);
  EXPECT_DOUBLE_EQ(d.p05, 5);
  EXPECT_DOUBLE_EQ(d.p50, 50);
  EXPECT_DOUBLE_EQ(d.p95, 95);
  EXPECT_DOUBLE_EQ(d.accepted, 25.0 / 101);
  EXPECT_EQ(DistributionOf({}, [](double) { return true; }).pairs, 0U);
}

// In the first layer K and V depend on the token alone: blocks with equal tokens are equal wherever they stand, once
// keys are rotated by their offset; absolutely rotated ones are not.
TEST(AnalyzeTest, EqualTokensAreEqualInTheFirstLayer) {
  const auto prompts = ResidentPrompts::Create(Options("llama"));
  ASSERT_TRUE(prompts.ok()) << prompts.status().ToString();
  const Tokens shared = RandomTokens(300, 1);
  ASSERT_TRUE((*prompts)->Add(After(40, 2, shared)).ok());
  ASSERT_TRUE((*prompts)->Add(After(75, 3, shared)).ok());
  const Expected<Analysis> analysis = (*prompts)->Analyse({.pairs = 50});
  ASSERT_TRUE(analysis.ok()) << analysis.status().ToString();
  EXPECT_GE(analysis->equal_pairs, 5U);
  ASSERT_EQ(analysis->layers.size(), 4U);
  const LayerAnalysis& k = analysis->layers[0];
  const LayerAnalysis& v = analysis->layers[1];
  EXPECT_EQ(k.kind, Kind::kK);
  EXPECT_EQ(v.kind, Kind::kV);
  EXPECT_LT(k.nmse.equal.p95, 1e-4);
  EXPECT_LT(v.nmse.equal.p95, 1e-4);
  EXPECT_GT(k.cosine.equal.p05, 0.9999);
  EXPECT_LT(k.cosine_absolute.equal.p95, 0.999);
  EXPECT_EQ(k.nmse.equal.accepted, 1);
  EXPECT_GT(k.nmse.random.p05, 0.5);
  EXPECT_LT(k.cosine.random.p95, 0.9);
  EXPECT_EQ(v.cosine.equal.p50, v.cosine_absolute.equal.p50);
  EXPECT_GT(analysis->layers[3].nmse.equal.p50, v.nmse.equal.p50);
}

TEST(AnalyzeTest, StandsSlidingWindows) {
  const auto prompts = ResidentPrompts::Create(Options("gemma3"));
  ASSERT_TRUE(prompts.ok()) << prompts.status().ToString();
  const Tokens shared = RandomTokens(200, 1);
  ASSERT_TRUE((*prompts)->Add(After(10, 2, shared)).ok());
  ASSERT_TRUE((*prompts)->Add(After(31, 3, shared)).ok());
  const Expected<Analysis> analysis = (*prompts)->Analyse({});
  ASSERT_TRUE(analysis.ok()) << analysis.status().ToString();
  ASSERT_EQ(analysis->layers.size(), 6U);
  size_t most = 0;
  for (const LayerAnalysis& layer : analysis->layers) most = std::max(most, layer.nmse.equal.pairs);
  EXPECT_EQ(most, analysis->equal_pairs);
  EXPECT_EQ(XmlError(ToSvg({}, *analysis)), "");
}

TEST(AnalyzeTest, NamesWhatIsWrong) {
  const auto prompts = ResidentPrompts::Create(Options("llama"));
  ASSERT_TRUE(prompts.ok()) << prompts.status().ToString();
  EXPECT_EQ((*prompts)->Analyse({}).status().code(), StatusCode::kInvalidArgument);
  ASSERT_TRUE((*prompts)->Add(RandomTokens(100, 1)).ok());
  EXPECT_EQ((*prompts)->Analyse({}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ((*prompts)->Add(RandomTokens(engine::kTestContext + 1, 1)).code(), StatusCode::kOutOfRange);
  Status status;
  for (int i = 0; status.ok() && i < 100; ++i) status = (*prompts)->Add(RandomTokens(2000, static_cast<uint64_t>(i)));
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
}

TEST(AnalyzeReportTest, TableJsonAndPictureHaveEveryLayer) {
  Analysis analysis = {.blocks = 10, .equal_pairs = 3, .layers = {}};
  for (int layer = 0; layer < 30; ++layer) {
    for (const Kind kind : {Kind::kK, Kind::kV}) {
      LayerAnalysis next = {.layer = layer, .kind = kind, .nmse = {}, .cosine = {}, .cosine_absolute = {}};
      next.nmse.equal = {.pairs = 3, .p05 = 0, .p25 = 0.01, .p50 = 0.02, .p75 = 0.03, .p95 = 0.1, .accepted = 0.5};
      next.nmse.random = {.pairs = 3, .p05 = 1, .p25 = 1.5, .p50 = 2, .p75 = 2.5, .p95 = 3};
      analysis.layers.push_back(next);
    }
  }
  const AnalysisContext context = {.model = "m", .docs = "", .requests = 2, .options = {}};
  EXPECT_EQ(XmlError(ToSvg(context, analysis)), "");
  const nlohmann::ordered_json json = ToJson(context, analysis);
  ASSERT_EQ(json["results"].size(), 60U);
  EXPECT_EQ(json["results"][1]["kind"], "V");
  EXPECT_EQ(json["results"][1]["nmse"]["equal"]["within_budget"], 0.5);
  EXPECT_EQ(json["budget"], 0.06);
  const auto rows = [&](bool all) {
    const std::string table = ToTable(context, analysis, all);
    return std::count(table.begin(), table.end(), '\n');
  };
  EXPECT_EQ(rows(true), 6 + 30);
  EXPECT_LE(rows(false), 6 + 9);
}

}  // namespace
}  // namespace jointkv::cli
