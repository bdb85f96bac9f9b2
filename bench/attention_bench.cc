// Attention of one layer of SmolLM2-135M (9 heads, 3 KV heads, 64 channels) over blocks of bf16, or sealed in 4 bits,
// on 2 threads: storing K and V of the step's rows, then attending. Layers rotate, so that K and V come from memory and
// not from a cache.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include "attention/attention.h"

namespace jointkv::bench {
namespace {

constexpr int kThreads = 2;
constexpr int kLayers = 10;
constexpr attention::HeadShape kHeads{9, 3, 64, 0.125f, false};
constexpr int kStepRowsMax = 512;
constexpr int kDocuments = 20;

std::vector<TokenId> RandomTokens(int n, std::mt19937& random) {
  std::vector<TokenId> tokens(n);
  // About one token in 40 ends a line.
  for (TokenId& token : tokens) token = random() % 40 == 0 ? 0 : 1 + static_cast<TokenId>(random() % 49000);
  return tokens;
}

class Layers {
 public:
  // Every block is shared by `readers` sequences. variants: instead, each sequence is 8 documents out of kDocuments in
  // random order, and blocks of equal tokens are one block in the first layer and `variants` in later ones, as joint
  // encoding leaves them.
  Layers(int sequences, int tokens, int readers = 1, bool encoded = false, int variants = 0)
      : pool_(kThreads), variants_(variants) {
    kv::KvShape shape{{kHeads.n_kv_heads, kHeads.head_dim, codec::Codec::kBf16}, std::vector<int>(kLayers, 0)};
    if (encoded) shape.sealed.assign(shape.n_tables(), codec::Codec::kQ4);
    const size_t bytes =
        shape.logical_token_bytes() * (static_cast<size_t>(tokens) + kStepRowsMax + 64) * sequences * 2;
    cache_ = kv::KvCache::Create(shape, kv::BlockCutter({1}), {bytes, false}).value();
    rope_ = dense::RopeTable({.n_rot = kHeads.head_dim, .freq_base = 100000}, {});
    rope_.Ensure(tokens + kStepRowsMax + 1);
    attention_ = std::make_unique<attention::Attention>(kHeads, *cache_, kThreads, kStepRowsMax, false);
    qkv_.resize(static_cast<size_t>(kStepRowsMax) * (kHeads.d_q() + 2 * kHeads.d_kv()));
    std::normal_distribution<float> normal;
    for (float& value : qkv_) value = normal(random_);
    out_.resize(static_cast<size_t>(kStepRowsMax) * kHeads.d_q());
    std::vector<std::vector<TokenId>> documents(kDocuments);
    for (std::vector<TokenId>& document : documents) {
      document = RandomTokens(tokens / 8, random_);
      document.back() = 0;  // the next one begins a block
    }
    for (int i = 0; i < sequences; ++i) {
      if (i >= sequences / readers) {
        ids_.push_back(cache_->Fork(ids_[i % (sequences / readers)], tokens + kStepRowsMax));
        continue;
      }
      ids_.push_back(cache_->Create(DomainId(0), tokens + kStepRowsMax, kv::KvCache::Sharing::kLossy));
      std::vector<TokenId> prompt;
      std::ranges::shuffle(documents, random_);
      for (int k = 0; k < 8 && variants > 0; ++k) prompt.insert(prompt.end(), documents[k].begin(), documents[k].end());
      prompt.resize(tokens, 1);
      if (variants == 0) prompt = RandomTokens(tokens, random_);
      for (int at = 0; at < tokens; at += kStepRowsMax) {
        const int rows = std::min(kStepRowsMax, tokens - at);
        Reserve({ids_.back()}, {prompt.begin() + at, prompt.begin() + at + rows});
        for (int layer = 0; layer < kLayers; ++layer) Store(layer);
        const kv::SealedRange sealed = cache_->Commit(ids_.back());
        if (encoded) Encode(ids_.back(), sealed);
        if (variants > 0) Redirect(ids_.back(), sealed);
      }
    }
  }

  const std::vector<SequenceId>& ids() const { return ids_; }

