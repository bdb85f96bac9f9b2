// A block store, an Attention and made-up activations, with a plain double reference as the judge of every row.
//
// Activations are a function of the tokens up to their position (kv/test_content.h), so sequences that rightly share
// blocks agree, and a row's result may be compared between worlds that computed it in other company. Scales are a
// function of the tokens up to their block's first.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <numbers>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "attention/attention.h"
#include "base/cpu.h"
#include "codec/block_io.h"
#include "dense/test_matrices.h"
#include "dense/test_rope.h"
#include "kv/arena.h"
#include "kv/test_content.h"

namespace jointkv::attention {

struct WorldShape {
  int n_heads = 6;
  int n_kv_heads = 2;
  int head_dim = 64;
  bool neox = false;
  codec::Codec codec = codec::Codec::kBf16;
  std::vector<int> window = {0};
  gguf::Rope rope = {};  // n_rot is head_dim
  bool rows_independent = false;
  bool norms = false;
  bool absolute_keys = false;  // in the store
  // Every second sealed block is encoded so, in each table for itself.
  std::optional<codec::Codec> sealed = {};
  // Sealed blocks are kept as differences from an earlier one of their size in the same sequence, where there is one.
  bool residuals = false;
  // Two of three sealed blocks refer to one of the same tokens that came before, in each table for itself.
  bool fused = false;
  bool fused_apart = false;  // the first layer's keys are not all alike either
  bool scaled = false;       // every block of every layer has factors for its keys and its values
  int threads = 2;
  bool judged = true;     // false: only the bits of the results matter
  float sharpness = 1;    // multiplies activations; large: one token takes all weight
  int tokens_max = 1000;  // of all sequences together
  dense::Precision out = dense::Precision::kF32;
};

class World {
 public:
  using Tokens = std::vector<TokenId>;
  struct Piece {
    SequenceId sequence;
    Tokens tokens;
  };
  // (history, layer) -> (d_q)
  using Results = std::map<std::pair<uint64_t, int>, std::vector<float>>;

  explicit World(const WorldShape& shape) : shape_(shape), pool_(shape.threads) {
    shape_.rope.n_rot = shape.head_dim;
    plain_rope_ = {shape_.rope};
    rope_ = dense::RopeTable(shape_.rope, {});
    rope_.Ensure(shape.tokens_max + 1);
    kv::KvShape kv{{shape.n_kv_heads, shape.head_dim, shape.codec}, shape.window};
    if (shape.sealed.has_value()) kv.sealed.assign(kv.n_tables(), *shape.sealed);
    // Each token may stand alone in a block of the smallest class, and the last slab of each class and codec hold one
    // block.
    const size_t codecs = (shape.sealed.has_value() ? 1 : 0) + (shape.residuals ? kv::kResidualCodecs.size() : 0);
    const size_t slabs = codec::kClasses + codecs * codec::kQuantisedClasses + 1;
    const size_t granules = kv.n_tables() * static_cast<size_t>(shape.tokens_max) + slabs * kv::kSlabGranules;
    const size_t bytes = kv.layout.granule_bytes() * granules;
    auto cache = kv::KvCache::Create(kv, kv::BlockCutter({1}),
                                     {.cap_bytes = bytes,
                                      .prefix_cache = true,
                                      .absolute_keys = shape.absolute_keys,
                                      .scales = shape.scaled,
                                      .residuals = shape.residuals});
    EXPECT_TRUE(cache.ok()) << cache.status().ToString();
    cache_ = std::move(cache).value();
    // Fresh blocks hold NaN in every codec: whatever a kernel reads without having written it shows.
    std::memset(cache_->data(BlockId(0)), 0xff, cache_->stats().capacity_bytes);
    heads_ = {shape.n_heads, shape.n_kv_heads, shape.head_dim, 1 / std::sqrt(static_cast<float>(shape.head_dim)),
              shape.neox};
    if (shape.sealed.has_value()) SetKeyReferences();
    attention_ = std::make_unique<Attention>(heads_, *cache_, shape.threads, shape.tokens_max, shape.rows_independent);
    norm_weights_ = dense::RandomFloats(2 * shape.head_dim, 99);
    bf16_kernels_ = HasAvx512Bf16() && shape.codec == codec::Codec::kBf16;
  }

