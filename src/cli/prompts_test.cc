#include "cli/prompts.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

namespace jointkv::cli {
namespace {

Expected<Prompt> Parse(std::string_view line) {
  engine::SamplingParams defaults;
  defaults.top_k = 7;
  return ParsePrompt(line, defaults);
}

TEST(ParsePromptTest, TakesText) {
  const Expected<Prompt> prompt = Parse(R"({"id": "a", "prompt": "Hi \u00e4"})");
  ASSERT_TRUE(prompt.ok()) << prompt.status().message();
  EXPECT_EQ(prompt->id, "a");
  EXPECT_EQ(std::get<std::string>(prompt->content), "Hi \xc3\xa4");
  EXPECT_EQ(prompt->sampling.top_k, 7);
}

TEST(ParsePromptTest, TakesTokensAndNumbersAsIds) {
  const Expected<Prompt> prompt = Parse(R"({"id": 12, "tokens": [1, 2, 300]})");
  ASSERT_TRUE(prompt.ok()) << prompt.status().message();
  EXPECT_EQ(prompt->id, "12");
  EXPECT_EQ(std::get<std::vector<TokenId>>(prompt->content), (std::vector<TokenId>{1, 2, 300}));
}

TEST(ParsePromptTest, TakesMessagesAndTools) {
  const Expected<Prompt> prompt = Parse(R"({"messages": [
      {"role": "system", "content": "S"},
      {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
      {"role": "assistant", "content": null,
       "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"x\":1}"}}]},
      {"role": "tool", "tool_call_id": "c1", "content": "2"}],
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
    "parallel_tool_calls": true})");
  ASSERT_TRUE(prompt.ok()) << prompt.status().message();
  const auto& conversation = std::get<Conversation>(prompt->content);
  ASSERT_EQ(conversation.messages.size(), 4U);
  EXPECT_EQ(conversation.messages[1].content, "ab");
  ASSERT_EQ(conversation.messages[2].tool_calls.size(), 1U);
  EXPECT_EQ(conversation.messages[2].tool_calls[0].arguments_json, R"({"x":1})");
  EXPECT_EQ(conversation.messages[3].tool_call_id, "c1");
  ASSERT_EQ(conversation.tools.size(), 1U);
  EXPECT_EQ(conversation.tools[0].parameters_json, R"({"type":"object"})");
  EXPECT_TRUE(conversation.parallel_tool_calls);
}

TEST(ParsePromptTest, ToolChoiceNoneHidesTheTools) {
  const Expected<Prompt> prompt = Parse(R"({"messages": [{"role": "user", "content": "a"}], "tool_choice": "none",
      "tools": [{"type": "function", "function": {"name": "f"}}]})");
  ASSERT_TRUE(prompt.ok()) << prompt.status().message();
  EXPECT_TRUE(std::get<Conversation>(prompt->content).tools.empty());
}

TEST(ParsePromptTest, SamplingOverridesTheDefaults) {
  const Expected<Prompt> prompt = Parse(R"({"prompt": "a", "temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1,
      "repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 2, "logit_bias": {"12": -3.5},
      "seed": -1, "stop": ["x", "y"], "stop_token_ids": [4], "max_completion_tokens": 9, "min_tokens": 2,
      "ignore_eos": true, "n": 3, "logprobs": true, "top_logprobs": 5, "model": "m", "user": null})");
  ASSERT_TRUE(prompt.ok()) << prompt.status().message();
  const engine::SamplingParams& s = prompt->sampling;
  EXPECT_EQ(s.temperature, 0);
  EXPECT_EQ(s.top_p, 0.5F);
  EXPECT_EQ(s.top_k, 3);
  EXPECT_EQ(s.min_p, 0.1F);
  EXPECT_EQ(s.repetition_penalty, 1.5F);
  EXPECT_EQ(s.presence_penalty, -1);
  EXPECT_EQ(s.frequency_penalty, 2);
  EXPECT_EQ(s.logit_bias, (std::vector<std::pair<TokenId, float>>{{12, -3.5F}}));
  EXPECT_EQ(s.seed, ~uint64_t{0});
  EXPECT_EQ(s.stop, (std::vector<std::string>{"x", "y"}));
  EXPECT_EQ(s.stop_tokens, (std::vector<TokenId>{4}));
  EXPECT_EQ(s.max_tokens, 9);
  EXPECT_EQ(s.min_tokens, 2);
  EXPECT_TRUE(s.ignore_eos);
  EXPECT_EQ(s.n, 3);
  EXPECT_EQ(s.logprobs, 5);
}

