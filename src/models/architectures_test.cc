// Every architecture and RoPE variant against llama.cpp, in f32 on both sides, on small models with random weights.
#include <cstdio>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "models/test_judge.h"
#include "models/test_runner.h"

namespace jointkv::models {
namespace {

// Of the logits' standard deviation. Two f32 passes through these models differ by less than 1e-4 (order of sums, sine
// and cosine, exp); a wrong position, window, scale or bias by more than 1e-1.
constexpr double kErrorMax = 1e-3;
constexpr int kTokens = 300;  // past every sliding window and every YaRN model's original context

class ArchitectureTest : public testing::TestWithParam<const char*> {
 protected:
  std::string path() const { return TestModelPath(GetParam()); }
};

TEST_P(ArchitectureTest, MatchesLlamaCpp) {
  Runner runner(path(), F32Options());
  for (const gguf::Tensor& tensor : runner.file().tensors()) ASSERT_EQ(tensor.type, GGML_TYPE_F32) << tensor.name;
  Judge judge(path(), {.f32 = true});
  ASSERT_EQ(judge.n_vocab(), runner.n_vocab());
  const Tokens tokens = RandomTokens(kTokens, runner.n_vocab(), 1);
  const std::span<const float> reference = judge.Next(tokens);
  double worst = 0;
  for (const std::vector<int>& chunks : {std::vector<int>{0}, {1, 50, 3, 17, 2, 90}}) {
    Agreement agreement;
    agreement.Add(reference, runner.Logits(tokens, chunks), runner.n_vocab());
    EXPECT_LE(agreement.max_error(), kErrorMax) << "first chunk " << chunks[0];
    worst = std::max(worst, agreement.max_error());
  }
  std::printf("%s: largest difference %.2g of the logits' standard deviation over %d tokens\n", GetParam(), worst,
              kTokens);
}

// Keys are rotated by their offset in their block and queries by the distance to its start. Whatever the shift, scores
// are those of absolute rotation: here blocks adopted from the prefix cache, followed by the same text after prefixes
// of different lengths. Prefixes that end inside a block also make the same text fall into blocks differently. The root
// mean square, as llama.cpp multiplies its angles up in f32, which shows in single logits at later positions.
TEST_P(ArchitectureTest, PositionFreeBlocksMatchAbsoluteRotation) {
  Runner runner(path(), F32Options());
  const Tokens text = RandomTokens(60, runner.n_vocab(), 2);
  for (const int prefix_tokens : {0, 1, 37, 128, 211}) {
    Tokens tokens = RandomTokens(prefix_tokens, runner.n_vocab(), 3);
    const SequenceId first = runner.Start();
    runner.Continue(first, tokens, {0});
    tokens.insert(tokens.end(), text.begin(), text.end());

    const SequenceId second = runner.Start();
    const int adopted = runner.cache().AdoptPrefix(second, tokens);
    if (prefix_tokens >= 64) {
      EXPECT_GT(adopted, 0);
    }
    const auto rest = std::span(tokens).subspan(static_cast<size_t>(adopted));
    const std::vector<float> ours = runner.Continue(second, rest, {40});
    Judge judge(path(), {.f32 = true});
    const std::span<const float> reference = judge.Next(tokens);
    Agreement agreement;
    agreement.Add(reference.last(ours.size()), ours, runner.n_vocab());
    EXPECT_LE(agreement.rms_error(), 1e-4) << "after " << prefix_tokens << " tokens, of them adopted " << adopted;
    runner.cache().Free(first);
    runner.cache().Free(second);
  }
  runner.cache().CheckIntegrity();
}

INSTANTIATE_TEST_SUITE_P(All, ArchitectureTest,
                         testing::Values("llama", "llama-biases", "llama-freq-factors", "llama-linear", "llama-yarn",
                                         "qwen2", "qwen2-linear", "qwen2-yarn", "qwen3", "qwen3-biases", "qwen3-yarn",
                                         "gemma3", "gemma3-linear", "gemma3-softcap"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace jointkv::models
