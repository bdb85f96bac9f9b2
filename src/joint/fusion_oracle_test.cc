// Store and fusion together against originals, under random operations: sequences of several domains, exact and lossy,
// that append, seal, fuse, fork, are freed, cancelled and evicted, while fusion is switched off and on.
//
// Contents (what a model would compute) are a function of the history, and close to a function of the last token alone:
// equal tokens in another context differ by little, by more than the budget now and then. So the oracle can compute
// every original at any time, and hold each stored block against it: exact sequences bit for bit, lossy ones within the
// budget. JOINTKV_ORACLE_OPS sets the number of operations.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "codec/block_io.h"
#include "joint/fusion.h"
#include "kv/test_content.h"

namespace jointkv::joint {
namespace {

using codec::Kind;
using kv::KvCache;

constexpr int kOperations = 1'000'000;  // over all configurations
constexpr int kConfigs = 12;
// A slab serves one class at a time: fewer are all taken by what the forward pass writes.
constexpr int kSlabsForDifferences = 60;
constexpr int kSequencesMax = 10;
constexpr int kTokensMax = 96;
constexpr int kDomains = 2;
constexpr int kVocabulary = 6;  // token 0 ends a block

struct Config {
  const char* name;
  codec::BlockLayout layout;
  std::vector<int> window;
  int slabs;
  bool prefix_cache;
  FusionOptions options;
  uint32_t seed;
  std::vector<codec::Codec> sealed = {};
};

struct Mirror {
  SequenceId id;
  DomainId domain;
  bool lossy = false;
  std::vector<TokenId> tokens;
  std::vector<uint64_t> histories;
  std::vector<TokenId> todo;  // prompt tokens not yet appended
  int committed = 0;
  bool pending = false;  // appended and written, not committed
  bool decodes = false;
};

class Run {
 public:
  explicit Run(const Config& config) : config_(config), random_(config.seed), pool_(2) {
    KvCache::Options options;
    options.cap_bytes = config.slabs * kv::kSlabGranules * config.layout.granule_bytes();
    options.prefix_cache = config.prefix_cache;
    ShapeStore(config.options, config.layout, options);
    auto cache =
        KvCache::Create({config.layout, config.window, config.sealed}, CutterFor(config.options, {1}), options);
    CHECK(cache.ok());
    cache_ = std::move(cache).value();
    for (int i = 0; i < config.layout.n_kv_heads * config.layout.head_dim / 2; ++i)
      query_energy_.push_back(std::exp2(5 * i % 9));
    fusion_ = std::make_unique<Fusion>(config.options, std::vector<const dense::RopeTable*>(config.window.size()),
                                       *cache_, pool_, [this](int) { return std::span<const double>(query_energy_); });
    for (auto& phrase : phrases_) {
      phrase = RandomTokens(4 + Below(20));
      phrase.push_back(0);
    }
    scratch_.resize(config.layout.block_bytes(codec::kBlockTokensMax));
  }

  void Go(int operations) {
    for (operation_ = 0; operation_ < operations && !testing::Test::HasFailure(); ++operation_) {
      while (!Step()) {
      }
      cache_->CheckIntegrity();
      if (operation_ % 16 == 0) fusion_->CheckIntegrity();
      if (operation_ % 64 != 0) continue;
      for (const Mirror& m : mirrors_) CheckContent(m);
    }
    EXPECT_FALSE(testing::Test::HasFailure())
        << config_.name << ", seed " << config_.seed << ", operation " << operation_;
    Finish();
  }

 private:
  int Below(int n) { return static_cast<int>(random_() % static_cast<uint32_t>(n)); }
  std::vector<TokenId> RandomTokens(int n) {
    std::vector<TokenId> tokens(n);
    for (TokenId& token : tokens) token = 1 + Below(kVocabulary - 1);
    return tokens;
  }

  bool Step() {
    const int draw = Below(1000);
    if (draw < 120) return Create();
    if (draw < 480) return Append();
    if (draw < 860) return Commit();
    if (draw < 910) return Fork();
    if (draw < 970) return Free(false);
    if (draw < 990) return Free(true);  // cancelled in mid-step
    if (draw < 996) return Switch();
    cache_->DropPrefixCache();
    EXPECT_EQ(cache_->stats().used_bytes, cache_->stats().running_bytes);
    return true;
  }

