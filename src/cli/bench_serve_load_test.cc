#include "cli/bench_serve_load.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "cli/bench_serve_server_for_test.h"

namespace jointkv::cli {
namespace {

std::string Event(const std::string& json) { return "data: " + json + "\n\n"; }

// Two texts and the end, in chunks that split events in the middle.
bool AnswerWell(const TestServer::Request& request, const TestServer::Send& send) {
  const std::string stream = ": ping\n\n" + Event(R"({"choices":[{"text":"for )" + request.body + R"("}]})") +
                             Event(R"({"choices":[{"text":"!","finish_reason":"length"}]})") +
                             Event(R"({"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4}})") +
                             "data: [DONE]\n\n";
  bool sent = send(kEventStreamHead);
  for (size_t at = 0; sent && at < stream.size(); at += 17) sent = send(Chunk(stream.substr(at, 17)));
  return sent && send(kLastChunk);
}

LoadResult RunOn(
    const TestServer& server, const std::vector<std::string>& bodies, LoadOptions options = {},
    const std::function<bool(const LoadState&)>& watch = [](const LoadState&) { return true; }) {
  const Expected<HttpServer> resolved = HttpServer::Resolve(server.url() + "/base/");
  EXPECT_TRUE(resolved.ok());
  options.path = "/v1/completions";
  return RunLoad(*resolved, options, bodies, std::vector<double>(bodies.size(), 0.0), watch);
}

std::vector<std::string> Bodies(size_t count) {
  std::vector<std::string> bodies;
  for (size_t i = 0; i < count; ++i) bodies.push_back(std::to_string(i));
  return bodies;
}

TEST(RunLoadTest, EveryRequestGetsItsOwnAnswer) {
  std::atomic<int> wrong = 0;
  TestServer server([&](const TestServer::Request& request, const TestServer::Send& send) {
    const bool right = request.head.starts_with("POST /base/v1/completions HTTP/1.1\r\n") &&
                       request.head.find("X-Test: yes\r\n") != std::string::npos &&
                       request.head.find("Content-Type: application/json\r\n") != std::string::npos;
    if (!right) ++wrong;
    return AnswerWell(request, send);
  });
  const LoadResult result = RunOn(server, Bodies(40), {.max_concurrency = 4, .headers = {{"X-Test", "yes"}}});
  EXPECT_EQ(wrong, 0);
  EXPECT_FALSE(result.interrupted);
  ASSERT_EQ(result.outcomes.size(), 40);
  for (size_t i = 0; i < 40; ++i) {
    const RequestOutcome& outcome = result.outcomes[i];
    EXPECT_TRUE(outcome.success) << outcome.error;
    EXPECT_EQ(outcome.text, "for " + std::to_string(i) + "!");
    EXPECT_EQ(outcome.prompt_tokens, 9);
    EXPECT_EQ(outcome.output_tokens, 4);
    EXPECT_EQ(outcome.itl_s.size(), 1);
    EXPECT_LE(outcome.ttft_s, outcome.latency_s);
    EXPECT_LE(outcome.start_s + outcome.latency_s, result.duration_s);
  }
  EXPECT_EQ(server.requests(), 40);
  EXPECT_LE(server.connections(), 4);
  EXPECT_LE(server.most_at_once(), 4);
}

TEST(RunLoadTest, WithoutALimitAllAreUnderWayAtOnce) {
  std::atomic<int> arrived = 0;
  TestServer server([&](const TestServer::Request& request, const TestServer::Send& send) {
    ++arrived;
    while (arrived < 8) std::this_thread::yield();
    return AnswerWell(request, send);
  });
  const LoadResult result = RunOn(server, Bodies(8));
  EXPECT_EQ(std::ranges::count_if(result.outcomes, &RequestOutcome::success), 8);
  EXPECT_EQ(server.connections(), 8);
}