TEST(ParsePromptTest, LogprobsAlsoAsTheNumberOfTheCompletionsApi) {
  EXPECT_EQ(Parse(R"({"prompt": "a", "logprobs": 2})")->sampling.logprobs, 2);
  EXPECT_EQ(Parse(R"({"prompt": "a", "logprobs": true})")->sampling.logprobs, 0);
  EXPECT_EQ(Parse(R"({"prompt": "a", "logprobs": false})")->sampling.logprobs, -1);
}

TEST(ParsePromptTest, FusionCanBeSwitchedOff) {
  EXPECT_TRUE(Parse(R"({"prompt": "a"})")->kv_fusion);
  EXPECT_TRUE(Parse(R"({"prompt": "a", "kv_fusion": "on"})")->kv_fusion);
  EXPECT_FALSE(Parse(R"({"prompt": "a", "kv_fusion": "off"})")->kv_fusion);
  EXPECT_FALSE(Parse(R"({"prompt": "a", "kv_fusion": false})")->kv_fusion);
}

struct BadRow {
  std::string line;
  std::string message;  // a part of it
  StatusCode code = StatusCode::kInvalidArgument;
};

TEST(ParsePromptTest, BadRowsNameTheField) {
  const std::vector<BadRow> rows = {
      {"", "not JSON"},
      {"{", "not JSON"},
      {"nonsense", "not JSON"},
      {R"({"prompt": "a"} trailing)", "not JSON"},
      {"{\"prompt\": \"\xff\"}", "not JSON"},
      {R"({"prompt": "\ud800"})", "not JSON"},
      {"[1]", "row: expected an object, got array"},
      {"3", "row: expected an object"},
      {"{}", "exactly one of prompt, messages and tokens"},
      {R"({"prompt": "a", "tokens": [1]})", "exactly one of"},
      {R"({"prompt": null})", "exactly one of"},
      {R"({"prompt": 5})", "prompt: expected a string, got number"},
      {R"({"prompt": "a", "max_token": 5})", "'max_token': unknown field"},
      {R"({"prompt": "a", "id": 1.5})", "id: expected a string"},
      {R"({"prompt": "a", "max_tokens": "5"})", "max_tokens: expected a whole number, got string"},
      {R"({"prompt": "a", "max_tokens": 1.5})", "max_tokens: expected a whole number"},
      {R"({"prompt": "a", "max_tokens": 99999999999})", "max_tokens: 99999999999 does not fit",
       StatusCode::kOutOfRange},
      {R"({"prompt": "a", "n": -9999999999})", "n: -9999999999 does not fit", StatusCode::kOutOfRange},
      {R"({"prompt": "a", "temperature": "hot"})", "temperature: expected a number"},
      {R"({"prompt": "a", "temperature": 1e300})", "temperature: 1e+300 is too large"},
      {R"({"prompt": "a", "ignore_eos": 1})", "ignore_eos: expected true or false"},
      {R"({"prompt": "a", "kv_fusion": "perhaps"})", "kv_fusion: expected true, false"},
      {R"({"prompt": "a", "kv_fusion": 0})", "kv_fusion: expected true, false"},
      {R"({"prompt": "a", "seed": 1.5})", "seed: expected a whole number"},
      {R"({"prompt": "a", "stop": [1]})", "stop[0]: expected a string"},
      {R"({"prompt": "a", "stop": {}})", "stop: expected an array"},
      {R"({"prompt": "a", "stop_token_ids": ["a"]})", "stop_token_ids[0]: expected a whole number"},
      {R"({"prompt": "a", "logit_bias": [1]})", "logit_bias: expected an object"},
      {R"({"prompt": "a", "logit_bias": {"x": 1}})", "logit_bias: 'x' is not a token id"},
      {R"({"prompt": "a", "logit_bias": {"1": "y"}})", "logit_bias.1: expected a number"},
      {R"({"prompt": "a", "top_logprobs": 2})", "top_logprobs: needs"},
      {R"({"tokens": "abc"})", "tokens: expected an array"},
      {R"({"tokens": [1, "a"]})", "tokens[1]: expected a whole number"},
      {R"({"tokens": [4294967296]})", "tokens[0]: 4294967296 does not fit", StatusCode::kOutOfRange},
      {R"({"messages": []})", "messages: is empty"},
      {R"({"messages": {}})", "messages: expected an array"},
      {R"({"messages": [1]})", "messages[0]: expected an object"},
      {R"({"messages": [{"content": "a"}]})", "messages[0].role: is missing"},
      {R"({"messages": [{"role": "user", "content": 1}]})", "messages[0].content: expected an array"},
      {R"({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})", "only parts of type text"},
      {R"({"messages": [{"role": "assistant", "tool_calls": [{}]}]})", "tool_calls[0].function: is missing"},
      {R"({"messages": [{"role": "user", "content": "a"}], "tools": [{}]})", "tools[0].function: is missing"},
      {R"({"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"})", "tool_choice: only auto"},
      {R"({"prompt": )" + std::string(100000, '[') + "}", "nested", StatusCode::kOutOfRange},
  };
  for (const BadRow& row : rows) {
    const Expected<Prompt> prompt = Parse(row.line);
    ASSERT_FALSE(prompt.ok()) << row.line;
    EXPECT_EQ(prompt.status().code(), row.code) << row.line.substr(0, 100);
    EXPECT_NE(prompt.status().message().find(row.message), std::string::npos) << row.line.substr(0, 100) << "\n"
                                                                              << prompt.status().message();
  }
}

