// A model with a block store of its own, driven step by step as the engine drives it, for the tests of this room.
#pragma once

#include <algorithm>
#include <filesystem>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/thread_pool.h"
#include "gguf/gguf_file.h"
#include "kv/kv_cache.h"
#include "models/model.h"

namespace jointkv::models {

using Tokens = std::vector<TokenId>;

// JOINTKV_TEST_MODELS is where CMake has tools/make_test_models put its files.
inline std::string TestModelPath(const std::string& name) {
  return std::string(JOINTKV_TEST_MODELS) + "/" + name + ".gguf";
}

inline Tokens RandomTokens(int n, int n_vocab, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<TokenId> token(0, n_vocab - 1);
  Tokens tokens(static_cast<size_t>(n));
  for (TokenId& t : tokens) t = token(random);
  return tokens;
}

// Threads: one caller. Owns: the file, the pool, the model and the store. Fails how: by CHECK.
class Runner {
 public:
  struct Options {
    ModelOptions model = {};
    codec::Codec codec = codec::Codec::kBf16;
    int threads = 2;
    int tokens_max = 1024;  // of one sequence
  };
  struct Piece {
    SequenceId sequence;
    std::span<const TokenId> tokens;
  };

  Runner(const std::string& path, const Options& options)
      : file_(OpenFile(path)), pool_(options.threads), tokens_max_(options.tokens_max) {
    auto model = Model::Load(file_, options.model, pool_);
    EXPECT_TRUE(model.ok()) << model.status().ToString();
    model_ = std::move(model).value();
    auto cache = kv::KvCache::Create(model_->CacheShape(options.codec), kv::BlockCutter({}), {size_t{256} << 20, true});
    EXPECT_TRUE(cache.ok()) << cache.status().ToString();
    cache_ = std::move(cache).value();
    model_->Bind(*cache_);
    model_->EnsurePositions(options.tokens_max);
  }

  Model& model() { return *model_; }
  kv::KvCache& cache() { return *cache_; }
  int n_vocab() const { return model_->n_vocab(); }
  const gguf::GgufFile& file() const { return file_; }

  SequenceId Start() { return cache_->Create(DomainId(0), tokens_max_); }

  // One engine step. Logits: (rows, n_vocab) of all rows, or of `logit_rows`.
  std::vector<float> Step(const std::vector<Piece>& pieces, const std::vector<int>* logit_rows = nullptr) {
    Tokens tokens;
    std::vector<attention::RowSpan> spans;
    for (const Piece& piece : pieces) {
      const auto rows = static_cast<int>(piece.tokens.size());
      spans.push_back({piece.sequence, static_cast<int>(tokens.size()), rows, cache_->length(piece.sequence)});
      tokens.insert(tokens.end(), piece.tokens.begin(), piece.tokens.end());
      EXPECT_TRUE(cache_->Append(piece.sequence, piece.tokens));
    }
    std::vector<int> all(tokens.size());
    std::iota(all.begin(), all.end(), 0);
    const std::vector<int>& wanted = logit_rows != nullptr ? *logit_rows : all;
    std::vector<float> logits(wanted.size() * static_cast<size_t>(n_vocab()));
    model_->Forward({tokens, spans, wanted}, *cache_, logits.data());
    for (const Piece& piece : pieces) cache_->Commit(piece.sequence);
    return logits;
  }

  // Continues `sequence` in steps of the given sizes, over and over; 0: all that is left.
  std::vector<float> Continue(SequenceId sequence, std::span<const TokenId> tokens, const std::vector<int>& chunks) {
    std::vector<float> logits;
    for (size_t i = 0; !tokens.empty(); ++i) {
      const auto chunk = static_cast<size_t>(chunks[i % chunks.size()]);
      const std::span<const TokenId> step = tokens.first(chunk == 0 ? tokens.size() : std::min(chunk, tokens.size()));
      tokens = tokens.subspan(step.size());
      const std::vector<float> part = Step({{sequence, step}});
      logits.insert(logits.end(), part.begin(), part.end());
    }
    return logits;
  }

  // A whole text as a sequence of its own that shares nothing.
  std::vector<float> Logits(std::span<const TokenId> tokens, const std::vector<int>& chunks = {0}) {
    const SequenceId sequence = Start();
    std::vector<float> logits = Continue(sequence, tokens, chunks);
    cache_->Free(sequence);
    cache_->DropPrefixCache();
    cache_->CheckIntegrity();
    return logits;
  }

 private:
  static gguf::GgufFile OpenFile(const std::string& path) {
    auto file = gguf::GgufFile::Open(path);
    EXPECT_TRUE(file.ok()) << file.status().ToString() << " (made by ctest's test_models, or tools/make_test_models)";
    return std::move(file).value();
  }

  gguf::GgufFile file_;
  ThreadPool pool_;
  int tokens_max_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<kv::KvCache> cache_;
};

// All in f32, so that nothing but the order of sums differs from any other f32 pass.
inline Runner::Options F32Options() {
  Runner::Options options;
  options.model.precision = dense::Precision::kF32;
  options.codec = codec::Codec::kF32;
  return options;
}

}  // namespace jointkv::models
