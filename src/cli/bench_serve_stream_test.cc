#include "cli/bench_serve_stream.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace jointkv::cli {
namespace {

using Events = std::vector<std::string>;

Events ParseInPieces(const std::string& bytes, size_t piece) {
  SseParser parser;
  Events events;
  for (size_t at = 0; at < bytes.size(); at += piece) {
    const Status status = parser.Take(std::string_view(bytes).substr(at, piece),
                                      [&](std::string_view data) { events.emplace_back(data); });
    EXPECT_TRUE(status.ok()) << status.ToString();
  }
  return events;
}

TEST(SseParserTest, GivesTheSameEventsHoweverTheBytesAreSplit) {
  const std::string bytes =
      ": ping\n\ndata: one\n\nevent: x\nid: 7\ndata:two\ndata:  three\n\n\n\ndata: caf\xC3\xA9\r\n\r\ndata: "
      "last\r\rdata:\n\n"
      "data: unfinished";
  const Events expected = {"one", "two\n three", "caf\xC3\xA9", "last", ""};
  for (size_t piece = 1; piece <= bytes.size(); ++piece) EXPECT_EQ(ParseInPieces(bytes, piece), expected) << piece;
}

TEST(SseParserTest, RefusesAnEndlessEvent) {
  SseParser parser;
  const std::string piece(1 << 20, 'x');
  Status status;
  for (int i = 0; i < 8 && status.ok(); ++i) status = parser.Take(piece, [](std::string_view) {});
  EXPECT_EQ(status.code(), StatusCode::kOutOfRange);
}

TEST(SseParserTest, RefusesAnEndlessEventOfManyLines) {
  SseParser parser;
  const std::string line = "data: " + std::string(1 << 16, 'x') + "\n";
  Status status;
  for (int i = 0; i < 100 && status.ok(); ++i) status = parser.Take(line, [](std::string_view) {});
  EXPECT_EQ(status.code(), StatusCode::kOutOfRange);
}

TEST(CompletionReaderTest, TakesTimesFromTextAndCountsFromUsage) {
  CompletionReader reader(10);
  const std::vector<std::pair<double, std::string>> events = {
      {10.5, R"({"choices":[{"delta":{"role":"assistant","content":""}}]})"},
      {11, R"({"choices":[{"delta":{"content":"Hel"},"finish_reason":null}]})"},
      {11.25, R"({"choices":[{"delta":{"content":"lo"}}]})"},
      {12, R"({"choices":[{"delta":{},"finish_reason":"length"}]})"},
      {13, R"({"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5,)"
           R"("prompt_tokens_details":{"cached_tokens":3}}})"},
      {13, "[DONE]"}};
  for (const auto& [now_s, data] : events) ASSERT_TRUE(reader.Take(data, now_s).ok()) << data;
  RequestOutcome outcome;
  outcome.start_s = 4;
  outcome.arrival_s = 3;
  ASSERT_TRUE(reader.Finish(outcome).ok());
  EXPECT_EQ(outcome.text, "Hello");
  EXPECT_DOUBLE_EQ(outcome.ttft_s, 1);
  EXPECT_DOUBLE_EQ(outcome.latency_s, 2);
  EXPECT_EQ(outcome.itl_s, std::vector<double>{0.25});
  EXPECT_EQ(outcome.prompt_tokens, 7);
  EXPECT_EQ(outcome.cached_tokens, 3);
  EXPECT_EQ(outcome.output_tokens, 5);
  EXPECT_EQ(outcome.start_s, 4);
  EXPECT_EQ(outcome.arrival_s, 3);
}

TEST(CompletionReaderTest, CountsEventsWithTextWhenTheServerDoesNotCount) {
  CompletionReader reader(0);
  for (const char* data : {R"({"choices":[{"text":"a"}]})", R"({"choices":[{"text":""}]})",
                           R"({"choices":[{"text":"b","finish_reason":"stop"}]})"}) {
    ASSERT_TRUE(reader.Take(data, 1).ok());
  }
  RequestOutcome outcome;
  ASSERT_TRUE(reader.Finish(outcome).ok());
  EXPECT_EQ(outcome.output_tokens, 2);
  EXPECT_EQ(outcome.prompt_tokens, 0);
}

TEST(CompletionReaderTest, AnAnswerWithoutTextHasItsEndAsFirstToken) {
  CompletionReader reader(1);
  ASSERT_TRUE(reader.Take(R"({"choices":[{"delta":{},"finish_reason":"stop"}]})", 3).ok());
  RequestOutcome outcome;
  ASSERT_TRUE(reader.Finish(outcome).ok());
  EXPECT_DOUBLE_EQ(outcome.ttft_s, 2);
  EXPECT_EQ(outcome.output_tokens, 0);
}

TEST(CompletionReaderTest, SaysWhatIsWrong) {
  RequestOutcome outcome;
  CompletionReader cut(0);
  ASSERT_TRUE(cut.Take(R"({"choices":[{"text":"a"}]})", 1).ok());
  EXPECT_EQ(cut.Finish(outcome).code(), StatusCode::kDataLoss);

  CompletionReader failed(0);
  EXPECT_EQ(failed.Take(R"({"error":{"message":"no memory","code":503}})", 1).message(), "no memory");
  EXPECT_FALSE(failed.Take("not JSON", 1).ok());
  EXPECT_FALSE(failed.Take(std::string(100'000, '['), 1).ok());
  EXPECT_FALSE(failed.Take("[1]", 1).ok());
}

TEST(CompletionReaderTest, TakesFieldsOfWrongTypesForMissing) {
  CompletionReader reader(0);
  for (const char* data :
       {R"({"choices":{}})", R"({"choices":[1]})", R"({"choices":[{"text":1,"delta":[],"finish_reason":2}]})",
        R"({"choices":[{"delta":{"content":[],"tool_calls":[1,{"function":"f"}]}}]})", R"({"usage":[1]})",
        R"({"usage":{"prompt_tokens":"x","completion_tokens":-4,"prompt_tokens_details":1}})", "{}"}) {
    EXPECT_TRUE(reader.Take(data, 1).ok()) << data;
  }
  RequestOutcome outcome;
  EXPECT_FALSE(reader.Finish(outcome).ok());
  EXPECT_EQ(outcome.output_tokens, 0);
}

TEST(ErrorMessageTest, NamesStatusAndMessage) {
  EXPECT_EQ(ErrorMessage(429, R"({"error":{"message":"slow down"}})"), "HTTP 429: slow down");
  EXPECT_EQ(ErrorMessage(500, "oops\nmore"), "HTTP 500: oops more");
  EXPECT_EQ(ErrorMessage(502, ""), "HTTP 502");
  EXPECT_EQ(ErrorMessage(500, R"({"error":"plain"})"), "HTTP 500: \"plain\"");
}

}  // namespace
}  // namespace jointkv::cli