  Mirror* Pick(auto&& suits) {
    std::vector<Mirror*> found;
    for (Mirror& m : mirrors_) {
      if (suits(m)) found.push_back(&m);
    }
    return found.empty() ? nullptr : found[Below(static_cast<int>(found.size()))];
  }

  bool Create() {
    if (mirrors_.size() == kSequencesMax) return false;
    Mirror m;
    m.domain = DomainId(Below(kDomains));
    // A few phrases in any order: equal blocks in different contexts, and prefixes of every depth.
    std::vector<TokenId> prompt = RandomTokens(Below(2) * Below(3));
    for (int phrases = 1 + Below(4); phrases > 0; --phrases) {
      const auto& phrase = phrases_[Below(prompt.empty() ? 2 : static_cast<int>(std::size(phrases_)))];
      prompt.insert(prompt.end(), phrase.begin(), phrase.end());
    }
    prompt.resize(std::min<size_t>(prompt.size(), kTokensMax - 8));
    prompt.push_back(1);
    const KvCache::Sharing sharing = fusion_->SharingOf(Below(4) != 0);
    m.lossy = sharing == KvCache::Sharing::kLossy;
    m.id = cache_->Create(m.domain, 1 + Below(kTokensMax), sharing);
    const int adopted = cache_->AdoptPrefix(m.id, prompt);
    adoptions_ += adopted > 0;
    Extend(m, std::span(prompt).first(adopted));
    m.todo.assign(prompt.begin() + adopted, prompt.end());
    m.committed = adopted;
    mirrors_.push_back(std::move(m));
    CheckContent(mirrors_.back());
    return true;
  }

  void Extend(Mirror& m, std::span<const TokenId> tokens) {
    for (const TokenId token : tokens) {
      const uint64_t before = m.histories.empty() ? kv::HistoryStart(m.domain) : m.histories.back();
      m.histories.push_back(kv::HistoryAfter(before, token));
      m.tokens.push_back(token);
    }
  }

  bool Append() {
    Mirror* m = Pick([](const Mirror& x) { return !x.pending && static_cast<int>(x.tokens.size()) < kTokensMax; });
    if (m == nullptr) return false;
    std::vector<TokenId> tokens;
    if (m->todo.empty()) {
      tokens = Below(3) > 0 ? RandomTokens(1) : phrases_[Below(static_cast<int>(std::size(phrases_)))];
    } else {
      tokens.assign(m->todo.begin(), m->todo.begin() + std::min<int>(static_cast<int>(m->todo.size()), 1 + Below(60)));
    }
    if (!cache_->Append(m->id, tokens)) {
      ++failures_;
      return true;
    }
    if (!m->todo.empty()) m->todo.erase(m->todo.begin(), m->todo.begin() + static_cast<ptrdiff_t>(tokens.size()));
    const int from = static_cast<int>(m->tokens.size());
    Extend(*m, tokens);
    WriteFrom(*m, from);
    m->pending = true;
    return true;
  }

  // |x| about 1 a channel, and up to a quarter of that from the context: how much, is the sequence's.
  void Original(const Mirror& m, int position, int table, std::span<float> values) {
    kv::FillContent(kv::MixContent(17, static_cast<uint32_t>(m.tokens[position])), table, values);
    noise_.resize(values.size());
    kv::FillContent(m.histories[position], table, noise_);
    const float amplitude = static_cast<float>(m.histories[0] / 7 % 5) * 0.06F;
    for (size_t i = 0; i < values.size(); ++i) values[i] = (values[i] + amplitude * noise_[i]) / 74;
    if (config_.options.policy != Policy::kCosine) return;
    // As in real models, what all keys have in common makes unrelated ones similar.
    kv::FillContent(99, table, noise_);
    for (size_t i = 0; i < values.size(); ++i) values[i] += noise_[i] / 50;
  }

  void WriteFrom(const Mirror& m, int from) {
    std::vector<float> values(kv::ContentWidth(*cache_));
    const auto blocks = cache_->blocks(m.id);
    for (size_t i = 0; i < blocks.size(); ++i) {
      for (int token = std::max(0, from - blocks[i].start); token < blocks[i].tokens; ++token) {
        for (int table = 0; table < cache_->shape().n_tables(); ++table) {
          const auto kind = static_cast<Kind>(table % 2);
          Original(m, blocks[i].start + token, table, values);
          codec::StoreToken(config_.layout, kind, cache_->data(cache_->table(m.id, table / 2, kind)[i]), blocks[i].cap,
                            token, values);
        }
      }
    }
  }

