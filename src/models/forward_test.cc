// What must not change a forward pass: how a prompt is cut into steps, who else is in them, the number of threads, what
// came from the prefix cache, where the weights lie. Bit for bit where the contract says so.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "models/test_judge.h"
#include "models/test_runner.h"

namespace jointkv::models {
namespace {

constexpr int kTokens = 150;

Runner::Options Deterministic() {
  Runner::Options options;
  options.model.deterministic = true;
  return options;
}

std::vector<dense::Precision> PrecisionsOfThisCpu() {
  std::vector<dense::Precision> precisions = {dense::Precision::kF32, dense::NativePrecision()};
  if (dense::HasInt8Products()) precisions.push_back(dense::Precision::kInt8);
  return precisions;
}

// Index of the first row that differs, or -1: a readable failure where vectors of floats are not.
int FirstDifference(std::span<const float> a, std::span<const float> b, int n_vocab) {
  if (a.size() != b.size()) return 0;
  const auto at = std::mismatch(a.begin(), a.end(), b.begin()).first;
  return at == a.end() ? -1 : static_cast<int>((at - a.begin()) / n_vocab);
}

// The model's file; each has something of its own: one head size or window each, biases, quantised weights.
class ForwardTest : public testing::TestWithParam<const char*> {
 protected:
  std::string path() const { return TestModelPath(GetParam()); }
};

TEST_P(ForwardTest, DeterministicWhateverTheChunks) {
  Runner runner(path(), Deterministic());
  const Tokens tokens = RandomTokens(kTokens, runner.n_vocab(), 1);
  const std::vector<float> whole = runner.Logits(tokens);
  for (const int chunk : {1, 7, 64}) {
    EXPECT_EQ(FirstDifference(whole, runner.Logits(tokens, {chunk}), runner.n_vocab()), -1) << "chunks of " << chunk;
  }
}

TEST_P(ForwardTest, DeterministicWhateverTheThreads) {
  std::vector<float> expected;
  for (const int threads : {1, 2, 3}) {
    Runner::Options options = Deterministic();
    options.threads = threads;
    Runner runner(path(), options);
    const std::vector<float> logits = runner.Logits(RandomTokens(kTokens, runner.n_vocab(), 1), {64});
    if (expected.empty()) expected = logits;
    EXPECT_EQ(FirstDifference(expected, logits, runner.n_vocab()), -1) << threads << " threads";
  }
}

TEST_P(ForwardTest, DeterministicWhateverTheCompany) {
  Runner runner(path(), Deterministic());
  const auto width = static_cast<size_t>(runner.n_vocab());
  const std::vector<Tokens> texts = {RandomTokens(kTokens, runner.n_vocab(), 1), RandomTokens(77, runner.n_vocab(), 2),
                                     RandomTokens(40, runner.n_vocab(), 3)};
  std::vector<std::vector<float>> alone;
  for (const Tokens& text : texts) alone.push_back(runner.Logits(text));

  // Steps of all sequences that have tokens left, in chunks that differ by sequence and step.
  std::vector<SequenceId> sequences;
  for (size_t i = 0; i < texts.size(); ++i) sequences.push_back(runner.Start());
  std::vector<std::vector<float>> together(texts.size());
  std::vector<size_t> done(texts.size());
  for (size_t step = 0;; ++step) {
    std::vector<Runner::Piece> pieces;
    std::vector<size_t> owners;
    for (size_t i = 0; i < texts.size(); ++i) {
      const size_t rows = std::min(texts[i].size() - done[i], 1 + (step * 5 + i * 3) % 16);
      if (rows == 0) continue;
      pieces.push_back({sequences[i], std::span(texts[i]).subspan(done[i], rows)});
      owners.push_back(i);
      done[i] += rows;
    }
    if (pieces.empty()) break;
    const std::vector<float> logits = runner.Step(pieces);
    auto at = logits.begin();
    for (size_t p = 0; p < pieces.size(); ++p) {
      const auto end = at + static_cast<ptrdiff_t>(pieces[p].tokens.size() * width);
      together[owners[p]].insert(together[owners[p]].end(), at, end);
      at = end;
    }
  }
  for (size_t i = 0; i < texts.size(); ++i) {
    EXPECT_EQ(FirstDifference(alone[i], together[i], runner.n_vocab()), -1) << "text " << i;
  }
  runner.cache().CheckIntegrity();
}

TEST_P(ForwardTest, DeterministicAfterAPrefixHitOrAFork) {
  Runner runner(path(), Deterministic());
  const Tokens tokens = RandomTokens(kTokens, runner.n_vocab(), 1);
  const std::vector<float> whole = runner.Logits(tokens);
  const auto tail = [&](size_t from) { return std::span(whole).subspan(from * static_cast<size_t>(runner.n_vocab())); };

  const SequenceId first = runner.Start();
  runner.Continue(first, std::span(tokens).first(100), {0});
  const SequenceId adopter = runner.Start();
  const auto adopted = static_cast<size_t>(runner.cache().AdoptPrefix(adopter, tokens));
  ASSERT_GT(adopted, 0u);
  EXPECT_EQ(FirstDifference(tail(adopted), runner.Continue(adopter, std::span(tokens).subspan(adopted), {23}),
                            runner.n_vocab()),
            -1);

  // Inside a block: the fork writes to a copy of it.
  const SequenceId fork = runner.cache().Fork(first, 1024);
  EXPECT_EQ(FirstDifference(tail(100), runner.Continue(fork, std::span(tokens).subspan(100), {0}), runner.n_vocab()),
            -1);
  EXPECT_EQ(FirstDifference(tail(100), runner.Continue(first, std::span(tokens).subspan(100), {9}), runner.n_vocab()),
            -1);
  runner.cache().CheckIntegrity();
}

TEST_P(ForwardTest, DeterministicWhateverLogitsAreWanted) {
  Runner runner(path(), Deterministic());
  const Tokens tokens = RandomTokens(kTokens, runner.n_vocab(), 1);
  const std::vector<float> whole = runner.Logits(tokens);
  const auto row = [&](int i) {
    return std::span(whole).subspan(static_cast<size_t>(i * runner.n_vocab()), static_cast<size_t>(runner.n_vocab()));
  };
  const SequenceId sequence = runner.Start();
  const std::vector<int> none;
  EXPECT_TRUE(runner.Step({{sequence, std::span(tokens).first(60)}}, &none).empty());
  const std::vector<int> some = {0, 7, 8, 49};
  const std::vector<float> logits = runner.Step({{sequence, std::span(tokens).subspan(60, 50)}}, &some);
  for (size_t i = 0; i < some.size(); ++i) {
    const auto ours =
        std::span(logits).subspan(i * static_cast<size_t>(runner.n_vocab()), static_cast<size_t>(runner.n_vocab()));
    EXPECT_EQ(FirstDifference(row(60 + some[i]), ours, runner.n_vocab()), -1) << "row " << some[i];
  }
}

// Without the option too, where only the order of sums may differ.
TEST_P(ForwardTest, ChunksAgreeInF32) {
  Runner runner(path(), F32Options());
  const Tokens tokens = RandomTokens(kTokens, runner.n_vocab(), 1);
  const std::vector<float> whole = runner.Logits(tokens);
  Runner::Options options = F32Options();
  options.model.quantised_rows = 0;
  Runner packed(path(), options);
  for (const int chunk : {1, 7, 64}) {
    Agreement agreement;
    agreement.Add(whole, packed.Logits(tokens, {chunk}), runner.n_vocab());
    // Some hundred roundings of 2^-24 each, most of which cancel: about 30 are left, and ten times that of the worst of
    // all logits.
    EXPECT_LE(agreement.rms_error(), 3e-6) << "chunks of " << chunk;
    EXPECT_LE(agreement.max_error(), 4e-5) << "chunks of " << chunk;
  }
}

// In bf16, rows and tiles of attention round in different places.
TEST_P(ForwardTest, ChunksAgreeInBf16) {
  Runner::Options options;
  options.model.precision = dense::NativePrecision();
  options.model.quantised_rows = 0;
  Runner runner(path(), options);
  const Tokens tokens = RandomTokens(kTokens, runner.n_vocab(), 1);
  const std::vector<float> whole = runner.Logits(tokens);
  Runner f32(path(), F32Options());
  const std::vector<float> exact = f32.Logits(tokens);
  Agreement rounding;  // what bf16 costs altogether
  rounding.Add(exact, whole, runner.n_vocab());
  for (const int chunk : {1, 7, 64}) {
    const std::vector<float> logits = runner.Logits(tokens, {chunk});
    Agreement agreement;
    agreement.Add(whole, logits, runner.n_vocab());
    Agreement chunked_rounding;
    chunked_rounding.Add(exact, logits, runner.n_vocab());
    EXPECT_LE(agreement.rms_error(), 2 * rounding.rms_error() + 1e-6) << "chunks of " << chunk;
    EXPECT_LE(chunked_rounding.rms_error(), 1.5 * rounding.rms_error() + 1e-6) << "chunks of " << chunk;
    // A dozen roundings of 2^-9 in a row.
    EXPECT_LE(chunked_rounding.rms_error(), 0.03) << "chunks of " << chunk;
  }
}

INSTANTIATE_TEST_SUITE_P(All, ForwardTest,
                         testing::Values("llama-biases", "qwen2-yarn", "qwen3", "gemma3", "gemma3-linear", "llama-q4_1",
                                         "qwen3-q8_0"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

class QuantisedTest : public testing::TestWithParam<const char*> {
 protected:
  std::string path() const { return TestModelPath(GetParam()); }
};

TEST_P(QuantisedTest, LeanIsPackedBitForBit) {
  for (const dense::Precision precision : PrecisionsOfThisCpu()) {
    for (const int quantised_rows : {0, 4}) {
      Runner::Options options;
      options.model.precision = precision;
      options.model.quantised_rows = quantised_rows;
      Runner packed(path(), options);
      options.model.weights_memory = dense::WeightsMemory::kLean;
      Runner lean(path(), options);
      EXPECT_GT(packed.model().packed_bytes(), 0u);
      EXPECT_EQ(lean.model().packed_bytes(), 0u);
      const Tokens tokens = RandomTokens(kTokens, packed.n_vocab(), 1);
      for (const int chunk : {0, 3}) {
        const std::vector<float> expected = packed.Logits(tokens, {chunk});
        EXPECT_EQ(FirstDifference(expected, lean.Logits(tokens, {chunk}), packed.n_vocab()), -1)
            << "quantised rows " << quantised_rows << ", chunks of " << chunk;
      }
    }
  }
}

// The quantised way and packed integers round activations to 8 bits, by block of 32 to 1/127 of its largest: an error
// of about 0.005 of each product, and these models have nine in a row, with a softmax that sharpens. llama.cpp rounds
// at the same places.
constexpr double kRoundingMax = 0.05;

TEST_P(QuantisedTest, QuantisedRowsAgreeWithPacked) {
  Runner::Options options = F32Options();
  options.model.quantised_rows = 0;
  Runner packed(path(), options);
  const Tokens tokens = RandomTokens(kTokens, packed.n_vocab(), 1);
  const std::vector<float> expected = packed.Logits(tokens);
  Judge judge(path(), {.f32 = true});
  const std::span<const float> judged = judge.Next(tokens);
  for (const dense::Precision precision : PrecisionsOfThisCpu()) {
    options.model.precision = precision;
    options.model.quantised_rows = 6;
    Runner quantised(path(), options);
    EXPECT_EQ(quantised.model().quantised_rows(), 6);
    for (const int chunk : {1, 6}) {
      const std::vector<float> logits = quantised.Logits(tokens, {chunk});
      Agreement agreement;
      agreement.Add(expected, logits, packed.n_vocab());
      EXPECT_LE(agreement.rms_error(), kRoundingMax) << "chunks of " << chunk;
      EXPECT_GT(agreement.rms_error(), 1e-4) << "not quantised after all";
      Agreement with_judge;
      with_judge.Add(judged, logits, packed.n_vocab());
      EXPECT_LE(with_judge.rms_error(), agreement.rms_error() / 2) << "chunks of " << chunk;
    }
    // A long step whose wanted rows are few changes ways in its last layer.
    const std::vector<int> last = {kTokens - 3, kTokens - 1};
    const SequenceId sequence = quantised.Start();
    const std::vector<float> logits = quantised.Step({{sequence, tokens}}, &last);
    std::vector<float> wanted;
    for (const int row : last) {
      wanted.insert(wanted.end(), expected.begin() + row * packed.n_vocab(),
                    expected.begin() + (row + 1) * packed.n_vocab());
    }
    Agreement agreement;
    agreement.Add(wanted, logits, packed.n_vocab());
    EXPECT_LE(agreement.rms_error(), kRoundingMax) << "last rows";
  }
}

TEST_P(QuantisedTest, PackedIntegersAgreeWithPacked) {
  if (!dense::HasInt8Products()) GTEST_SKIP() << "no 8-bit products";
  Runner::Options options = F32Options();
  options.model.quantised_rows = 0;
  Runner packed(path(), options);
  const Tokens tokens = RandomTokens(kTokens, packed.n_vocab(), 1);
  const std::vector<float> expected = packed.Logits(tokens);
  Judge judge(path(), {.f32 = true});
  const std::span<const float> judged = judge.Next(tokens);
  options.model.precision = dense::Precision::kInt8;
  Runner integers(path(), options);
  for (const int chunk : {1, 6, 0}) {
    const std::vector<float> logits = integers.Logits(tokens, {chunk});
    Agreement agreement;
    agreement.Add(expected, logits, packed.n_vocab());
    EXPECT_LE(agreement.rms_error(), kRoundingMax) << "chunks of " << chunk;
    EXPECT_GT(agreement.rms_error(), 1e-4) << "not in integers after all";
    Agreement with_judge;
    with_judge.Add(judged, logits, packed.n_vocab());
    // A difference in the last bits, as of scales that llama.cpp keeps in f16, moves one code in dozens by a whole
    // step.
    EXPECT_LT(with_judge.rms_error(), agreement.rms_error()) << "chunks of " << chunk;
  }
}

TEST_P(QuantisedTest, DeterministicTakesThePackedWay) {
  Runner::Options options = Deterministic();
  options.model.quantised_rows = 4;
  Runner runner(path(), options);
  EXPECT_EQ(runner.model().quantised_rows(), 0);
}

TEST_P(QuantisedTest, TheMeasuredCrossingIsWithinBounds) {
  Runner runner(path(), {});
  EXPECT_GE(runner.model().quantised_rows(), 0);
  EXPECT_LE(runner.model().quantised_rows(), 8);
}

INSTANTIATE_TEST_SUITE_P(All, QuantisedTest, testing::Values("llama-q4_1", "qwen3-q8_0"), [](const auto& test) {
  std::string name = test.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

TEST(ModelTest, ReportsEachLayerOnce) {
  Runner::Options options;
  std::vector<std::pair<int, int>> reports;
  options.model.progress = [&](int done, int total) { reports.emplace_back(done, total); };
  const Runner runner(TestModelPath("qwen3"), options);
  EXPECT_EQ(reports, (std::vector<std::pair<int, int>>{{1, 3}, {2, 3}, {3, 3}}));
}

TEST(ModelTest, AnF32FileRunsInF32AndAQuantisedOneInTheBestPrecision) {
  Runner f32(TestModelPath("llama"), {});
  EXPECT_EQ(f32.model().precision(), dense::Precision::kF32);
  Runner q4(TestModelPath("llama-q4_1"), {});
  EXPECT_EQ(q4.model().precision(), dense::HasInt8Products() ? dense::Precision::kInt8 : dense::NativePrecision());
}

TEST(ModelTest, StoreShapeFollowsTheWindows) {
  Runner runner(TestModelPath("gemma3"), {});
  const kv::KvShape shape = runner.model().CacheShape(codec::Codec::kBf16);
  EXPECT_EQ(shape.window, (std::vector<int>{16, 16, 16, 16, 16, 0, 16}));
  EXPECT_EQ(shape.layout.n_kv_heads, 1);
  EXPECT_EQ(shape.layout.head_dim, 256);
}

}  // namespace
}  // namespace jointkv::models
