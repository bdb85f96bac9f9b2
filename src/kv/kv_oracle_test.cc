// The store against a plain oracle under random operations, with CheckIntegrity and the oracle's own recount after
// each.
//
// The oracle knows only tokens: what each sequence holds, which blocks the index must know and who uses them, in which
// order they are evicted. Contents are checked by value (test_content.h), so any block that was shared wrongly, written
// through a share, or freed too early shows as a wrong value. JOINTKV_ORACLE_OPS sets the number of operations.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include <gtest/gtest.h>

#include "kv/kv_cache.h"
#include "kv/test_content.h"

namespace jointkv::kv {
namespace {

constexpr int kOperations = 1'000'000;  // over all configurations
constexpr int kConfigs = 5;
constexpr int kSequencesMax = 9;
constexpr int kTokensMax = 96;
constexpr int kDomains = 3;
constexpr TokenId kVocabulary = 6;  // small, so that unrelated texts meet; token 0 ends a block

struct Config {
  const char* name;
  codec::BlockLayout layout;
  std::vector<int> window;
  int slabs;
  bool prefix_cache;
  uint32_t seed;

  bool any_window() const {
    return std::ranges::any_of(window, [](int w) { return w > 0; });
  }
};

// One block of one chain that the index must know.
struct Entry {
  Entry* parent = nullptr;
  int children = 0;
  int users = 0;
  int64_t unused_since = 0;
  DomainId domain;
  int cap = 0;
  uint64_t name = 0;            // hash of domain, tree and tokens up to the block's end
  int64_t seen_at = -1;         // operation at which `blocks` were last filled in
  std::vector<BlockId> blocks;  // by table
};

struct Mirror {
  SequenceId id;
  DomainId domain;
  bool lossy = false;
  std::vector<TokenId> tokens;
  std::vector<uint64_t> histories;
  std::vector<TokenId> todo;  // prompt tokens not yet appended
  std::vector<Entry*> chain;
  int committed = 0;
  bool off_chain = false;
  bool pending = false;  // appended, not committed
  bool written = false;
};

class Run {
 public:
  explicit Run(const Config& config) : config_(config), random_(config.seed) {
    auto cache = KvCache::Create({config.layout, config.window}, BlockCutter({1}),
                                 {config.slabs * kSlabGranules * config.layout.granule_bytes(), config.prefix_cache});
    CHECK(cache.ok());
    cache_ = std::move(cache).value();
    for (auto& text : texts_) text = RandomTokens(kTokensMax);
  }

  void Go(int operations) {
    for (operation_ = 0; operation_ < operations && !testing::Test::HasFailure(); ++operation_) {
      while (!Step()) {
      }
      CheckAll();
      if (operation_ % 256 == 0) {
        for (const Mirror& m : mirrors_) CheckContent(m);
      }
    }
    EXPECT_FALSE(testing::Test::HasFailure())
        << config_.name << ", seed " << config_.seed << ", operation " << operation_;
    Finish();
  }

 private:
  int Below(int n) { return static_cast<int>(random_() % static_cast<uint32_t>(n)); }
  std::vector<TokenId> RandomTokens(int n) {
    std::vector<TokenId> tokens(n);
    for (TokenId& token : tokens) token = Below(3) == 0 ? Below(kVocabulary) : 1 + Below(kVocabulary - 1);
    return tokens;
  }

