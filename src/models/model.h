// Model: a decoder-only transformer from a model file, one Forward per engine step.
//
// Threads: one caller; the work runs on the pool given at load. Owns: packed weights, buffers for `max_rows` rows, the
// attention plan. The GgufFile and the pool must outlive it. Fails how: Load returns a Status naming the tensor or key;
// Forward cannot fail.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "attention/attention.h"
#include "base/status.h"
#include "base/thread_pool.h"
#include "dense/linear.h"
#include "dense/rope.h"
#include "gguf/gguf_file.h"
#include "gguf/hyperparameters.h"
#include "kv/kv_cache.h"

namespace jointkv::models {

struct ModelOptions {
  std::optional<dense::Precision> precision;  // none: AutoPrecision
  dense::WeightsMemory weights_memory = dense::WeightsMemory::kPacked;
  // Steps of at most this many rows use the file's quantised weights directly; none: measured at load.
  std::optional<int> quantised_rows;
  int max_rows = 1024;                                // rows of the largest step
  bool deterministic = false;                         // a row's logits never depend on the rest of its step
  std::function<void(int done, int total)> progress;  // layers loaded
};

// f32 for an f32 file, integers for a quantised one where the CPU has them, else the CPU's best.
dense::Precision AutoPrecision(const gguf::GgufFile& file);

// One step: rows of several sequences.
struct StepInput {
  std::span<const TokenId> tokens;            // (rows)
  std::span<const attention::RowSpan> spans;  // cover the rows in order
  std::span<const int> logit_rows;            // rows whose logits are wanted, ascending
  std::span<const int> hidden_rows = {};      // rows whose final hidden state is wanted, ascending
  float* hidden = nullptr;                    // room for (logit_rows + hidden_rows, d_model)
};

class Model {
 public:
  static Expected<std::unique_ptr<Model>> Load(const gguf::GgufFile& file, const ModelOptions& options,
                                               ThreadPool& pool);
  virtual ~Model() = default;

  // The store that this model's steps need; call Bind with it before the first Forward.
  kv::KvShape CacheShape(codec::Codec codec) const;
  void Bind(const kv::KvCache& cache);

  // Positions below `positions` may appear in steps from now on. May allocate; call between steps.
  void EnsurePositions(int positions);

  // Writes K and V of every row into the slots that `cache` has reserved, logits (logit_rows, n_vocab), and what the
  // output matrix would multiply, after the last norm, to input.hidden (hidden_rows, d_model).
  virtual void Forward(const StepInput& input, const kv::KvCache& cache, float* logits) = 0;

  // Of all steps since Bind, which must have been called.
  const attention::Attention::Times& attention_times() const { return attention_->times(); }
  std::span<const double> query_energy(int layer) const { return attention_->query_energy(layer); }

  const gguf::Hyperparameters& hyperparameters() const { return hp_; }
  int n_vocab() const { return hp_.n_vocab; }
  int quantised_rows() const { return quantised_rows_; }
  dense::Precision precision() const { return linear_options_.precision; }
  size_t packed_bytes() const { return packed_bytes_; }
  // As far as EnsurePositions reached; its entries are multiplied by RopeMagnitude.
  const dense::RopeTable& RopeOfLayer(int layer) const { return hp_.is_swa_layer[layer] ? rope_swa_ : rope_; }
  float RopeMagnitude(int layer) const { return hp_.rope_of_layer(layer).magnitude(); }

  // For the architectures' own classes; use Load.
  Model(const gguf::GgufFile& file, gguf::Hyperparameters hp, const ModelOptions& options, ThreadPool& pool);

