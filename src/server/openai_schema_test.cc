#include "server/openai_schema.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace jointkv::server {
namespace {

const Json kChat = {{"messages", {{{"role", "user"}, {"content", "Hello"}}}}};
const Json kCompletion = {{"prompt", "Hello"}};

Json With(Json body, const std::string& field, Json value) {
  body[field] = std::move(value);
  return body;
}

// The error that parsing gives; its message is empty when there was none.
ApiError ErrorOf(const Json& body, bool chat) {
  try {
    chat ? ParseChat(body, Limits()) : ParseCompletion(body, Limits());
  } catch (const ApiError& error) {
    return error;
  }
  return {};
}

TEST(OpenAiSchema, ReadsEverySamplingField) {
  Json body = kChat;
  body.update(Json::parse(R"({"model": "m", "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1,
      "repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.25, "seed": 7, "n": 2,
      "stop": ["a", "b"], "stop_token_ids": [5], "logit_bias": {"9": -100}, "max_completion_tokens": 11,
      "min_tokens": 2, "ignore_eos": true, "logprobs": true, "top_logprobs": 4, "stream": true,
      "stream_options": {"include_usage": true}, "kv_fusion": "off", "kv": true, "unknown": {"x": 1}})"));
  const GenerationCall call = ParseChat(body, Limits());
  EXPECT_TRUE(call.chat);
  EXPECT_EQ(call.model, "m");
  const engine::SamplingParams& sampling = call.sampling;
  EXPECT_FLOAT_EQ(sampling.temperature, 0.5F);
  EXPECT_EQ(sampling.top_k, 3);
  EXPECT_FLOAT_EQ(sampling.top_p, 0.9F);
  EXPECT_FLOAT_EQ(sampling.min_p, 0.1F);
  EXPECT_FLOAT_EQ(sampling.repetition_penalty, 1.2F);
  EXPECT_FLOAT_EQ(sampling.presence_penalty, -0.5F);
  EXPECT_FLOAT_EQ(sampling.frequency_penalty, 0.25F);
  EXPECT_EQ(sampling.seed, 7U);
  EXPECT_EQ(sampling.n, 2);
  EXPECT_EQ(sampling.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(sampling.stop_tokens, std::vector<TokenId>{5});
  ASSERT_EQ(sampling.logit_bias.size(), 1U);
  EXPECT_EQ(sampling.logit_bias[0].first, 9);
  EXPECT_EQ(sampling.max_tokens, 11);
  EXPECT_EQ(sampling.min_tokens, 2);
  EXPECT_TRUE(sampling.ignore_eos);
  EXPECT_EQ(sampling.logprobs, 4);
  EXPECT_FALSE(call.max_tokens_field.empty());
  EXPECT_TRUE(call.stream);
  EXPECT_TRUE(call.include_usage);
  EXPECT_FALSE(call.kv_fusion);
  EXPECT_TRUE(call.reports_kv);
}

TEST(OpenAiSchema, NullCountsAsAbsent) {
  Json body = kCompletion;
  for (const char* field : {"model", "temperature", "top_k", "seed", "n", "stop", "logit_bias", "max_tokens",
                            "logprobs", "stream", "stream_options", "echo", "suffix", "best_of", "kv_fusion"}) {
    body[field] = nullptr;
  }
  const GenerationCall call = ParseCompletion(body, Limits());
  EXPECT_EQ(call.sampling.max_tokens, 16);
  EXPECT_EQ(call.sampling.logprobs, -1);
  EXPECT_TRUE(call.max_tokens_field.empty());
  EXPECT_TRUE(call.kv_fusion);
}

// Each field with each type of JSON that it must not have.
TEST(OpenAiSchema, WrongTypesNameTheField) {
  const Json text = "x", number = 1.5, yes = true, list = Json::array({Json::object()}), object = {{"a", 1}};
  struct Field {
    const char* name;
    std::vector<Json> wrong;
  };
  const std::vector<Field> both = {
      {"model", {number, yes, list, object}},
      {"temperature", {text, yes, list, object}},
      {"top_p", {text, yes, list, object}},
      {"min_p", {text, yes, list, object}},
      {"repetition_penalty", {text, yes, list, object}},
      {"presence_penalty", {text, yes, list, object}},
      {"frequency_penalty", {text, yes, list, object}},
      {"top_k", {text, number, yes, list, object, Json(int64_t{1} << 40)}},
      {"n", {text, number, yes, list, object, Json(uint64_t{1} << 63)}},
      {"min_tokens", {text, number, yes, list, object}},
      {"max_tokens", {text, number, yes, list, object, Json(0), Json(-1), Json(int64_t{1} << 40)}},
      {"max_completion_tokens", {text, number, yes, list, object, Json(0), Json(-5)}},
      {"seed", {text, number, yes, list, object}},
      {"stop", {number, yes, object, list}},
      {"stop_token_ids", {text, number, yes, object, list}},
      {"logit_bias", {text, number, yes, list, object, {{"5", "x"}}}},
      {"ignore_eos", {text, number, list, object}},
      {"stream", {text, number, list, object}},
      {"stream_options", {text, number, yes, list, object}},
      {"kv_fusion", {text, number, list, object}},
      {"kv", {text, number, list, object}},
      {"response_format",
       {text,
        number,
        yes,
        list,
        {{"type", 5}},
        {{"type", "xml"}},
        {{"type", "json_schema"}},
        {{"type", "json_schema"}, {"json_schema", 5}},
        {{"type", "json_schema"}, {"json_schema", {{"schema", 5}}}}}},
      {"structured_outputs", {text, number, yes, list, {{"json", 5}}, {{"regex", "a*"}}}},
      {"guided_json", {number, yes, list}},
  };
  const std::vector<Field> chat = {
      {"messages", {nullptr, text, number, yes, object, Json::array(), list}},
      {"logprobs", {text, number, list, object}},
      {"top_logprobs", {text, number, yes, list, object, Json(3)}},
      {"tools",
       {text, number, yes, object, list, Json::array({5}), Json::parse(R"([{"type": "x"}])"),
        Json::parse(R"([{"function": {"name": 5}}])"),
        Json::parse(R"([{"function": {"name": "f", "parameters": 5}}])")}},
      {"tool_choice", {text, number, yes, list, object, "required", Json::parse(R"({"function": {"name": "f"}})")}},
      {"parallel_tool_calls", {text, number, list, object}},
      {"chat_template_kwargs", {text, number, yes, list, {{"enable_thinking", 5}}}},
  };
  const std::vector<Field> completion = {
      {"prompt", {nullptr, number, yes, object, Json::array(), list, Json::parse("[1, \"a\"]"), Json::parse("[1.5]")}},
      {"logprobs", {text, number, yes, list, object, Json(-1)}},
      {"echo", {text, number, list, object}},
      {"suffix", {text, number, yes, list, object}},
      {"best_of", {text, number, yes, list, object, Json(3)}},
  };
  const auto check = [](const std::vector<Field>& fields, const Json& base, bool is_chat) {
    for (const Field& field : fields) {
      for (const Json& value : field.wrong) {
        const ApiError error = ErrorOf(With(base, field.name, value), is_chat);
        EXPECT_EQ(error.status, 400);
        EXPECT_TRUE(error.param.starts_with(field.name)) << field.name << " = " << value << ": " << error.param;
        EXPECT_NE(error.message.find(field.name), std::string::npos) << error.message;
      }
    }
  };
  check(both, kChat, true);
  check(both, kCompletion, false);
  check(chat, kChat, true);
  check(completion, kCompletion, false);
}

TEST(OpenAiSchema, MessagesOfEveryShape) {
  const Json body = Json::parse(R"({"messages": [
      {"role": "developer", "content": "Be brief."},
      {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
      {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function",
          "function": {"name": "f", "arguments": "{}"}}]},
      {"role": "tool", "tool_call_id": "1", "content": "42"}]})");
  const std::vector<text::ChatMessage> messages = Messages(body, Limits());
  ASSERT_EQ(messages.size(), 4U);
  EXPECT_EQ(messages[0].role, "system");
  EXPECT_EQ(messages[1].content, "ab");
  ASSERT_EQ(messages[2].tool_calls.size(), 1U);
  EXPECT_EQ(messages[2].tool_calls[0].name, "f");
  EXPECT_EQ(messages[3].tool_call_id, "1");
}