  // One random operation; false where the one drawn has nothing to work on.
  bool Step() {
    const int draw = Below(1000);
    if (draw < 130) return Create();
    if (draw < 445) return Append();
    if (draw < 665) return Write();
    if (draw < 865) return Commit();
    if (draw < 905) return Fork();
    if (draw < 960) return Free(false);
    if (draw < 980) return Free(true);  // cancelled in mid-step
    if (draw < 998) return Move();
    return Drop();
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
    // A few texts, cut anywhere and sometimes continued freely, so prefixes are shared at every depth.
    const auto& text = texts_[Below(static_cast<int>(std::size(texts_)))];
    std::vector<TokenId> prompt(text.begin(), text.begin() + 1 + Below(70));
    if (Below(2) == 0) {
      const auto more = RandomTokens(Below(20));
      prompt.insert(prompt.end(), more.begin(), more.end());
    }
    m.lossy = Below(3) == 0;
    m.id =
        cache_->Create(m.domain, 1 + Below(kTokensMax), m.lossy ? KvCache::Sharing::kLossy : KvCache::Sharing::kExact);
    const auto [known, chain] = Longest(m, prompt);
    const int adopted = cache_->AdoptPrefix(m.id, prompt);
    if (config_.any_window()) {
      EXPECT_LE(adopted, known);
      short_adoptions_ += adopted < known;
    } else {
      EXPECT_EQ(adopted, known);
    }
    adoptions_ += adopted > 0;
    Extend(m, std::span(prompt).first(adopted));
    m.todo.assign(prompt.begin() + adopted, prompt.end());
    m.committed = adopted;
    int end = 0;
    for (size_t i = 0; end < adopted; ++i) {
      end = chain[i].first;
      m.chain.push_back(chain[i].second);
      ++chain[i].second->users;
    }
    EXPECT_EQ(end, adopted);
    mirrors_.push_back(std::move(m));
    CheckContent(mirrors_.back());
    return true;
  }

  static uint64_t Name(const Mirror& m, uint64_t history) { return MixContent(history, m.lossy); }

  // The longest chain of known whole blocks that leaves a token over: its length, and each block's end and entry.
  std::pair<int, std::vector<std::pair<int, Entry*>>> Longest(const Mirror& m, std::span<const TokenId> prompt) {
    const auto histories = Histories(m.domain, prompt);
    std::vector<std::pair<int, Entry*>> chain;
    int end = 0;
    while (true) {
      const int length = cache_->cutter().FirstBlock(prompt.subspan(end));
      if (length == 0 || end + length >= static_cast<int>(prompt.size())) break;
      const auto found = entries_.find(Name(m, histories[end + length - 1]));
      if (found == entries_.end()) break;
      end += length;
      chain.emplace_back(end, found->second.get());
    }
    return {end, chain};
  }

  void Extend(Mirror& m, std::span<const TokenId> tokens) {
    for (const TokenId token : tokens) {
      m.histories.push_back(HistoryAfter(m.histories.empty() ? HistoryStart(m.domain) : m.histories.back(), token));
      m.tokens.push_back(token);
    }
  }

  bool Append() {
    Mirror* m = Pick([](const Mirror& x) { return !x.pending && static_cast<int>(x.tokens.size()) < kTokensMax; });
    if (m == nullptr) return false;
    std::vector<TokenId> tokens;
    if (m->todo.empty()) {
      tokens = RandomTokens(Below(3) > 0 ? 1 : 1 + Below(8));
    } else {
      tokens.assign(m->todo.begin(), m->todo.begin() + std::min<int>(static_cast<int>(m->todo.size()), 1 + Below(40)));
    }
    const KvStats before = cache_->stats();
    const bool appended = cache_->Append(m->id, tokens);
    const KvStats after = cache_->stats();
    const int64_t evicted = after.evicted_blocks - before.evicted_blocks;
    for (int64_t i = 0; i < evicted; ++i) EvictOldest();
    if (appended) {
      if (!m->todo.empty()) m->todo.erase(m->todo.begin(), m->todo.begin() + static_cast<ptrdiff_t>(tokens.size()));
      Extend(*m, tokens);
      m->pending = true;
      m->written = false;
    } else {
      ++failures_;
      EXPECT_EQ(after.running_bytes, before.running_bytes);
      EXPECT_EQ(after.copies_on_write, before.copies_on_write);
      // It gave up either at once, or with nothing left to evict.
      EXPECT_TRUE(evicted == 0 || std::ranges::none_of(entries_, [](const auto& e) { return e.second->users == 0; }));
    }
    CheckContent(*m);
    return true;
  }

