// How alike KV blocks are: distances and cosines between blocks with equal tokens at different positions, and between
// random blocks with different tokens, in an exact cache.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "base/status.h"
#include "base/thread_pool.h"
#include "engine/engine.h"
#include "gguf/gguf_file.h"
#include "kv/kv_cache.h"
#include "models/model.h"
#include "text/tokenizer.h"

namespace jointkv::cli {

// Of the values of some pairs of blocks.
struct Distribution {
  size_t pairs = 0;
  double p05 = 0;
  double p25 = 0;
  double p50 = 0;
  double p75 = 0;
  double p95 = 0;
  double accepted = 0;  // share that the test in question lets pass
};

// accepts: the test that a policy would make of a value.
Distribution DistributionOf(std::vector<double> values, const std::function<bool(double)>& accepts);

struct EqualAndRandom {
  Distribution equal;
  Distribution random;
};

// One layer, K or V.
struct LayerAnalysis {
  int layer = 0;
  codec::Kind kind = codec::Kind::kK;
  EqualAndRandom nmse;  // |a - b|^2 / (tokens x energy), accepted up to the budget
  // Of flattened blocks. As stored, keys rotated by their offset in the block: absolute RoPE gives two blocks at one
  // position the same cosine.
  EqualAndRandom cosine;
  EqualAndRandom cosine_absolute;  // keys rotated by their position, as the paper compares them; V: as cosine
};

struct AnalysisOptions {
  size_t pairs = 300;  // of each sort, layer and kind
  float budget = 0.06F;
  float threshold = 0.7F;
  uint64_t seed = 1;
};

struct Analysis {
  size_t blocks = 0;                  // sealed, of all prompts
  size_t equal_pairs = 0;             // with equal tokens at different positions
  std::vector<LayerAnalysis> layers;  // K and V of each layer in turn
};

// ResidentPrompts: prompts in an exact cache of their own, each private. Threads: one; the work runs on the pool. Owns:
// model, store and pool. Fails how: Create as Engine::Create; Add with kResourceExhausted when the store is full, or
// kOutOfRange when the prompt is longer than the context; Analyse with kInvalidArgument when no two blocks are equal.
class ResidentPrompts {
 public:
  // Takes model, threads and KV bytes from `options`.
  static Expected<std::unique_ptr<ResidentPrompts>> Create(const engine::EngineOptions& options);

  Status Add(std::span<const TokenId> prompt);
  Expected<Analysis> Analyse(const AnalysisOptions& options);

  const text::Tokenizer& tokenizer() const { return *tokenizer_; }
  const kv::KvCache& cache() const { return *cache_; }

 private:
  struct Block {
    SequenceId sequence;
    int index = 0;  // in the sequence
  };
  struct Pair {
    Block a;
    Block b;
  };

  explicit ResidentPrompts(int threads) : pool_(threads) {}
  std::span<const TokenId> TokensOf(const Block& block) const;
  std::vector<Pair> EqualPairs(const std::vector<Block>& blocks, std::mt19937_64& random) const;
  std::vector<Pair> RandomPairs(const std::vector<Block>& blocks, size_t most, std::mt19937_64& random) const;
  bool Load(const Block& block, int layer, codec::Kind kind, std::vector<float>& values) const;
  void RotateToPosition(const Block& block, int layer, std::vector<float>& values) const;
  double EnergyOf(const std::vector<Block>& blocks, int layer, codec::Kind kind) const;
  LayerAnalysis AnalyseLayer(int layer, codec::Kind kind, const std::vector<Block>& blocks,
                             const std::vector<Pair>& equal, const std::vector<Pair>& random,
                             const AnalysisOptions& options) const;

  ThreadPool pool_;
  std::unique_ptr<gguf::GgufFile> file_;
  std::unique_ptr<text::Tokenizer> tokenizer_;
  std::unique_ptr<models::Model> model_;
  std::unique_ptr<kv::KvCache> cache_;
  std::vector<SequenceId> sequences_;
  int step_tokens_ = 512;
  int max_context_ = 0;
};

}  // namespace jointkv::cli