  bool Commit() {
    Mirror* m = Pick([](const Mirror& x) { return x.pending; });
    if (m == nullptr) return false;
    Phase phase = Phase::kDecode;
    if (!m->decodes) {
      m->decodes = m->todo.empty();
      phase = m->decodes ? Phase::kEntersDecode : Phase::kPrefill;
    }
    fusion_->OnSealed(m->id, cache_->Commit(m->id), phase);
    m->pending = false;
    m->committed = static_cast<int>(m->tokens.size());
    CheckContent(*m);
    return true;
  }

  bool Fork() {
    if (mirrors_.size() == kSequencesMax) return false;
    const Mirror* source = Pick([](const Mirror& x) { return !x.pending; });
    if (source == nullptr) return false;
    Mirror child = *source;
    child.id = cache_->Fork(source->id, 1 + Below(kTokensMax));
    mirrors_.push_back(std::move(child));
    return true;
  }

  bool Free(bool in_step) {
    Mirror* m = Pick([&](const Mirror& x) { return x.pending == in_step; });
    if (m == nullptr) return false;
    cache_->Free(m->id);
    if (m != &mirrors_.back()) *m = std::move(mirrors_.back());
    mirrors_.pop_back();
    return true;
  }

  bool Switch() {
    fusion_->set_enabled(!fusion_->enabled());
    return true;
  }

  // Every committed vector that the sequence may still look back on, against its original.
  void CheckContent(const Mirror& m) {
    const auto blocks = cache_->blocks(m.id);
    std::vector<float> original(kv::ContentWidth(*cache_));
    std::vector<float> stored(original.size());
    for (int table = 0; table < cache_->shape().n_tables(); ++table) {
      const auto kind = static_cast<Kind>(table % 2);
      const BlockId* row = cache_->table(m.id, table / 2, kind);
      for (size_t i = 0; i < blocks.size() && blocks[i].start < m.committed; ++i) {
        if (!row[i].valid()) continue;
        const int tokens = std::min<int>(blocks[i].tokens, m.committed - blocks[i].start);
        const std::vector<std::byte> block = kv::StoredBlock(*cache_, table, row[i], blocks[i].cap, blocks[i].tokens);
        const float* scales = cache_->scales(m.id, table / 2, kind);
        const float scale = scales == nullptr ? 1 : scales[i];
        double squares = 0;
        double product = 0;
        double original_size = 0;
        double stored_size = 0;
        for (int token = 0; token < tokens; ++token) {
          Original(m, blocks[i].start + token, table, original);
          codec::StoreToken(config_.layout, kind, scratch_.data(), codec::kBlockTokensMax, 0, original);
          codec::LoadToken(config_.layout, kind, scratch_.data(), codec::kBlockTokensMax, 0, original);
          codec::LoadToken(config_.layout, kind, block.data(), blocks[i].cap, token, stored);
          for (size_t c = 0; c < stored.size(); ++c) {
            stored[c] *= scale;
            squares += std::pow(stored[c] - original[c], 2);
            product += static_cast<double>(stored[c]) * original[c];
            original_size += static_cast<double>(original[c]) * original[c];
            stored_size += static_cast<double>(stored[c]) * stored[c];
          }
        }
        if (squares != 0 && blocks[i].sealed && !config_.sealed.empty() && fusion_->energy(table) > 0) {
          const double nmse = squares / (tokens * fusion_->energy(table));
          const double allowed = std::max<double>(m.lossy ? config_.options.budget : 0, EncodedNmse(m, table, i));
          EXPECT_LE(nmse, allowed * (1 + 1e-4)) << "block " << i << " of table " << table;
          continue;
        }
        if (!m.lossy || !blocks[i].sealed) {
          EXPECT_EQ(squares, 0) << "block " << i << " of table " << table;
          continue;
        }
        if (squares == 0) continue;
        if (config_.options.policy == Policy::kCosine) {
          const double cosine = product / std::sqrt(original_size * stored_size);
          if (kind == Kind::kK) {
            EXPECT_GE(cosine, config_.options.threshold - 1e-4);
          }
          EXPECT_NEAR(std::sqrt(stored_size / original_size), 1, 0.02);  // bf16 rounding of every mean on the way
          worst_ = std::max(worst_, kind == Kind::kK ? 2 - 2 * cosine : 0);
          continue;
        }
        const double nmse = squares / (tokens * fusion_->energy(table));
        EXPECT_LE(nmse, config_.options.budget * (1 + 1e-4)) << "block " << i << " of table " << table;
        worst_ = std::max(worst_, nmse);
      }
    }
  }

