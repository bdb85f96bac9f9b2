#include "text/grammar.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "json.h"
#include "llama.h"
#include "text/gbnf.h"
#include "text/json_schema.h"
#include "text/test_model.h"

namespace jointkv::text {
namespace {

using Json = common_json;

class GrammarTest : public ::testing::Test {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_MODEL();
    auto opened = Tokenizer::Open(DefaultModelPath());
    ASSERT_TRUE(opened.ok()) << opened.status().ToString();
    tokenizer_ = std::move(opened).value();
  }

  std::shared_ptr<Grammar> Compile(const std::string& gbnf) {
    auto grammar = Grammar::FromGbnf(*tokenizer_, gbnf);
    EXPECT_TRUE(grammar.ok()) << grammar.status().ToString();
    return grammar.ok() ? *grammar : nullptr;
  }

  std::shared_ptr<Grammar> Schema(const std::string& schema) {
    auto grammar = Grammar::FromJsonSchema(*tokenizer_, schema);
    EXPECT_TRUE(grammar.ok()) << grammar.status().ToString();
    return grammar.ok() ? *grammar : nullptr;
  }

  std::vector<TokenId> Tokens(const std::string& text) const {
    auto tokens = tokenizer_->Encode(text, false, false);
    EXPECT_TRUE(tokens.ok()) << tokens.status().ToString();
    return tokens.ok() ? std::move(tokens).value() : std::vector<TokenId>();
  }
  TokenId First(const std::string& text) const { return Tokens(text).at(0); }

  // The tokens that the mask leaves.
  std::vector<TokenId> Allowed(const GrammarState& state) const {
    std::vector<float> logits(static_cast<size_t>(tokenizer_->n_vocab()));
    state.Mask(logits);
    std::vector<TokenId> out;
    for (TokenId id = 0; id < tokenizer_->n_vocab(); ++id) {
      if (logits[static_cast<size_t>(id)] == 0) out.push_back(id);
    }
    return out;
  }

  bool Matches(const std::shared_ptr<Grammar>& grammar, const std::string& text) const {
    GrammarState state(grammar);
    for (const TokenId token : Tokens(text)) {
      if (!state.Allows(token)) return false;
      state.Accept(token);
    }
    return state.Allows(*tokenizer_->eos());
  }