  // Plans a step of these tokens for each sequence.
  void Reserve(const std::vector<SequenceId>& ids, const std::vector<TokenId>& tokens) {
    const int rows = static_cast<int>(tokens.size());
    std::vector<attention::RowSpan> spans;
    rows_ = 0;
    for (const SequenceId id : ids) {
      const int position = cache_->length(id);
      if (!cache_->Append(id, tokens)) std::abort();
      spans.push_back({id, rows_, rows, position});
      rows_ += rows;
    }
    attention_->Plan(*cache_, spans);
  }
  void Redirect(SequenceId id, kv::SealedRange sealed) {
    for (int table = 0; table < cache_->shape().n_tables(); ++table) {
      for (int index = sealed.first; index < sealed.last; ++index) {
        if (!cache_->Redirectable(id, table, index)) continue;
        const kv::LogicalBlock& block = cache_->blocks(id)[index];
        const auto tokens = cache_->tokens(id).subspan(block.start, block.tokens);
        std::vector<BlockId>& alike = alike_[{table, {tokens.begin(), tokens.end()}}];
        const int most = table < 2 ? 1 : variants_;
        if (alike.empty() || (static_cast<int>(alike.size()) < most && random_() % 2 == 0)) {
          alike.push_back(cache_->table(id, table / 2, static_cast<kv::Kind>(table % 2))[index]);
        } else {
          cache_->Redirect(id, table, index, alike[random_() % alike.size()]);
        }
      }
    }
  }
  void Encode(SequenceId id, kv::SealedRange sealed) {
    const codec::BlockLayout& layout = cache_->shape().layout;
    for (int table = 0; table < cache_->shape().n_tables(); ++table) {
      const auto kind = static_cast<kv::Kind>(table % 2);
      for (int index = sealed.first; index < sealed.last; ++index) {
        const kv::LogicalBlock& block = cache_->blocks(id)[index];
        std::vector<std::byte> bytes(layout.block_bytes(block.cap));
        codec::EncodeBlock(layout, kind, codec::Codec::kQ4, cache_->data(cache_->table(id, table / 2, kind)[index]),
                           block.cap, block.tokens, {}, bytes.data());
        if (!cache_->Encode(id, table, index, codec::Codec::kQ4, bytes.data()).valid()) std::abort();
      }
    }
  }
  void Store(int layer) { attention_->Store(pool_, *cache_, layer, rope_, {}, qkv_.data()); }
  void Run(int layer) {
    attention_->Run(pool_, *cache_, layer, rope_, 1, {out_.data(), dense::Precision::kBf16, rows_, kHeads.d_q()});
    benchmark::DoNotOptimize(out_.data());
  }

 private:
  std::mt19937 random_{1};
  ThreadPool pool_;
  std::unique_ptr<kv::KvCache> cache_;
  dense::RopeTable rope_;
  std::unique_ptr<attention::Attention> attention_;
  std::vector<float> qkv_;
  std::vector<uint16_t> out_;
  std::vector<SequenceId> ids_;
  int rows_ = 0;
  int variants_;
  std::map<std::pair<int, std::vector<TokenId>>, std::vector<BlockId>> alike_;  // by table and tokens
};

// One token of each sequence after `tokens` others, each block of which `readers` sequences share. GB/s are of what is
// read as bf16.
void Decode(benchmark::State& state) {
  const int sequences = static_cast<int>(state.range(0));
  const int tokens = static_cast<int>(state.range(1));
  Layers layers(sequences, tokens, static_cast<int>(state.range(2)), state.range(3) != 0,
                static_cast<int>(state.range(4)));
  layers.Reserve(layers.ids(), {1});
  int layer = 0;
  for (auto _ : state) {
    layers.Store(layer % kLayers);
    layers.Run(layer++ % kLayers);
  }
  const double bytes = 2.0 * sequences * (tokens + 1) * kHeads.d_kv() * 2;
  state.counters["GB/s"] = benchmark::Counter(bytes / 1e9, benchmark::Counter::kIsIterationInvariantRate);
}

// A chunk of `rows` tokens of one sequence after `tokens` others.
void Prefill(benchmark::State& state) {
  const int rows = static_cast<int>(state.range(0));
  const int tokens = static_cast<int>(state.range(1));
  Layers layers(1, tokens);
  std::mt19937 random(3);
  layers.Reserve(layers.ids(), RandomTokens(rows, random));
  int layer = 0;
  for (auto _ : state) {
    layers.Store(layer % kLayers);
    layers.Run(layer++ % kLayers);
  }
  const double pairs = static_cast<double>(rows) * tokens + rows * (rows + 1) / 2.0;
  state.counters["GFLOP/s"] =
      benchmark::Counter(4 * pairs * kHeads.d_q() / 1e9, benchmark::Counter::kIsIterationInvariantRate);
}

void Repeat(benchmark::internal::Benchmark* bench) {
  bench->UseRealTime()->Unit(benchmark::kMicrosecond)->MinTime(0.1)->Repetitions(15)->ReportAggregatesOnly();
  // On a machine with other work: the least time and the highest rates are the quiet ones.
  bench->ComputeStatistics("min", [](const std::vector<double>& v) { return *std::ranges::min_element(v); });
  bench->ComputeStatistics("max", [](const std::vector<double>& v) { return *std::ranges::max_element(v); });
}

BENCHMARK(Decode)
    ->ArgNames({"sequences", "tokens", "readers", "q4", "variants"})
    ->Args({16, 1040, 1, 0, 0})
    ->Args({16, 1040, 4, 0, 0})
    ->Args({16, 1040, 16, 0, 0})
    ->Args({16, 1040, 1, 1, 0})
    ->Args({16, 1040, 4, 1, 0})
    ->Args({48, 1040, 6, 1, 0})
    ->Args({1, 1040, 1, 0, 0})
    ->Args({16, 100, 1, 0, 0})
    ->Args({16, 1040, 1, 0, 1})
    ->Args({16, 1040, 1, 0, 2})
    ->Args({48, 1040, 1, 1, 2})
    ->Apply(Repeat);
BENCHMARK(Prefill)->ArgNames({"rows", "tokens"})->Args({512, 1000})->Args({512, 0})->Apply(Repeat);

}  // namespace
}  // namespace jointkv::bench

BENCHMARK_MAIN();
