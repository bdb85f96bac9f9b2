#include "cli/eval_report.h"

#include <gtest/gtest.h>

namespace jointkv::cli {
namespace {

EvalContext Context() {
  return {.workload = "rag-pool",
          .docs = "",
          .model = "m.gguf",
          .requests = 2,
          .continuation = 2,
          .seeds = {1, 2},
          .head_dim = 64,
          .threads = 1};
}

EvalRun Run(double kl, size_t logical, size_t held, size_t metadata) {
  EvalRun run;
  run.scores = {{.kl = kl, .nll_exact = 1, .nll_ours = 1, .same_top = true},
                {.kl = kl, .nll_exact = 1, .nll_ours = 1, .same_top = false}};
  run.fullest = {.logical_bytes = logical, .held_bytes = held, .metadata_bytes = metadata, .all_resident = true};
  run.fusion.fused = 10;
  run.fusion.fused_equal_tokens = 9;
  run.fusion.fusion_s = 0.1;
  run.step_s = 2;
  return run;
}

EvalResult Result(engine::KvType kv_type) {
  EvalResult result;
  result.setting.kv_type = kv_type;
  result.setting.fusion.policy = joint::Policy::kBounded;
  result.setting.fusion.budget = 0.03F;
  result.runs = {Run(0.1, 4000, 900, 100), Run(0.3, 6000, 900, 100)};
  result.exact_ratios = {0.8, 1.2};
  return result;
}

TEST(EvalReportTest, FactorsMultiplyToTheCompression) {
  const EvalRow row = RowOf(Result({}), Context());
  EXPECT_DOUBLE_EQ(row.compression.mean, 5);
  EXPECT_DOUBLE_EQ(row.compression.min, 4);
  EXPECT_DOUBLE_EQ(row.compression.max, 6);
  EXPECT_DOUBLE_EQ(row.exact_factor, 1);
  EXPECT_DOUBLE_EQ(row.codec_factor, 1);
  EXPECT_DOUBLE_EQ(row.fusion_factor, 5);
  EXPECT_DOUBLE_EQ(row.bytes_held, 900);
  EXPECT_EQ(row.quality.tokens, 4);
  EXPECT_DOUBLE_EQ(row.quality.kl_mean, 0.2);
  EXPECT_DOUBLE_EQ(row.kl_mean.min, 0.1);
  EXPECT_DOUBLE_EQ(row.quality.top1, 0.5);
  EXPECT_DOUBLE_EQ(*row.equal_token_share, 0.9);
}

TEST(EvalReportTest, FusionIsWhatExactSharingAndTheCodecLeave) {
  const EvalRow row = RowOf(Result(*engine::ParseKvType("q4")), Context());
  EXPECT_GT(row.codec_factor, 3);
  EXPECT_DOUBLE_EQ(row.compression.mean, 5);
  EXPECT_NEAR(row.fusion_factor * row.exact_factor * row.codec_factor, 5, 1e-9);
}

TEST(EvalReportTest, JsonTellsSettingsApart) {
  EvalResult cosine = Result({});
  cosine.setting.fusion.policy = joint::Policy::kCosine;
  cosine.setting.fusion.across_chunks = false;
  EvalResult off = Result(*engine::ParseKvType("q8"));
  off.setting.fusion.policy = joint::Policy::kOff;
  for (EvalRun& run : off.runs) run.fusion = {};
  std::vector<EvalRow> rows;
  for (const EvalResult& result : {Result({}), cosine, off}) rows.push_back(RowOf(result, Context()));
  const nlohmann::ordered_json json = ToJson(Context(), rows);
  const auto& results = json["results"];
  EXPECT_EQ(results[0]["budget"], 0.03);
  EXPECT_TRUE(results[0]["threshold"].is_null());
  EXPECT_EQ(results[1]["threshold"], 0.7);
  EXPECT_EQ(results[1]["cosine_scope"], "bff");
  EXPECT_TRUE(results[1]["budget"].is_null());
  EXPECT_TRUE(results[2]["equal_token_share"].is_null());
  EXPECT_EQ(results[2]["kv_type"], "q8");
  EXPECT_DOUBLE_EQ(results[0]["fusion_share"], 0.05);

  const std::string table = ToTable(Context(), rows);
  for (const char* part : {"bounded 0.03", "cosine 0.7 bff", "q8"}) {
    EXPECT_NE(table.find(part), std::string::npos) << part;
  }
  const std::vector<ParetoSeries> curves = CurvesOf(rows);
  ASSERT_EQ(curves.size(), 3U);
  EXPECT_EQ(curves[1].name, "cosine bff, bf16");
  EXPECT_EQ(curves[2].name, "off, q8");
}

TEST(EvalReportTest, CurvesGatherTheSettingsOfAPolicy) {
  EvalResult other = Result({});
  other.setting.fusion.budget = 0.1F;
  const std::vector<ParetoSeries> curves = CurvesOf({RowOf(Result({}), Context()), RowOf(other, Context())});
  ASSERT_EQ(curves.size(), 1U);
  ASSERT_EQ(curves[0].points.size(), 2U);
  EXPECT_EQ(curves[0].points[1].label, "0.1");
}

TEST(EvalReportTest, TasksReportTheirError) {
  const TaskRow row = {.setting = {}, .questions = 100, .right = 50, .compression = 2, .decode_tok_s = 10};
  const nlohmann::ordered_json json = ToJson(Context(), Task::kNq, {row});
  EXPECT_EQ(json["results"][0]["accuracy"], 0.5);
  EXPECT_DOUBLE_EQ(json["results"][0]["standard_error"], 0.05);
  EXPECT_NE(ToTable(Context(), Task::kNq, {row}).find("50.0 % +- 5.0"), std::string::npos);
}

}  // namespace
}  // namespace jointkv::cli
