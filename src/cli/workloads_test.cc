#include "cli/workloads.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string>

namespace jointkv::cli {
namespace {

constexpr Workload kAll[] = {Workload::kRagPool,      Workload::kUnique, Workload::kFewShot,
                             Workload::kSystemPrompt, Workload::kWiki,   Workload::kSamples};

std::vector<WorkloadRequest> Draw(const WorkloadOptions& options, uint64_t seed) {
  const Expected<WorkloadMaker> maker = WorkloadMaker::Create(options);
  EXPECT_TRUE(maker.ok()) << maker.status().message();
  return maker.ok() ? maker->Draw(seed) : std::vector<WorkloadRequest>();
}

std::string TextOf(const WorkloadRequest& request) {
  std::string text;
  for (const auto& message : request.messages) text += message.role + ": " + message.content + "\n";
  return text;
}

// Titles of the documents in a prompt.
std::vector<std::string> Titles(const WorkloadRequest& request) {
  std::vector<std::string> titles;
  const std::string text = TextOf(request);
  for (size_t at = 0; (at = text.find("Document: ", at)) != std::string::npos; ++at) {
    titles.push_back(text.substr(at, text.find('\n', at) - at));
  }
  return titles;
}

class WorkloadsTest : public testing::Test {
 protected:
  std::string Write(const std::string& text) {
    std::ofstream(path_, std::ios::binary) << text;
    return path_;
  }
  std::string Rows(int count) {
    std::string rows;
    for (int i = 0; i < count; ++i) {
      const std::string n = std::to_string(i);
      rows += R"({"title": "T)" + n + R"(", "text": "Text )" + n + R"( about things.", "question": "Q)" + n +
              R"(?", "answers": ["A)" + n + "\"]}\n";
    }
    return Write(rows);
  }
  void TearDown() override { std::filesystem::remove(path_); }

