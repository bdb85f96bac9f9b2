#include "text/chat_output.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "text/detokenizer.h"
#include "text/grammar.h"
#include "text/json_schema.h"
#include "text/test_model.h"

namespace jointkv::text {
namespace {

// As Hermes and Qwen 2.5 write tools: JSON between tags, in ChatML.
constexpr char kHermes[] = R"({%- if tools %}{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == "user" or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- elif message.role == "assistant" %}
{{- '<|im_start|>' + message.role }}
{%- if message.content %}{{- '\n' + message.content }}{%- endif %}
{%- for tool_call in message.tool_calls %}
{%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
{{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == "tool" %}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %})";

// ChatML whose assistant thinks between <think> and </think>.
constexpr char kThinks[] = R"({%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
{{- '<|im_start|>assistant\n' }}{%- if reasoning %}{{- '<think>\n' + reasoning + '\n</think>\n\n' }}{%- endif %}
{{- message.content + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %})";

const ChatMessage kUser{.role = "user", .content = "The weather in Bern?"};
const Tool kWeather{"get_weather", "The weather of a city",
                    R"({"type":"object","properties":{"city":{"type":"string","pattern":"\\d"}},"required":["city"]})"};
const Tool kTime{"get_time", "The time", ""};

class ChatOutputTest : public ::testing::Test {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_MODEL();
    auto opened = Tokenizer::Open(DefaultModelPath());
    ASSERT_TRUE(opened.ok()) << opened.status().ToString();
    tokenizer_ = std::move(opened).value();
  }

  std::unique_ptr<ChatTemplate> Make(const std::string& source) {
    auto made = ChatTemplate::Create(*tokenizer_, source);
    EXPECT_TRUE(made.ok()) << made.status().ToString();
    EXPECT_FALSE((*made)->is_fallback()) << (*made)->warning();
    return std::move(made).value();
  }

  ChatPrompt RenderTools(const std::string& source, const ChatOptions& options) {
    const std::vector<Tool> tools = {kWeather, kTime};
    auto prompt = Make(source)->Render({&kUser, 1}, tools, options);
    EXPECT_TRUE(prompt.ok()) << prompt.status().ToString();
    return prompt.ok() ? *prompt : ChatPrompt();
  }

  // Feeds in pieces; the deltas must join to what the parser says.
  static ChatOutput Stream(const std::shared_ptr<const ChatFormat>& format, const std::string& text, size_t piece) {
    ChatOutputParser parser(format);
    ChatOutput joined;
    const auto add = [&](const ChatDelta& delta) {
      joined.reasoning += delta.reasoning;
      joined.content += delta.content;
      for (const ToolCallDelta& call : delta.tool_calls) {
        const auto index = static_cast<size_t>(call.index);
        if (index == joined.tool_calls.size()) {
          EXPECT_FALSE(call.id.empty() || call.name.empty());
          joined.tool_calls.push_back({.id = call.id, .name = call.name, .arguments_json = {}});
        } else {
          EXPECT_TRUE(call.id.empty() && call.name.empty());
        }
        joined.tool_calls.at(index).arguments_json += call.arguments;
      }
    };
    for (size_t at = 0; at < text.size(); at += piece) add(parser.Append(std::string_view(text).substr(at, piece)));
    add(parser.Finish());
    EXPECT_EQ(joined.content, parser.content());
    EXPECT_EQ(joined.reasoning, parser.reasoning());
    EXPECT_EQ(joined.tool_calls.size(), parser.tool_calls().size());
    return joined;
  }

  bool Complete(const ChatPrompt& prompt, const std::string& text) {
    auto grammar = Grammar::Compile(*tokenizer_, prompt.grammar);
    EXPECT_TRUE(grammar.ok()) << grammar.status().ToString();
    if (!grammar.ok()) return false;
    GrammarState state(*grammar);
    const auto tokens = tokenizer_->Encode(text, false, true);
    EXPECT_TRUE(tokens.ok());
    for (const TokenId token : *tokens) {
      if (!state.Allows(token)) return false;
      state.Accept(token);
    }
    return state.Allows(*tokenizer_->eos());
  }

