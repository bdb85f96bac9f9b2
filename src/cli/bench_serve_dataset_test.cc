#include "cli/bench_serve_dataset.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "cli/engine_options.h"

namespace jointkv::cli {
namespace {

class DatasetTest : public testing::Test {
 protected:
  void SetUp() override {
    path_ = std::filesystem::path(testing::TempDir()) / ("bench_serve_dataset_" + std::to_string(getpid()) + ".jsonl");
  }
  void TearDown() override { std::filesystem::remove(path_); }

  DatasetOptions Custom(const std::string& rows, size_t num_prompts) {
    std::ofstream(path_) << rows;
    DatasetOptions options;
    options.name = "custom";
    options.path = path_;
    options.num_prompts = num_prompts;
    options.shuffle = false;
    return options;
  }

  std::filesystem::path path_;
};

constexpr const char* kRows =
    "{\"prompt\": \"one\", \"output_tokens\": 5}\n\n{\"prompt\": \"two\"}\n"
    "{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", \"content\": \"u\"}]}\n";

std::vector<std::string> LastContents(const std::vector<ServeRequest>& requests) {
  std::vector<std::string> contents;
  for (const ServeRequest& request : requests) contents.push_back(request.messages.back().content);
  return contents;
}

TEST_F(DatasetTest, CustomRowsAreRepeatedWhenTheyAreTooFew) {
  const auto requests = MakeDataset(Custom(kRows, 5));
  ASSERT_TRUE(requests.ok()) << requests.status().ToString();
  EXPECT_EQ(LastContents(*requests), (std::vector<std::string>{"one", "two", "u", "one", "two"}));
  EXPECT_EQ((*requests)[0].output_tokens, 5);
  EXPECT_EQ((*requests)[1].output_tokens, 256);
  EXPECT_EQ((*requests)[2].messages.size(), 2);
}

TEST_F(DatasetTest, OptionsOverrideTheRows) {
  DatasetOptions options = Custom(kRows, 3);
  options.output_tokens = 9;
  const auto requests = MakeDataset(options);
  ASSERT_TRUE(requests.ok());
  for (const ServeRequest& request : *requests) EXPECT_EQ(request.output_tokens, 9);
  options.num_prompts = 4;
  options.oversample = false;
  EXPECT_EQ(MakeDataset(options).status().code(), StatusCode::kOutOfRange);
}

TEST_F(DatasetTest, ShufflingFollowsTheSeed) {
  std::string rows;
  for (int i = 0; i < 50; ++i) rows += "{\"prompt\": \"" + std::to_string(i) + "\"}\n";
  DatasetOptions options = Custom(rows, 50);
  const std::vector<std::string> in_order = LastContents(*MakeDataset(options));
  options.shuffle = true;
  options.seed = 1;
  const std::vector<std::string> shuffled = LastContents(*MakeDataset(options));
  EXPECT_NE(shuffled, in_order);
  EXPECT_EQ(shuffled, LastContents(*MakeDataset(options)));
  options.seed = 2;
  EXPECT_NE(shuffled, LastContents(*MakeDataset(options)));
  EXPECT_EQ(std::set<std::string>(shuffled.begin(), shuffled.end()),
            std::set<std::string>(in_order.begin(), in_order.end()));
}

TEST_F(DatasetTest, BadRowsAreNamed) {
  for (const char* row :
       {"nonsense", "[1]", "{}", R"({"prompt": 1})", R"({"prompt": "a", "messages": []})", R"({"messages": []})",
        R"({"messages": [1]})", R"({"messages": [{"role": "user"}]})", R"({"messages": [{"role": 1, "content": "a"}]})",
        R"({"prompt": "a", "output_tokens": 0})", R"({"prompt": "a", "output_tokens": "5"})",
        R"({"prompt": "a", "output_tokens": 1e9})", R"({"prompt": "a", "output_tokens": 99999999999})"}) {
    const Status status = MakeDataset(Custom("{\"prompt\": \"fine\"}\n" + std::string(row) + "\n", 1)).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << row;
    EXPECT_NE(status.message().find(".jsonl:2: "), std::string::npos) << status.message();
  }
  EXPECT_EQ(MakeDataset(Custom("", 1)).status().code(), StatusCode::kInvalidArgument);
  EXPECT_FALSE(MakeDataset(Custom(std::string(1 << 20, '[') + "\n", 1)).ok());
  DatasetOptions missing = Custom("", 1);
  missing.path += ".missing";
  EXPECT_EQ(MakeDataset(missing).status().code(), StatusCode::kNotFound);
}

TEST_F(DatasetTest, SavedRowsAreTheSameRequests) {
  DatasetOptions workload;
  workload.name = "rag-pool";
  workload.num_prompts = 4;
  const auto requests = MakeDataset(workload);
  ASSERT_TRUE(requests.ok()) << requests.status().ToString();
  const auto again = MakeDataset(Custom(ToRows(*requests), 4));
  ASSERT_TRUE(again.ok()) << again.status().ToString();
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(ToBody((*again)[i], {.api = ServeApi::kChat}), ToBody((*requests)[i], {.api = ServeApi::kChat}));
  }
}

TEST_F(DatasetTest, EveryNameMakesRequests) {
  for (const std::string& name : DatasetNames()) {
    if (name == "custom" || name == "random") continue;
    DatasetOptions options;
    options.name = name;
    options.num_prompts = 3;
    const auto requests = MakeDataset(options);
    ASSERT_TRUE(requests.ok()) << name << ": " << requests.status().ToString();
    EXPECT_EQ(requests->size(), 3) << name;
    options.seed = 1;
    EXPECT_NE(LastContents(*requests), LastContents(*MakeDataset(options))) << name;
  }
  DatasetOptions unknown;
  unknown.name = "sonnet";
  EXPECT_EQ(MakeDataset(unknown).status().code(), StatusCode::kInvalidArgument);
  DatasetOptions without_words;
  without_words.tokenizer_path = testing::TempDir();
  EXPECT_EQ(MakeDataset(without_words).status().code(), StatusCode::kNotFound);
}

TEST_F(DatasetTest, RandomPromptsHaveTheirLengths) {
  if (!CheckModelFile(DefaultModelPath()).ok()) GTEST_SKIP() << "no model file " << DefaultModelPath();
  const auto tokenizer = text::Tokenizer::Open(DefaultModelPath());
  ASSERT_TRUE(tokenizer.ok());
  const auto exact = RandomDataset(**tokenizer, 5, 1, {.prefix = 3, .input = 20, .output = 7});
  ASSERT_TRUE(exact.ok());
  for (const ServeRequest& request : *exact) {
    const auto tokens = (*tokenizer)->Encode(request.messages.front().content, false, false);
    EXPECT_EQ(tokens->size(), 23);
    EXPECT_EQ(request.output_tokens, 7);
  }
  std::set<std::string> different;
  std::set<int> outputs;
  const auto varied = RandomDataset(**tokenizer, 200, 1, {.input = 20, .output = 10, .range_ratio = 0.5});
  for (const ServeRequest& request : *varied) {
    const auto tokens = (*tokenizer)->Encode(request.messages.front().content, false, false);
    EXPECT_GE(tokens->size(), 10);
    EXPECT_LE(tokens->size(), 30);
    different.insert(request.messages.front().content);
    outputs.insert(request.output_tokens);
  }
  EXPECT_EQ(different.size(), 200);
  EXPECT_EQ(*outputs.begin(), 5);
  EXPECT_EQ(*outputs.rbegin(), 15);
}

TEST(ToBodyTest, ChatsAreMessagesAndCompletionsText) {
  const ServeRequest request = {{{"system", "be brief"}, {"user", "hi"}}, 8};
  EXPECT_EQ(nlohmann::json::parse(ToBody(request, {.api = ServeApi::kChat, .model = "m"})), nlohmann::json::parse(R"({
    "model": "m", "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
    "max_completion_tokens": 8, "stream": true, "stream_options": {"include_usage": true}})"));
  BodyOptions options = {.model = "m", .ignore_eos = true};
  options.extra = {{"temperature", 0}, {"max_tokens", 3}};
  EXPECT_EQ(nlohmann::json::parse(ToBody(request, options)), nlohmann::json::parse(R"({
    "model": "m", "prompt": "be brief\n\nhi", "max_tokens": 3, "stream": true,
    "stream_options": {"include_usage": true}, "ignore_eos": true, "temperature": 0})"));
  EXPECT_EQ(ToBody(request, {.api = ServeApi::kEmbeddings, .model = "m"}), R"({"model":"m","input":"be brief\n\nhi"})");
}

TEST(ToBodyTest, BadUtf8IsReplaced) {
  const ServeRequest request = {{{"user", "a\xFF"}}, 1};
  EXPECT_NE(ToBody(request, {.model = "m"}).find("a\xEF\xBF\xBD"), std::string::npos);
}

}  // namespace
}  // namespace jointkv::cli
