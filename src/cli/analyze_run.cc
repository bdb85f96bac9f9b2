#include "cli/analyze_run.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <thread>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "cli/rag_pool.h"
#include "cli/summary.h"
#include "codec/block_io.h"

namespace jointkv::cli {
namespace {

using codec::Kind;

constexpr size_t kPairsMost = 20000;  // that layers choose from: sliding windows drop some

struct Comparison {
  double squares_a = 0;
  double squares_b = 0;
  double product = 0;

  double distance() const { return std::max(0.0, squares_a + squares_b - 2 * product); }
  double cosine() const {
    const double norms = std::sqrt(squares_a * squares_b);
    return norms > 0 ? product / norms : 0;
  }
};

Comparison Compare(const std::vector<float>& a, const std::vector<float>& b) {
  Comparison sums;
  for (size_t i = 0; i < a.size(); ++i) {
    sums.squares_a += static_cast<double>(a[i]) * a[i];
    sums.squares_b += static_cast<double>(b[i]) * b[i];
    sums.product += static_cast<double>(a[i]) * b[i];
  }
  return sums;
}

}  // namespace

Distribution DistributionOf(std::vector<double> values, const std::function<bool(double)>& accepts) {
  Distribution distribution;
  distribution.pairs = values.size();
  if (values.empty()) return distribution;
  distribution.accepted =
      static_cast<double>(std::ranges::count_if(values, accepts)) / static_cast<double>(values.size());
  distribution.p05 = Percentile(values, 0.05);
  distribution.p25 = Percentile(values, 0.25);
  distribution.p50 = Percentile(values, 0.5);
  distribution.p75 = Percentile(values, 0.75);
  distribution.p95 = Percentile(values, 0.95);
  return distribution;
}

Expected<std::unique_ptr<ResidentPrompts>> ResidentPrompts::Create(const engine::EngineOptions& options) {
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  std::unique_ptr<ResidentPrompts> prompts(new ResidentPrompts(options.threads == 0 ? cores : options.threads));
  ASSIGN_OR_RETURN(gguf::GgufFile file, gguf::GgufFile::Open(options.model_path));
  prompts->file_ = std::make_unique<gguf::GgufFile>(std::move(file));
  models::ModelOptions model_options;
  model_options.max_rows = prompts->step_tokens_;
  model_options.progress = options.load_progress;
  ASSIGN_OR_RETURN(prompts->model_, models::Model::Load(*prompts->file_, model_options, prompts->pool_));
  ASSIGN_OR_RETURN(prompts->tokenizer_, text::Tokenizer::Open(options.model_path));
  const text::Tokenizer& tokenizer = *prompts->tokenizer_;
  const models::Model& model = *prompts->model_;
  if (tokenizer.n_vocab() > model.n_vocab()) {
    return Status(StatusCode::kDataLoss, "tokenizer has " + std::to_string(tokenizer.n_vocab()) +
                                             " tokens, the model's output only " + std::to_string(model.n_vocab()));
  }
  prompts->max_context_ = model.hyperparameters().context_length;
  std::vector<uint8_t> ends_block(static_cast<size_t>(model.n_vocab()));
  for (TokenId token = 0; token < tokenizer.n_vocab(); ++token) {
    ends_block[static_cast<size_t>(token)] = tokenizer.EndsLine(token) || tokenizer.IsMarkup(token);
  }
  kv::KvCache::Options kv_options;
  kv_options.cap_bytes = options.kv_bytes == 0 ? AvailableMemoryBytes() / 3 : options.kv_bytes;
  kv_options.prefix_cache = false;
  const codec::Codec codec = options.kv_type.empty() ? codec::Codec::kBf16 : options.kv_type.back().type.k;
  ASSIGN_OR_RETURN(prompts->cache_,
                   kv::KvCache::Create(model.CacheShape(codec), kv::BlockCutter(std::move(ends_block)), kv_options));
  prompts->model_->Bind(*prompts->cache_);
  return prompts;
}

Status ResidentPrompts::Add(std::span<const TokenId> prompt) {
  const auto length = static_cast<int>(prompt.size());
  if (length > max_context_) {
    return {StatusCode::kOutOfRange, "a prompt of " + std::to_string(length) + " tokens does not fit the context of " +
                                         std::to_string(max_context_)};
  }
  model_->EnsurePositions(length + 1);
  const SequenceId sequence = cache_->Create(DomainId(0), length);
  sequences_.push_back(sequence);
  std::vector<float> logits(static_cast<size_t>(model_->n_vocab()));
  for (int done = 0; done < length;) {
    const int rows = std::min(step_tokens_, length - done);
    const std::span<const TokenId> tokens = prompt.subspan(static_cast<size_t>(done), static_cast<size_t>(rows));
    if (!cache_->Append(sequence, tokens)) {
      return {StatusCode::kResourceExhausted, "prompt " + std::to_string(sequences_.size()) + " of " +
                                                  std::to_string(length) + " tokens does not fit the KV memory of " +
                                                  FormatBytes(cache_->stats().capacity_bytes) + ": see --kv-bytes"};
    }
    const attention::RowSpan span = {sequence, 0, rows, done};
    const int last_row = rows - 1;
    model_->Forward({tokens, {&span, 1}, {&last_row, 1}}, *cache_, logits.data());
    cache_->Commit(sequence);
    done += rows;
  }
  return Status::Ok();
}

std::span<const TokenId> ResidentPrompts::TokensOf(const Block& block) const {
  const kv::LogicalBlock& logical = cache_->blocks(block.sequence)[static_cast<size_t>(block.index)];
  return cache_->tokens(block.sequence).subspan(static_cast<size_t>(logical.start), logical.tokens);
}

std::vector<ResidentPrompts::Pair> ResidentPrompts::EqualPairs(const std::vector<Block>& blocks,
                                                               std::mt19937_64& random) const {
  std::map<std::vector<TokenId>, std::vector<Block>> groups;
  for (const Block& block : blocks) {
    const std::span<const TokenId> tokens = TokensOf(block);
    groups[{tokens.begin(), tokens.end()}].push_back(block);
  }
  const auto start = [this](const Block& block) {
    return cache_->blocks(block.sequence)[static_cast<size_t>(block.index)].start;
  };
  std::vector<Pair> pairs;
  for (const auto& [tokens, group] : groups) {
    for (size_t i = 0; i < group.size(); ++i) {
      for (size_t j = i + 1; j < group.size(); ++j) {
        if (start(group[i]) != start(group[j])) pairs.push_back({group[i], group[j]});
      }
    }
  }
  std::vector<Pair> chosen;
  for (const size_t i : DrawOrder(pairs.size(), std::min(pairs.size(), kPairsMost), random)) chosen.push_back(pairs[i]);
  return chosen;
}

std::vector<ResidentPrompts::Pair> ResidentPrompts::RandomPairs(const std::vector<Block>& blocks, size_t most,
                                                                std::mt19937_64& random) const {
  std::map<size_t, std::vector<Block>> by_length;
  for (const Block& block : blocks) by_length[TokensOf(block).size()].push_back(block);
  std::vector<Pair> pairs;
  for (size_t i = 0; i < most; ++i) {
    const Block& a = blocks[random() % blocks.size()];
    const std::vector<Block>& others = by_length.at(TokensOf(a).size());
    const Block& b = others[random() % others.size()];
    if (!std::ranges::equal(TokensOf(a), TokensOf(b))) pairs.push_back({a, b});
  }
  return pairs;
}

// False when the block has left the layer's window. values: (tokens, n_kv_heads * head_dim).
bool ResidentPrompts::Load(const Block& block, int layer, Kind kind, std::vector<float>& values) const {
  const BlockId physical = cache_->table(block.sequence, layer, kind)[block.index];
  if (!physical.valid()) return false;
  const kv::LogicalBlock& logical = cache_->blocks(block.sequence)[static_cast<size_t>(block.index)];
  const codec::BlockLayout& layout = cache_->shape().layout;
  const auto width = static_cast<size_t>(layout.n_kv_heads * layout.head_dim);
  values.resize(logical.tokens * width);
  for (size_t token = 0; token < logical.tokens; ++token) {
    codec::LoadToken(layout, kind, cache_->data(physical), logical.cap, static_cast<int>(token),
                     std::span<float>(values).subspan(token * width, width));
  }
  return true;
}

// Keys as absolute RoPE would have them: all tokens of a block turn by the position that their offsets count from.
void ResidentPrompts::RotateToPosition(const Block& block, int layer, std::vector<float>& values) const {
  const int base = cache_->blocks(block.sequence)[static_cast<size_t>(block.index)].base;
  const dense::RopeTable& rope = model_->RopeOfLayer(layer);
  const float scale = 1 / model_->RopeMagnitude(layer);
  const auto head_dim = static_cast<size_t>(cache_->shape().layout.head_dim);
  for (size_t head = 0; head < values.size(); head += head_dim) {
    for (int pair = 0; pair < rope.n_pairs(); ++pair) {
      float& first = values[head + 2 * static_cast<size_t>(pair)];
      float& second = values[head + 2 * static_cast<size_t>(pair) + 1];
      const float cos = rope.cos(base)[pair] * scale;
      const float sin = rope.sin(base)[pair] * scale;
      const float turned = first * cos - second * sin;
      second = first * sin + second * cos;
      first = turned;
    }
  }
}

// Mean squared norm of a token's vector around the channel mean: what an NMSE of 1 stands for.
double ResidentPrompts::EnergyOf(const std::vector<Block>& blocks, int layer, Kind kind) const {
  const codec::BlockLayout& layout = cache_->shape().layout;
  const auto width = static_cast<size_t>(layout.n_kv_heads * layout.head_dim);
  std::vector<double> sums(width);
  double squares = 0;
  double tokens = 0;
  std::vector<float> values;
  for (const Block& block : blocks) {
    if (!Load(block, layer, kind, values)) continue;
    for (size_t i = 0; i < values.size(); ++i) {
      sums[i % width] += values[i];
      squares += static_cast<double>(values[i]) * values[i];
    }
    tokens += static_cast<double>(values.size() / width);
  }
  if (tokens == 0) return 0;
  double energy = squares / tokens;
  for (const double sum : sums) energy -= sum / tokens * (sum / tokens);
  return energy;
}

LayerAnalysis ResidentPrompts::AnalyseLayer(int layer, Kind kind, const std::vector<Block>& blocks,
                                            const std::vector<Pair>& equal, const std::vector<Pair>& random,
                                            const AnalysisOptions& options) const {
  const double energy = std::max(1e-30, EnergyOf(blocks, layer, kind));
  const codec::BlockLayout& layout = cache_->shape().layout;
  const auto width = static_cast<double>(layout.n_kv_heads * layout.head_dim);
  LayerAnalysis analysis = {.layer = layer, .kind = kind, .nmse = {}, .cosine = {}, .cosine_absolute = {}};
  const auto measure = [&](const std::vector<Pair>& pairs, Distribution EqualAndRandom::*side) {
    std::vector<double> nmse;
    std::vector<double> cosine;
    std::vector<double> absolute;
    std::vector<float> a;
    std::vector<float> b;
    for (const Pair& pair : pairs) {
      if (nmse.size() == options.pairs) break;
      if (!Load(pair.a, layer, kind, a) || !Load(pair.b, layer, kind, b)) continue;
      const Comparison stored = Compare(a, b);
      nmse.push_back(stored.distance() / (static_cast<double>(a.size()) / width * energy));
      cosine.push_back(stored.cosine());
      if (kind == Kind::kK) {
        RotateToPosition(pair.a, layer, a);
        RotateToPosition(pair.b, layer, b);
      }
      absolute.push_back(Compare(a, b).cosine());
    }
    const auto within = [&](double value) { return value <= options.budget; };
    const auto above = [&](double value) { return value >= options.threshold; };
    analysis.nmse.*side = DistributionOf(std::move(nmse), within);
    analysis.cosine.*side = DistributionOf(std::move(cosine), above);
    analysis.cosine_absolute.*side = DistributionOf(std::move(absolute), above);
  };
  measure(equal, &EqualAndRandom::equal);
  measure(random, &EqualAndRandom::random);
  return analysis;
}

Expected<Analysis> ResidentPrompts::Analyse(const AnalysisOptions& options) {
  std::vector<Block> blocks;
  for (const SequenceId sequence : sequences_) {
    const std::span<const kv::LogicalBlock> logical = cache_->blocks(sequence);
    for (size_t i = 0; i < logical.size(); ++i) {
      if (logical[i].sealed) blocks.push_back({sequence, static_cast<int>(i)});
    }
  }
  std::mt19937_64 random(options.seed);
  const std::vector<Pair> equal = EqualPairs(blocks, random);
  if (equal.empty()) {
    return Status(StatusCode::kInvalidArgument,
                  "no two blocks have equal tokens at different positions: take more requests, or a smaller pool");
  }
  const std::vector<Pair> different = RandomPairs(blocks, kPairsMost, random);
  Analysis analysis = {.blocks = blocks.size(), .equal_pairs = equal.size(), .layers = {}};
  analysis.layers.resize(static_cast<size_t>(cache_->shape().n_tables()));
  pool_.ParallelFor(cache_->shape().n_tables(), [&](int table, int) {
    const Kind kind = table % 2 == 0 ? Kind::kK : Kind::kV;
    analysis.layers[static_cast<size_t>(table)] = AnalyseLayer(table / 2, kind, blocks, equal, different, options);
  });
  return analysis;
}

}  // namespace jointkv::cli