  // A random text of the grammar; after `hurry` tokens it closes what is open as soon as it may.
  std::string RandomText(const std::shared_ptr<Grammar>& grammar, uint64_t seed, int hurry) const {
    std::mt19937_64 random(seed);
    GrammarState state(grammar);
    std::string text;
    for (int i = 0; i < 4000 && !state.finished(); ++i) {
      std::vector<TokenId> allowed = Allowed(state);
      if (allowed.empty()) return text + " <- no token goes on";
      if (i > hurry) {
        const auto closes = [&](TokenId id) {
          const std::string& piece = tokenizer_->Piece(id);
          return tokenizer_->IsEndOfGeneration(id) || piece == "\"" || piece == "}" || piece == "]";
        };
        std::vector<TokenId> closing;
        std::ranges::copy_if(allowed, std::back_inserter(closing), closes);
        if (!closing.empty()) allowed = closing;
      }
      const TokenId token = allowed[random() % allowed.size()];
      EXPECT_TRUE(state.Allows(token));
      if (tokenizer_->IsEndOfGeneration(token)) return text;
      state.Accept(token);
      text += tokenizer_->Piece(token);
    }
    return text;
  }

  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST(Gbnf, ErrorsNameTheLine) {
  const std::vector<std::pair<std::string, std::string>> bad = {
      {"root ::= \"a", "expected a character"},
      {"root ::= [a", "expected a character"},
      {"root = \"a\"", "expected '::='"},
      {"root ::= a\n", "rule 'a' is not defined"},
      {"start ::= \"a\"", "no rule 'root'"},
      {"root ::= * \"a\"", "something to repeat"},
      {"root ::= \"a\"{x}", "expected a number"},
      {"root ::= \"a\"{3,2}", "maximum is below"},
      {"root ::= \"a\"{2001}", "limit 2000"},
      {"root ::= \"a\"?*+", "three repetitions"},
      {"root ::= (\"a\"", "expected ')'"},
      {"root ::= \"a\" )", "end of the rule"},
      {"root ::= \"\\q\"", "unknown escape"},
      {"root ::= \"\\x4\"", "hexadecimal"},
      {"root ::= [z-a]", "ends before it begins"},
      {"root ::= <|im_end|>", "not supported"},
      {"root ::= \"\\", "unknown escape"},
      {"root ::= " + std::string(200, '('), "nested more than"},
      {"root ::= \"\xff\"", "UTF-8"},
      {"", "no rule 'root'"},
      {std::string(300000, ' '), "limit"},
  };
  for (const auto& [source, message] : bad) {
    const auto parsed = ParseGbnf(source);
    ASSERT_FALSE(parsed.ok()) << source;
    EXPECT_NE(parsed.status().message().find(message), std::string::npos) << parsed.status().message();
  }
  const auto parsed = ParseGbnf("root ::= \"a\"\nb ::= \"b");
  EXPECT_NE(parsed.status().message().find("line 2"), std::string::npos) << parsed.status().message();
}

TEST(Gbnf, RandomSourcesNeverCrash) {
  const std::vector<std::string> words = {"root", "::=", "\n",  "\"", "[", "]", "^", "-", "a", "(",
                                          ")",    "|",   "*",   "+",  "?", "{", "}", ",", "2", "0",
                                          ".",    "\\",  "x41", "#",  " ", "é", "<", "!"};
  std::mt19937 random(1);
  for (int round = 0; round < 20000; ++round) {
    std::string source = round % 2 == 0 ? "root ::= " : "";
    for (unsigned i = random() % 24; i > 0; --i) source += words[random() % words.size()];
    (void)ParseGbnf(source).ok();
  }
}

TEST_F(GrammarTest, MatchesWhatItSays) {
  const struct {
    const char* gbnf;
    std::vector<std::string> yes;
    std::vector<std::string> no;
  } cases[] = {
      {"root ::= \"yes\" | \"no\"", {"yes", "no"}, {"", "y", "yesno", "maybe"}},
      {"root ::= [a-c]+ \".\"?", {"a", "abc.", "ccc"}, {"", ".", "d", "ab.."}},
      {"root ::= [^a-y]{2,3}", {"zz", "!?#", "éé", "日本語"}, {"z", "zzzz", "az"}},
      {"root ::= x{3}\nx ::= \"ab\"", {"ababab"}, {"abab", "abababab"}},
      {"root ::= \"(\" root \")\" | \"\"", {"", "()", "((()))"}, {"(", "(()", ")("}},
      {"root ::= [é-ü] [\\U0001F600-\\U0001F64F]", {"é😀", "ó🙏"}, {"e😀", "é", "é🚀"}},
      {"root ::= . . #comment\n", {"ab", "日本", "😀a"}, {"a", "abc"}},
      {"root ::= (\"a\" | \"ab\") (\"c\" | \"bc\")", {"ac", "abc", "abbc"}, {"a", "abcc"}},
      {"root ::= e\ne ::= t (\"+\" t)*\nt ::= [0-9]+ | \"(\" e \")\"", {"1+2", "(1+(2+3))+4"}, {"1+", "(1"}},
      {"root ::= a a a b\na ::= \"x\"?\nb ::= \"y\"", {"y", "xy", "xxxy"}, {"", "xxxxy"}},
  };
  for (const auto& test : cases) {
    const auto grammar = Compile(test.gbnf);
    ASSERT_NE(grammar, nullptr);
    for (const std::string& text : test.yes) EXPECT_TRUE(Matches(grammar, text)) << test.gbnf << ": " << text;
    for (const std::string& text : test.no) EXPECT_FALSE(Matches(grammar, text)) << test.gbnf << ": " << text;
  }
}

TEST_F(GrammarTest, LeftRecursionIsRefused) {
  for (const char* gbnf : {"root ::= root \"a\" | \"b\"", "root ::= x root\nx ::= \"\" | \"a\"",
                           "root ::= a\na ::= b \"x\"\nb ::= c\nc ::= d? a\nd ::= \"d\"", "root ::= root"}) {
    const auto grammar = Grammar::FromGbnf(*tokenizer_, gbnf);
    ASSERT_FALSE(grammar.ok()) << gbnf;
    EXPECT_NE(grammar.status().message().find("left recursion"), std::string::npos) << grammar.status().message();
  }
}

struct SamplerDeleter {
  void operator()(llama_sampler* sampler) const { llama_sampler_free(sampler); }
};
using SamplerPtr = std::unique_ptr<llama_sampler, SamplerDeleter>;

// llama.cpp's own grammar sampler judges: the same tokens at each place of random texts.
TEST_F(GrammarTest, AgreesWithLlamaCpp) {
  llama_model_params params = llama_model_default_params();
  params.vocab_only = true;
  const std::unique_ptr<llama_model, void (*)(llama_model*)> model(
      llama_model_load_from_file(DefaultModelPath().c_str(), params), llama_model_free);
  ASSERT_NE(model, nullptr);
  const llama_vocab* vocab = llama_model_get_vocab(model.get());
  const auto schema = [](const char* text) {
    auto gbnf = JsonSchemaToGbnf(text, "schema");
    EXPECT_TRUE(gbnf.ok()) << gbnf.status().ToString();
    return gbnf.ok() ? *gbnf : "";
  };
  const std::string sources[] = {
      schema(R"({"type":"object"})"),
      schema(R"({"type":"object","properties":{"a":{"type":"integer","minimum":-3,"maximum":120},
                 "b":{"type":"array","items":{"enum":["x","yy",3,null]},"minItems":1,"maxItems":4},
                 "c":{"type":"string","pattern":"^[a-z]{2,4}(-[0-9]+)?$"}},"required":["b"]})"),
      schema(
          R"({"anyOf":[{"type":"string","format":"date"},{"type":"number"},{"type":"array","items":{"type":"boolean"}}]})"),
      "root ::= [^a-z]* (\"é\" | [あ-ん]+) root | \"end\" .",
      "root ::= (\"a\" | \"ab\" | \"b\"){2,5} ([x-z]? \"\\n\")*",
  };
  for (const std::string& gbnf : sources) {
    const auto grammar = Compile(gbnf);
    ASSERT_NE(grammar, nullptr);
    for (uint64_t seed = 0; seed < 3; ++seed) {
      SamplerPtr judge(llama_sampler_init_grammar(vocab, gbnf.c_str(), "root"));
      ASSERT_NE(judge, nullptr);
      GrammarState state(grammar);
      std::mt19937_64 random(seed);
      for (int i = 0; i < 25 && !state.finished(); ++i) {
        std::vector<llama_token_data> data;
        for (TokenId id = 0; id < tokenizer_->n_vocab(); ++id) data.push_back({id, 0, 0});
        llama_token_data_array array = {data.data(), data.size(), -1, false};
        llama_sampler_apply(judge.get(), &array);
        std::vector<TokenId> expected;
        for (const llama_token_data& item : data) {
          // Control tokens are text to llama.cpp, and the character NUL is none; here it is the other way round.
          if (tokenizer_->Piece(item.id) == std::string(1, '\0')) {
            if (state.Allows(item.id)) expected.push_back(item.id);
            continue;
          }
          const bool compared = tokenizer_->GivesText(item.id) || tokenizer_->IsEndOfGeneration(item.id);
          if (compared && item.logit == 0) expected.push_back(item.id);
        }
        ASSERT_EQ(Allowed(state), expected) << "at token " << i << " of " << gbnf;
        std::erase_if(expected, [&](TokenId id) { return tokenizer_->IsEndOfGeneration(id); });
        if (expected.empty()) break;
        const TokenId token = expected[random() % expected.size()];
        state.Accept(token);
        llama_sampler_accept(judge.get(), token);
      }
    }
  }
}