  std::unique_ptr<Tokenizer> tokenizer_;
};

constexpr char kCall[] =
    "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Zürich\"}}\n</tool_call>";

TEST_F(ChatOutputTest, WithoutAFormatAllIsContent) {
  const ChatOutput output = Stream(nullptr, "<think>é</think><tool_call>", 3);
  EXPECT_EQ(output.content, "<think>é</think><tool_call>");
  EXPECT_EQ(ParseChatOutput(nullptr, "x").content, "x");
  const auto chat = Make(kHermes);
  const auto prompt = chat->Render({&kUser, 1});
  ASSERT_TRUE(prompt.ok());
  EXPECT_EQ(prompt->format, nullptr);
  EXPECT_TRUE(prompt->grammar.empty());
}

TEST_F(ChatOutputTest, ToolCallsWholeAndInPieces) {
  const ChatPrompt prompt = RenderTools(kHermes, {});
  ASSERT_NE(prompt.format, nullptr);
  EXPECT_TRUE(prompt.grammar.lazy);
  EXPECT_NE(prompt.text.find("get_weather"), std::string::npos);
  for (const size_t piece : {1000, 1, 7}) {
    const ChatOutput output = Stream(prompt.format, std::string("I look.\n") + kCall, piece);
    EXPECT_TRUE(output.content.starts_with("I look.")) << output.content;
    ASSERT_EQ(output.tool_calls.size(), 1u) << "pieces of " << piece;
    EXPECT_EQ(output.tool_calls[0].name, "get_weather");
    EXPECT_EQ(output.tool_calls[0].arguments_json, R"({"city": "Zürich"})");
    EXPECT_FALSE(output.tool_calls[0].id.empty());
  }
  const ChatOutput text = Stream(prompt.format, "No tool < needed.", 1);
  EXPECT_EQ(text.content, "No tool < needed.");
  EXPECT_TRUE(text.tool_calls.empty());
}

TEST_F(ChatOutputTest, ParallelCalls) {
  ChatOptions options;
  options.parallel_tool_calls = true;
  const ChatPrompt prompt = RenderTools(kHermes, options);
  const std::string two =
      std::string(kCall) + "\n<tool_call>\n{\"name\": \"get_time\", \"arguments\": {}}\n</tool_call>";
  for (const size_t piece : {1000, 2}) {
    const ChatOutput output = Stream(prompt.format, two, piece);
    ASSERT_EQ(output.tool_calls.size(), 2u);
    EXPECT_EQ(output.tool_calls[1].name, "get_time");
    EXPECT_NE(output.tool_calls[0].id, output.tool_calls[1].id);
  }
}

TEST_F(ChatOutputTest, GrammarsHoldToTheChoice) {
  const ChatPrompt automatic = RenderTools(kHermes, {});
  EXPECT_TRUE(Complete(automatic, "Just text."));
  EXPECT_TRUE(Complete(automatic, std::string("Text. ") + kCall));
  EXPECT_FALSE(Complete(automatic, "<tool_call>\n{\"name\": \"other\""));

  ChatOptions options;
  options.tool_choice = ToolChoice::kRequired;
  const ChatPrompt required = RenderTools(kHermes, options);
  EXPECT_FALSE(required.grammar.lazy);
  EXPECT_TRUE(Complete(required, kCall));
  EXPECT_FALSE(Complete(required, "Just text."));
  EXPECT_FALSE(Complete(required, std::string("Text. ") + kCall));
  const std::string twice = std::string(kCall) + "\n" + kCall;
  EXPECT_FALSE(Complete(required, twice));
  options.parallel_tool_calls = true;
  EXPECT_TRUE(Complete(RenderTools(kHermes, options), twice));
  options.parallel_tool_calls = false;

  options.tool_name = "get_time";
  const ChatPrompt named = RenderTools(kHermes, options);
  EXPECT_FALSE(Complete(named, kCall));
  EXPECT_TRUE(Complete(named, "<tool_call>\n{\"name\": \"get_time\", \"arguments\": {}}\n</tool_call>"));

  options.tool_name.clear();
  options.tool_choice = ToolChoice::kNone;
  const ChatPrompt none = RenderTools(kHermes, options);
  EXPECT_TRUE(none.grammar.empty());
  EXPECT_EQ(Stream(none.format, kCall, 5).tool_calls.size(), 0u);
}

TEST_F(ChatOutputTest, BadToolsAreRefused) {
  const auto chat = Make(kHermes);
  const auto refuse = [&](const Tool& tool, ChatOptions options, const std::string& message) {
    const auto prompt = chat->Render({&kUser, 1}, {&tool, 1}, options);
    ASSERT_FALSE(prompt.ok()) << message;
    EXPECT_NE(prompt.status().message().find(message), std::string::npos) << prompt.status().message();
  };
  refuse({"", "", ""}, {}, "a name must have");
  refuse({"x", "", "[]"}, {}, "parameters of tool 'x'");
  refuse({"x", "", R"({"$ref":"#/a","a":{"$ref":"#/a"}})"}, {}, "itself");
  ChatOptions named;
  named.tool_name = "y";
  refuse({"x", "", ""}, named, "no tool 'y'");
  ChatOptions required;
  required.tool_choice = ToolChoice::kRequired;
  EXPECT_FALSE(chat->Render({&kUser, 1}, {}, required).ok());
  const auto plain = Make("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}");
  EXPECT_EQ(plain->Render({&kUser, 1}, {&kTime, 1}, required).status().code(), StatusCode::kUnsupported);
  EXPECT_TRUE(plain->Render({&kUser, 1}, {&kTime, 1}).ok());
}

TEST_F(ChatOutputTest, ThoughtsAreReasoning) {
  const auto chat = Make(kThinks);
  EXPECT_TRUE(chat->thinks());
  const auto prompt = chat->Render({&kUser, 1});
  ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
  ASSERT_NE(prompt->format, nullptr);
  for (const size_t piece : {1000, 1, 3}) {
    const ChatOutput output = Stream(prompt->format, "<think>\nHmm é.\n</think>\n\nSunny.", piece);
    EXPECT_NE(output.reasoning.find("Hmm é."), std::string::npos) << output.reasoning << "|" << output.content;
    EXPECT_EQ(output.content, "Sunny.");
  }
  EXPECT_EQ(Stream(prompt->format, "Sunny.", 2).content, "Sunny.");
}

TEST_F(ChatOutputTest, JsonAnswers) {
  ChatOptions options;
  options.json_schema = R"({"type":"object","properties":{"n":{"type":"integer"}},"required":["n"]})";
  for (const char* source : {"", kHermes, kThinks}) {
    const auto chat = source[0] == 0 ? std::move(ChatTemplate::Create(*tokenizer_)).value() : Make(source);
    const auto prompt = chat->Render({&kUser, 1}, {}, options);
    ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
    EXPECT_TRUE(Complete(*prompt, "{\"n\": 3}"));
    EXPECT_FALSE(Complete(*prompt, "three"));
    EXPECT_EQ(Stream(prompt->format, "{\"n\": 3}", 1).content, "{\"n\": 3}");
    EXPECT_TRUE(!chat->thinks() || Complete(*prompt, "<think>\nHm.\n</think>\n\n{\"n\": 3}"));
  }
  options.json_schema = "{";
  EXPECT_FALSE(Make(kHermes)->Render({&kUser, 1}, {}, options).ok());
}

TEST_F(ChatOutputTest, HostileOutputsNeverThrow) {
  const std::vector<std::string> words = {"<tool_call>",
                                          "</tool_call>",
                                          "\n",
                                          "{\"name\": \"",
                                          "get_weather",
                                          "get_time",
                                          "\", \"arguments\": ",
                                          "{",
                                          "}",
                                          "[",
                                          "]",
                                          "\"city\"",
                                          ":",
                                          "é",
                                          "😀",
                                          "\\",
                                          "\"",
                                          "<think>",
                                          "</think>",
                                          "<|im_end|>",
                                          "text ",
                                          std::string(1, '\0'),
                                          "\\u12"};
  std::mt19937 random(3);
  ChatOptions parallel;
  parallel.parallel_tool_calls = true;
  const ChatPrompt prompts[] = {RenderTools(kHermes, {}), RenderTools(kHermes, parallel), RenderTools(kThinks, {})};
  for (int round = 0; round < 600; ++round) {
    std::string text;
    for (unsigned i = random() % 20; i > 0; --i) text += words[random() % words.size()];
    ChatOutputParser parser(prompts[round % 3].format);
    std::string content;
    for (size_t at = 0; at < text.size();) {
      size_t end = std::min(text.size(), at + 1 + random() % 9);
      while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) ++end;
      content += parser.Append(std::string_view(text).substr(at, end - at)).content;
      at = end;
    }
    content += parser.Finish().content;
    EXPECT_EQ(content, parser.content());
    EXPECT_TRUE(IsValidUtf8(content)) << text;
    for (const ToolCall& call : parser.tool_calls()) EXPECT_TRUE(IsValidUtf8(call.arguments_json));
  }
  // Deeper than any stack: stays content.
  const std::string deep = "<tool_call>\n{\"name\": \"get_time\", \"arguments\": " + std::string(200000, '[');
  ChatOutputParser parser(prompts[0].format);
  for (size_t at = 0; at < deep.size(); at += 4000) parser.Append(std::string_view(deep).substr(at, 4000));
  parser.Finish();
  ParseChatOutput(prompts[2].format, std::string(1 << 20, 'x') + "<think>");
}

}  // namespace
}  // namespace jointkv::text