  void EvictOldest() {
    // Of the domain with the most unused entries; the lowest of several.
    std::map<DomainId, int> unused;
    for (const auto& [name, entry] : entries_) unused[entry->domain] += entry->users == 0;
    const auto most = std::ranges::max_element(unused, {}, [](const auto& count) { return count.second; });
    Entry* oldest = nullptr;
    for (const auto& [name, entry] : entries_) {
      if (entry->users == 0 && entry->domain == most->first &&
          (oldest == nullptr || entry->unused_since < oldest->unused_since))
        oldest = entry.get();
    }
    ASSERT_NE(oldest, nullptr);
    EXPECT_EQ(oldest->children, 0);
    if (oldest->parent != nullptr) --oldest->parent->children;
    entries_.erase(oldest->name);
    ++evictions_;
  }

  bool Write() {
    Mirror* m = Pick([](const Mirror& x) { return x.pending && !x.written; });
    if (m == nullptr) return false;
    WriteContent(*cache_, m->id, m->histories, m->committed);
    m->written = true;
    CheckContent(*m);
    return true;
  }

  bool Commit() {
    Mirror* m = Pick([](const Mirror& x) { return x.pending && x.written; });
    if (m == nullptr) return false;
    cache_->Commit(m->id);
    m->pending = false;
    m->committed = static_cast<int>(m->tokens.size());
    const auto blocks = cache_->blocks(m->id);
    const size_t first = m->chain.size();
    for (size_t i = first; config_.prefix_cache && !m->off_chain && i < blocks.size() && blocks[i].sealed; ++i) {
      Publish(*m, i, blocks[i]);
    }
    CheckContent(*m);
    return true;
  }

  void Publish(Mirror& m, size_t index, const LogicalBlock& block) {
    const uint64_t name = Name(m, m.histories[block.start + block.tokens - 1]);
    auto& entry = entries_[name];
    if (entry == nullptr) {
      entry = std::make_unique<Entry>();
      entry->name = name;
      entry->domain = m.domain;
      entry->parent = m.chain.empty() ? nullptr : m.chain.back();
      if (entry->parent != nullptr) ++entry->parent->children;
      entry->cap = block.cap;
    } else if (config_.any_window() && block.cap != entry->cap) {
      // The one case where known content is not shared: a stripped entry of another size class.
      m.off_chain = true;
      ++departures_;
      return;
    }
    EXPECT_EQ(entry->cap, block.cap) << "block " << index;
    ++entry->users;
    m.chain.push_back(entry.get());
  }

  bool Fork() {
    if (mirrors_.size() == kSequencesMax) return false;
    const Mirror* source = Pick([](const Mirror& x) { return !x.pending; });
    if (source == nullptr) return false;
    Mirror child = *source;
    child.id = cache_->Fork(source->id, 1 + Below(kTokensMax));
    for (Entry* entry : child.chain) ++entry->users;
    mirrors_.push_back(std::move(child));
    CheckContent(mirrors_.back());
    return true;
  }

  bool Free(bool in_step) {
    Mirror* m = Pick([&](const Mirror& x) { return x.pending == in_step; });
    if (m == nullptr) return false;
    cache_->Free(m->id);
    for (size_t i = m->chain.size(); i > 0; --i) {
      if (--m->chain[i - 1]->users == 0) m->chain[i - 1]->unused_since = ++clock_;
    }
    if (m != &mirrors_.back()) *m = std::move(mirrors_.back());
    mirrors_.pop_back();
    return true;
  }