  kv::KvCache& cache() { return *cache_; }
  const dense::RopeTable& rope() const { return rope_; }
  const Results& results() const { return results_; }
  double worst_error() const { return worst_error_; }
  int encoded() const { return encoded_; }          // blocks
  int differences() const { return differences_; }  // of those
  int redirected() const { return redirected_; }    // table slots
  const Attention& attention() const { return *attention_; }

  SequenceId Start(DomainId domain = DomainId(0)) {
    const SequenceId id = cache_->Create(domain, shape_.tokens_max,
                                         shape_.fused ? kv::KvCache::Sharing::kLossy : kv::KvCache::Sharing::kExact);
    domains_[id] = domain;
    return id;
  }
  SequenceId Fork(SequenceId source) {
    const SequenceId id = cache_->Fork(source, shape_.tokens_max);
    domains_[id] = domains_[source];
    return id;
  }

  // One step of all pieces at once. Fails the test when any row is not what the reference says.
  void Step(const std::vector<Piece>& pieces) {
    std::vector<RowSpan> spans;
    int rows = 0;
    for (const Piece& piece : pieces) {
      const int position = cache_->length(piece.sequence);
      ASSERT_TRUE(cache_->Append(piece.sequence, piece.tokens));
      const int n = static_cast<int>(piece.tokens.size());
      spans.push_back({piece.sequence, rows, n, position});
      rows += n;
    }
    SetScales(spans);
    attention_->Plan(*cache_, spans);
    for (int layer = 0; layer < static_cast<int>(shape_.window.size()); ++layer) {
      RunLayer(spans, rows, layer);
      if (testing::Test::HasFatalFailure()) return;
    }
    for (const Piece& piece : pieces) {
      const kv::SealedRange sealed = cache_->Commit(piece.sequence);
      Encode(piece.sequence, sealed);
      if (shape_.fused) Redirect(piece.sequence, sealed);
    }
    SetScales(spans);  // sealed blocks may have become others' since
  }

  // Root mean square error over what rounding to bf16 explains (1: just as much); call after some steps in bf16.
  double NoiseRatio() const { return std::sqrt(squared_error_ / predicted_variance_); }

 private:
  struct Token {
    std::vector<double> k;  // (n_kv_heads, 2, head_dim / 2) absolutely rotated, with RoPE's magnitude, scaled
    std::vector<double> v;  // (n_kv_heads, head_dim), scaled
  };

  void SetKeyReferences() {
    const codec::BlockLayout& layout = cache_->shape().layout;
    for (int layer = 0; layer < cache_->shape().n_layers(); ++layer) {
      std::vector<std::byte> mean(layout.block_bytes(codec::kBlockTokensMax));
      for (int token = 0; token < codec::kBlockTokensMax; ++token) {
        codec::StoreToken(layout, kv::Kind::kK, mean.data(), codec::kBlockTokensMax, token,
                          dense::RandomFloats(heads_.d_kv(), 7000 + 100 * layer + token, 0.3F));
      }
      std::vector<float> scales = dense::RandomFloats(heads_.d_kv() / 2, 7050 + layer, 1.0F);
      for (float& scale : scales) scale = std::exp2(scale);
      cache_->SetKeyReference(layer, std::move(mean), std::move(scales));
    }
  }

