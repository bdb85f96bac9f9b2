#include "cli/rag_pool.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>

namespace jointkv::cli {
namespace {

TEST(RagPoolTest, DocumentsFollowTheSeedAndHaveAboutEightyWords) {
  const std::vector<Document> documents = MakeUpDocuments(20, 1);
  const std::vector<Document> again = MakeUpDocuments(20, 1);
  ASSERT_EQ(documents.size(), 20U);
  std::set<std::string> texts;
  for (size_t i = 0; i < documents.size(); ++i) {
    EXPECT_EQ(documents[i].text, again[i].text);
    const auto words = std::ranges::count(documents[i].text, ' ') + 1;
    EXPECT_GE(words, 80);
    EXPECT_LE(words, 105);
    texts.insert(documents[i].text);
  }
  EXPECT_EQ(texts.size(), 20U);
  EXPECT_NE(MakeUpDocuments(1, 2)[0].text, documents[0].text);
}

TEST(RagPoolTest, PromptHoldsEachDrawnDocumentOnce) {
  std::vector<Document> documents;
  for (int i = 0; i < 5; ++i) {
    documents.push_back({"title" + std::to_string(i), "text" + std::to_string(i), "question" + std::to_string(i)});
  }
  std::mt19937_64 random(1);
  for (int repeat = 0; repeat < 50; ++repeat) {
    const RagPrompt prompt = DrawRagPrompt(documents, 3, random);
    const auto& messages = prompt.messages;
    ASSERT_EQ(messages.size(), 2U);
    EXPECT_EQ(messages[0].role, "system");
    int held = 0;
    for (int i = 0; i < 5; ++i) {
      const std::string text = "text" + std::to_string(i);
      const size_t first = messages[1].content.find(text);
      if (first == std::string::npos) {
        EXPECT_EQ(messages[1].content.find("question" + std::to_string(i)), std::string::npos);
        continue;
      }
      ++held;
      EXPECT_EQ(messages[1].content.find(text, first + 1), std::string::npos);
    }
    EXPECT_EQ(held, 3);
    ASSERT_LT(prompt.asked, prompt.documents.size());
    const Document& asked = documents[prompt.documents[prompt.asked]];
    EXPECT_TRUE(messages[1].content.ends_with("Question: " + asked.question));
  }
}

TEST(RagPoolTest, MadeUpAnswersStandInTheirText) {
  for (const Document& document : MakeUpDocuments(20, 3)) {
    ASSERT_EQ(document.answers.size(), 1U);
    EXPECT_NE(document.text.find(document.answers[0]), std::string::npos);
  }
}

TEST(RagPoolTest, ReadsDocumentsAndNamesTheBadLine) {
  const std::string path = testing::TempDir() + "rag_pool_test." + std::to_string(getpid()) + ".jsonl";
  const auto message = [&](const std::string& text) {
    std::ofstream(path) << text;
    return ReadDocuments(path, 1).status().message();
  };
  const std::string good = R"({"title": "T", "text": "X", "question": "Q", "answers": ["A", "B"]})";
  EXPECT_EQ(message(good + "\n\n"), "");
  const Expected<std::vector<Document>> one = ReadDocuments(path, 1);
  ASSERT_TRUE(one.ok()) << one.status().message();
  EXPECT_EQ((*one)[0].question, "Q");
  EXPECT_EQ((*one)[0].answers, (std::vector<std::string>{"A", "B"}));
  EXPECT_EQ(ReadDocuments(path, 2).status().code(), StatusCode::kOutOfRange);
  EXPECT_EQ(message(good + "\n\n{\"title\": 1}\n"), path + ":3: title: expected a string");
  EXPECT_EQ(message(R"({"title": "T", "text": "X", "question": "Q", "answers": "A"})"),
            path + ":1: answers: expected an array of strings");
  EXPECT_EQ(message(R"({"title": "T", "text": "X", "question": "Q", "answers": [1]})"),
            path + ":1: answers: expected an array of strings");
  std::filesystem::remove(path);
  EXPECT_EQ(ReadDocuments(path, 1).status().code(), StatusCode::kNotFound);
}

}  // namespace
}  // namespace jointkv::cli
