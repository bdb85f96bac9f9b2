// Next-token distributions of real models on real text against llama.cpp's on the same file. Prints the figures that
// the docs quote; JOINTKV_KL_TOKENS=2000 is the full run.
//
// Files, each test skipped without its own: the default model (JOINTKV_MODEL), gemma-3-270m (tools/setup --gemma), the
// default model's f32 copy (made by ctest's f32_model), and JOINTKV_DATA/wikitext2-test.txt (../shared/data).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include <gtest/gtest.h>

#include "models/test_judge.h"
#include "models/test_runner.h"

namespace jointkv::models {
namespace {

std::string Environment(const char* name, const std::string& fallback) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != 0 ? value : fallback;
}

std::string CachedModel(const std::string& file) {
  return Environment("JOINTKV_CACHE", Environment("HOME", ".") + "/.cache/jointkv") + "/models/" + file;
}
std::string DefaultModel() { return Environment("JOINTKV_MODEL", CachedModel("SmolLM2-135M-Instruct.Q4_1.gguf")); }
std::string TextFile() {
  return Environment("JOINTKV_DATA", std::string(JOINTKV_SOURCE_DIR) + "/../shared/data") + "/wikitext2-test.txt";
}
int TokensOfEnvironment() { return std::max(1, std::atoi(Environment("JOINTKV_KL_TOKENS", "500").c_str())); }

class RealModelTest : public testing::Test {
 protected:
  // Feeds both with the text's first tokens, `chunk` at a time.
  static Agreement Compare(const char* what, const std::string& path, Runner::Options options, bool f32_judge,
                           int n_tokens, int chunk) {
    options.tokens_max = n_tokens + 1;
    Judge judge(path, {.f32 = f32_judge, .threads = 2, .tokens_max = n_tokens + 1});
    Runner runner(path, options);
    std::ifstream file(TextFile(), std::ios::binary);
    std::string text(std::istreambuf_iterator<char>(file), {});
    text.resize(std::min(text.size(), static_cast<size_t>(n_tokens) * 16));  // far more bytes than tokens
    Tokens tokens = judge.Tokenize(text);
    tokens.resize(std::min(tokens.size(), static_cast<size_t>(n_tokens)));
    const SequenceId sequence = runner.Start();
    Agreement agreement;
    constexpr size_t kJudgedAtOnce = 128;  // bounds the memory for logits
    for (size_t at = 0; at < tokens.size(); at += kJudgedAtOnce) {
      const auto part = std::span(tokens).subspan(at, std::min(tokens.size() - at, kJudgedAtOnce));
      agreement.Add(judge.Next(part), runner.Continue(sequence, part, {chunk}), runner.n_vocab());
    }
    std::printf(
        "%s, %d tokens, %d per step: mean KL %.3g, top-1 agreement %.2f %%, largest difference %.2g deviations\n", what,
        agreement.rows(), chunk, agreement.mean_kl(), 100 * agreement.top1(), agreement.max_error());
    return agreement;
  }
};

#define SKIP_WITHOUT(path) \
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "no file " << (path)

// llama.cpp rounds activations to 8 bits before each product with quantised weights, which alone costs about 0.003.
// So do we in int8, and the two roundings seldom agree to the last bit.
constexpr double kKlMax = 0.01;
constexpr double kTop1Min = 0.95;

TEST_F(RealModelTest, DefaultModel) {
  SKIP_WITHOUT(DefaultModel());
  SKIP_WITHOUT(TextFile());
  const Agreement agreement = Compare("default model", DefaultModel(), {}, false, TokensOfEnvironment(), 128);
  EXPECT_LE(agreement.mean_kl(), kKlMax);
  EXPECT_GE(agreement.top1(), kTop1Min);
}

// One token per step: quantised rows and the row kernels of attention.
TEST_F(RealModelTest, DefaultModelDecoding) {
  SKIP_WITHOUT(DefaultModel());
  SKIP_WITHOUT(TextFile());
  Runner::Options options;
  options.model.quantised_rows = 1;
  // Roundings that are not the judge's flip about 3 of 100 tokens: of 200, 6 give or take 3, which is too near the
  // limit.
  const Agreement agreement =
      Compare("default model, quantised rows", DefaultModel(), options, false, 2 * TokensOfEnvironment(), 1);
  EXPECT_LE(agreement.mean_kl(), kKlMax);
  EXPECT_GE(agreement.top1(), kTop1Min);
}

TEST_F(RealModelTest, Gemma) {
  const std::string path = CachedModel("gemma-3-270m-q4_k_m.gguf");
  SKIP_WITHOUT(path);
  SKIP_WITHOUT(TextFile());
  const Agreement agreement = Compare("gemma-3-270m", path, {}, false, TokensOfEnvironment(), 128);
  EXPECT_LE(agreement.mean_kl(), kKlMax);
  EXPECT_GE(agreement.top1(), kTop1Min);
}

TEST_F(RealModelTest, F32CopyOfDefaultModel) {
  SKIP_WITHOUT(TestModelPath("default-f32"));
  SKIP_WITHOUT(TextFile());
  const Agreement agreement = Compare("f32 copy of the default model", TestModelPath("default-f32"), F32Options(), true,
                                      TokensOfEnvironment(), 128);
  EXPECT_LE(agreement.mean_kl(), 1e-4);
  EXPECT_LE(agreement.max_error(), 1e-3);
}

}  // namespace
}  // namespace jointkv::models
