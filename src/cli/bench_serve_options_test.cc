#include "cli/bench_serve_options.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "cli/bench_serve_report.h"

namespace jointkv::cli {
namespace {

// Throws what the parser throws.
ServeFlags Parse(const std::string& line) {
  ServeFlags flags;
  CLI::App app("test");
  AddServeFlags(app, flags);
  app.parse(line);
  return flags;
}

TEST(ServeFlagsTest, DefaultsAreThoseOfVllm) {
  const ServeFlags flags = Parse("");
  EXPECT_EQ(flags.backend, "openai");
  EXPECT_EQ(flags.endpoint, "/v1/completions");
  EXPECT_EQ(flags.host, "127.0.0.1");
  EXPECT_EQ(flags.port, 8000);
  EXPECT_EQ(flags.dataset.name, "random");
  EXPECT_EQ(flags.dataset.num_prompts, 1000);
  EXPECT_EQ(flags.dataset.random.input, 1024);
  EXPECT_EQ(flags.dataset.random.output, 128);
  EXPECT_TRUE(std::isinf(flags.arrival.request_rate));
  EXPECT_FALSE(flags.max_concurrency.has_value());
  EXPECT_TRUE(flags.body.ignore_eos);  // as vLLM does with random prompts
  EXPECT_EQ(flags.stats.metrics, (std::vector<std::string>{"ttft", "tpot", "itl"}));
  EXPECT_EQ(flags.stats.percentiles, std::vector<double>{99});
}

TEST(ServeFlagsTest, TakesWhatVllmTakes) {
  const ServeFlags flags = Parse(
      "--backend openai-chat --dataset-name custom --dataset-path p.jsonl --num-prompts 12 --request-rate 2.5 "
      "--burstiness 0.5 --max-concurrency 4 --seed 3 --goodput ttft:300 e2el:2000.5 --percentile-metrics ttft,e2el "
      "--metric-percentiles 50,99.9 --temperature 0.5 --top-k 7 --extra-body {\"kv_fusion\":\"off\"} "
      "--metadata a=b c=d=e --header X-One=1 --custom-output-len 77 --label x");
  EXPECT_EQ(flags.endpoint, "/v1/chat/completions");
  EXPECT_EQ(flags.body.api, ServeApi::kChat);
  EXPECT_FALSE(flags.body.ignore_eos);
  EXPECT_EQ(flags.arrival.seed, 3);
  EXPECT_EQ(flags.dataset.output_tokens, 77);
  ASSERT_EQ(flags.stats.goals.size(), 2);
  EXPECT_EQ(flags.stats.goals[1].metric, "e2el");
  EXPECT_EQ(flags.stats.goals[1].limit_ms, 2000.5);
  EXPECT_EQ(flags.stats.percentiles, (std::vector<double>{50, 99.9}));
  EXPECT_EQ(flags.body.extra.dump(), R"({"temperature":0.5,"top_k":7,"kv_fusion":"off"})");
  ASSERT_EQ(flags.metadata.size(), 2);
  EXPECT_EQ(flags.metadata[1].second, "d=e");
  EXPECT_EQ(flags.headers.back(), (std::pair<std::string, std::string>("X-One", "1")));
}

TEST(ServeFlagsTest, Backends) {
  EXPECT_EQ(Parse("--backend vllm").endpoint, "/v1/completions");
  EXPECT_EQ(Parse("--backend vllm").body.api, ServeApi::kCompletions);
  EXPECT_EQ(Parse("--backend openai-chat --endpoint /x/chat/completions").endpoint, "/x/chat/completions");
  const ServeFlags embeddings = Parse("--backend openai-embeddings");
  EXPECT_EQ(embeddings.endpoint, "/v1/embeddings");
  EXPECT_EQ(embeddings.body.api, ServeApi::kEmbeddings);
  EXPECT_FALSE(embeddings.body.ignore_eos);
  EXPECT_EQ(embeddings.stats.metrics, std::vector<std::string>{"e2el"});
  EXPECT_EQ(Parse("").tls_check, TlsCheck::kCertificate);
  EXPECT_EQ(Parse("--insecure").tls_check, TlsCheck::kNone);
}

TEST(ServeFlagsTest, LogprobsAreWhatTheEndpointCallsThem) {
  EXPECT_EQ(Parse("--logprobs 3").body.extra.dump(), R"({"logprobs":3})");
  EXPECT_EQ(Parse("--logprobs 3 --backend openai-chat").body.extra.dump(), R"({"logprobs":true,"top_logprobs":3})");
}

TEST(ServeFlagsTest, RequestIds) {
  const std::string usual = Parse("").request_id_prefix;
  EXPECT_EQ(usual.size(), 15) << usual;
  EXPECT_TRUE(usual.starts_with("bench-") && usual.ends_with('-')) << usual;
  EXPECT_EQ(Parse("--request-id-prefix run").request_id_prefix, "run");
}

TEST(ServeFlagsTest, NamesWhatDoesNothingWithoutAResult) {
  EXPECT_EQ(Parse("--result-filename r.json --metadata a=b").ignored,
            (std::vector<std::string>{"--result-filename", "--metadata"}));
  EXPECT_TRUE(Parse("--result-filename r.json --append-result").ignored.empty());
}

TEST(ServeFlagsTest, OutputLengths) {
  EXPECT_EQ(Parse("--output-len 9").dataset.random.output, 9);
  EXPECT_FALSE(Parse("--output-len 9").dataset.output_tokens.has_value());
  EXPECT_EQ(Parse("--dataset-name rag-pool --output-len 9").dataset.output_tokens, 9);
  EXPECT_FALSE(Parse("--dataset-name custom --custom-output-len -1").dataset.output_tokens.has_value());
  EXPECT_FALSE(Parse("--dataset-name rag-pool --custom-output-len 5").dataset.output_tokens.has_value());
}

TEST(ServeFlagsTest, RefusesWhatMakesNoSense) {
  for (const char* line : {"--backend tgi",
                           "--dataset-name sonnet",
                           "--num-prompts 0",
                           "--request-rate 0",
                           "--request-rate -1",
                           "--request-rate nan",
                           "--burstiness 0",
                           "--max-concurrency 0",
                           "--goodput ttft",
                           "--goodput itl:3",
                           "--goodput ttft:x",
                           "--goodput ttft:-1",
                           "--percentile-metrics ttfb",
                           "--metric-percentiles 101",
                           "--metric-percentiles 50,,",
                           "--extra-body [1]",
                           "--extra-body {",
                           "--metadata a",
                           "--metadata =b",
                           "--header \"a=b\rc: d\"",
                           "--endpoint v1",
                           "--port 0",
                           "--random-range-ratio 2",
                           "--backend openai-audio",
                           "--backend openai-embeddings --percentile-metrics ttft",
                           "--backend openai-embeddings --goodput e2el:3",
                           "--backend openai-embeddings --ignore-eos",
                           "--backend openai-embeddings --temperature 0",
                           "--request-id-prefix \"a\rb\"",
                           "--top-k 2.5",
                           "--logprobs nan",
                           "--ramp-up-strategy linear",
                           "--ramp-up-strategy sudden --ramp-up-start-rps 1 --ramp-up-end-rps 2",
                           "--ramp-up-strategy linear --ramp-up-start-rps 1",
                           "--ramp-up-strategy linear --ramp-up-start-rps 3 --ramp-up-end-rps 2",
                           "--ramp-up-strategy linear --ramp-up-start-rps 0 --ramp-up-end-rps 2",
                           "--ramp-up-strategy linear --ramp-up-start-rps 1 --ramp-up-end-rps 2 --request-rate 1",
                           "--ramp-up-start-rps 1 --ramp-up-end-rps 2",
                           "--no-such-option"}) {
    EXPECT_THROW(Parse(line), CLI::ParseError) << line;
  }
}

TEST(ServeResultTest, SaysWhatWasRun) {
  ServeFlags flags =
      Parse("--backend openai-chat --dataset-name rag-pool --num-prompts 5 --metadata machine=m duration=x");
  flags.body.model = "org/model";
  auto json = ServeResultJson(flags, "20260102-030405", {{"duration", 1.5}, {"completed", 5}});
  EXPECT_EQ(json.dump(),
            R"({"date":"20260102-030405","endpoint_type":"openai-chat","backend":"openai-chat","label":null,)"
            R"("model_id":"org/model","tokenizer_id":null,"dataset_name":"rag-pool","num_prompts":5,"machine":"m",)"
            R"("duration":1.5,"request_rate":"inf","burstiness":1.0,"max_concurrency":null,"completed":5})");
  EXPECT_EQ(ServeResultPath(flags, "D"), "openai-chat-infqps-model-D.json");
  flags.max_concurrency = 4;
  flags.arrival.request_rate = 2.5;
  flags.label = "run";
  flags.result_dir = "out";
  EXPECT_EQ(ServeResultPath(flags, "D"), "out/run-2.5qps-concurrency4-model-D.json");
  flags.result_filename = "r.json";
  EXPECT_EQ(ServeResultPath(flags, "D"), "out/r.json");
  EXPECT_EQ(ServeResultJson(flags, "D", nlohmann::ordered_json::object())["request_rate"], 2.5);
}

TEST(ServeResultTest, SaysHowTheRateRose) {
  const ServeFlags flags =
      Parse("--model m --ramp-up-strategy exponential --ramp-up-start-rps 0.5 --ramp-up-end-rps 8 --burstiness inf");
  EXPECT_EQ(ServeResultPath(flags, "D"), "openai-ramp-up-exponential-0.5qps-8qps-m-D.json");
  const auto json = ServeResultJson(flags, "D", nlohmann::ordered_json::object());
  EXPECT_EQ(json["request_rate"], "inf");
  EXPECT_EQ(json["burstiness"], "inf");
  EXPECT_EQ(json["ramp_up_strategy"], "exponential");
  EXPECT_EQ(json["ramp_up_start_rps"].dump(), "0.5");
  EXPECT_EQ(json["ramp_up_end_rps"].dump(), "8");

  const std::chrono::system_clock::time_point start(std::chrono::seconds(1'000'000'000));
  const auto changes = RateChangesJson({{0.5, 0}, {1, 1.25}}, start);
  EXPECT_EQ(changes[0]["rps"].dump(), "0.5");
  EXPECT_EQ(changes[1]["rps"].dump(), "1");
  const std::string then = changes[1]["timestamp"];
  EXPECT_EQ(then.size(), 26) << then;
  EXPECT_TRUE(then.ends_with(":41.250000")) << then;  // of the minute; the hour is the place's
}

TEST(FirstModelIdTest, TakesTheFirstOrNothing) {
  EXPECT_EQ(FirstModelId(R"({"data":[{"id":"a"},{"id":"b"}]})"), "a");
  for (const char* body :
       {"", "x", "[]", "{}", R"({"data":1})", R"({"data":[]})", R"({"data":[1]})", R"({"data":[{"id":3}]})"}) {
    EXPECT_EQ(FirstModelId(body), "") << body;
  }
}

}  // namespace
}  // namespace jointkv::cli
