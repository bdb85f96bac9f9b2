#include "text/tokenizer.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gguf.h"
#include "text/detokenizer.h"
#include "text/test_model.h"

namespace jointkv::text {
namespace {

class TokenizerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_MODEL();
    auto opened = Tokenizer::Open(DefaultModelPath());
    ASSERT_TRUE(opened.ok()) << opened.status().ToString();
    tokenizer_ = std::move(opened).value();
  }

  std::vector<TokenId> Encode(std::string_view text, bool add_special = false, bool parse_special = false) {
    auto tokens = tokenizer_->Encode(text, add_special, parse_special);
    EXPECT_TRUE(tokens.ok()) << tokens.status().ToString();
    return tokens.ok() ? *tokens : std::vector<TokenId>{};
  }

  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(TokenizerTest, RoundTripsText) {
  const std::vector<std::string> texts = {
      "",
      " ",
      "The quick brown fox jumps over the lazy dog.",
      "  two spaces\tand a tab\r\nand lines\n\n\n",
      "Zürich, Ærø, Łódź, Ελλάδα, Москва, 日本語, العربية, हिन्दी",
      "emoji \U0001F600 \U0001F469\u200D\U0001F4BB flags \U0001F1E8\U0001F1ED",
      "int main() { return 0x1F + 1e-9; }  // comment",
      "<|im_start|>user\nnot markup when it is text<|im_end|>",
      std::string("a\0b", 3),
      std::string(100000, 'a'),
      std::string(100000, ' '),
      std::string(100000, '!'),
  };
  for (const std::string& text : texts) {
    EXPECT_EQ(tokenizer_->Decode(Encode(text), true), text) << text.substr(0, 80);
  }
}

TEST_F(TokenizerTest, KnownIds) {
  // From the tokenizer.json of SmolLM2-135M-Instruct.
  EXPECT_EQ(tokenizer_->n_vocab(), 49152);
  EXPECT_EQ(tokenizer_->Piece(1), "<|im_start|>");
  EXPECT_EQ(tokenizer_->Piece(2), "<|im_end|>");
  EXPECT_EQ(tokenizer_->eos(), TokenId{2});
  EXPECT_TRUE(tokenizer_->IsEndOfGeneration(2));
  EXPECT_TRUE(tokenizer_->IsControl(1));
  EXPECT_TRUE(tokenizer_->IsMarkup(1));
  EXPECT_FALSE(tokenizer_->IsEndOfGeneration(1));
  const auto line = Encode("line\n");
  EXPECT_TRUE(tokenizer_->EndsLine(line.back()));
  EXPECT_FALSE(tokenizer_->EndsLine(line.front()));
  EXPECT_FALSE(tokenizer_->IsSpecial(line.front()));
}

TEST_F(TokenizerTest, SpecialTokensAreParsedOnDemand) {
  EXPECT_EQ(Encode("<|im_end|>", false, true), std::vector<TokenId>{2});
  EXPECT_GT(Encode("<|im_end|>", false, false).size(), 1u);
}

TEST_F(TokenizerTest, LongTextsInPartsGiveTheSameTokens) {
  const std::string turn = "<|im_start|>user\nSome words, a <b>tag</b> and 12 > 3.<|im_end|>\n";
  const auto one = Encode(turn, false, true);
  std::string text;
  std::vector<TokenId> expected;
  for (int i = 0; i < 2000; ++i) {
    text += turn;
    expected.insert(expected.end(), one.begin(), one.end());
  }
  EXPECT_EQ(Encode(text, false, true), expected);
  std::string marks;
  for (int i = 0; i < 100000; ++i) marks += "<|im_end|>";
  EXPECT_EQ(Encode(marks, false, true), std::vector<TokenId>(100000, 2)) << "quadratic: this would take 36 s";
}

TEST_F(TokenizerTest, InvalidIdsAreHarmless) {
  for (const TokenId id : {TokenId{-1}, TokenId{INT32_MIN}, tokenizer_->n_vocab(), TokenId{INT32_MAX}}) {
    EXPECT_EQ(tokenizer_->Piece(id), "");
    EXPECT_FALSE(tokenizer_->IsSpecial(id));
    EXPECT_FALSE(tokenizer_->EndsLine(id));
  }
}

// This model's vocabulary lacks tokens for a few bytes (control characters, leads that UTF-8 never uses); its tokenizer
// drops them.
TEST_F(TokenizerTest, RandomBytesRoundTrip) {
  std::vector<bool> has_token(256);
  for (TokenId id = 0; id < tokenizer_->n_vocab(); ++id) {
    const std::string& piece = tokenizer_->Piece(id);
    if (piece.size() == 1) has_token[static_cast<unsigned char>(piece[0])] = true;
  }
  const auto representable = [&](std::string bytes) {
    std::erase_if(bytes, [&](char c) { return !has_token[static_cast<unsigned char>(c)]; });
    return bytes;
  };
  EXPECT_LT(std::count(has_token.begin(), has_token.end(), false), 32);
  std::mt19937 random(7);
  for (int i = 0; i < 10000; ++i) {
    std::string bytes(random() % 64, '\0');
    for (char& c : bytes) c = static_cast<char>(random() % (i % 2 == 0 ? 256 : 128));
    const auto tokens = tokenizer_->Encode(bytes, false, i % 3 == 0);
    ASSERT_TRUE(tokens.ok()) << tokens.status().ToString();
    ASSERT_EQ(tokenizer_->Decode(*tokens, true), representable(SanitizeUtf8(bytes))) << "input " << i;
    std::string streamed;
    StreamDetokenizer stream(*tokenizer_, true);
    for (const TokenId id : *tokens) {
      stream.Append(id, streamed);
      ASSERT_TRUE(IsValidUtf8(streamed));
    }
    stream.Flush(streamed);
    ASSERT_EQ(streamed, SanitizeUtf8(representable(SanitizeUtf8(bytes))));
  }
}

TEST_F(TokenizerTest, RandomTokensStreamAsOneDecode) {
  std::mt19937 random(8);
  for (int i = 0; i < 2000; ++i) {
    std::vector<TokenId> tokens(random() % 40);
    for (TokenId& id : tokens) id = static_cast<TokenId>(random() % static_cast<unsigned>(tokenizer_->n_vocab()));
    std::string streamed;
    StreamDetokenizer stream(*tokenizer_);
    for (const TokenId id : tokens) stream.Append(id, streamed);
    stream.Flush(streamed);
    ASSERT_EQ(streamed, SanitizeUtf8(tokenizer_->Decode(tokens, false)));
  }
}

TEST_F(TokenizerTest, ThreadsAgree) {
  const std::string text = "Threads share one tokenizer: 1234 \U0001F600 <|im_end|>\n";
  const auto expected = Encode(text, true, true);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        const auto tokens = tokenizer_->Encode(text, true, true);
        if (!tokens.ok() || *tokens != expected) ++wrong[t];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4));
}