TEST(RunLoadTest, FailuresAreCountedWithTheirReason) {
  TestServer server([](const TestServer::Request& request, const TestServer::Send& send) {
    switch (std::stoi(request.body)) {
      case 0: return AnswerWell(request, send);
      case 1: return send(JsonAnswer(429, R"({"error":{"message":"too many"}})"));
      case 2: return send(kEventStreamHead) && send(Chunk(Event(R"({"choices":[{"text":"a"}]})"))) && false;
      case 3: return send(kEventStreamHead) && send(Chunk(Event("nonsense"))) && send(kLastChunk);
      case 4:
        return send(kEventStreamHead) && send(Chunk(Event(R"({"error":{"message":"lost"}})"))) && send(kLastChunk);
      case 5: return send(kEventStreamHead) && send(Chunk(Event(R"({"choices":[{"text":"a"}]})"))) && send(kLastChunk);
      case 6: return send("SMTP ready\r\n\r\n") && false;
      default: return AnswerWell(request, send);
    }
  });
  const LoadResult result = RunOn(server, Bodies(8), {.max_concurrency = 1});
  ASSERT_EQ(result.outcomes.size(), 8);
  const auto& outcomes = result.outcomes;
  EXPECT_TRUE(outcomes[0].success);
  EXPECT_EQ(outcomes[1].error, "HTTP 429: too many");
  EXPECT_FALSE(outcomes[2].error.empty());
  EXPECT_NE(outcomes[3].error.find("not a JSON object"), std::string::npos) << outcomes[3].error;
  EXPECT_EQ(outcomes[4].error, "lost");
  EXPECT_NE(outcomes[5].error.find("without a finish reason"), std::string::npos) << outcomes[5].error;
  EXPECT_FALSE(outcomes[6].error.empty());
  EXPECT_TRUE(outcomes[7].success) << outcomes[7].error;
  EXPECT_EQ(std::ranges::count_if(outcomes, &RequestOutcome::success), 2);
}

TEST(RunLoadTest, ConnectsAnewWhenTheServerHungUpInBetween) {
  TestServer server([](const TestServer::Request& request, const TestServer::Send& send) {
    AnswerWell(request, send);
    return false;  // the answer did not say so
  });
  const LoadResult result = RunOn(server, Bodies(10), {.max_concurrency = 2});
  for (const RequestOutcome& outcome : result.outcomes) EXPECT_TRUE(outcome.success) << outcome.error;
  EXPECT_EQ(server.requests(), 10);
}

// Begins an answer that never ends.
bool AnswerEndlessly(const TestServer::Send& send) {
  bool sent = send(kEventStreamHead);
  while (sent) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    sent = send(Chunk(": ping\n\n"));
  }
  return false;
}

TEST(RunLoadTest, AnInterruptKeepsWhatIsDone) {
  TestServer server([](const TestServer::Request& request, const TestServer::Send& send) {
    return request.body == "1" ? AnswerEndlessly(send) : AnswerWell(request, send);
  });
  const LoadResult result = RunOn(server, Bodies(3), {.max_concurrency = 1},
                                  [](const LoadState& state) { return state.completed == 0 || state.running == 0; });
  EXPECT_TRUE(result.interrupted);
  ASSERT_EQ(result.outcomes.size(), 1);
  EXPECT_TRUE(result.outcomes[0].success);
}

TEST(RunLoadTest, ARequestHasATimeLimit) {
  TestServer server([](const TestServer::Request&, const TestServer::Send& send) { return AnswerEndlessly(send); });
  const LoadResult result = RunOn(server, Bodies(1), {.timeout_s = 0.1});
  ASSERT_EQ(result.outcomes.size(), 1);
  EXPECT_EQ(result.outcomes[0].error, "no whole answer in time");
}

TEST(RunLoadTest, RequestsAreNumbered) {
  TestServer server([](const TestServer::Request& request, const TestServer::Send& send) {
    const bool numbered = request.head.find("X-Request-Id: run-" + request.body + "\r\n") != std::string::npos;
    return numbered ? AnswerWell(request, send) : send(JsonAnswer(400, "{}"));
  });
  const LoadResult result =
      RunOn(server, Bodies(3), {.headers = {{"X-Request-Id", "no"}}, .request_id_prefix = "run-"});
  for (const RequestOutcome& outcome : result.outcomes) EXPECT_TRUE(outcome.success) << outcome.error;
}