TEST_F(GrammarTest, TextsAreJsonOfTheSchema) {
  const struct {
    const char* schema;
    std::function<bool(const Json&)> holds;
  } cases[] = {
      {R"({"type":"object"})", [](const Json& json) { return json.is_object(); }},
      {R"({"type":"object","properties":{"name":{"type":"string","maxLength":5},"age":{"type":"integer"}},
           "required":["name","age"],"additionalProperties":false})",
       [](const Json& json) {
         return json.size() == 2 && json.at("name").is_string() && json.at("age").is_number_integer();
       }},
      {R"({"type":"array","items":{"enum":["red","green"]},"minItems":2,"maxItems":3})",
       [](const Json& json) {
         return (json.size() == 2 || json.size() == 3) &&
                (json.at(size_t{0}) == "red" || json.at(size_t{0}) == "green");
       }},
      {R"({"type":"integer","minimum":18,"maximum":120})",
       [](const Json& json) { return json.get<int>() >= 18 && json.get<int>() <= 120; }},
      {R"({"$defs":{"tree":{"type":"object","properties":{"value":{"type":"boolean"},
           "children":{"type":"array","items":{"$ref":"#/$defs/tree"},"maxItems":2}},"required":["value"]}},
           "$ref":"#/$defs/tree"})",
       [](const Json& json) { return json.at("value").is_boolean(); }},
      {R"({"anyOf":[{"type":"null"},{"const":{"a":[1,2]}}]})",
       [](const Json& json) { return json.is_null() || json.at("a").size() == 2; }},
  };
  for (const auto& test : cases) {
    const auto grammar = Schema(test.schema);
    ASSERT_NE(grammar, nullptr);
    for (uint64_t seed = 0; seed < 12; ++seed) {
      const std::string text = RandomText(grammar, seed, static_cast<int>(seed * 3));
      const Json json = Json::parse_no_throw(text);
      ASSERT_FALSE(json.is_discarded()) << test.schema << "\n" << text;
      EXPECT_TRUE(test.holds(json)) << test.schema << "\n" << text;
    }
  }
}