// Vocabularies made by hand: a byte-level one of 256 + 3 tokens, changed by each case.
class VocabularyFileTest : public ::testing::Test {
 protected:
  struct Gguf {
    gguf_context* file = gguf_init_empty();
    ~Gguf() { gguf_free(file); }
  };

  static std::string ByteName(int byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    int code = byte;
    if (!printable) code = 256 + (byte <= 0x20 ? byte : byte <= 0xa0 ? byte - 0x7f + 33 : 67);
    if (code < 0x80) return std::string(1, static_cast<char>(code));
    return {static_cast<char>(0xc0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3f))};
  }

  static void SetStrings(gguf_context* file, const char* key, const std::vector<std::string>& values) {
    std::vector<const char*> pointers;
    for (const std::string& value : values) pointers.push_back(value.c_str());
    gguf_set_arr_str(file, key, pointers.data(), pointers.size());
  }

  static std::vector<std::string> Tokens() {
    std::vector<std::string> tokens;
    for (int byte = 0; byte < 256; ++byte) tokens.push_back(ByteName(byte));
    for (const char* more : {"<|bos|>", "<|eos|>", "ab"}) tokens.push_back(more);
    return tokens;
  }

  static std::vector<int32_t> Types() {
    std::vector<int32_t> types(259, 1);
    types[256] = types[257] = 3;
    return types;
  }

  static void Fill(gguf_context* file) {
    gguf_set_val_str(file, "general.architecture", "unheard-of");
    gguf_set_val_str(file, "tokenizer.ggml.model", "gpt2");
    gguf_set_val_str(file, "tokenizer.ggml.pre", "gpt-2");
    SetStrings(file, "tokenizer.ggml.tokens", Tokens());
    gguf_set_arr_data(file, "tokenizer.ggml.token_type", GGUF_TYPE_INT32, Types().data(), 259);
    SetStrings(file, "tokenizer.ggml.merges", {"a b"});
    gguf_set_val_u32(file, "tokenizer.ggml.bos_token_id", 256);
    gguf_set_val_u32(file, "tokenizer.ggml.eos_token_id", 257);
    gguf_set_val_bool(file, "tokenizer.ggml.add_bos_token", true);
  }

  Expected<std::unique_ptr<Tokenizer>> OpenWith(const std::function<void(gguf_context*)>& change) {
    Gguf gguf;
    Fill(gguf.file);
    change(gguf.file);
    EXPECT_TRUE(gguf_write_to_file(gguf.file, path_.c_str(), true));
    return Tokenizer::Open(path_);
  }

  void TearDown() override { std::filesystem::remove(path_); }

  std::string path_ =
      (std::filesystem::temp_directory_path() / ("jointkv_vocabulary_" + std::to_string(getpid()) + ".gguf")).string();
};

