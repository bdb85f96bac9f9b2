// Random shapes, histories and batches, each row held against the double reference. A failure names its seed.
// JOINTKV_FUZZ_SECONDS goes on with further seeds for so long.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "attention/test_world.h"
#include "base/clock.h"

namespace jointkv::attention {
namespace {

constexpr int kWorlds = 50;
constexpr int kSteps = 10;

WorldShape RandomShape(std::mt19937_64& random) {
  const auto pick = [&](std::initializer_list<int> values) { return values.begin()[random() % values.size()]; };
  WorldShape shape;
  shape.n_kv_heads = pick({1, 1, 2, 3});
  shape.n_heads = shape.n_kv_heads * pick({1, 2, 3, 4, 5, 7, 8, 9, 12});
  shape.head_dim = pick({16, 24, 32, 48, 64, 80, 112, 128});
  shape.neox = random() % 2 == 0;
  shape.codec = static_cast<codec::Codec>(pick({0, 0, 0, 1, 2}));
  shape.window = {0};
  for (int i = pick({0, 1, 2}); i > 0; --i)
    shape.window.push_back(pick({1, 2, 3, 4, 7, 16, 31, 32, 33, 64, 100, 257, 512}));
  shape.rope.freq_base = random() % 2 == 0 ? 1e4f : 1e6f;
  if (random() % 4 == 0) {
    shape.rope.freq_scale = 0.25f;
    shape.rope.ext_factor = 1;
    shape.rope.n_ctx_orig = 256;
  }
  shape.rows_independent = random() % 3 == 0;
  shape.norms = random() % 4 == 0;
  shape.absolute_keys = random() % 3 == 0;
  shape.scaled = random() % 3 == 0;
  if (shape.codec == codec::Codec::kBf16 && !shape.scaled && random() % 2 == 0) {
    shape.sealed = random() % 2 == 0 ? codec::Codec::kQ4 : codec::Codec::kQ8;
  }
  shape.residuals = shape.codec == codec::Codec::kBf16 && !shape.scaled && random() % 2 == 0;
  shape.fused = !shape.scaled && random() % 3 == 0;
  shape.fused_apart = random() % 2 == 0;
  shape.threads = pick({1, 2, 3});
  shape.sharpness = random() % 5 == 0 ? 4.0f : 1.0f;
  shape.out = random() % 3 == 0 ? dense::Precision::kBf16 : dense::Precision::kF32;
  shape.tokens_max = 1600;
  return shape;
}

struct Met {
  int encoded = 0;  // blocks
  int differences = 0;
  int redirected = 0;  // table slots
};

void RunWorld(uint64_t seed, Met& met) {
  std::mt19937_64 random(seed);
  const WorldShape shape = RandomShape(random);
  World world(shape);
  const int line = 2 + static_cast<int>(random() % 60);
  int budget = 1100;
  std::vector<SequenceId> sequences;
  for (int step = 0; step < kSteps && budget > 0; ++step) {
    std::vector<World::Piece> pieces;
    if (sequences.empty() || random() % 3 == 0) {
      sequences.push_back(world.Start(DomainId(static_cast<int32_t>(random() % 2))));
      // A prompt that begins as others did, so that there is something to adopt.
      const World::Tokens prompt = RandomTokens(2 + static_cast<int>(random() % 300), seed % 3, line);
      const int hit = world.cache().AdoptPrefix(sequences.back(), prompt);
      pieces.push_back({sequences.back(), Cut(prompt, hit, static_cast<int>(prompt.size()))});
    } else if (random() % 3 == 0) {
      const SequenceId fork = world.Fork(sequences[random() % sequences.size()]);
      sequences.push_back(fork);
    } else if (sequences.size() > 2 && random() % 3 == 0) {
      world.cache().Free(sequences.front());
      sequences.erase(sequences.begin());
    }
    for (const SequenceId id : sequences) {
      if ((!pieces.empty() && pieces[0].sequence == id) || random() % 4 == 0) continue;
      const int longest = random() % 4 == 0 ? 300 : 20;
      const int n = random() % 2 == 0 ? 1 : 1 + static_cast<int>(random() % longest);
      // Text that comes again elsewhere, where blocks of equal tokens are fused.
      pieces.push_back({id, RandomTokens(n, shape.fused ? random() % 4 : random(), line)});
    }
    for (const World::Piece& piece : pieces) budget -= static_cast<int>(piece.tokens.size());
    if (pieces.empty() || budget < 0) continue;
    std::ranges::shuffle(pieces, random);
    world.Step(pieces);
    if (testing::Test::HasFatalFailure()) return;
    world.cache().CheckIntegrity();
  }
  met.encoded += world.encoded();
  met.differences += world.differences();
  met.redirected += world.redirected();
}

TEST(AttentionFuzzTest, RandomWorldsAgreeWithTheReference) {
  const char* seconds = std::getenv("JOINTKV_FUZZ_SECONDS");
  const double until_s = MonotonicSeconds() + (seconds == nullptr ? 0 : std::atof(seconds));
  Met met;
  uint64_t seed = 1;
  for (; seed <= kWorlds || MonotonicSeconds() < until_s; ++seed) {
    const testing::ScopedTrace trace(__FILE__, __LINE__, "seed " + std::to_string(seed));
    RunWorld(seed, met);
    if (HasFailure()) return;
  }
  std::cout << seed - 1 << " worlds, " << met.encoded << " encoded blocks, of which " << met.differences
            << " are differences, " << met.redirected << " slots of fused blocks\n";
  EXPECT_GT(met.redirected, 0);
  EXPECT_GT(met.differences, 0);
  EXPECT_GT(met.encoded, met.differences);
}

}  // namespace
}  // namespace jointkv::attention