TEST_F(GrammarTest, CopiesGoOnApart) {
  const auto grammar = Compile("root ::= \"a\" (\"b\" | \"c\") \"d\"");
  GrammarState first(grammar);
  first.Accept(First("a"));
  GrammarState second = first;
  first.Accept(First("b"));
  EXPECT_FALSE(first.Allows(First("c")));
  EXPECT_TRUE(second.Allows(First("c")));
  first.Accept(First("d"));
  EXPECT_TRUE(first.finished());
  EXPECT_FALSE(second.finished());
  for (const TokenId id : Allowed(first)) EXPECT_TRUE(tokenizer_->IsEndOfGeneration(id));
}

// As the library writes "any text until", in several alternatives: thousands of calls deep without end.
TEST_F(GrammarTest, RecursionToTheRightIsALoop) {
  const auto grammar =
      Compile("root ::= any \"<end>\"\nany ::= | [<] open | [^<] any\nopen ::= | [<] open | [^<e] any");
  GrammarState state(grammar);
  for (int i = 0; i < 20000; ++i) {
    ASSERT_TRUE(state.Allows(First("a"))) << i << " " << state.status().ToString();
    state.Accept(First("a"));
  }
  EXPECT_FALSE(state.Allows(*tokenizer_->eos()));
  for (const TokenId token : Tokens("<end>")) state.Accept(token);
  EXPECT_TRUE(state.Allows(*tokenizer_->eos())) << state.status().ToString();
}

TEST_F(GrammarTest, LogitsBeyondTheVocabularyAreMasked) {
  const auto grammar = Compile("root ::= .*");
  std::vector<float> logits(static_cast<size_t>(tokenizer_->n_vocab()) + 100);
  GrammarState(grammar).Mask(logits);
  EXPECT_LT(logits.back(), 0);
}

TEST_F(GrammarTest, ControlTokensOnlyWhereVisible) {
  GrammarSpec spec;
  spec.gbnf = "root ::= \"<|im_start|>\" .*";
  const TokenId control = 1;
  ASSERT_EQ(tokenizer_->Piece(control), "<|im_start|>");
  auto grammar = Grammar::Compile(*tokenizer_, spec);
  ASSERT_TRUE(grammar.ok());
  EXPECT_FALSE(GrammarState(*grammar).Allows(control));
  spec.visible_tokens = {control};
  grammar = Grammar::Compile(*tokenizer_, spec);
  ASSERT_TRUE(grammar.ok());
  const GrammarState state(*grammar);
  EXPECT_TRUE(state.Allows(control));
  EXPECT_TRUE(std::ranges::count(Allowed(state), control) == 1);
}

