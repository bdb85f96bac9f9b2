#include "models/model.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "base/bf16.h"
#include "base/clock.h"
#include "dense/gemm_int8.h"
#include "dense/ops.h"
#include "gguf/dequantize.h"

namespace jointkv::models {
namespace {

// Quantised rows beyond this would make a step slower than one packed pass on any machine we know.
constexpr int kQuantisedRowsMax = 8;

}  // namespace

dense::Precision AutoPrecision(const gguf::GgufFile& file) {
  const std::string& type = file.quantization();
  if (type == "f32") return dense::Precision::kF32;
  const bool quantised = type != "f16" && type != "bf16";
  return quantised && dense::HasInt8Products() ? dense::Precision::kInt8 : dense::NativePrecision();
}

Expected<std::unique_ptr<Model>> Model::Load(const gguf::GgufFile& file, const ModelOptions& options,
                                             ThreadPool& pool) {
  ASSIGN_OR_RETURN(gguf::Hyperparameters hp, gguf::ReadHyperparameters(file));
  switch (hp.architecture) {
    case gguf::Architecture::kLlama: return LoadLlama(file, std::move(hp), options, pool);
    case gguf::Architecture::kQwen2: return LoadQwen2(file, std::move(hp), options, pool);
    case gguf::Architecture::kQwen3: return LoadQwen3(file, std::move(hp), options, pool);
    case gguf::Architecture::kGemma3: return LoadGemma3(file, std::move(hp), options, pool);
  }
  return Status(StatusCode::kInternal, "architecture without a model");
}

Model::Model(const gguf::GgufFile& file, gguf::Hyperparameters hp, const ModelOptions& options, ThreadPool& pool)
    : file_(file), hp_(std::move(hp)), options_(options), pool_(pool) {
  linear_options_.precision = options.precision.value_or(AutoPrecision(file));
  linear_options_.memory = options.weights_memory;
  linear_options_.arena = &weights_;
  rope_ = dense::RopeTable(hp_.rope, hp_.rope_freq_factors);
  rope_swa_ = dense::RopeTable(hp_.rope_swa, {});
  EnsurePositions(codec::kBlockTokensMax);
  const size_t rows = options.max_rows;
  kept_rows_.reserve(rows);
  x_ = HugeBuffer(rows * hp_.d_model * sizeof(float));
  norm_ = HugeBuffer(rows * hp_.d_model * sizeof(float));
  qkv_ = HugeBuffer(rows * (hp_.d_q() + 2 * hp_.d_kv()) * sizeof(float));
  attn_ = HugeBuffer(rows * hp_.d_q() * sizeof(float));
  ffn_ = HugeBuffer(rows * hp_.d_ff * sizeof(float));
  const int max_inner = std::max({hp_.d_model, hp_.d_q(), hp_.d_ff});
  scratch_.Reserve(pool.size(), options.max_rows, std::max(kQuantisedRowsMax, options.quantised_rows.value_or(0)),
                   max_inner, linear_options_);
}

kv::KvShape Model::CacheShape(codec::Codec codec) const {
  kv::KvShape shape;
  shape.layout = {hp_.n_kv_heads, hp_.head_dim, codec};
  for (int layer = 0; layer < hp_.n_layers; ++layer)
    shape.window.push_back(hp_.is_swa_layer[layer] ? hp_.sliding_window : 0);
  return shape;
}

void Model::Bind(const kv::KvCache& cache) {
  attention::HeadShape shape;
  shape.n_heads = hp_.n_heads;
  shape.n_kv_heads = hp_.n_kv_heads;
  shape.head_dim = hp_.head_dim;
  shape.scale = hp_.attention_scale;
  shape.neox = hp_.rope.neox;
  attention_ =
      std::make_unique<attention::Attention>(shape, cache, pool_.size(), options_.max_rows, options_.deterministic);
}

void Model::EnsurePositions(int positions) {
  rope_.Ensure(positions);
  rope_swa_.Ensure(positions);
}

std::string Model::LayerName(int layer, const char* name) const { return "blk." + std::to_string(layer) + "." + name; }

void Model::ReportProgress(int layer) const {
  if (options_.progress) options_.progress(layer + 1, hp_.n_layers);
}

Expected<std::vector<float>> Model::LoadVector(const std::string& name, int size) const {
  ASSIGN_OR_RETURN(const gguf::Tensor* tensor, gguf::RequireTensor(file_, name + ".weight", {size}));
  std::vector<float> values(size);
  RETURN_IF_ERROR(gguf::Dequantize(*tensor, 0, 1, values.data()));
  return values;
}

Expected<dense::Linear> Model::LoadLinear(std::initializer_list<LinearSource> sources, int in) {
  std::vector<const gguf::Tensor*> parts;
  std::vector<const gguf::Tensor*> biases;
  for (const LinearSource& source : sources) {
    ASSIGN_OR_RETURN(const gguf::Tensor* part, gguf::RequireTensor(file_, source.name + ".weight", {in, source.out}));
    parts.push_back(part);
    if (file_.Find(source.name + ".scale") != nullptr) {
      return Status(StatusCode::kUnsupported,
                    "tensor '" + source.name + ".scale': matrices with a scale of their own are not supported");
    }
    const std::string bias_name = source.name + ".bias";
    const gguf::Tensor* bias = nullptr;
    if (file_.Find(bias_name) != nullptr) {
      ASSIGN_OR_RETURN(bias, gguf::RequireTensor(file_, bias_name, {source.out}));
    }
    biases.push_back(bias);
  }
  ASSIGN_OR_RETURN(dense::Linear linear, dense::Linear::Create(parts, biases, linear_options_, pool_));
  packed_bytes_ += linear.packed_bytes();
  all_quantised_ = all_quantised_ && linear.has_quantised();
  return linear;
}

Status Model::LoadEmbedding() {
  ASSIGN_OR_RETURN(embedding_, gguf::RequireTensor(file_, "token_embd.weight", {hp_.d_model, hp_.n_vocab}));
  return Status::Ok();
}

Expected<dense::Linear> Model::LoadOutput() {
  const bool tied = file_.Find("output.weight") == nullptr;
  return LoadLinear({{tied ? "token_embd" : "output", hp_.n_vocab}}, hp_.d_model);
}

void Model::ChooseQuantisedRows(std::span<const dense::Linear* const> layers) {
  if (options_.deterministic || !all_quantised_) {
    quantised_rows_ = 0;
    return;
  }
  if (options_.quantised_rows.has_value()) {
    quantised_rows_ = *options_.quantised_rows;
    return;
  }
  std::vector<float> y(static_cast<size_t>(kQuantisedRowsMax) * layers[0]->out());
  const auto sweep = [&](dense::Precision precision, int rows, int quantised_rows) {
    double best_s = 1e9;
    for (int repeat = 0; repeat < 3; ++repeat) {
      const dense::Activations x = {norm_.data(), dense::ActivationPrecision(precision), rows, hp_.d_model};
      const double start_s = MonotonicSeconds();
      for (const dense::Linear* layer : layers) layer->Forward(pool_, scratch_, x, quantised_rows, y.data());
      best_s = std::min(best_s, MonotonicSeconds() - start_s);
    }
    return best_s;
  };
  // Reading a third of bf16's bytes, the quantised way suffers less when memory is shared: it wins near ties. Packed
  // integers are as small.
  const double tie = linear_options_.precision == dense::Precision::kInt8 ? 1 : 1.25;
  const double quantised_s = sweep(dense::Precision::kF32, 1, 1);
  quantised_rows_ = 0;
  while (quantised_rows_ < kQuantisedRowsMax) {
    const int rows = quantised_rows_ + 1;
    if (rows * quantised_s > tie * sweep(linear_options_.precision, rows, 0)) break;
    quantised_rows_ = rows;
  }
}

dense::Activations Model::Act(HugeBuffer& buffer, int rows, int cols) const {
  const bool quantised = rows <= quantised_rows_;
  const dense::Precision packed = dense::ActivationPrecision(linear_options_.precision);
  return {buffer.data(), quantised ? dense::Precision::kF32 : packed, rows, cols};
}

dense::Activations Model::ActFor(const dense::Linear& linear, HugeBuffer& buffer, int rows) const {
  dense::Activations act = Act(buffer, rows, linear.in());
  if (rows > quantised_rows_ && linear.precision() == dense::Precision::kInt8) act.precision = dense::Precision::kInt8;
  return act;
}

void Model::Multiply(const dense::Linear& linear, const dense::Activations& x, float* y, bool accumulate) {
  linear.Forward(pool_, scratch_, x, quantised_rows_, y, accumulate);
}

void Model::MultiplyGated(const dense::Linear& linear, const dense::Activations& x, dense::Gate gate,
                          const dense::Activations& y) {
  linear.ForwardGated(pool_, scratch_, x, quantised_rows_, gate, y);
}

void Model::Embed(std::span<const TokenId> tokens, float* x) {
  const int d_model = hp_.d_model;
  pool_.ParallelFor(static_cast<int>(tokens.size()), [&](int row, int) {
    float* out = x + static_cast<ptrdiff_t>(row) * d_model;
    const Status status = gguf::Dequantize(*embedding_, tokens[row], 1, out);
    CHECK(status.ok());
    if (hp_.embedding_scale != 1) dense::Scale(hp_.embedding_scale, out, d_model);
  });
}

std::span<const int> Model::KeptRows(const StepInput& input) {
  if (input.hidden_rows.empty()) return input.logit_rows;
  kept_rows_.clear();
  std::ranges::set_union(input.logit_rows, input.hidden_rows, std::back_inserter(kept_rows_));
  return kept_rows_;
}

int Model::TakeHidden(const StepInput& input, const std::vector<float>& output_norm) {
  const auto logit_rows = static_cast<int>(input.logit_rows.size());
  if (input.hidden_rows.empty()) return logit_rows;
  const dense::Activations all = {input.hidden, dense::Precision::kF32, static_cast<int>(kept_rows_.size()),
                                  hp_.d_model};
  dense::RmsNorm(pool_, x(), output_norm.data(), hp_.rms_eps, all);
  const auto pick = [&](std::span<const int> rows, float* data) {
    size_t to = 0;
    for (size_t from = 0; from < kept_rows_.size() && to < rows.size(); ++from) {
      if (kept_rows_[from] != rows[to]) continue;
      const auto d_model = static_cast<size_t>(hp_.d_model);
      if (from != to) std::memcpy(data + to * d_model, data + from * d_model, d_model * sizeof(float));
      ++to;
    }
  };
  pick(input.hidden_rows, input.hidden);
  pick(input.logit_rows, x());
  return logit_rows;
}

int Model::KeepRows(std::span<const int> rows, float* x, const dense::Activations& other) {
  const size_t element = other.precision == dense::Precision::kBf16 ? 2 : 4;
  auto* bytes = static_cast<std::byte*>(other.data);
  for (size_t i = 0; i < rows.size(); ++i) {
    const size_t from = rows[i];
    if (from == i) continue;
    std::memcpy(x + i * hp_.d_model, x + from * hp_.d_model, hp_.d_model * sizeof(float));
    std::memcpy(bytes + i * other.cols * element, bytes + from * other.cols * element, other.cols * element);
  }
  return static_cast<int>(rows.size());
}

dense::Activations Model::Shrink(const dense::Activations& x, int rows) const {
  dense::Activations shrunk = x;
  shrunk.rows = rows;
  // Fewer rows may now take the quantised way, which wants f32.
  if (rows <= quantised_rows_ && x.precision == dense::Precision::kBf16) {
    for (size_t i = static_cast<size_t>(rows) * x.cols; i > 0; --i) {
      static_cast<float*>(x.data)[i - 1] = F32FromBf16(static_cast<const uint16_t*>(x.data)[i - 1]);
    }
    shrunk.precision = dense::Precision::kF32;
  }
  return shrunk;
}

}  // namespace jointkv::models