  // What joint encoding does, without changing a value: a block moves down, or (where no index keeps blocks too, which
  // would have to be counted) gives way to another sequence's of the same history.
  bool Move() {
    Mirror* m = Pick([](const Mirror& x) { return x.lossy && x.committed > 0; });
    if (m == nullptr) return false;
    const int index = Below(static_cast<int>(cache_->blocks(m->id).size()));
    const int table = Below(cache_->shape().n_tables());
    if (!cache_->Redirectable(m->id, table, index)) return false;
    const auto block_of = [&](const Mirror& x) {
      return cache_->table(x.id, table / 2, static_cast<Kind>(table % 2))[index];
    };
    const LogicalBlock block = cache_->blocks(m->id)[index];
    const int last = block.start + block.tokens - 1;
    const Mirror* other = Pick([&](const Mirror& x) {
      return !config_.prefix_cache && x.committed > last && x.histories[last] == m->histories[last] &&
             cache_->blocks(x.id)[index].cap == block.cap && block_of(x).valid() && block_of(x) != block_of(*m);
    });
    if (other == nullptr) {
      const BlockId before = block_of(*m);
      moves_ += cache_->MoveDown(m->id, table, index) != before;
    } else {
      const BlockId target = block_of(*other);
      cache_->Redirect(m->id, table, index, target);
      EXPECT_EQ(block_of(*m), target);
      ++redirects_;
    }
    CheckContent(*m);
    return true;
  }

  bool Drop() {
    const int64_t before = cache_->stats().evicted_blocks;
    cache_->DropPrefixCache();
    const int64_t evicted = cache_->stats().evicted_blocks - before;
    for (int64_t i = 0; i < evicted; ++i) EvictOldest();
    EXPECT_TRUE(std::ranges::none_of(entries_, [](const auto& e) { return e.second->users == 0; }));
    EXPECT_EQ(cache_->stats().used_bytes, cache_->stats().running_bytes);
    return true;
  }

  void CheckContent(const Mirror& m) {
    const int readable = m.pending && m.written ? static_cast<int>(m.tokens.size()) : m.committed;
    EXPECT_EQ(WrongContent(*cache_, m.id, m.histories, readable), 0);
  }

  // The tables of all sequences against the oracle: owners of each block, domains, equal chains at equal places,
  // windows.
  void CheckAll() {
    cache_->CheckIntegrity();
    const int n_tables = cache_->shape().n_tables();
    const auto ids = static_cast<size_t>(cache_->total_blocks());
    owners_.assign(ids, 0);
    domain_of_.assign(ids, DomainId());
    size_t running = 0;
    size_t logical = 0;
    for (const Mirror& m : mirrors_) {
      logical += m.tokens.size();
      EXPECT_TRUE(std::ranges::equal(cache_->tokens(m.id), m.tokens));
      const auto blocks = cache_->blocks(m.id);
      for (int table = 0; table < n_tables; ++table) {
        const int window = config_.window[table / 2];
        const BlockId* row = cache_->table(m.id, table / 2, static_cast<Kind>(table % 2));
        for (size_t i = 0; i < blocks.size(); ++i) {
          const bool gone =
              window > 0 && blocks[i].sealed && blocks[i].start + blocks[i].tokens <= m.committed - window + 1;
          EXPECT_EQ(row[i].valid(), !gone);
          if (!row[i].valid()) continue;
          if (owners_[row[i].index()]++ == 0) {
            running += config_.layout.block_bytes(blocks[i].cap);
            domain_of_[row[i].index()] = m.domain;
          }
          EXPECT_EQ(domain_of_[row[i].index()], m.domain);
          if (i < m.chain.size()) CheckPlace(*m.chain[i], table, row[i]);
        }
      }
    }
    for (const Mirror& m : mirrors_) {
      const size_t n_blocks = cache_->blocks(m.id).size();
      for (int table = 0; table < n_tables; ++table) {
        const BlockId* row = cache_->table(m.id, table / 2, static_cast<Kind>(table % 2));
        for (size_t i = 0; i < n_blocks; ++i) {
          if (!row[i].valid()) continue;
          EXPECT_EQ(cache_->sharers(row[i]), owners_[row[i].index()] + (i < m.chain.size() ? 1 : 0));
        }
      }
    }
    const KvStats stats = cache_->stats();
    EXPECT_EQ(stats.running_bytes, running);
    EXPECT_EQ(stats.logical_bytes, logical * cache_->shape().logical_token_bytes());
    EXPECT_LE(stats.held_bytes, stats.capacity_bytes);
    EXPECT_LE(stats.used_bytes, stats.held_bytes);
    if (config_.any_window()) return;
    size_t idle = 0;
    for (const auto& [name, entry] : entries_) {
      if (entry->users == 0) idle += n_tables * config_.layout.block_bytes(entry->cap);
    }
    EXPECT_EQ(stats.used_bytes, running + idle);
  }

