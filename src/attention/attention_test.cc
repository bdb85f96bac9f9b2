#include "attention/attention.h"

#include <algorithm>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "attention/test_world.h"

namespace jointkv::attention {
namespace {

using codec::Codec;
using Tokens = World::Tokens;

// Chunks of many sizes: rows only, tiles with every remainder, several of both.
const std::vector<int> kChunks = {1, 2, 7, 8, 9, 31, 64, 90, 1, 1, 3};

void RunChunks(World& world, const Tokens& tokens, const std::vector<int>& chunks) {
  const SequenceId id = world.Start();
  int at = 0;
  for (const int chunk : chunks) {
    world.Step({{id, Cut(tokens, at, chunk)}});
    if (testing::Test::HasFatalFailure()) return;
    at += chunk;
  }
}

void ExpectBf16Noise(const World& world, Codec codec) {
  if (codec == Codec::kBf16 && HasAvx512Bf16()) {
    EXPECT_LT(world.NoiseRatio(), 1.3);
  }
}

void CheckShape(const WorldShape& shape) {
  const testing::ScopedTrace trace(__FILE__, __LINE__,
                                   "heads " + std::to_string(shape.n_heads) + "/" + std::to_string(shape.n_kv_heads) +
                                       " x " + std::to_string(shape.head_dim) + (shape.neox ? " neox " : " ") +
                                       codec::CodecName(shape.codec));
  World world(shape);
  RunChunks(world, RandomTokens(220, shape.head_dim), kChunks);
  ExpectBf16Noise(world, shape.codec);
}

TEST(AttentionTest, EveryHeadSizeAndGroup) {
  int n = 0;
  for (const int head_dim : {16, 64, 80, 96, 128, 256}) {
    for (const int group : {1, 2, 3, 4, 7, 8}) {
      const int kv_heads = group < 4 && head_dim < 256 ? 2 : 1;
      WorldShape shape{.n_heads = group * kv_heads,
                       .n_kv_heads = kv_heads,
                       .head_dim = head_dim,
                       .neox = ++n % 2 == 0,
                       .tokens_max = 300};
      CheckShape(shape);
      shape.codec = n % 3 == 0 ? Codec::kF16 : Codec::kF32;
      CheckShape(shape);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(AttentionTest, ALargeGroupGoesRowByRow) {
  CheckShape({.n_heads = 32, .n_kv_heads = 1, .head_dim = 32, .tokens_max = 300});
}

TEST(AttentionTest, HeadNorms) {
  for (const Codec codec : {Codec::kBf16, Codec::kF32})
    CheckShape({.neox = true, .codec = codec, .norms = true, .tokens_max = 300});
}

TEST(AttentionTest, Bf16Output) {
  CheckShape({.tokens_max = 300, .out = dense::Precision::kBf16});
  CheckShape({.codec = Codec::kF32, .tokens_max = 300, .out = dense::Precision::kBf16});
}

// Smaller than a block, about one, more than a split, more than there is; three kinds of layer at once.
TEST(AttentionTest, Windows) {
  for (const Codec codec : {Codec::kBf16, Codec::kF16, Codec::kF32}) {
    for (const bool rows_independent : {false, true}) {
      World world({.n_heads = 4,
                   .head_dim = 32,
                   .codec = codec,
                   .window = {1, 5, 0, 33, 300, 5000},
                   .rows_independent = rows_independent});
      std::vector<int> chunks = kChunks;
      chunks.insert(chunks.end(), {200, 1, 1, 150, 1, 1, 1, 40});
      RunChunks(world, RandomTokens(620, 4), chunks);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(AttentionTest, LongSequencesHaveSeveralSplitsAndKeyTiles) {
  for (const Codec codec : {Codec::kBf16, Codec::kF32}) {
    for (const int line : {4, 1000}) {
      World world({.n_heads = 3, .n_kv_heads = 1, .codec = codec});
      RunChunks(world, RandomTokens(930, 5, line), {600, 1, 1, 257, 8, 9, 1, 1});
      if (HasFatalFailure()) return;
      ExpectBf16Noise(world, codec);
    }
  }
}

TEST(AttentionTest, YarnMagnitudeAndLinearScaling) {
  for (const Codec codec : {Codec::kBf16, Codec::kF32}) {
    for (const gguf::Rope& rope :
         {gguf::Rope{.freq_scale = 0.25f, .ext_factor = 1, .n_ctx_orig = 128},
          gguf::Rope{.freq_scale = 0.5f, .ext_factor = 1, .attn_factor = 0.8f, .n_ctx_orig = 64},
          gguf::Rope{.freq_base = 1e6f, .freq_scale = 0.125f}}) {
      CheckShape({.neox = true, .codec = codec, .rope = rope, .tokens_max = 300});
      if (HasFatalFailure()) return;
    }
  }
}

// What joint encoding may ask for: keys absolutely rotated in the store, blocks with a factor.
TEST(AttentionTest, AbsoluteKeysAndScales) {
  for (const Codec codec : {Codec::kBf16, Codec::kF16, Codec::kF32}) {
    for (const bool rows_independent : {false, true}) {
      for (const auto& [absolute_keys, scaled] : {std::pair(true, false), {false, true}, {true, true}}) {
        WorldShape shape{.head_dim = 80,
                         .neox = scaled,
                         .codec = codec,
                         .window = {0, 37},
                         .rows_independent = rows_independent,
                         .absolute_keys = absolute_keys,
                         .scaled = scaled};
        World world(shape);
        RunChunks(world, RandomTokens(450, 9), {1, 290, 1, 90, 1, 9, 2});
        ExpectBf16Noise(world, codec);
        shape.rope = {.freq_scale = 0.25f, .ext_factor = 1, .n_ctx_orig = 128};
        CheckShape(shape);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Decoding, prefilling and just starting sequences in one step; forks that share an open block and then part.
TEST(AttentionTest, MixedBatchesAndForks) {
  for (const Codec codec : {Codec::kBf16, Codec::kF16, Codec::kF32}) {
    World world({.codec = codec, .window = {0, 20}});
    const Tokens tokens = RandomTokens(400, 6);
    const SequenceId a = world.Start();
    const SequenceId b = world.Start(DomainId(1));
    world.Step({{a, Cut(tokens, 0, 45)}, {b, Cut(tokens, 0, 3)}});
    const SequenceId c = world.Fork(a);
    const SequenceId d = world.Fork(a);
    world.Step({{a, {7}}, {b, Cut(tokens, 3, 100)}, {c, {8}}, {d, Cut(tokens, 300, 30)}});
    world.Step({{d, {1}}, {c, {2}}, {b, {3}}, {a, {4}}});
    const SequenceId e = world.Fork(d);
    world.Step({{e, Cut(tokens, 200, 9)}, {d, Cut(tokens, 200, 9)}, {c, Cut(tokens, 100, 1)}});
    world.cache().Free(a);
    world.Step({{e, {0}}, {d, {5}}});
    if (HasFatalFailure()) return;
  }
}

// Families of forks, decoding together: each block of a family is read by all of its members, open ones by one each.
TEST(AttentionTest, ManyReadersOfSharedBlocks) {
  for (const Codec codec : {Codec::kBf16, Codec::kF32}) {
    std::vector<World::Results> results;
    for (const int threads : {1, 2, 3}) {
      World world({.codec = codec, .window = {0, 50}, .threads = threads, .judged = threads == 2, .tokens_max = 4000});
      std::vector<SequenceId> ids;
      for (int family = 0; family < 3; ++family) {
        const SequenceId first = world.Start(DomainId(family));
        world.Step({{first, RandomTokens(150 + 60 * family, 20 + family)}});
        ids.push_back(first);
        for (int i = 0; i < 2 * family + 1; ++i) ids.push_back(world.Fork(first));
      }
      std::ranges::reverse(ids);
      for (int step = 0; step < 3; ++step) {
        std::vector<World::Piece> pieces;
        for (size_t i = 0; i < ids.size(); ++i)
          pieces.push_back({ids[i], RandomTokens(1 + step % 2, 50 * i + static_cast<uint64_t>(step))});
        world.Step(pieces);
        if (HasFatalFailure()) return;
      }
      results.push_back(world.results());
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(results[0], results[2]);
  }
}

// More readers than a batch takes, and so many that no two blocks of theirs fit one.
TEST(AttentionTest, MoreReadersThanABatch) {
  for (const std::optional<Codec> sealed : {std::optional<Codec>(), std::optional(Codec::kQ4)}) {
    std::vector<World::Results> results;
    for (const int threads : {2, 1, 3}) {
      World world({.sealed = sealed, .threads = threads, .judged = threads == 2, .tokens_max = 6000});
      std::vector<World::Piece> pieces;
      for (const int readers : {35, 100}) {
        const SequenceId first = world.Start();
        world.Step({{first, RandomTokens(130, readers)}});
        pieces.push_back({first, {1}});
        for (int i = 1; i < readers; ++i) pieces.push_back({world.Fork(first), {static_cast<TokenId>(2 + i)}});
      }
      world.Step(pieces);
      if (HasFatalFailure()) return;
      results.push_back(world.results());
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(results[0], results[2]);
  }
}

// Sequences of the same paragraphs in different orders, decoding together. What they share differs from table to table,
// as joint encoding leaves it: readers of one block in the first layer read several in a later one.
class FusedReadersTest : public testing::Test {
 protected:
  static constexpr int kSequences = 9;

  // Each prompt has six of five paragraphs, so some come twice.
  void Prefill(World& world, int paragraph_tokens) {
    std::vector<Tokens> paragraphs;
    for (int i = 0; i < 5; ++i) {
      paragraphs.push_back(RandomTokens(paragraph_tokens, 70 + i));
      paragraphs.back().back() = 0;
    }
    for (int i = 0; i < kSequences; ++i) {
      Tokens prompt = {static_cast<TokenId>(i + 1), 9, 0};
      for (int j = 0; j < 6; ++j) {
        const Tokens& paragraph = paragraphs[(i * 3 + j * (1 + i % 3)) % 5];
        prompt.insert(prompt.end(), paragraph.begin(), paragraph.end());
      }
      ids_.push_back(world.Start());
      world.Step({{ids_.back(), prompt}});
    }
  }

  void DecodeOneEach(World& world, int step) {
    std::vector<World::Piece> pieces;
    for (const SequenceId id : ids_)
      pieces.push_back({id, RandomTokens(1, static_cast<uint64_t>(id.value) * 8 + step)});
    world.Step(pieces);
  }

  std::vector<SequenceId> ids_;
};

TEST_F(FusedReadersTest, AgreeWithTheReferenceOnAnyThreads) {
  for (const std::optional<Codec> sealed : {std::optional<Codec>(), {Codec::kQ4}, {Codec::kQ8}}) {
    for (const bool residuals : {false, true}) {
      std::vector<World::Results> results;
      for (const int threads : {1, 2, 3}) {
        ids_.clear();
        World world({.n_heads = 9,
                     .n_kv_heads = 3,
                     .window = {0, 0, 100, 0},
                     .sealed = sealed,
                     .residuals = residuals,
                     .fused = true,
                     .fused_apart = residuals,
                     .threads = threads,
                     .judged = threads == 2,
                     .tokens_max = 4000});
        Prefill(world, 40);
        for (int step = 0; step < 3; ++step) {
          DecodeOneEach(world, step);
          if (HasFatalFailure()) return;
        }
        EXPECT_GT(world.redirected(), 200);
        results.push_back(world.results());
      }
      EXPECT_EQ(results[0], results[1]);
      EXPECT_EQ(results[0], results[2]);
    }
  }
}

TEST_F(FusedReadersTest, EachBlockIsDecodedOnce) {
  World world({.n_heads = 6,
               .n_kv_heads = 2,
               .window = {0, 0, 0},
               .sealed = Codec::kQ4,
               .fused = true,
               .threads = 1,
               .judged = false,
               .tokens_max = 20000});
  Prefill(world, 300);
  int64_t encoded = 0;
  for (int table = 0; table < world.cache().shape().n_tables(); ++table) {
    std::set<int32_t> ids;
    for (const SequenceId id : ids_) {
      const BlockId* row = world.cache().table(id, table / 2, static_cast<kv::Kind>(table % 2));
      for (size_t i = 0; i < world.cache().blocks(id).size(); ++i) {
        if (world.cache().codec(row[i]) == Codec::kQ4) ids.insert(row[i].value);
      }
    }
    encoded += static_cast<int64_t>(ids.size());
  }
  const int64_t before = world.attention().decoded_heads();
  DecodeOneEach(world, 0);
  // Where readers of more blocks come together than are kept decoded at once, or parts of the plan meet, one may be
  // decoded twice.
  EXPECT_GE(world.attention().decoded_heads() - before, 2 * encoded);
  EXPECT_LE(world.attention().decoded_heads() - before, 2 * encoded * 11 / 10);
}

// Keys stored free of their position, and keys stored with it, against plain absolute RoPE: f32 throughout, to 1e-4.
TEST(AttentionTest, BlocksAreAbsoluteRope) {
  for (const int store : {0, 1, 2, 3}) {
    World world({.n_heads = 9,
                 .n_kv_heads = 3,
                 .neox = store % 2 == 1,
                 .codec = Codec::kF32,
                 .rope = {.freq_base = 100000},
                 .absolute_keys = store >= 2,
                 .tokens_max = 1100});
    RunChunks(world, RandomTokens(1060, 7), {1000, 1, 1, 50, 1});
    EXPECT_LT(world.worst_error(), 1e-4);
    RecordProperty("worst_error", std::to_string(world.worst_error()));
  }
}

TEST(AttentionTest, EveryHighwayTarget) {
  dense::ForEachTarget([] {
    for (const Codec codec : {Codec::kF32, Codec::kF16, Codec::kBf16}) {
      for (const int head_dim : {80, 18}) {
        for (const bool cosine : {false, true}) {
          CheckShape({.n_heads = 6,
                      .n_kv_heads = 2,
                      .head_dim = head_dim,
                      .codec = codec,
                      .window = {0, 19},
                      .absolute_keys = cosine,
                      .scaled = cosine,
                      .tokens_max = 300});
        }
      }
    }
  });
}

struct Store {
  Codec codec;
  bool cosine;  // absolute keys and scales
};

class RowIndependenceTest : public testing::TestWithParam<Store> {
 protected:
  WorldShape shape(int threads = 2) const {
    return {.n_heads = 10,
            .n_kv_heads = 2,
            .codec = GetParam().codec,
            .window = {0, 40},
            .rows_independent = true,
            .absolute_keys = GetParam().cosine,
            .scaled = GetParam().cosine,
            .threads = threads,
            .judged = false};
  }
  const Tokens tokens_ = RandomTokens(640, 8);
};

// Every row that both worlds computed has the same bits; at least `rows` are compared.
void ExpectSameBits(const World::Results& a, const World::Results& b, size_t rows) {
  size_t compared = 0;
  for (const auto& [key, row] : a) {
    const auto other = b.find(key);
    if (other == b.end()) continue;
    ++compared;
    ASSERT_EQ(row, other->second) << "layer " << key.second;
  }
  EXPECT_GE(compared, rows);
}

TEST_P(RowIndependenceTest, ChunksDoNotMatter) {
  World whole(shape());
  RunChunks(whole, tokens_, {640});
  World alone(shape());
  RunChunks(alone, tokens_, std::vector<int>(640, 1));
  ExpectSameBits(whole.results(), alone.results(), 1280);
  World pieces(shape());
  RunChunks(pieces, tokens_, {5, 17, 1, 1, 32, 300, 9, 1, 200, 74});
  ExpectSameBits(whole.results(), pieces.results(), 1280);
}

TEST_P(RowIndependenceTest, CompanyDoesNotMatter) {
  World alone(shape());
  RunChunks(alone, tokens_, {200, 1, 1, 60});
  World crowd(shape());
  const SequenceId other = crowd.Start(DomainId(1));
  const SequenceId id = crowd.Start();
  crowd.Step({{other, RandomTokens(33, 1)}, {id, Cut(tokens_, 0, 90)}});
  crowd.Step({{id, Cut(tokens_, 90, 111)}, {other, {3}}});
  crowd.Step({{other, {4}}, {id, Cut(tokens_, 201, 61)}});
  ExpectSameBits(alone.results(), crowd.results(), 2 * 262);
}

TEST_P(RowIndependenceTest, APrefixHitDoesNotMatter) {
  World fresh(shape());
  RunChunks(fresh, tokens_, {400, 1, 1, 60});
  World warm(shape());
  const SequenceId first = warm.Start();
  warm.Step({{first, Cut(tokens_, 0, 300)}});
  const SequenceId second = warm.Start();
  const int hit = warm.cache().AdoptPrefix(second, Cut(tokens_, 0, 402));
  EXPECT_GT(hit, 200);
  const SequenceId fork = warm.Fork(second);
  warm.Step({{second, Cut(tokens_, hit, 402 - hit)}});
  warm.Step({{fork, Cut(tokens_, hit, 3)}, {second, Cut(tokens_, 402, 60)}});
  ExpectSameBits(fresh.results(), warm.results(), 2 * 462);
}

TEST_P(RowIndependenceTest, ThreadsDoNotMatter) {
  for (const bool rows_independent : {true, false}) {
    std::vector<World::Results> results;
    for (const int threads : {1, 2, 3}) {
      WorldShape s = shape(threads);
      s.rows_independent = rows_independent;
      World world(s);
      RunChunks(world, tokens_, {300, 1, 100, 8, 1});
      results.push_back(world.results());
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(results[0], results[2]);
  }
}

// Four rows at once, each for itself over all blocks, against one after the other, in parts that decode many blocks at
// once.
TEST(AttentionTest, EncodedBlocksInPartsAsInRows) {
  const Tokens tokens = RandomTokens(700, 9);
  int compared = 0;
  for (const Codec sealed : {Codec::kQ8, Codec::kQ4}) {
    for (int before = 600; before < 620; ++before) {
      const WorldShape shape = {.n_heads = 4,
                                .n_kv_heads = 2,
                                .head_dim = 160,
                                .rows_independent = true,
                                .sealed = sealed,
                                .residuals = true,
                                .judged = false};
      World together(shape);
      const SequenceId id = together.Start();
      together.Step({{id, Cut(tokens, 0, before)}});
      const size_t blocks = together.cache().blocks(id).size();
      together.Step({{id, Cut(tokens, before, 4)}});
      // Else the later rows of those that come one after the other meet a block that is encoded by then.
      if (together.cache().blocks(id).size() != blocks || together.cache().blocks(id).back().sealed) continue;
      World apart(shape);
      RunChunks(apart, tokens, {before, 1, 1, 1, 1});
      ExpectSameBits(together.results(), apart.results(), before + 4);
      ++compared;
    }
  }
  EXPECT_GT(compared, 10);
}

INSTANTIATE_TEST_SUITE_P(Stores, RowIndependenceTest,
                         testing::Values(Store{Codec::kBf16, false}, Store{Codec::kF16, false},
                                         Store{Codec::kF32, false}, Store{Codec::kBf16, true}, Store{Codec::kF16, true},
                                         Store{Codec::kF32, true}),
                         [](const auto& store) {
                           return std::string(codec::CodecName(store.param.codec)) +
                                  (store.param.cosine ? "_cosine" : "");
                         });

}  // namespace
}  // namespace jointkv::attention