TEST_F(VocabularyFileTest, OpensAnyArchitecture) {
  auto opened = OpenWith([](gguf_context*) {});
  ASSERT_TRUE(opened.ok()) << opened.status().ToString();
  const Tokenizer& tokenizer = **opened;
  EXPECT_EQ(tokenizer.n_vocab(), 259);
  EXPECT_TRUE(tokenizer.adds_bos());
  EXPECT_EQ(*tokenizer.Encode("ab", true, false), (std::vector<TokenId>{256, 258}));
  EXPECT_EQ(*tokenizer.Encode("a<|eos|>", false, true), (std::vector<TokenId>{'a', 257}));
  EXPECT_TRUE(tokenizer.IsEndOfGeneration(257));
  EXPECT_TRUE(tokenizer.EndsLine('\n'));
  std::string all;
  for (int c = 0; c < 128; ++c) all += static_cast<char>(c);
  EXPECT_EQ(tokenizer.Decode(*tokenizer.Encode(all, false, false), true), all);
}

TEST_F(VocabularyFileTest, RefusesBadMetadata) {
  struct Case {
    const char* name;
    StatusCode code;
    std::function<void(gguf_context*)> change;
  };
  const std::vector<Case> cases = {
      {"no model", StatusCode::kNotFound, [](auto* f) { gguf_remove_key(f, "tokenizer.ggml.model"); }},
      {"model type", StatusCode::kNotFound, [](auto* f) { gguf_set_val_u32(f, "tokenizer.ggml.model", 1); }},
      {"no vocabulary", StatusCode::kUnsupported, [](auto* f) { gguf_set_val_str(f, "tokenizer.ggml.model", "none"); }},
      {"word piece", StatusCode::kUnsupported, [](auto* f) { gguf_set_val_str(f, "tokenizer.ggml.model", "bert"); }},
      {"unknown", StatusCode::kUnsupported, [](auto* f) { gguf_set_val_str(f, "tokenizer.ggml.model", "zzz"); }},
      {"unknown pre", StatusCode::kDataLoss, [](auto* f) { gguf_set_val_str(f, "tokenizer.ggml.pre", "zzz"); }},
      {"pre type", StatusCode::kDataLoss, [](auto* f) { gguf_set_val_u32(f, "tokenizer.ggml.pre", 3); }},
      {"no tokens", StatusCode::kNotFound, [](auto* f) { gguf_remove_key(f, "tokenizer.ggml.tokens"); }},
      {"empty tokens", StatusCode::kDataLoss, [](auto* f) { SetStrings(f, "tokenizer.ggml.tokens", {}); }},
      {"tokens not an array", StatusCode::kDataLoss,
       [](auto* f) { gguf_set_val_str(f, "tokenizer.ggml.tokens", "a"); }},
      {"tokens of numbers", StatusCode::kDataLoss,
       [](auto* f) { gguf_set_arr_data(f, "tokenizer.ggml.tokens", GGUF_TYPE_INT32, Types().data(), 259); }},
      {"repeated token", StatusCode::kDataLoss,
       [](auto* f) {
         auto tokens = Tokens();
         tokens[5] = tokens[6];
         SetStrings(f, "tokenizer.ggml.tokens", tokens);
       }},
      {"empty token that takes another's name", StatusCode::kDataLoss,
       [](auto* f) {
         auto tokens = Tokens();
         tokens[5] = "[EMPTY_6]";
         tokens[6] = "";
         SetStrings(f, "tokenizer.ggml.tokens", tokens);
       }},
      {"huge token", StatusCode::kDataLoss,
       [](auto* f) {
         auto tokens = Tokens();
         tokens[5] = std::string(1 << 20, 'x');
         SetStrings(f, "tokenizer.ggml.tokens", tokens);
       }},
      {"short types", StatusCode::kDataLoss,
       [](auto* f) { gguf_set_arr_data(f, "tokenizer.ggml.token_type", GGUF_TYPE_INT32, Types().data(), 7); }},
      {"types of another type", StatusCode::kDataLoss,
       [](auto* f) { gguf_set_arr_data(f, "tokenizer.ggml.token_type", GGUF_TYPE_FLOAT32, Types().data(), 259); }},
      {"short scores", StatusCode::kDataLoss,
       [](auto* f) { gguf_set_arr_data(f, "tokenizer.ggml.scores", GGUF_TYPE_FLOAT32, Types().data(), 7); }},
      {"no merges", StatusCode::kDataLoss, [](auto* f) { gguf_remove_key(f, "tokenizer.ggml.merges"); }},
      {"merges of numbers", StatusCode::kDataLoss,
       [](auto* f) { gguf_set_arr_data(f, "tokenizer.ggml.merges", GGUF_TYPE_INT32, Types().data(), 259); }},
      {"bos past the end", StatusCode::kDataLoss,
       [](auto* f) { gguf_set_val_u32(f, "tokenizer.ggml.bos_token_id", 259); }},
      {"eos past the end", StatusCode::kDataLoss,
       [](auto* f) { gguf_set_val_u32(f, "tokenizer.ggml.eos_token_id", 0xffffffffu); }},
      {"bos type", StatusCode::kDataLoss, [](auto* f) { gguf_set_val_str(f, "tokenizer.ggml.bos_token_id", "<s>"); }},
      {"add_bos type", StatusCode::kDataLoss, [](auto* f) { gguf_set_val_u32(f, "tokenizer.ggml.add_bos_token", 1); }},
      {"missing name that a model's workaround needs", StatusCode::kDataLoss,
       [](auto* f) { gguf_set_val_str(f, "general.name", "phi-3"); }},
  };
  for (const Case& c : cases) {
    const auto opened = OpenWith(c.change);
    ASSERT_FALSE(opened.ok()) << c.name;
    EXPECT_EQ(opened.status().code(), c.code) << c.name << ": " << opened.status().ToString();
    EXPECT_EQ(opened.status().message().find("no reason given"), std::string::npos) << c.name;
  }
}