  // What encoding leaves of a block as its sequence wrote it.
  double EncodedNmse(const Mirror& m, int table, size_t index) {
    const kv::LogicalBlock& block = cache_->blocks(m.id)[index];
    const auto kind = static_cast<Kind>(table % 2);
    const codec::Codec sealed = config_.sealed[table];
    const codec::Codec to = block.start == 0 && sealed == codec::Codec::kQ4 ? codec::Codec::kQ8 : sealed;
    if (!codec::IsQuantised(to)) return 0;
    std::vector<std::byte> written(config_.layout.block_bytes(block.cap));
    std::vector<std::byte> encoded(written.size());
    std::vector<std::byte> decoded(written.size());
    std::vector<float> values(kv::ContentWidth(*cache_));
    std::vector<float> left(values.size());
    for (int token = 0; token < block.tokens; ++token) {
      Original(m, block.start + token, table, values);
      codec::StoreToken(config_.layout, kind, written.data(), block.cap, token, values);
    }
    const codec::Reference reference = kind == Kind::kK ? cache_->key_reference(table / 2) : codec::Reference();
    codec::EncodeBlock(config_.layout, kind, to, written.data(), block.cap, block.tokens, reference, encoded.data());
    codec::DecodeBlock(config_.layout, kind, to, encoded.data(), block.cap, block.tokens, reference, decoded.data());
    double squares = 0;
    for (int token = 0; token < block.tokens; ++token) {
      codec::LoadToken(config_.layout, kind, written.data(), block.cap, token, values);
      codec::LoadToken(config_.layout, kind, decoded.data(), block.cap, token, left);
      for (size_t c = 0; c < left.size(); ++c) squares += std::pow(values[c] - left[c], 2);
    }
    return squares / (block.tokens * fusion_->energy(table));
  }

  // Largest relative squared error of a member: for cosine of equally long vectors, |a - b|^2 / |a|^2 = 2 - 2 cos.
  double Allowed() const {
    const FusionOptions& options = config_.options;
    return options.policy == Policy::kCosine ? 2 - 2 * options.threshold : options.budget;
  }