 protected:
  // Loading. Names are GGUF's, without ".weight" or ".bias"; shapes are checked against the hyperparameters.
  Expected<std::vector<float>> LoadVector(const std::string& name, int size) const;
  struct LinearSource {
    std::string name;
    int out = 0;
  };
  // Stacks the sources along their outputs. Biases are taken where the file has them.
  Expected<dense::Linear> LoadLinear(std::initializer_list<LinearSource> sources, int in);
  Status LoadEmbedding();
  Expected<dense::Linear> LoadOutput();  // "output", or the token embedding where it is tied
  std::string LayerName(int layer, const char* name) const;
  void ReportProgress(int layer) const;
  // Rows up to which quantised weights beat packed ones, by timing one sweep over `layers` each way.
  void ChooseQuantisedRows(std::span<const dense::Linear* const> layers);

  // Steps.
  // A buffer's first rows as activations, in the precision that a Linear wants for that many rows; plain numbers, or
  // for one Linear and whatever it wants.
  dense::Activations Act(HugeBuffer& buffer, int rows, int cols) const;
  dense::Activations ActFor(const dense::Linear& linear, HugeBuffer& buffer, int rows) const;
  void Multiply(const dense::Linear& linear, const dense::Activations& x, float* y, bool accumulate = false);
  void MultiplyGated(const dense::Linear& linear, const dense::Activations& x, dense::Gate gate,
                     const dense::Activations& y);
  // x (rows, d_model) = embedding of each token, times the model's embedding scale.
  void Embed(std::span<const TokenId> tokens, float* x);
  // The rows that the last layer is computed for: those whose logits or hidden state is wanted.
  std::span<const int> KeptRows(const StepInput& input);
  // From the kept rows in x, writes input.hidden and leaves those whose logits are wanted; returns how many.
  int TakeHidden(const StepInput& input, const std::vector<float>& output_norm);
  // Moves the given rows of x (rows, d_model) and `other` to the front; returns how many.
  int KeepRows(std::span<const int> rows, float* x, const dense::Activations& other);
  dense::Activations Shrink(const dense::Activations& x, int rows) const;
  float* x() { return reinterpret_cast<float*>(x_.data()); }
  float* qkv() { return reinterpret_cast<float*>(qkv_.data()); }

  const gguf::GgufFile& file_;
  const gguf::Hyperparameters hp_;
  ModelOptions options_;
  dense::LinearOptions linear_options_;
  ThreadPool& pool_;
  const gguf::Tensor* embedding_ = nullptr;
  std::unique_ptr<attention::Attention> attention_;
  dense::RopeTable rope_;
  dense::RopeTable rope_swa_;
  dense::LinearScratch scratch_;
  int quantised_rows_ = 0;
  bool all_quantised_ = true;  // every Linear has the quantised way
  size_t packed_bytes_ = 0;
  HugeArena weights_;  // packed panels
  HugeBuffer x_;       // (max_rows, d_model) f32: the residual stream
  HugeBuffer norm_;    // (max_rows, d_model) f32 or bf16
  HugeBuffer qkv_;     // (max_rows, d_q + 2 d_kv) f32
  HugeBuffer attn_;    // (max_rows, d_q) f32 or bf16
  HugeBuffer ffn_;     // (max_rows, d_ff) f32 or bf16
  std::vector<int> kept_rows_;
};

// One architecture each, in its own file.
Expected<std::unique_ptr<Model>> LoadLlama(const gguf::GgufFile& file, gguf::Hyperparameters hp,
                                           const ModelOptions& options, ThreadPool& pool);
Expected<std::unique_ptr<Model>> LoadQwen2(const gguf::GgufFile& file, gguf::Hyperparameters hp,
                                           const ModelOptions& options, ThreadPool& pool);
Expected<std::unique_ptr<Model>> LoadQwen3(const gguf::GgufFile& file, gguf::Hyperparameters hp,
                                           const ModelOptions& options, ThreadPool& pool);
Expected<std::unique_ptr<Model>> LoadGemma3(const gguf::GgufFile& file, gguf::Hyperparameters hp,
                                            const ModelOptions& options, ThreadPool& pool);

}  // namespace jointkv::models