TEST_F(VocabularyFileTest, SmallVocabularyWithoutBeginToken) {
  const auto opened = OpenWith([](gguf_context* f) {
    gguf_set_val_str(f, "tokenizer.ggml.model", "llama");
    SetStrings(f, "tokenizer.ggml.tokens", {"x"});
    gguf_remove_key(f, "tokenizer.ggml.token_type");
    gguf_remove_key(f, "tokenizer.ggml.bos_token_id");
    gguf_remove_key(f, "tokenizer.ggml.eos_token_id");
  });
  EXPECT_FALSE(opened.ok());
}

TEST_F(VocabularyFileTest, MissingByteTokensAreAnErrorNotACrash) {
  const auto opened = OpenWith([](gguf_context* f) {
    gguf_set_val_str(f, "tokenizer.ggml.model", "llama");
    SetStrings(f, "tokenizer.ggml.tokens", {"<unk>", "<s>", "</s>", "a"});
    gguf_remove_key(f, "tokenizer.ggml.token_type");
    gguf_set_val_u32(f, "tokenizer.ggml.bos_token_id", 1);
    gguf_set_val_u32(f, "tokenizer.ggml.eos_token_id", 2);
  });
  ASSERT_TRUE(opened.ok()) << opened.status().ToString();
  EXPECT_FALSE((*opened)->Encode("zebra \U0001F600", true, true).ok());
}

TEST_F(VocabularyFileTest, LongRunsAreRefusedWhereStdRegexWouldRecurse) {
  const auto opened = OpenWith([](gguf_context* f) { gguf_set_val_str(f, "tokenizer.ggml.pre", "default"); });
  ASSERT_TRUE(opened.ok()) << opened.status().ToString();
  const auto tokens = (*opened)->Encode(std::string(1 << 20, '!'), false, false);
  ASSERT_FALSE(tokens.ok());
  EXPECT_EQ(tokens.status().code(), StatusCode::kOutOfRange);
  const std::string allowed = std::string(8192, '!') + " " + std::string(8192, '1') + std::string(8192, ' ');
  EXPECT_TRUE((*opened)->Encode(allowed, false, false).ok());
}

TEST_F(VocabularyFileTest, DamagedFilesNeverCrash) {
  ASSERT_TRUE(OpenWith([](gguf_context*) {}).ok());
  std::ifstream in(path_, std::ios::binary);
  const std::string good((std::istreambuf_iterator<char>(in)), {});
  in.close();
  std::mt19937 random(9);
  int opened = 0;
  for (int i = 0; i < 600; ++i) {
    std::string bad = good;
    if (i % 4 == 0) bad.resize(random() % bad.size());
    for (unsigned k = 0; k < 1 + random() % 8 && !bad.empty(); ++k) {
      bad[random() % bad.size()] = static_cast<char>(random());
    }
    std::ofstream(path_, std::ios::binary | std::ios::trunc) << bad;
    const auto tokenizer = Tokenizer::Open(path_);
    if (!tokenizer.ok()) continue;
    ++opened;
    (void)(*tokenizer)->Encode("some text \xff\n<|eos|>", true, true).ok();
  }
  EXPECT_GT(opened, 0);
}

TEST(TokenizerOpen, NamesTheMissingFile) {
  const auto opened = Tokenizer::Open("/no/such/file.gguf");
  ASSERT_FALSE(opened.ok());
  EXPECT_NE(opened.status().message().find("/no/such/file.gguf"), std::string::npos);
}

}  // namespace
}  // namespace jointkv::text
