#include "text/chat_template.h"

#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "text/detokenizer.h"
#include "text/template_guard.h"
#include "text/test_model.h"

namespace jointkv::text {
namespace {

class ChatTemplateTest : public ::testing::Test {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_MODEL();
    auto opened = Tokenizer::Open(DefaultModelPath());
    ASSERT_TRUE(opened.ok()) << opened.status().ToString();
    tokenizer_ = std::move(opened).value();
  }

  std::unique_ptr<ChatTemplate> Make(const std::string& source = "") {
    auto made = ChatTemplate::Create(*tokenizer_, source);
    EXPECT_TRUE(made.ok()) << made.status().ToString();
    return made.ok() ? std::move(made).value() : nullptr;
  }

  std::unique_ptr<Tokenizer> tokenizer_;
};

const ChatMessage kUser{.role = "user", .content = "What is 2+2?"};
const Tool kTool{"get_weather", "The weather of a city",
                 R"({"type":"object","properties":{"city":{"type":"string"}},"required":["city"]})"};

TEST_F(ChatTemplateTest, RendersTheModelsFormat) {
  const auto chat = Make();
  ASSERT_NE(chat, nullptr);
  EXPECT_FALSE(chat->is_fallback()) << chat->warning();
  const std::vector<ChatMessage> messages = {{.role = "system", .content = "Be brief."},
                                             kUser,
                                             {.role = "assistant", .content = "4"},
                                             {.role = "user", .content = "And 3+3?"}};
  const auto prompt = chat->Render(messages);
  ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
  EXPECT_EQ(prompt->text,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
            "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n");
  const auto closed = chat->Render(messages, {}, {.add_generation_prompt = false});
  ASSERT_TRUE(closed.ok());
  EXPECT_TRUE(closed->text.ends_with("And 3+3?<|im_end|>\n"));
}

TEST_F(ChatTemplateTest, AddsTheModelsOwnSystemLine) {
  const auto chat = Make();
  const auto prompt = chat->Render({&kUser, 1});
  ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
  EXPECT_EQ(prompt->text,
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n");
  const auto tokens = chat->EncodeChat({&kUser, 1});
  ASSERT_TRUE(tokens.ok());
  EXPECT_EQ(tokens->front(), 1);
  EXPECT_NE((*tokens)[1], 1) << "one <|im_start|> only: it is also the model's begin token";
  EXPECT_EQ(tokenizer_->Decode(*tokens, true), prompt->text);
}

TEST_F(ChatTemplateTest, ToolsAndToolCallsRender) {
  const auto chat = Make();
  const std::vector<ChatMessage> messages = {
      kUser,
      {.role = "assistant", .content = "", .tool_calls = {{"call_1", "get_weather", R"({"city":"Bern"})"}}},
      {.role = "tool", .content = "sunny", .name = "get_weather", .tool_call_id = "call_1"},
  };
  const auto prompt = chat->Render(messages, {&kTool, 1});
  ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
  EXPECT_NE(prompt->text.find("What is 2+2?"), std::string::npos);
  EXPECT_NE(prompt->text.find("sunny"), std::string::npos);
}

TEST_F(ChatTemplateTest, OwnTemplateSeesTools) {
  const auto chat = Make(
      "{% if tools %}TOOLS{% for t in tools %} {{ t.function.name }}:{{ t.function.parameters | tojson }}{% endfor %}\n"
      "{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
      "{% if add_generation_prompt %}[assistant]{% endif %}");
  EXPECT_FALSE(chat->is_fallback()) << chat->warning();
  const auto prompt = chat->Render({&kUser, 1}, {&kTool, 1});
  ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
  EXPECT_NE(prompt->text.find("get_weather"), std::string::npos) << prompt->text;
  EXPECT_NE(prompt->text.find("[user]What is 2+2?"), std::string::npos) << prompt->text;
}

TEST_F(ChatTemplateTest, BeginTokenOnce) {
  const auto chat = Make("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}");
  const auto prompt = chat->Render({&kUser, 1});
  ASSERT_TRUE(prompt.ok());
  const auto tokens = chat->EncodeChat({&kUser, 1});
  ASSERT_TRUE(tokens.ok());
  ASSERT_TRUE(tokenizer_->bos().has_value());
  EXPECT_EQ(tokens->front(), *tokenizer_->bos());
  EXPECT_NE((*tokens)[1], *tokenizer_->bos());
}

TEST_F(ChatTemplateTest, BrokenTemplatesFallBackToChatMl) {
  std::vector<std::string> broken = {
      "{% for m in messages %}{{ m.content }}",              // never closed
      "{{ undefined_function(1) }}",                         // fails at run time
      "{{ raise_exception('never') }}",                      // refuses everything
      "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",  // calls itself for ever
      "{{ " + std::string(5000, '(') + "1" + std::string(5000, ')') + " }}",
      std::string(1 << 20, 'x'),
  };
  if (kLimitsChildMemory) broken.push_back("{% for i in range(1000000000000) %}{% endfor %}");
  for (const std::string& source : broken) {
    const auto chat = Make(source);
    ASSERT_NE(chat, nullptr);
    EXPECT_TRUE(chat->is_fallback()) << source.substr(0, 60);
    EXPECT_TRUE(chat->warning().ends_with("; using ChatML")) << chat->warning();
    const auto prompt = chat->Render({&kUser, 1});
    ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
    EXPECT_EQ(prompt->text, "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n");
    EXPECT_EQ(prompt->stops, std::vector<std::string>{"<|im_end|>"});
  }
}

TEST_F(ChatTemplateTest, EndlessTemplateIsStopped) {
  const auto start = std::chrono::steady_clock::now();
  const auto chat = Make(
      "{% for a in range(3000) %}{% for b in range(3000) %}{% for c in range(3000) %}{% endfor %}{% endfor %}"
      "{% endfor %}");
  EXPECT_TRUE(chat->is_fallback());
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
}

TEST_F(ChatTemplateTest, RejectedMessagesAreAStatus) {
  const auto chat = Make(
      "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('bad role') }}{% endif %}"
      "{{ m.content }}{% endfor %}");
  EXPECT_FALSE(chat->is_fallback()) << chat->warning();
  EXPECT_TRUE(chat->Render({&kUser, 1}).ok());
  const ChatMessage odd{.role = "wizard", .content = "x"};
  const auto prompt = chat->Render({&odd, 1});
  ASSERT_FALSE(prompt.ok());
  EXPECT_EQ(prompt.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(prompt.status().message().find("bad role"), std::string::npos) << prompt.status().message();
}

TEST_F(ChatTemplateTest, HostileMessagesNeverCrash) {
  const auto chat = Make();
  const std::string bad = "\xff\xfe\xed\xa0\x80 half \xe2\x82";
  const std::vector<std::vector<ChatMessage>> conversations = {
      {},
      {{.role = "", .content = ""}},
      {{.role = bad, .content = bad, .name = bad, .tool_call_id = bad}},
      {{.role = "wizard", .content = "{{ 1/0 }}{% for %}"}},
      {{.role = "assistant", .content = "", .tool_calls = {{bad, bad, bad}}}},
      {{.role = "assistant", .content = "", .tool_calls = {{"", "", "{not json"}}}},
      {{.role = "tool", .content = bad}},
      {{.role = "user", .content = std::string(1 << 20, '\0')}},
  };
  for (const auto& messages : conversations) {
    const auto prompt = chat->Render(messages);
    EXPECT_TRUE(!prompt.ok() || IsValidUtf8(prompt->text));
    (void)chat->Render(messages, {&kTool, 1}).ok();
  }
  const Tool odd{bad, bad, "{not json"};
  EXPECT_FALSE(chat->Render({&kUser, 1}, {&odd, 1}).ok());
  const Tool deep{"deep", "", std::string(100000, '[') + std::string(100000, ']')};
  const auto prompt = chat->Render({&kUser, 1}, {&deep, 1});
  ASSERT_FALSE(prompt.ok());
  EXPECT_EQ(prompt.status().code(), StatusCode::kOutOfRange);
}

TEST_F(ChatTemplateTest, RandomTemplatesNeverCrash) {
  const std::vector<std::string> words = {"{{",
                                          "}}",
                                          "{%",
                                          "%}",
                                          "{#",
                                          "#}",
                                          " for m in messages ",
                                          " endfor ",
                                          " if ",
                                          " elif ",
                                          " else ",
                                          " endif ",
                                          " set x = ",
                                          " macro f(a) ",
                                          " endmacro ",
                                          "messages",
                                          "[0]",
                                          "['role']",
                                          ".content",
                                          "|length",
                                          "|tojson",
                                          "'s'",
                                          "\"",
                                          "(",
                                          ")",
                                          "[",
                                          "]",
                                          "{",
                                          "}",
                                          ":",
                                          ",",
                                          " not ",
                                          "-",
                                          "~",
                                          "+",
                                          " 1 ",
                                          "range(3)",
                                          " loop.index ",
                                          "\xff"};
  std::mt19937 random(11);
  for (int i = 0; i < 150; ++i) {
    std::string source;
    for (unsigned k = 0; k < 1 + random() % 30; ++k) source += words[random() % words.size()];
    const auto chat = Make(source);
    ASSERT_NE(chat, nullptr);
    (void)chat->Render({&kUser, 1}).ok();
  }
}

TEST_F(ChatTemplateTest, ThreadsAgree) {
  const auto chat = Make();
  const auto expected = chat->EncodeChat({&kUser, 1});
  ASSERT_TRUE(expected.ok());
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) {
        const auto tokens = chat->EncodeChat({&kUser, 1});
        if (!tokens.ok() || *tokens != *expected) ++wrong[t];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4));
}

TEST(TemplateGuard, CountsNestingNotLength) {
  std::string flat;
  for (int i = 0; i < 500; ++i) flat += "{% if a %}x{% elif b %}y{% endif %}{{ f((1)) }}{# ((( #}";
  EXPECT_TRUE(CheckTemplateShape(flat).ok()) << CheckTemplateShape(flat).ToString();
  std::string deep;
  for (int i = 0; i < 500; ++i) deep += "{% if a %}";
  EXPECT_FALSE(CheckTemplateShape(deep).ok());
  std::string chain = "{% if a %}";
  for (int i = 0; i < 500; ++i) chain += "{% elif b %}";
  EXPECT_FALSE(CheckTemplateShape(chain).ok());
  EXPECT_TRUE(CheckTemplateShape("{{ '((((' ~ \"[[[[\" }}").ok());
  EXPECT_FALSE(CheckTemplateShape("{{ " + std::string(20000, 'x') + " }}").ok());
}

TEST(TemplateGuard, JsonDepth) {
  EXPECT_TRUE(CheckJsonDepth(R"({"a":"[[[[","b":[{}]})", "x").ok());
  EXPECT_FALSE(CheckJsonDepth(std::string(65, '['), "x").ok());
  EXPECT_TRUE(CheckJsonDepth("]]]]", "x").ok());
}

}  // namespace
}  // namespace jointkv::text