  // Of the blocks that a sequence has just sealed and not taken from others.
  void Encode(SequenceId sequence, kv::SealedRange sealed) {
    const codec::BlockLayout& layout = cache_->shape().layout;
    for (int table = 0; table < cache_->shape().n_tables(); ++table) {
      const auto kind = static_cast<kv::Kind>(table % 2);
      for (int index = sealed.first; index < sealed.last; ++index) {
        if (!cache_->Owned(sequence, table, index)) continue;
        const BlockId own = cache_->table(sequence, table / 2, kind)[index];
        if (cache_->codec(own) != layout.codec) continue;
        const kv::LogicalBlock& block = cache_->blocks(sequence)[index];
        std::vector<std::byte> encoded(layout.block_bytes(block.cap));
        if (const BlockId base = BaseFor(sequence, table, index); base.valid()) {
          const codec::Codec to = kv::kResidualCodecs[(index + table) % kv::kResidualCodecs.size()];
          const std::vector<std::byte> mean = kv::StoredBlock(*cache_, table, base, block.cap, block.tokens);
          codec::EncodeBlock(layout, kind, to, cache_->data(own), block.cap, block.tokens, {mean.data(), block.cap},
                             encoded.data());
          ASSERT_TRUE(cache_->Encode(sequence, table, index, to, encoded.data(), base).valid());
          ++encoded_;
          ++differences_;
          continue;
        }
        if (!shape_.sealed.has_value() || (index + table) % 2 != 0) continue;
        codec::EncodeBlock(layout, kind, *shape_.sealed, cache_->data(own), block.cap, block.tokens,
                           kind == kv::Kind::kK ? cache_->key_reference(table / 2) : codec::Reference(),
                           encoded.data());
        ASSERT_TRUE(cache_->Encode(sequence, table, index, *shape_.sealed, encoded.data()).valid());
        ++encoded_;
      }
    }
  }

  // As joint encoding would, but whatever the blocks hold. The first keys of equal tokens are alike wherever they
  // stand.
  void Redirect(SequenceId sequence, kv::SealedRange sealed) {
    std::vector<BlockId> released;
    cache_->TakeReleased(released);
    for (const BlockId id : released) {
      for (auto& [key, ids] : representatives_) std::erase(ids, id);
    }
    for (int table = 0; table < cache_->shape().n_tables(); ++table) {
      for (int index = sealed.first; index < sealed.last; ++index) {
        if (!cache_->Redirectable(sequence, table, index)) continue;
        const kv::LogicalBlock& block = cache_->blocks(sequence)[index];
        const auto tokens = cache_->tokens(sequence).subspan(block.start, block.tokens);
        std::vector<BlockId>& ids =
            representatives_[{table, domains_[sequence].value, block.cap, Tokens(tokens.begin(), tokens.end())}];
        const uint64_t choice = kv::MixContent(ids.size() + static_cast<uint64_t>(cache_->serial(sequence)), table);
        const BlockId own = cache_->table(sequence, table / 2, static_cast<kv::Kind>(table % 2))[index];
        if (cache_->base(own).valid() || std::ranges::find(ids, own) != ids.end()) continue;
        if (ids.empty() || ((table > 0 || shape_.fused_apart) && choice % 3 == 0)) {
          cache_->Watch(own);
          ids.push_back(own);
        } else {
          cache_->Redirect(sequence, table, index, ids[choice / 3 % ids.size()]);
          ++redirected_;
        }
      }
    }
  }

  // An earlier block of the same size that stands alone; invalid: none.
  BlockId BaseFor(SequenceId sequence, int table, int index) const {
    const auto blocks = cache_->blocks(sequence);
    const BlockId* row = cache_->table(sequence, table / 2, static_cast<kv::Kind>(table % 2));
    for (int i = index - 1; i >= 0 && shape_.residuals; --i) {
      if (row[i].valid() && row[i] != row[index] && blocks[i].cap == blocks[index].cap &&
          blocks[i].tokens == blocks[index].tokens && !cache_->base(row[i]).valid()) {
        return row[i];
      }
    }
    return BlockId();
  }

  // The factor of a block whose first token has this history.
  float Scale(uint64_t history, int table) const {
    if (!shape_.scaled) return 1;
    return 0.5f + static_cast<float>(kv::MixContent(history, 1000 + table) % 1500) / 1000;
  }

  // For the blocks that the spans reach; earlier ones have theirs, or take them along with a prefix or a fork.
  void SetScales(const std::vector<RowSpan>& spans) {
    for (const RowSpan& span : spans) {
      if (!shape_.scaled) return;
      const std::vector<uint64_t> histories = kv::Histories(domains_[span.sequence], cache_->tokens(span.sequence));
      const auto blocks = cache_->blocks(span.sequence);
      for (size_t i = 0; i < blocks.size(); ++i) {
        if (blocks[i].start + blocks[i].tokens <= span.position) continue;
        for (int table = 0; table < cache_->shape().n_tables(); ++table)
          cache_->SetScale(span.sequence, table, static_cast<int>(i), Scale(histories[blocks[i].start], table));
      }
    }
  }