TEST(OpenAiSchema, SchemasKeepTheirKeysInOrder) {
  const std::string schema = R"({"type":"object","properties":{"z":{"type":"string"},"a":{"type":"integer"}}})";
  const std::string json_schema = R"("response_format": {"type": "json_schema", "json_schema": {"name": "x",
      "schema": )" + schema + "}}";
  for (const std::string& format :
       {json_schema, R"("guided_json": )" + schema, R"("structured_outputs": {"json": )" + schema + "}"}) {
    const std::string body = R"({"prompt": "a", )" + format + "}";
    const GenerationCall call = ParseCompletion(ParseObject(body, 64), Limits(), body);
    EXPECT_EQ(call.json_schema, schema);
    EXPECT_TRUE(call.has_grammar());
  }
  const std::string tools = R"({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function",
      "function": {"name": "f", "description": "d", "parameters": )" +
                            schema + R"(}}],
      "tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": false})";
  const GenerationCall call = ParseChat(ParseObject(tools, 64), Limits(), tools);
  ASSERT_EQ(call.tools.size(), 1U);
  EXPECT_EQ(call.tools[0].name, "f");
  EXPECT_EQ(call.tools[0].description, "d");
  EXPECT_EQ(call.tools[0].parameters_json, schema);
  EXPECT_EQ(call.tool_name, "f");
  EXPECT_FALSE(call.chat_options().parallel_tool_calls);
}