  // All who share a chain find one and the same physical block in it.
  void CheckPlace(Entry& entry, int table, BlockId block) {
    if (entry.seen_at != operation_) {
      entry.seen_at = operation_;
      entry.blocks.assign(cache_->shape().n_tables(), BlockId());
    }
    BlockId& known = entry.blocks[table];
    if (!known.valid()) known = block;
    EXPECT_EQ(known, block);
  }

  void Finish() {
    for (const Mirror& m : mirrors_) cache_->Free(m.id);
    cache_->DropPrefixCache();
    cache_->CheckIntegrity();
    const KvStats stats = cache_->stats();
    EXPECT_EQ(stats.used_bytes, 0u);
    EXPECT_EQ(stats.held_bytes, 0u);
    EXPECT_EQ(stats.running_bytes, 0u);
    EXPECT_EQ(stats.logical_bytes, 0u);
    std::cout << config_.name << ": seed " << config_.seed << ", " << operation_ << " operations, " << adoptions_
              << " adoptions (" << short_adoptions_ << " cut short by windows), " << evictions_ << " evictions, "
              << failures_ << " failed appends, " << stats.copies_on_write << " copies on write, " << departures_
              << " chains left for a size class, " << moves_ << " moves, " << redirects_ << " redirects\n";
    if (operation_ < 10'000) return;
    EXPECT_GT(failures_, 0);
    EXPECT_GT(stats.copies_on_write, 0);
    EXPECT_EQ(adoptions_ > 0, config_.prefix_cache);
    EXPECT_EQ(evictions_ > 0, config_.prefix_cache);
    EXPECT_TRUE(moves_ > 0 || config_.slabs < 5);  // in so few a class hardly ever has two
    EXPECT_EQ(redirects_ > 0, !config_.prefix_cache);
  }

  const Config& config_;
  std::mt19937 random_;
  std::unique_ptr<KvCache> cache_;
  std::vector<TokenId> texts_[4];
  std::vector<Mirror> mirrors_;
  std::unordered_map<uint64_t, std::unique_ptr<Entry>> entries_;  // by name
  std::vector<int> owners_;
  std::vector<DomainId> domain_of_;
  int64_t clock_ = 0;
  int64_t operation_ = 0;
  int64_t adoptions_ = 0;
  int64_t short_adoptions_ = 0;
  int64_t evictions_ = 0;
  int64_t failures_ = 0;
  int64_t departures_ = 0;
  int64_t moves_ = 0;
  int64_t redirects_ = 0;
};

int OperationsPerConfig() {
  const char* text = std::getenv("JOINTKV_ORACLE_OPS");
  const int operations = text == nullptr ? kOperations : std::atoi(text);
  return (operations + kConfigs - 1) / kConfigs;
}

void RunConfig(const Config& config) { Run(config).Go(OperationsPerConfig()); }

using codec::Codec;

TEST(KvOracle, FullAttention) { RunConfig({"full", {1, 4, Codec::kF16}, {0, 0}, 8, true, 11}); }
TEST(KvOracle, OneWindowLayer) { RunConfig({"one window", {1, 4, Codec::kBf16}, {0, 12, 0}, 10, true, 12}); }
TEST(KvOracle, TwoWindows) { RunConfig({"two windows", {2, 4, Codec::kBf16}, {0, 9, 30}, 9, true, 13}); }
TEST(KvOracle, Narrow) { RunConfig({"narrow", {1, 8, Codec::kF32}, {0, 7}, 4, true, 14}); }
TEST(KvOracle, NoPrefixCache) { RunConfig({"no prefix cache", {1, 4, Codec::kBf16}, {0, 16}, 6, false, 15}); }

}  // namespace
}  // namespace jointkv::kv