TEST_F(GrammarTest, PrefillIsWhatThePromptSaid) {
  GrammarSpec spec;
  spec.gbnf = "root ::= \"<think>\" \"ab\"";
  spec.prefill = "<think>a";
  const auto grammar = Grammar::Compile(*tokenizer_, spec);
  ASSERT_TRUE(grammar.ok()) << grammar.status().ToString();
  EXPECT_TRUE(Matches(*grammar, "b"));
  spec.prefill = "no";
  EXPECT_FALSE(Grammar::Compile(*tokenizer_, spec).ok());
}

TEST_F(GrammarTest, LazyGrammarsWaitForTheirTrigger) {
  GrammarSpec spec;
  spec.gbnf = "root ::= \"<tool>\" [0-9]+ \"</tool>\"";
  spec.lazy = true;
  spec.trigger_words = {"<tool>"};
  spec.think_begin = "<think>";
  spec.think_end = "</think>";
  const auto grammar = Grammar::Compile(*tokenizer_, spec);
  ASSERT_TRUE(grammar.ok()) << grammar.status().ToString();
  const auto feed = [&](GrammarState& state, const std::string& text) {
    for (const TokenId token : Tokens(text)) state.Accept(token);
  };
  GrammarState state(*grammar);
  feed(state, "Let me see. " + std::string(3000, 'x') + "<to");
  EXPECT_FALSE(state.constrains());
  EXPECT_TRUE(state.Allows(5));
  feed(state, "ol>");
  EXPECT_TRUE(state.constrains());
  EXPECT_FALSE(state.Allows(First("x")));
  feed(state, "12</tool>");
  EXPECT_TRUE(state.finished());

  GrammarState thinking(*grammar);
  feed(thinking, "<think>I could use <tool>");
  EXPECT_FALSE(thinking.constrains()) << "not while it thinks";
  feed(thinking, "</think>\n<tool>");
  EXPECT_TRUE(thinking.constrains());

  GrammarState wrong(*grammar);
  feed(wrong, "a<tool>");
  feed(wrong, "not a number");  // a forced text
  EXPECT_FALSE(wrong.constrains());
  EXPECT_TRUE(wrong.status().ok());

  spec.trigger_words.clear();
  EXPECT_FALSE(Grammar::Compile(*tokenizer_, spec).ok());
  spec.trigger_patterns = {"(?:use|take)\\s+(<tool>)"};
  const auto by_pattern = Grammar::Compile(*tokenizer_, spec);
  ASSERT_TRUE(by_pattern.ok()) << by_pattern.status().ToString();
  GrammarState pattern(*by_pattern);
  feed(pattern, "a <tool> b");
  EXPECT_FALSE(pattern.constrains());
  feed(pattern, " I take  <tool>1");
  EXPECT_TRUE(pattern.constrains());
  spec.trigger_patterns = {"(("};
  EXPECT_FALSE(Grammar::Compile(*tokenizer_, spec).ok());
}