class ReadPromptsTest : public testing::Test {
 protected:
  void Write(const std::string& text) { std::ofstream(path_, std::ios::binary) << text; }
  void TearDown() override { std::filesystem::remove(path_); }

  // (line, text or error) of every row.
  std::vector<std::pair<int, std::string>> Read(const PromptLimits& limits = {}) {
    std::vector<std::pair<int, std::string>> rows;
    const auto take = [&](int line, const Expected<Prompt>& prompt) {
      rows.emplace_back(line, prompt.ok() ? std::get<std::string>(prompt->content) : prompt.status().message());
    };
    const Status status = ReadPrompts(path_, {}, take, limits);
    EXPECT_TRUE(status.ok()) << status.message();
    return rows;
  }

  const std::string path_ = testing::TempDir() + "prompts_test." + std::to_string(getpid()) + ".jsonl";
};

TEST_F(ReadPromptsTest, NumbersLinesAndSkipsBlankOnes) {
  Write("{\"prompt\": \"a\"}\r\n\n  \t\n{\"prompt\": \"b\"}\n{\"prompt\": \"c\"}");
  EXPECT_EQ(Read(), (std::vector<std::pair<int, std::string>>{{1, "a"}, {4, "b"}, {5, "c"}}));
}

TEST_F(ReadPromptsTest, GoesOnAfterABadLine) {
  Write("{\"prompt\": 1}\n{\"prompt\": \"b\"}\n");
  EXPECT_EQ(Read(), (std::vector<std::pair<int, std::string>>{{1, "prompt: expected a string, got number"}, {2, "b"}}));
}

TEST_F(ReadPromptsTest, RefusesALineBeyondTheLimitWithoutHoldingIt) {
  Write("{\"prompt\": \"" + std::string(300000, 'x') + "\"}\n{\"prompt\": \"b\"}\n");
  EXPECT_EQ(Read({.line_bytes_max = 1000}),
            (std::vector<std::pair<int, std::string>>{{1, "row: more than 1000 bytes"}, {2, "b"}}));
}

TEST_F(ReadPromptsTest, AnEmptyFileHasNoRows) {
  Write("");
  EXPECT_TRUE(Read().empty());
}

TEST_F(ReadPromptsTest, SaysWhichFileIsMissing) {
  const Status status = ReadPrompts("/nonexistent.jsonl", {}, [](int, const Expected<Prompt>&) {});
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_EQ(status.message(), "'/nonexistent.jsonl': No such file or directory");
}

}  // namespace
}  // namespace jointkv::cli