  const std::string path_ = testing::TempDir() + "workloads_test." + std::to_string(getpid());
};

TEST_F(WorkloadsTest, NamesGoBothWays) {
  for (const Workload workload : kAll) EXPECT_EQ(ParseWorkload(WorkloadName(workload)), workload);
  EXPECT_EQ(ParseWorkload("nonsense"), std::nullopt);
}

TEST_F(WorkloadsTest, MadeUpOnesFollowTheSeed) {
  for (const Workload workload : kAll) {
    const WorkloadOptions options = {.workload = workload, .requests = 10, .pool = 6, .documents = 3};
    const auto requests = Draw(options, 1);
    const auto again = Draw(options, 1);
    const auto other = Draw(options, 2);
    ASSERT_EQ(requests.size(), 10U) << WorkloadName(workload);
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_EQ(TextOf(requests[i]), TextOf(again[i]));
      EXPECT_EQ(requests[i].continuation, again[i].continuation);
      ASSERT_FALSE(requests[i].continuation.empty());
      EXPECT_FALSE(requests[i].continuation.front().empty());
      EXPECT_NE(TextOf(requests[i]), TextOf(other[i])) << WorkloadName(workload);
      EXPECT_EQ(requests[i].answers.empty(), workload == Workload::kWiki);
    }
  }
}

TEST_F(WorkloadsTest, RagPoolContinuesWithTheAnswerAndThePassageAskedAbout) {
  const auto requests = Draw({.docs_path = Rows(12), .requests = 20, .pool = 5, .documents = 3}, 7);
  std::set<std::string> titles;
  for (const WorkloadRequest& request : requests) {
    EXPECT_EQ(Titles(request).size(), 3U);
    for (const std::string& title : Titles(request)) titles.insert(title);
    const std::string text = TextOf(request);
    const std::string n = text.substr(text.find("Question: Q") + 11);
    const std::string number = n.substr(0, n.find('?'));
    EXPECT_EQ(request.answers, std::vector<std::string>{"A" + number});
    EXPECT_EQ(request.continuation.front(), "A" + number + ". Text " + number + " about things.");
    EXPECT_EQ(request.continuation.size(), 3U);
  }
  EXPECT_EQ(titles.size(), 5U);
}

TEST_F(WorkloadsTest, UniqueHasNoDocumentTwice) {
  std::set<std::string> titles;
  for (const WorkloadRequest& request :
       Draw({.workload = Workload::kUnique, .docs_path = Rows(12), .requests = 4, .documents = 3}, 7)) {
    for (const std::string& title : Titles(request)) EXPECT_TRUE(titles.insert(title).second) << title;
  }
  EXPECT_EQ(titles.size(), 12U);
}

TEST_F(WorkloadsTest, SamplesShareAPromptAndDifferInWhatFollows) {
  for (const size_t documents : {2, 9}) {
    const auto requests = Draw({.workload = Workload::kSamples, .requests = 20, .documents = documents}, 3);
    std::map<std::string, std::set<std::string>> continuations;
    for (const WorkloadRequest& request : requests) {
      EXPECT_TRUE(continuations[TextOf(request)].insert(request.continuation.front()).second);
    }
    EXPECT_EQ(continuations.size(), 3U);
    EXPECT_EQ(continuations[TextOf(requests[0])].size(), 8U);
    EXPECT_EQ(continuations[TextOf(requests[19])].size(), 4U);
  }
}

TEST_F(WorkloadsTest, SystemPromptIsOneForAll) {
  const auto requests = Draw({.workload = Workload::kSystemPrompt, .requests = 8, .documents = 4}, 3);
  std::set<std::string> questions;
  for (const WorkloadRequest& request : requests) {
    EXPECT_EQ(request.messages[0].content, requests[0].messages[0].content);
    questions.insert(request.messages[1].content);
  }
  EXPECT_GT(questions.size(), 1U);
}

TEST_F(WorkloadsTest, FewShotAsksWhatNoExampleShows) {
  const std::string path = Write(R"({"question": "one?", "answer": "1 = 1\n#### 1"})"
                                 "\n"
                                 R"({"question": "two?", "answer": "1 + 1 = 2\n#### 2"})"
                                 "\n"
                                 R"({"question": "three?", "answer": "3\n#### 3,000"})"
                                 "\n");
  for (const WorkloadRequest& request :
       Draw({.workload = Workload::kFewShot, .docs_path = path, .requests = 6, .pool = 2, .documents = 2}, 5)) {
    const std::string& content = request.messages[1].content;
    for (const char* question : {"one?", "two?", "three?"}) {
      const size_t at = content.find(question);
      ASSERT_NE(at, std::string::npos);
      EXPECT_EQ(content.find(question, at + 1), std::string::npos);
    }
    ASSERT_EQ(request.answers.size(), 1U);
    EXPECT_TRUE(request.continuation.front().ends_with("#### " + request.answers.front()));
  }
}

TEST_F(WorkloadsTest, MadeUpProblemsHaveTheResultAtTheirEnd) {
  for (const Document& problem : MakeUpProblems(30, 4)) {
    ASSERT_EQ(problem.answers.size(), 1U);
    EXPECT_TRUE(problem.text.ends_with("\n#### " + problem.answers[0]));
    EXPECT_GT(std::stoi(problem.answers[0]), 0);
  }
}

TEST_F(WorkloadsTest, WikiPagesDoNotOverlapAndGoOn) {
  std::string text;
  for (int i = 0; i < 2000; ++i) text += "w" + std::to_string(i) + (i % 50 == 49 ? "\n\n" : " ");
  const auto requests = Draw({.workload = Workload::kWiki, .docs_path = Write(text), .requests = 5, .documents = 2}, 5);
  std::set<std::string> words;
  for (const WorkloadRequest& request : requests) {
    std::string page = request.messages[1].content;
    const int first = std::stoi(page.substr(1));
    EXPECT_EQ(std::ranges::count(page, 'w'), 200);
    EXPECT_TRUE(request.continuation.front().starts_with("w" + std::to_string(first + 200)));
    EXPECT_TRUE(words.insert(page.substr(0, page.find(' '))).second);
  }
}

TEST_F(WorkloadsTest, SaysWhatIsMissing) {
  const auto fails = [](const WorkloadOptions& options) { return WorkloadMaker::Create(options).status(); };
  EXPECT_EQ(fails({.pool = 3, .documents = 4}).message(), "documents 4: more than the pool of 3");
  EXPECT_EQ(fails({.docs_path = Rows(4), .pool = 5, .documents = 2}).message(),
            "'" + path_ + "' has 4 documents, 5 are needed");
  EXPECT_EQ(fails({.workload = Workload::kUnique, .docs_path = path_, .requests = 3, .documents = 2}).code(),
            StatusCode::kOutOfRange);
  EXPECT_EQ(fails({.workload = Workload::kWiki, .docs_path = path_}).code(), StatusCode::kOutOfRange);
  EXPECT_EQ(fails({.workload = Workload::kFewShot, .docs_path = path_, .pool = 2, .documents = 2}).message(),
            path_ + ":1: answer: expected a string");
  EXPECT_EQ(fails({.docs_path = "/nonexistent"}).code(), StatusCode::kNotFound);
}

TEST_F(WorkloadsTest, SameTextCountsOnce) {
  const std::string row = R"({"title": "T", "text": "X", "question": "Q"})";
  const Status status =
      WorkloadMaker::Create({.docs_path = Write(row + "\n" + row), .pool = 2, .documents = 1}).status();
  EXPECT_EQ(status.message(), "'" + path_ + "' has 1 different documents, 2 are needed");
}

}  // namespace
}  // namespace jointkv::cli