TEST(RunLoadTest, EmbeddingsAreOneAnswer) {
  TestServer server([](const TestServer::Request& request, const TestServer::Send& send) {
    switch (std::stoi(request.body)) {
      case 0: return send(JsonAnswer(200, R"({"data":[{"embedding":[1,2]}],"usage":{"prompt_tokens":7}})"));
      case 1: return send(JsonAnswer(200, R"({"data":[]})"));
      case 2: return send(JsonAnswer(200, "data: {}"));
      case 3: return send(JsonAnswer(400, R"({"error":{"message":"no"}})"));
      default: return send(JsonAnswer(200, std::string(17 << 20, ' ')));
    }
  });
  const LoadResult result = RunOn(server, Bodies(5), {.max_concurrency = 1, .embeddings = true});
  ASSERT_EQ(result.outcomes.size(), 5);
  const RequestOutcome& first = result.outcomes[0];
  EXPECT_TRUE(first.success) << first.error;
  EXPECT_EQ(first.prompt_tokens, 7);
  EXPECT_EQ(first.output_tokens, 0);
  EXPECT_GT(first.latency_s, 0);
  EXPECT_EQ(first.ttft_s, first.latency_s);
  EXPECT_NE(result.outcomes[1].error.find("no embeddings"), std::string::npos) << result.outcomes[1].error;
  EXPECT_NE(result.outcomes[2].error.find("no embeddings"), std::string::npos) << result.outcomes[2].error;
  EXPECT_EQ(result.outcomes[3].error, "HTTP 400: no");
  EXPECT_NE(result.outcomes[4].error.find("more than"), std::string::npos) << result.outcomes[4].error;
}

TEST(RunLoadTest, NobodyListens) {
  std::string url;
  {
    TestServer server([](const TestServer::Request&, const TestServer::Send&) { return false; });
    url = server.url();
  }
  const Expected<HttpServer> server = HttpServer::Resolve(url);
  ASSERT_TRUE(server.ok());
  const LoadResult result = RunLoad(*server, {.path = "/x"}, {"a", "b"}, {0, 0}, [](const LoadState&) { return true; });
  ASSERT_EQ(result.outcomes.size(), 2);
  EXPECT_NE(result.outcomes[1].error.find("refused"), std::string::npos) << result.outcomes[1].error;
}

TEST(HttpGetTest, GivesStatusAndBody) {
  TestServer server([](const TestServer::Request& request, const TestServer::Send& send) {
    if (request.head.starts_with("GET /long ")) {
      bool more = send("HTTP/1.1 200 OK\r\n\r\n");
      const std::string piece(1 << 20, 'x');
      while (more) more = send(piece);
      return false;
    }
    return send(JsonAnswer(503, "loading"));
  });
  const Expected<HttpServer> resolved = HttpServer::Resolve(server.url());
  ASSERT_TRUE(resolved.ok());
  const Expected<HttpAnswer> answer = HttpGet(*resolved, "/health", {}, 30);
  ASSERT_TRUE(answer.ok()) << answer.status().ToString();
  EXPECT_EQ(answer->status, 503);
  EXPECT_EQ(answer->body, "loading");
  EXPECT_EQ(HttpGet(*resolved, "/long", {}, 30).status().code(), StatusCode::kOutOfRange);
}

TEST(HttpServerTest, ReadsUrls) {
  const Expected<HttpServer> server = HttpServer::Resolve("http://127.0.0.1:8000/a/b/");
  ASSERT_TRUE(server.ok());
  EXPECT_EQ(server->host, "127.0.0.1");
  EXPECT_EQ(server->port, "8000");
  EXPECT_EQ(server->path, "/a/b");
  const Expected<HttpServer> v6 = HttpServer::Resolve("http://[::1]");
  ASSERT_TRUE(v6.ok());
  EXPECT_EQ(v6->host, "::1");
  EXPECT_EQ(v6->port, "80");
  EXPECT_EQ(v6->authority(), "[::1]");
  EXPECT_EQ(v6->tls, nullptr);
  const Expected<HttpServer> https = HttpServer::Resolve("https://127.0.0.1/v");
  ASSERT_TRUE(https.ok()) << https.status().ToString();
  EXPECT_EQ(https->port, "443");
  EXPECT_EQ(https->path, "/v");
  EXPECT_EQ(https->authority(), "127.0.0.1");
  EXPECT_NE(https->tls, nullptr);
  EXPECT_EQ(server->authority(), "127.0.0.1:8000");
  for (const char* url : {"127.0.0.1:80", "ftp://a", "https://", "http://", "http://:80", "http://a:x",
                          "http://a:", "http://a:70000", "http://a:-1", "http://a:123456789012"}) {
    EXPECT_EQ(HttpServer::Resolve(url).status().code(), StatusCode::kInvalidArgument) << url;
  }
}

