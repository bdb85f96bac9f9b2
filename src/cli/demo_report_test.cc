#include "cli/demo_report.h"

#include <gtest/gtest.h>

#include <vector>

namespace jointkv::cli {
namespace {

DemoRun RunOf(joint::Policy policy, int running_peak) {
  DemoRun run;
  run.policy = policy;
  run.summary.requests = 16;
  run.summary.running_peak = running_peak;
  run.fullest = {.logical_bytes = 4000, .held_bytes = 900, .metadata_bytes = 100, .all_resident = false};
  return run;
}

TEST(DemoReportTest, OneRunIsOneColumn) {
  const std::vector<DemoRun> runs = {RunOf(joint::Policy::kOff, 4)};
  const std::string table = ToTable(runs);
  EXPECT_NE(table.find("off\n"), std::string::npos);
  EXPECT_EQ(table.find("KL"), std::string::npos);
  const auto json = ToJson(runs);
  EXPECT_EQ(json["running_peak"], 4);
  EXPECT_EQ(json["off"]["running_peak"], 4);
  EXPECT_FALSE(json.contains("bounded"));
}

TEST(DemoReportTest, TheLastRunIsTheSummary) {
  std::vector<DemoRun> runs = {RunOf(joint::Policy::kOff, 4), RunOf(joint::Policy::kBounded, 12)};
  runs.back().quality = {.tokens = 100, .kl_mean = 0.0123, .kl_p99 = 0.2, .top1 = 0.97};
  runs.back().fusion.offered = 8;
  runs.back().fusion.fused = 6;
  const std::string table = ToTable(runs);
  EXPECT_NE(table.find("               off           bounded\n"), std::string::npos) << table;
  EXPECT_NE(table.find("                 -            0.0123\n"), std::string::npos) << table;
  EXPECT_NE(table.find("4.00              4.00\n"), std::string::npos) << table;
  const auto json = ToJson(runs);
  EXPECT_EQ(json["running_peak"], 12);
  EXPECT_EQ(json["off"]["running_peak"], 4);
  EXPECT_FALSE(json["off"].contains("kl_mean"));
  EXPECT_EQ(json["bounded"]["kl_tokens"], 100);
  EXPECT_DOUBLE_EQ(json["bounded"]["kl_mean"].get<double>(), 0.0123);
  EXPECT_DOUBLE_EQ(json["bounded"]["compression"].get<double>(), 4);
  EXPECT_DOUBLE_EQ(json["bounded"]["fused_share"].get<double>(), 0.75);
  EXPECT_EQ(json["bounded"]["kv_bytes_held"], 1000);
}

}  // namespace
}  // namespace jointkv::cli