// Each of these costs time or memory exponential in its size where alternatives are multiplied out.
TEST_F(GrammarTest, HostileGrammarsAreBounded) {
  std::string doubling = "root ::= r0\n";
  for (int i = 0; i < 60; ++i) {
    const std::string next = "r" + std::to_string(i + 1);
    doubling += "r" + std::to_string(i) + " ::= " + next + " " + next + " | " + next + "\n";
  }
  doubling += "r60 ::= \"a\"?\n";
  const std::string sources[] = {
      doubling,
      "root ::= (\"a\"? \"a\"?){1000}",
      "root ::= ((\"a\"? | \"b\"?){0,40}){0,40}",
      "root ::= \"[\" root \"]\" | \"[\" root root \"]\" | \"[\" root root root \"]\" | \"a\"",
      "root ::= (\"a\" | \"a\" \"a\" | \"a\" \"a\" \"a\")* \"b\"",
      "root ::= ([a-z]{1,2000} [a-z]{1,2000} [a-z]{1,2000})*",
  };
  for (const std::string& gbnf : sources) {
    auto grammar = Grammar::FromGbnf(*tokenizer_, gbnf);
    if (!grammar.ok()) continue;
    GrammarState state(*grammar);
    for (int i = 0; i < 300 && state.status().ok(); ++i) {
      const std::vector<TokenId> allowed = Allowed(state);
      EXPECT_TRUE(!allowed.empty() || !state.status().ok());
      if (allowed.empty()) break;
      const TokenId open = First("[");
      const TokenId a = First("a");
      state.Accept(state.Allows(open) ? open : state.Allows(a) ? a : allowed.front());
    }
    EXPECT_TRUE(state.status().ok() || Allowed(state).empty());
  }
}

TEST(JsonSchema, HostileSchemasAreRefused) {
  const auto nest = [](const std::string& open, int depth, const std::string& close) {
    std::string out;
    for (int i = 0; i < depth; ++i) out += open;
    out += "{}";
    for (int i = 0; i < depth; ++i) out += close;
    return out;
  };
  std::string refs = R"({"$defs":{)";
  for (int i = 0; i < 70; ++i) {
    const std::string next = R"({"$ref":"#/$defs/d)" + std::to_string(i + 1) + "\"}";
    refs += (i > 0 ? ",\"d" : "\"d") + std::to_string(i) + R"(":{"anyOf":[)" + next + "," + next + "]}";
  }
  refs += R"(,"d70":{"type":"null"}},"$ref":"#/$defs/d0"})";
  std::string optional = R"({"type":"object","properties":{)";
  for (int i = 0; i < 200; ++i) optional += (i > 0 ? ",\"p" : "\"p") + std::to_string(i) + "\":{}";
  optional += "}}";
  const std::vector<std::pair<std::string, std::string>> bad = {
      {"", "not valid JSON"},
      {"[]", "not an object"},
      {"{\"type\":\"object\"", "not valid JSON"},
      {R"({"type":"wizard"})", "unrecognized type"},
      {R"({"type":5})", "type"},
      {nest(R"({"type":"array","items":)", 60, "}"), "deep"},
      {nest(R"({"type":["object","object"],"properties":{"a":)", 15, "}}"), "limit"},
      {R"({"$ref":"#/$defs/none"})", "does not exist"},
      {R"({"$ref":"https://example.com/schema"})", "does not exist"},
      {R"({"$ref":"#/a","a":{"$ref":"#/a"}})", "itself"},
      {R"({"allOf":[{"$ref":"#/a"}],"a":{"allOf":[{"$ref":"#/a"}]}})", "itself"},
      {refs, ""},
      {optional, "optional"},
      {R"({"type":"string","pattern":"a+"})", "must begin with ^"},
      {R"({"type":"string","pattern":"^\\d+$"})", "escape"},
      {R"({"type":"string","pattern":"^(?=a)b$"})", "groups"},
      {R"({"type":"string","minLength":5000})", ""},
      {R"({"type":"string","minLength":-1})", "minLength"},
      {R"({"type":"array","minItems":1e300})", "minItems"},
      {R"({"type":"integer","minimum":1e300})", "2^53"},
      {"{\"" + std::string(2000, 'k') + "\":{}}", "key"},
      {"{\"title\":\"" + std::string(100000, 'k') + "\"}", "bytes"},
  };
  for (const auto& [schema, message] : bad) {
    const auto gbnf = JsonSchemaToGbnf(schema, "response_format");
    // What the converter accepts the grammar's own limits may still refuse.
    const Status status = gbnf.ok() ? ParseGbnf(*gbnf).status() : gbnf.status();
    EXPECT_FALSE(status.ok()) << schema.substr(0, 100);
    EXPECT_NE(status.message().find(message), std::string::npos) << message << "\n" << status.message().substr(0, 300);
  }
}

}  // namespace
}  // namespace jointkv::text