TEST(ArrivalTimesTest, AllAtOnceWithoutARate) { EXPECT_EQ(ArrivalTimes(3, {}), std::vector<double>(3, 0.0)); }

TEST(ArrivalTimesTest, RiseAndEndWhereTheRateSays) {
  for (const double burstiness : {0.2, 1.0, 50.0}) {
    const ArrivalOptions options = {.request_rate = 4, .burstiness = burstiness, .seed = 5};
    const std::vector<double> times = ArrivalTimes(1000, options);
    EXPECT_TRUE(std::ranges::is_sorted(times));
    EXPECT_NEAR(times.back(), 250, 1e-9);
    EXPECT_EQ(times, ArrivalTimes(1000, options));
    EXPECT_NE(times, ArrivalTimes(1000, {.request_rate = 4, .burstiness = burstiness, .seed = 6}));
  }
}

TEST(ArrivalTimesTest, EvenGaps) {
  const std::vector<double> times = ArrivalTimes(4, {.request_rate = 2, .burstiness = INFINITY});
  EXPECT_EQ(times, (std::vector<double>{0.5, 1, 1.5, 2}));
}

TEST(ArrivalTimesTest, ARampRisesFromStartToEnd) {
  const RampUp linear = {.start_rps = 1, .end_rps = 4};
  EXPECT_EQ(ArrivalTimes(4, {.ramp_up = linear, .burstiness = INFINITY}),
            (std::vector<double>{1, 1 + 1. / 2, 1 + 1. / 2 + 1. / 3, 1 + 1. / 2 + 1. / 3 + 1. / 4}));
  const RampUp exponential = {.exponential = true, .start_rps = 1, .end_rps = 16};
  EXPECT_DOUBLE_EQ(exponential.RateOf(0, 5), 1);
  EXPECT_DOUBLE_EQ(exponential.RateOf(2, 5), 4);
  EXPECT_DOUBLE_EQ(exponential.RateOf(4, 5), 16);
  EXPECT_EQ(linear.RateOf(0, 1), 1);
  EXPECT_TRUE(std::ranges::is_sorted(ArrivalTimes(100, {.ramp_up = exponential, .seed = 3})));
}

TEST(RateChangesTest, NamesEveryWholeRate) {
  const std::vector<RateChange> changes = RateChanges({.start_rps = 0.5, .end_rps = 3.5}, {1, 2, 3});
  ASSERT_EQ(changes.size(), 4);  // at 0.5, 2 and 3.5
  EXPECT_EQ(changes[0].rps, 0.5);
  EXPECT_EQ(changes[0].at_s, 0);
  for (size_t i = 1; i < 4; ++i) EXPECT_EQ(changes[i].rps, static_cast<double>(i));
  EXPECT_EQ(changes[1].at_s, 2);
  EXPECT_EQ(changes[2].at_s, 2);
  EXPECT_EQ(changes[3].at_s, 3);
}

// The squared coefficient of variation of gamma distributed gaps is 1 / burstiness; 20,000 of them estimate it within
// a tenth.
TEST(ArrivalTimesTest, BurstinessShapesTheGaps) {
  for (const double burstiness : {0.5, 1.0, 4.0}) {
    std::vector<double> gaps = ArrivalTimes(20'000, {.request_rate = 2, .burstiness = burstiness, .seed = 1});
    std::adjacent_difference(gaps.begin(), gaps.end(), gaps.begin());
    const double mean = std::accumulate(gaps.begin(), gaps.end(), 0.0) / 20'000;
    double variance = 0;
    for (const double gap : gaps) variance += (gap - mean) * (gap - mean) / 20'000;
    EXPECT_NEAR(mean, 0.5, 1e-9);
    EXPECT_NEAR(variance / (mean * mean) * burstiness, 1, 0.1) << burstiness;
  }
}

}  // namespace
}  // namespace jointkv::cli
