#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "engine/test_engine.h"
#include "server/block_map.h"
#include "server/status_json.h"

namespace jointkv::server {
namespace {

using engine::Driver;
using engine::Greedy;
using engine::RandomTokens;
using engine::TestOptions;
using nlohmann::json;

TEST(StatusJson, CountsWhatTheEngineDid) {
  Driver driver(TestOptions());
  json status = json::parse(StatusJson(driver.engine()));
  EXPECT_EQ(status["running"], 0);
  EXPECT_EQ(status["kv"]["physical_bytes"], 0);
  EXPECT_EQ(status["compression"]["total"], 1);
  const double before_s = status["time_s"];

  const auto prompt = RandomTokens(150, 1);
  driver.Submit(prompt, Greedy(20));
  driver.Step();
  driver.Submit(prompt, Greedy(20));
  for (int i = 0; i < 4; ++i) driver.Step();
  status = json::parse(StatusJson(driver.engine()));
  EXPECT_EQ(status["running"], 2);
  EXPECT_EQ(status["waiting"], 0);
  EXPECT_EQ(status["prompt_tokens"], 300);
  EXPECT_EQ(status["output_tokens"], driver.engine().stats().output_tokens);
  EXPECT_EQ(status["kv"]["logical_bytes"], driver.engine().kv_stats().logical_bytes);
  EXPECT_EQ(status["kv"]["physical_bytes"], driver.engine().kv_stats().running_bytes);
  EXPECT_GT(status["slots"]["prefix"], 0);
  EXPECT_GT(status["compression"]["exact_sharing"], 1);
  EXPECT_EQ(status["fusion"]["policy"], "bounded");
  EXPECT_GE(status["time_s"], before_s);
}

TEST(BlockMapJson, HasACharacterForEachBlock) {
  Driver driver(TestOptions());
  EXPECT_EQ(json::parse(BlockMapJson(driver.engine()))["requests"], json::array());

  const auto prompt = RandomTokens(150, 1);
  driver.Submit(prompt, Greedy(50));
  driver.Step();
  driver.Submit(prompt, Greedy(50));
  for (int i = 0; i < 4; ++i) driver.Step();
  const json map = json::parse(BlockMapJson(driver.engine()));
  EXPECT_EQ(map["layers"], 2);
  ASSERT_EQ(map["requests"].size(), 2u);
  for (const json& request : map["requests"]) {
    const size_t columns = request["starts"].size();
    EXPECT_EQ(request["blocks"], columns);
    EXPECT_EQ(request["sizes"].size(), columns);
    EXPECT_EQ(request["phase"], "decode");
    int tokens = 0;
    for (size_t i = 0; i < columns; ++i) {
      EXPECT_EQ(request["starts"][i], tokens);
      tokens += request["sizes"][i].get<int>();
    }
    EXPECT_EQ(request["tokens"], tokens);
    ASSERT_EQ(request["rows"].size(), 2u);
    for (const json& row : request["rows"]) {
      for (const char* name : {"k", "v", "k_readers", "v_readers"}) {
        EXPECT_EQ(row[name].get<std::string>().size(), columns);
      }
      EXPECT_EQ(row["k"].get<std::string>().front(), 'p');
      EXPECT_EQ(row["k_readers"].get<std::string>().front(), '2');
      EXPECT_EQ(row["v"].get<std::string>().back(), 'o');
      EXPECT_EQ(row["v_readers"].get<std::string>().back(), '1');
    }
  }
  EXPECT_EQ(json::parse(BlockMapJson(driver.engine(), DomainId(1)))["requests"], json::array());
}

TEST(BlockMapJson, PutsTheReadersOfManyIntoOneDigit) {
  engine::EngineOptions options = TestOptions();
  options.max_running = 40;
  Driver driver(options);
  engine::SamplingParams many = Greedy(30);
  many.n = 40;
  driver.Submit(RandomTokens(100, 1), many);
  for (int i = 0; i < 3; ++i) driver.Step();
  const json map = json::parse(BlockMapJson(driver.engine()));
  EXPECT_EQ(map["running"], 40);
  EXPECT_EQ(map["requests"].size(), 24u);
  EXPECT_EQ(map["requests"][0]["rows"][0]["k_readers"].get<std::string>().front(), 'z');
}

}  // namespace
}  // namespace jointkv::server