TEST(OpenAiSchema, KeysOfSchemasAreBounded) {
  std::string body = R"({"prompt": "a", "guided_json": {"a": 1)";
  for (int i = 0; i < 9000; ++i) body += ",\"k" + std::to_string(i % 3) + "\":1";
  body += "}}";
  EXPECT_THROW(ParseCompletion(ParseObject(body, 64), Limits(), body), ApiError);
}

TEST(OpenAiSchema, OneFormatPerCallAndOnePromptPerFormat) {
  Json body = kCompletion;
  body["guided_json"] = Json::object();
  body["response_format"] = {{"type", "json_object"}};
  EXPECT_EQ(ErrorOf(body, false).param, "guided_json");
  body.erase("guided_json");
  EXPECT_EQ(ErrorOf(body, false).message, "");
  body["prompt"] = {"a", "b"};
  EXPECT_EQ(ErrorOf(body, false).param, "response_format");
}

TEST(OpenAiSchema, EchoMayAskForNoOutput) {
  EXPECT_EQ(ErrorOf(With(kCompletion, "max_tokens", 0), false).param, "max_tokens");
  Json body = Json::parse(R"({"prompt": [[1, 2]], "echo": true, "max_tokens": 0, "logprobs": 1})");
  const GenerationCall call = ParseCompletion(body, Limits());
  EXPECT_TRUE(call.echo);
  EXPECT_EQ(call.sampling.max_tokens, 0);
  EXPECT_EQ(call.sampling.logprobs, 1);
  body["n"] = 2;
  EXPECT_EQ(ErrorOf(body, false).param, "n");
}

TEST(OpenAiSchema, Embeddings) {
  const GenerationCall call =
      ParseEmbedding(Json::parse(R"({"input": ["a", "b"], "encoding_format": "base64", "dimensions": 5})"), Limits());
  EXPECT_TRUE(call.embed);
  EXPECT_TRUE(call.base64);
  EXPECT_EQ(call.dimensions, 5);
  EXPECT_EQ(call.prompts.size(), 2U);
  for (const auto& [body, param] : std::vector<std::pair<const char*, const char*>>{
           {R"({})", "input"},
           {R"({"input": 5})", "input"},
           {R"({"input": []})", "input"},
           {R"({"input": [{}]})", "input"},
           {R"({"input": "a", "model": 5})", "model"},
           {R"({"input": "a", "encoding_format": "hex"})", "encoding_format"},
           {R"({"input": "a", "encoding_format": 5})", "encoding_format"},
           {R"({"input": "a", "dimensions": "x"})", "dimensions"}}) {
    try {
      ParseEmbedding(Json::parse(body), Limits());
      ADD_FAILURE() << body;
    } catch (const ApiError& error) {
      EXPECT_EQ(error.param, param) << body;
    }
  }
}

TEST(OpenAiSchema, BadMessagesNameTheirPlace) {
  const std::vector<std::pair<const char*, const char*>> cases = {
      {R"([5])", "messages[0]"},
      {R"([{"content": "a"}])", "messages[0].role"},
      {R"([{"role": 1, "content": "a"}])", "messages[0].role"},
      {R"([{"role": "user"}])", "messages[0].content"},
      {R"([{"role": "user", "content": 5}])", "messages[0].content"},
      {R"([{"role": "user", "content": [5]}])", "messages[0].content[0]"},
      {R"([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])",
       "messages[0].content[0].type"},
      {R"([{"role": "user", "content": "a"}, {"role": "user", "content": "a", "name": 1}])", "messages[1].name"},
      {R"([{"role": "assistant", "tool_calls": 5}])", "messages[0].tool_calls"},
      {R"([{"role": "assistant", "tool_calls": [{"id": "1"}]}])", "messages[0].tool_calls[0].function"},
      {R"([{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}])",
       "messages[0].tool_calls[0].function.name"},
  };
  for (const auto& [messages, param] : cases) {
    EXPECT_EQ(ErrorOf({{"messages", Json::parse(messages)}}, true).param, param) << messages;
  }
}