  int n_pairs() const { return shape_.head_dim / 2; }

  const std::vector<float>& Qkv(uint64_t history, int layer) {
    std::vector<float>& row = qkv_[kv::MixContent(history, layer)];
    if (row.empty())
      row = dense::RandomFloats(static_cast<size_t>(heads_.d_q()) + 2 * heads_.d_kv(), kv::MixContent(history, layer),
                                shape_.sharpness);
    return row;
  }

  // A model's head vector in pair order, normalised where the world does so.
  std::vector<double> PairOrder(const float* head, const float* norm) const {
    const int n = n_pairs();
    std::vector<double> values(head, head + 2 * n);
    if (norm != nullptr) {
      double sum = 0;
      for (const double x : values) sum += x * x;
      for (int i = 0; i < 2 * n; ++i) values[i] *= norm[i] / std::sqrt(sum / (2 * n) + kEps);
    }
    if (shape_.neox) return values;
    std::vector<double> pairs(values.size());
    for (int i = 0; i < n; ++i) {
      pairs[i] = values[2 * i];
      pairs[n + i] = values[2 * i + 1];
    }
    return pairs;
  }

  void Rotate(double* pairs, int position, double magnitude) {
    auto& angles = angles_[position];
    if (angles.empty()) {
      for (int i = 0; i < n_pairs(); ++i)
        angles.emplace_back(std::cos(plain_rope_.Theta(i, position)), std::sin(plain_rope_.Theta(i, position)));
    }
    for (int i = 0; i < n_pairs(); ++i) {
      const double x = pairs[i];
      const double y = pairs[n_pairs() + i];
      pairs[i] = (x * angles[i].first - y * angles[i].second) * magnitude;
      pairs[n_pairs() + i] = (x * angles[i].second + y * angles[i].first) * magnitude;
    }
  }

  // K and V of positions [first, end), times their scales. In f32 from the activations, unless blocks are fused; else
  // what the store holds of them, which must be the activations rounded.
  std::vector<Token> LoadTokens(const RowSpan& span, const std::vector<uint64_t>& histories, int layer, int first,
                                int end) {
    const int head_dim = shape_.head_dim;
    std::vector<Token> tokens(end);
    std::array<std::vector<std::byte>, 2> decoded;  // the present block, by kind
    std::vector<float> stored(heads_.d_kv());
    for (const kv::LogicalBlock& block : cache_->blocks(span.sequence)) {
      const size_t index = &block - cache_->blocks(span.sequence).data();
      for (int position = std::max(first, block.start); position < std::min<int>(end, block.start + block.tokens);
           ++position) {
        Token& token = tokens[position];
        const auto scale = [&](kv::Kind kind) { return Scale(histories[block.start], kv::TableIndex(layer, kind)); };
        const std::vector<float>& qkv = Qkv(histories[position], layer);
        for (int head = 0; head < shape_.n_kv_heads; ++head) {
          std::vector<double> k = PairOrder(qkv.data() + heads_.d_q() + head * head_dim,
                                            shape_.norms ? norm_weights_.data() + head_dim : nullptr);
          Rotate(k.data(), position, plain_rope_.Magnitude());
          token.k.insert(token.k.end(), k.begin(), k.end());
        }
        token.v.assign(qkv.end() - heads_.d_kv(), qkv.end());
        const double unit = shape_.codec == codec::Codec::kBf16 ? dense::kBf16Unit : 0x1p-11;
        for (const kv::Kind kind : {kv::Kind::kK, kv::Kind::kV}) {
          if (shape_.codec == codec::Codec::kF32 && !shape_.fused) break;
          const BlockId id = cache_->table(span.sequence, layer, kind)[index];
          std::vector<std::byte>& bytes = decoded[static_cast<size_t>(kind)];
          if (position == std::max(first, block.start)) {
            bytes = kv::StoredBlock(*cache_, kv::TableIndex(layer, kind), id, block.cap, block.tokens);
          }
          codec::LoadToken(cache_->shape().layout, kind, bytes.data(), block.cap, position - block.start, stored);
          const bool encoded = cache_->codec(id) != cache_->shape().layout.codec;
          std::vector<double>& values = kind == kv::Kind::kK ? token.k : token.v;
          for (int i = 0; i < heads_.d_kv(); ++i) {
            const int channel = i % head_dim;
            const int from = kind == kv::Kind::kK ? i - channel + channel % n_pairs() * 2 + channel / n_pairs() : i;
            stored_[i] = stored[from];
          }
          if (kind == kv::Kind::kK) {
            for (int head = 0; head < shape_.n_kv_heads; ++head)
              Rotate(stored_.data() + head * head_dim, shape_.absolute_keys ? 0 : block.start, 1);
          }
          for (int i = 0; i < heads_.d_kv(); ++i) {
            const int other = i % head_dim < n_pairs() ? i + n_pairs() : i - n_pairs();
            const double size =
                kind == kv::Kind::kK ? std::abs(values[i]) + std::abs(values[other]) : std::abs(values[i]);
            // f16 halves its relative precision below 2^-14 and so on; 2^-24 is its least step.
            const bool redirected = shape_.fused && cache_->state(span.sequence, kv::TableIndex(layer, kind),
                                                                  static_cast<int>(index)) == kv::SlotState::kFused;
            if (!encoded && !redirected)
              ExpectStored(stored_[i], values[i], size * (unit + 8 * dense::kF32Unit) * 1.5 + 0x1p-24);
            if (testing::Test::HasFatalFailure()) return tokens;
          }
          values.assign(stored_.begin(), stored_.begin() + heads_.d_kv());
        }
        for (double& value : token.k) value *= scale(kv::Kind::kK);
        for (double& value : token.v) value *= scale(kv::Kind::kV);
      }
    }
    return tokens;
  }