  void Finish() {
    for (const Mirror& m : mirrors_) cache_->Free(m.id);
    cache_->DropPrefixCache();
    cache_->CheckIntegrity();
    const kv::KvStats store = cache_->stats();
    EXPECT_EQ(store.used_bytes, 0u);
    EXPECT_EQ(store.held_bytes, 0u);
    EXPECT_EQ(store.running_bytes, 0u);
    fusion_->DropReleased();
    const FusionStats stats = fusion_->stats();
    EXPECT_EQ(stats.representatives, 0);
    EXPECT_LE(worst_, stats.worst_nmse * (1 + 1e-4));
    std::cout << config_.name << ": seed " << config_.seed << ", " << operation_ << " operations, " << adoptions_
              << " adoptions, " << failures_ << " failed appends, " << stats.fused << " of " << stats.offered
              << " blocks fused, " << stats.rejected << " rejected, " << stats.residuals << " differences, worst NMSE "
              << worst_ << " of " << Allowed() << "\n";
    if (operation_ < 50'000) return;
    const bool roomy = config_.slabs >= kSlabsForDifferences;
    EXPECT_EQ(failures_ > 0, !roomy);
    EXPECT_EQ(stats.fused > 0, config_.options.policy != Policy::kOff);
    // Where there is room, what is beyond the budget is a difference.
    EXPECT_EQ(stats.rejected > 0, config_.options.policy != Policy::kOff && !roomy);
    if (roomy) {
      EXPECT_GT(stats.residuals, 1000);
    }
    if (!config_.sealed.empty()) {
      EXPECT_GT(stats.encoded, 0);
      EXPECT_EQ(stats.unencoded > 0, !roomy);
      return;
    }
    EXPECT_EQ(worst_ > Allowed() / 2, config_.options.policy != Policy::kOff);
  }

  const Config& config_;
  std::mt19937 random_;
  ThreadPool pool_;
  std::unique_ptr<KvCache> cache_;
  std::vector<double> query_energy_;
  std::unique_ptr<Fusion> fusion_;
  std::vector<TokenId> phrases_[6];
  std::vector<Mirror> mirrors_;
  std::vector<float> noise_;
  std::vector<std::byte> scratch_;
  int64_t operation_ = 0;
  int64_t adoptions_ = 0;
  int64_t failures_ = 0;
  double worst_ = 0;
};

void RunConfig(const Config& config) {
  const char* text = std::getenv("JOINTKV_ORACLE_OPS");
  const int operations = text == nullptr ? kOperations : std::atoi(text);
  Run(config).Go((operations + kConfigs - 1) / kConfigs);
}

using codec::Codec;

FusionOptions Bounded(float budget) {
  FusionOptions options;
  options.policy = Policy::kBounded;
  options.budget = budget;
  return options;
}

FusionOptions WithResiduals(float budget) {
  FusionOptions options = Bounded(budget);
  options.residuals = true;
  return options;
}

TEST(FusionOracle, FullAttention) {
  RunConfig({"full", {1, 8, Codec::kBf16}, {0, 0}, 10, true, WithResiduals(0.01F), 21});
}
TEST(FusionOracle, Windows) { RunConfig({"windows", {2, 4, Codec::kF16}, {0, 12, 40}, 14, true, Bounded(0.1F), 22}); }
TEST(FusionOracle, NoPrefixCache) {
  RunConfig({"no prefix cache", {1, 8, Codec::kF32}, {0, 16}, 6, false, Bounded(0.04F), 23});
}
TEST(FusionOracle, Narrow) { RunConfig({"narrow", {1, 4, Codec::kBf16}, {0, 9}, 5, true, Bounded(0.08F), 24}); }
FusionOptions PaperAt(float threshold) {
  FusionOptions options;
  options.policy = Policy::kCosine;
  options.threshold = threshold;
  options.chunk_tokens = 32;
  return options;
}

TEST(FusionOracle, Similarity) {
  FusionOptions options = Bounded(0.3F);
  options.similarity = true;
  RunConfig({"similarity", {1, 4, Codec::kBf16}, {0, 11}, 10, true, options, 41});
}

TEST(FusionOracle, Cosine) {
  RunConfig({"cosine", {1, 8, Codec::kBf16}, {0, 0, 0, 0, 0}, 12, true, PaperAt(0.9F), 26});
}
TEST(FusionOracle, CosineWindows) {
  RunConfig({"cosine, windows", {1, 6, Codec::kF16}, {0, 0, 24, 0, 0, 0}, 14, true, PaperAt(0.8F), 27});
}
TEST(FusionOracle, Encoded) {
  const std::vector<Codec> sealed = {Codec::kQ8, Codec::kQ4, Codec::kQ4, Codec::kBf16};
  RunConfig({"encoded", {2, 8, Codec::kBf16}, {0, 20}, 10, true, WithResiduals(0.03F), 29, sealed});
}
TEST(FusionOracle, Differences) {
  RunConfig({"differences", {1, 16, Codec::kBf16}, {0, 20}, kSlabsForDifferences, true, WithResiduals(0.03F), 31});
}
TEST(FusionOracle, DifferencesFromEncoded) {
  const std::vector<Codec> sealed = {Codec::kQ8, Codec::kQ8, Codec::kQ4, Codec::kQ8};
  RunConfig({"differences, encoded",
             {2, 8, Codec::kBf16},
             {0, 20},
             kSlabsForDifferences,
             true,
             WithResiduals(0.03F),
             32,
             sealed});
}
TEST(FusionOracle, EncodedOnly) {
  FusionOptions off;
  off.policy = Policy::kOff;
  RunConfig({"encoded, off", {1, 16, Codec::kBf16}, {0}, 5, true, off, 30, {Codec::kQ4, Codec::kQ4}});
}
TEST(FusionOracle, Off) {
  FusionOptions off;
  off.policy = Policy::kOff;
  RunConfig({"off", {1, 4, Codec::kBf16}, {0}, 4, true, off, 25});
}

}  // namespace
}  // namespace jointkv::joint