TEST(OpenAiSchema, PromptsOfEveryShape) {
  const auto prompts = [](const char* prompt) {
    return ParseCompletion({{"prompt", Json::parse(prompt)}}, Limits()).prompts;
  };
  EXPECT_EQ(prompts(R"("a")"), std::vector<TextOrTokens>{"a"});
  EXPECT_EQ(prompts(R"(["a", "b"])"), (std::vector<TextOrTokens>{"a", "b"}));
  EXPECT_EQ(prompts("[1, 2]"), (std::vector<TextOrTokens>{std::vector<TokenId>{1, 2}}));
  EXPECT_EQ(prompts("[[1], [2, 3]]"), (std::vector<TextOrTokens>{std::vector<TokenId>{1}, std::vector<TokenId>{2, 3}}));
}

TEST(OpenAiSchema, ListsHaveLimits) {
  Limits limits;
  limits.prompts_max = 2;
  limits.messages_max = 1;
  EXPECT_THROW(ParseCompletion({{"prompt", {"a", "b", "c"}}}, limits), ApiError);
  Json body = kChat;
  body["messages"].push_back(body["messages"][0]);
  EXPECT_THROW(ParseChat(body, limits), ApiError);
}

TEST(JsonFields, BodiesAreBounded) {
  EXPECT_THROW(ParseObject("", 64), ApiError);
  EXPECT_THROW(ParseObject("[1]", 64), ApiError);
  EXPECT_THROW(ParseObject("{\"a\": NaN}", 64), ApiError);
  EXPECT_THROW(ParseObject("{\"a\": \"\xff\"}", 64), ApiError);
  EXPECT_THROW(ParseObject("{\"a\": 1e999}", 64), ApiError);
  EXPECT_THROW(ParseObject("{\"a\": " + std::string(100000, '['), 64), ApiError);
  EXPECT_EQ(ParseObject("{\"a\": [[\"[[[[\"]]}", 3)["a"][0][0], "[[[[");
  EXPECT_THROW(ParseObject("{\"a\": [[1]]}", 2), ApiError);
}

TEST(ApiError, EngineRefusalsNameTheApisField) {
  engine::SamplingParams bad;
  const auto param = [&bad] {
    const ApiError error = FromEngine(Validate(bad, 1000));
    EXPECT_TRUE(error.message.starts_with(error.param + ": ")) << error.message;
    EXPECT_EQ(error.status, 400);
    bad = {};
    return error.param;
  };
  bad.temperature = -1;
  EXPECT_EQ(param(), "temperature");
  bad.stop_tokens = {5000};
  EXPECT_EQ(param(), "stop_token_ids");
  bad.stop = {std::string(1000, 'x')};
  EXPECT_EQ(param(), "stop");
  bad.stop.assign(100, "x");
  EXPECT_EQ(param(), "stop");
  bad.logit_bias = {{5, 200.0F}};
  EXPECT_EQ(param(), "logit_bias");
  bad.min_tokens = -1;
  EXPECT_EQ(param(), "min_tokens");
  EXPECT_EQ(FromEngine(Status(StatusCode::kOutOfRange, "prompt: token 5 is not")).param, "prompt");
  EXPECT_EQ(FromEngine(Status(StatusCode::kResourceExhausted, "request: too long")).code, "context_length_exceeded");
  EXPECT_EQ(FromEngine(Status(StatusCode::kInternal, "x")).status, 500);
}

TEST(ApiError, BodyIsValidJsonWhateverTheMessage) {
  const Json body = Json::parse(ErrorBody({.message = "a\xff\"b\n"}));
  EXPECT_TRUE(body["error"]["param"].is_null());
  EXPECT_TRUE(body["error"]["code"].is_null());
  EXPECT_EQ(body["error"]["type"], "invalid_request_error");
}

}  // namespace
}  // namespace jointkv::server