  static void ExpectStored(double stored, double expected, double tolerance) {
    ASSERT_NEAR(stored, expected, tolerance) << "in the store";
  }

  void RunLayer(const std::vector<RowSpan>& spans, int rows, int layer) {
    const int width = heads_.d_q() + 2 * heads_.d_kv();
    std::vector<float> qkv;
    std::vector<std::vector<uint64_t>> histories;
    for (const RowSpan& span : spans) {
      histories.push_back(kv::Histories(domains_[span.sequence], cache_->tokens(span.sequence)));
      for (int r = 0; r < span.rows; ++r) {
        const std::vector<float>& row = Qkv(histories.back()[span.position + r], layer);
        qkv.insert(qkv.end(), row.begin(), row.end());
      }
    }
    ASSERT_EQ(qkv.size(), static_cast<size_t>(rows) * width);
    Attention::HeadNorms norms;
    if (shape_.norms) norms = {norm_weights_.data(), norm_weights_.data() + shape_.head_dim, kEps};
    attention_->Store(pool_, *cache_, layer, rope_, norms, qkv.data());
    CheckQueryEnergy(spans, histories, layer);
    if (testing::Test::HasFatalFailure()) return;
    std::vector<float> out(static_cast<size_t>(rows) * heads_.d_q(), NAN);
    std::vector<uint16_t> out16(out.size(), 0xffff);
    const bool bf16 = shape_.out == dense::Precision::kBf16;
    attention_->Run(pool_, *cache_, layer, rope_, shape_.rope.magnitude(),
                    {bf16 ? static_cast<void*>(out16.data()) : out.data(), shape_.out, rows, heads_.d_q()});
    for (size_t i = 0; bf16 && i < out.size(); ++i) out[i] = F32FromBf16(out16[i]);
    for (size_t s = 0; s < spans.size(); ++s) {
      const RowSpan& span = spans[s];
      const int window = shape_.window[layer];
      const int first = window == 0 ? 0 : std::max(0, span.position - window + 1);
      std::vector<Token> tokens;
      if (shape_.judged) tokens = LoadTokens(span, histories[s], layer, first, span.position + span.rows);
      if (testing::Test::HasFatalFailure()) return;
      for (int r = 0; r < span.rows; ++r) {
        const float* row = out.data() + static_cast<ptrdiff_t>(span.first_row + r) * heads_.d_q();
        const uint64_t history = histories[s][span.position + r];
        results_[{history, layer}].assign(row, row + heads_.d_q());
        for (int head = 0; shape_.judged && head < shape_.n_heads; ++head) {
          Judge(tokens, Qkv(history, layer), head, span.position + r, window,
                row + static_cast<ptrdiff_t>(head) * shape_.head_dim);
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }

  void CheckQueryEnergy(const std::vector<RowSpan>& spans, const std::vector<std::vector<uint64_t>>& histories,
                        int layer) {
    const std::span<const double> counted = attention_->query_energy(layer);
    if (!shape_.sealed.has_value()) {
      ASSERT_TRUE(counted.empty()) << "nothing here is encoded";
      return;
    }
    QueryEnergy& expected = query_energy_[layer];
    expected.sums.resize(heads_.d_kv() / 2);
    for (size_t s = 0; s < spans.size(); ++s) {
      for (int position = std::max(1, spans[s].position); position < spans[s].position + spans[s].rows; ++position) {
        if (expected.rows++ >= Attention::kQueryRowsMax) break;
        for (int head = 0; head < heads_.n_heads; ++head) {
          const std::vector<double> q =
              PairOrder(Qkv(histories[s][position], layer).data() + static_cast<ptrdiff_t>(head) * heads_.head_dim,
                        shape_.norms ? norm_weights_.data() : nullptr);
          double* sums = expected.sums.data() + static_cast<ptrdiff_t>(head / heads_.group()) * n_pairs();
          const double scale = heads_.scale * std::numbers::log2e;
          for (int i = 0; i < n_pairs(); ++i)
            sums[i] += scale * scale * (q[i] * q[i] + q[n_pairs() + i] * q[n_pairs() + i]);
        }
      }
    }
    ASSERT_EQ(counted.empty(), expected.rows == 0);
    if (counted.empty()) return;
    ASSERT_EQ(counted.size(), expected.sums.size());
    for (size_t i = 0; i < counted.size(); ++i) ASSERT_NEAR(counted[i], expected.sums[i], 1e-5 * expected.sums[i]);
  }

  // Where the tolerance comes from. A kernel's score is off by e_t, its weight by a factor of at most exp(2 max|e_t|)
  // after normalisation, times 1 + u_p where weights are rounded to bf16 (the divisor is summed before that). So a
  // channel is off by at most (exp(2e) - 1 + u_p) sum_t p_t |v_t|. In f32, e is the chain of head_dim additions plus
  // rotation, each one unit of sum |q||k|. In bf16 each element of the rotated q (and, in tiles, of the re-rotated k)
  // is rounded: independent errors of at most u |q_c k_c|, so a standard deviation of at most u / sqrt(3) sqrt(sum
  // q_c^2 k_c^2); six of those bound all that a test will see.
  void Judge(const std::vector<Token>& tokens, const std::vector<float>& qkv, int head, int position, int window,
             const float* out) {
    const int head_dim = shape_.head_dim;
    const int kv_head = head / heads_.group();
    std::vector<double> q =
        PairOrder(qkv.data() + static_cast<ptrdiff_t>(head) * head_dim, shape_.norms ? norm_weights_.data() : nullptr);
    Rotate(q.data(), position, plain_rope_.Magnitude());
    const int first = window == 0 ? 0 : std::max(0, position - window + 1);
    const double roundings = !bf16_kernels_ ? 0 : shape_.rows_independent ? 1 : 2;
    std::vector<double> scores;
    std::vector<double> noise;
    double max = -INFINITY;
    double score_error = 0;
    for (int t = first; t <= position; ++t) {
      const double* k = tokens[t].k.data() + static_cast<ptrdiff_t>(kv_head) * head_dim;
      double score = 0;
      double size = 0;
      double squares = 0;
      for (int i = 0; i < n_pairs(); ++i) {
        score += q[i] * k[i] + q[n_pairs() + i] * k[n_pairs() + i];
        const double both =
            (q[i] * q[i] + q[n_pairs() + i] * q[n_pairs() + i]) * (k[i] * k[i] + k[n_pairs() + i] * k[n_pairs() + i]);
        size += std::sqrt(both);
        squares += both;
      }
      scores.push_back(score * heads_.scale);
      noise.push_back(heads_.scale * dense::kBf16Unit * std::sqrt(squares * roundings / 3));
      score_error = std::max(score_error, heads_.scale * size * (head_dim + 24) * dense::kF32Unit + 6 * noise.back());
      max = std::max(max, scores.back());
    }
    double total = 0;
    for (double& score : scores) total += score = std::exp(score - max);
    const double weight_unit = bf16_kernels_ ? dense::kBf16Unit : 0;
    const double relative =
        std::expm1(2 * score_error) + weight_unit + static_cast<double>(scores.size() + 40) * dense::kF32Unit;
    std::vector<double> sum(head_dim, 0.0);
    std::vector<double> magnitude(head_dim, 0.0);
    const auto values = [&](size_t i) {
      return tokens[first + i].v.data() + static_cast<ptrdiff_t>(kv_head) * head_dim;
    };
    for (size_t i = 0; i < scores.size(); ++i) {
      const double p = scores[i] /= total;
      const double* v = values(i);
      for (int c = 0; c < head_dim; ++c) {
        sum[c] += p * v[c];
        magnitude[c] += p * std::abs(v[c]);
      }
    }
    for (int c = 0; c < head_dim; ++c) {
      const double out_error = shape_.out == dense::Precision::kBf16 ? std::abs(sum[c]) * dense::kBf16Unit : 0;
      ASSERT_NEAR(out[c], sum[c], relative * magnitude[c] + out_error * 1.1)
          << "head " << head << " channel " << c << " position " << position;
      const double error = out[c] - sum[c];
      worst_error_ = std::max(worst_error_, std::abs(error));
      squared_error_ += error * error;
      predicted_variance_ += out_error * out_error / 3;
    }
    if (!bf16_kernels_) return;
    for (size_t i = 0; i < scores.size(); ++i) {
      const double weight_error = scores[i] * weight_unit;
      const double score_noise = scores[i] * noise[i];
      const double* v = values(i);
      for (int c = 0; c < head_dim; ++c) {
        predicted_variance_ += weight_error * weight_error * v[c] * v[c] / 3 +
                               score_noise * score_noise * (v[c] - sum[c]) * (v[c] - sum[c]);
      }
    }
  }

  static constexpr float kEps = 1e-6f;

  WorldShape shape_;
  ThreadPool pool_;
  HeadShape heads_;
  bool bf16_kernels_ = false;
  dense::PlainRope plain_rope_;
  dense::RopeTable rope_;
  std::unique_ptr<kv::KvCache> cache_;
  std::unique_ptr<Attention> attention_;
  std::vector<float> norm_weights_;  // (2, head_dim) of q and k
  std::map<SequenceId, DomainId> domains_;
  std::unordered_map<uint64_t, std::vector<float>> qkv_;
  std::unordered_map<int, std::vector<std::pair<double, double>>> angles_;  // by position
  std::vector<double> stored_ = std::vector<double>(8192);
  Results results_;
  int encoded_ = 0;
  int differences_ = 0;
  int redirected_ = 0;
  std::map<std::tuple<int, int32_t, int, Tokens>, std::vector<BlockId>> representatives_;  // by table, domain, content
  struct QueryEnergy {
    std::vector<double> sums;  // (n_kv_heads, head_dim / 2)
    int rows = 0;
  };
  std::map<int, QueryEnergy> query_energy_;  // by layer
  double worst_error_ = 0;
  double squared_error_ = 0;
  double predicted_variance_ = 0;
};

// n tokens of which about one in `line` ends a line, so blocks come in all lengths.
inline World::Tokens RandomTokens(int n, uint64_t seed, int line = 12) {
  std::mt19937_64 random(seed);
  World::Tokens tokens(n);
  for (TokenId& token : tokens) token = random() % line == 0 ? 0 : 1 + static_cast<TokenId>(random() % 500);
  return tokens;
}

inline World::Tokens Cut(const World::Tokens& tokens, int begin, int n) {
  return {tokens.begin() + begin,
          tokens.begin() + std::min<ptrdiff_t>(begin + n, static_cast<ptrdiff_t>(tokens.size()))};
}

}  // namespace jointkv::attention
