// qwen3: Qwen3 (Yang et al. 2025): llama's layer with RMSNorm on each head's Q and K before RoPE, NEOX-style pairs.
#include "dense/ops.h"
#include "models/model.h"

namespace jointkv::models {
namespace {

class Qwen3 : public Model {
 public:
  using Model::Model;
  Status LoadWeights();
  void Forward(const StepInput& input, const kv::KvCache& cache, float* logits) override;

 private:
  struct Layer {
    std::vector<float> attn_norm;  // (d_model)
    dense::Linear qkv;             // (d_model) -> (d_q + 2 d_kv)
    std::vector<float> q_norm;     // (head_dim)
    std::vector<float> k_norm;     // (head_dim)
    dense::Linear attn_output;     // (d_q) -> (d_model)
    std::vector<float> ffn_norm;   // (d_model)
    dense::Linear gate_up;         // (d_model) -> (2 d_ff)
    dense::Linear down;            // (d_ff) -> (d_model)
  };
  std::vector<Layer> layers_;
  std::vector<float> output_norm_;  // (d_model)
  dense::Linear output_;            // (d_model) -> (n_vocab)
};

Status Qwen3::LoadWeights() {
  RETURN_IF_ERROR(LoadEmbedding());
  std::vector<const dense::Linear*> sample;
  layers_.resize(hp_.n_layers);
  for (int i = 0; i < hp_.n_layers; ++i) {
    Layer& layer = layers_[i];
    ASSIGN_OR_RETURN(layer.attn_norm, LoadVector(LayerName(i, "attn_norm"), hp_.d_model));
    ASSIGN_OR_RETURN(layer.qkv, LoadLinear({{LayerName(i, "attn_q"), hp_.d_q()},
                                            {LayerName(i, "attn_k"), hp_.d_kv()},
                                            {LayerName(i, "attn_v"), hp_.d_kv()}},
                                           hp_.d_model));
    ASSIGN_OR_RETURN(layer.q_norm, LoadVector(LayerName(i, "attn_q_norm"), hp_.head_dim));
    ASSIGN_OR_RETURN(layer.k_norm, LoadVector(LayerName(i, "attn_k_norm"), hp_.head_dim));
    ASSIGN_OR_RETURN(layer.attn_output, LoadLinear({{LayerName(i, "attn_output"), hp_.d_model}}, hp_.d_q()));
    ASSIGN_OR_RETURN(layer.ffn_norm, LoadVector(LayerName(i, "ffn_norm"), hp_.d_model));
    ASSIGN_OR_RETURN(
        layer.gate_up,
        LoadLinear({{LayerName(i, "ffn_gate"), hp_.d_ff}, {LayerName(i, "ffn_up"), hp_.d_ff}}, hp_.d_model));
    ASSIGN_OR_RETURN(layer.down, LoadLinear({{LayerName(i, "ffn_down"), hp_.d_model}}, hp_.d_ff));
    sample.push_back(&layer.gate_up);
    ReportProgress(i);
  }
  ASSIGN_OR_RETURN(output_norm_, LoadVector("output_norm", hp_.d_model));
  ASSIGN_OR_RETURN(output_, LoadOutput());
  ChooseQuantisedRows(sample);
  return Status::Ok();
}

void Qwen3::Forward(const StepInput& input, const kv::KvCache& cache, float* logits) {
  int rows = static_cast<int>(input.tokens.size());
  attention_->Plan(cache, input.spans);
  Embed(input.tokens, x());  // x (rows, d_model)

  for (int i = 0; i < hp_.n_layers; ++i) {
    const Layer& layer = layers_[i];
    const dense::Activations norm = ActFor(layer.qkv, norm_, rows);
    dense::RmsNorm(pool_, x(), layer.attn_norm.data(), hp_.rms_eps, norm);  // norm (rows, d_model)
    Multiply(layer.qkv, norm, qkv());                                       // qkv (rows, d_q + 2 d_kv)
    attention_->Store(pool_, cache, i, rope_, {layer.q_norm.data(), layer.k_norm.data(), hp_.rms_eps}, qkv());
    if (i + 1 == hp_.n_layers && KeptRows(input).empty()) return;

    dense::Activations attn = Act(attn_, rows, hp_.d_q());
    attention_->Run(pool_, cache, i, rope_, RopeMagnitude(i), attn);  // attn (rows, d_q)
    if (i + 1 == hp_.n_layers) {
      rows = KeepRows(KeptRows(input), x(), attn);
      attn = Shrink(attn, rows);
    }
    Multiply(layer.attn_output, attn, x(), /*accumulate=*/true);  // x += (rows, d_model)

    const dense::Activations ffn_norm = ActFor(layer.gate_up, norm_, rows);
    dense::RmsNorm(pool_, x(), layer.ffn_norm.data(), hp_.rms_eps, ffn_norm);  // ffn_norm (rows, d_model)
    const dense::Activations ffn = Act(ffn_, rows, hp_.d_ff);
    MultiplyGated(layer.gate_up, ffn_norm, dense::Gate::kSilu, ffn);  // ffn (rows, d_ff)
    Multiply(layer.down, ffn, x(), /*accumulate=*/true);              // x += (rows, d_model)
  }

  rows = TakeHidden(input, output_norm_);
  if (rows == 0) return;
  const dense::Activations norm = ActFor(output_, norm_, rows);
  dense::RmsNorm(pool_, x(), output_norm_.data(), hp_.rms_eps, norm);
  Multiply(output_, norm, logits);  // logits (rows, n_vocab)
}

}  // namespace

Expected<std::unique_ptr<Model>> LoadQwen3(const gguf::GgufFile& file, gguf::Hyperparameters hp,
                                           const ModelOptions& options, ThreadPool& pool) {
  auto model = std::make_unique<Qwen3>(file, std::move(hp), options, pool);
  RETURN_IF_ERROR(model->LoadWeights());
  return std::unique_ptr<Model>(std::move(model));
}

}  // namespace jointkv::models
