// gemma3: Gemma 3 (Gemma Team 2025): sliding-window layers with their own RoPE base between full ones, RMSNorm on each
// head's Q and K, norms after each block as well as before, GELU, scaled embeddings.
#include "dense/ops.h"
#include "models/model.h"

namespace jointkv::models {
namespace {

class Gemma3 : public Model {
 public:
  using Model::Model;
  Status LoadWeights();
  void Forward(const StepInput& input, const kv::KvCache& cache, float* logits) override;

 private:
  struct Layer {
    std::vector<float> attn_norm;       // (d_model)
    dense::Linear qkv;                  // (d_model) -> (d_q + 2 d_kv)
    std::vector<float> q_norm;          // (head_dim)
    std::vector<float> k_norm;          // (head_dim)
    dense::Linear attn_output;          // (d_q) -> (d_model)
    std::vector<float> attn_post_norm;  // (d_model)
    std::vector<float> ffn_norm;        // (d_model)
    dense::Linear gate_up;              // (d_model) -> (2 d_ff)
    dense::Linear down;                 // (d_ff) -> (d_model)
    std::vector<float> ffn_post_norm;   // (d_model)
  };
  float* y() { return reinterpret_cast<float*>(y_.data()); }

  HugeBuffer y_;  // (max_rows, d_model) f32: a block's output before its norm
  std::vector<Layer> layers_;
  std::vector<float> output_norm_;  // (d_model)
  dense::Linear output_;            // (d_model) -> (n_vocab)
};

Status Gemma3::LoadWeights() {
  RETURN_IF_ERROR(LoadEmbedding());
  y_ = HugeBuffer(static_cast<size_t>(options_.max_rows) * hp_.d_model * sizeof(float));
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
    ASSIGN_OR_RETURN(layer.attn_post_norm, LoadVector(LayerName(i, "post_attention_norm"), hp_.d_model));
    ASSIGN_OR_RETURN(layer.ffn_norm, LoadVector(LayerName(i, "ffn_norm"), hp_.d_model));
    ASSIGN_OR_RETURN(
        layer.gate_up,
        LoadLinear({{LayerName(i, "ffn_gate"), hp_.d_ff}, {LayerName(i, "ffn_up"), hp_.d_ff}}, hp_.d_model));
    ASSIGN_OR_RETURN(layer.down, LoadLinear({{LayerName(i, "ffn_down"), hp_.d_model}}, hp_.d_ff));
    ASSIGN_OR_RETURN(layer.ffn_post_norm, LoadVector(LayerName(i, "post_ffw_norm"), hp_.d_model));
    sample.push_back(&layer.gate_up);
    ReportProgress(i);
  }
  ASSIGN_OR_RETURN(output_norm_, LoadVector("output_norm", hp_.d_model));
  ASSIGN_OR_RETURN(output_, LoadOutput());
  ChooseQuantisedRows(sample);
  return Status::Ok();
}

void Gemma3::Forward(const StepInput& input, const kv::KvCache& cache, float* logits) {
  int rows = static_cast<int>(input.tokens.size());
  attention_->Plan(cache, input.spans);
  Embed(input.tokens, x());  // x (rows, d_model)

  for (int i = 0; i < hp_.n_layers; ++i) {
    const Layer& layer = layers_[i];
    const dense::Activations norm = ActFor(layer.qkv, norm_, rows);
    dense::RmsNorm(pool_, x(), layer.attn_norm.data(), hp_.rms_eps, norm);  // norm (rows, d_model)
    Multiply(layer.qkv, norm, qkv());                                       // qkv (rows, d_q + 2 d_kv)
    attention_->Store(pool_, cache, i, RopeOfLayer(i), {layer.q_norm.data(), layer.k_norm.data(), hp_.rms_eps}, qkv());
    if (i + 1 == hp_.n_layers && KeptRows(input).empty()) return;

    dense::Activations attn = Act(attn_, rows, hp_.d_q());
    attention_->Run(pool_, cache, i, RopeOfLayer(i), RopeMagnitude(i), attn);  // attn (rows, d_q)
    if (i + 1 == hp_.n_layers) {
      rows = KeepRows(KeptRows(input), x(), attn);
      attn = Shrink(attn, rows);
    }
    Multiply(layer.attn_output, attn, y());  // y (rows, d_model)
    dense::AddRmsNorm(pool_, x(), y(), layer.attn_post_norm.data(), hp_.rms_eps, rows, hp_.d_model);

    const dense::Activations ffn_norm = ActFor(layer.gate_up, norm_, rows);
    dense::RmsNorm(pool_, x(), layer.ffn_norm.data(), hp_.rms_eps, ffn_norm);  // ffn_norm (rows, d_model)
    const dense::Activations ffn = Act(ffn_, rows, hp_.d_ff);
    MultiplyGated(layer.gate_up, ffn_norm, dense::Gate::kGelu, ffn);  // ffn (rows, d_ff)
    Multiply(layer.down, ffn, y());                                   // y (rows, d_model)
    dense::AddRmsNorm(pool_, x(), y(), layer.ffn_post_norm.data(), hp_.rms_eps, rows, hp_.d_model);
  }

  rows = TakeHidden(input, output_norm_);
  if (rows == 0) return;
  const dense::Activations norm = ActFor(output_, norm_, rows);
  dense::RmsNorm(pool_, x(), output_norm_.data(), hp_.rms_eps, norm);
  Multiply(output_, norm, logits);  // logits (rows, n_vocab)
  if (hp_.final_logit_softcap > 0)
    dense::SoftCap(pool_, hp_.final_logit_softcap, logits, static_cast<size_t>(rows) * hp_.n_vocab);
}

}  // namespace

Expected<std::unique_ptr<Model>> LoadGemma3(const gguf::GgufFile& file, gguf::Hyperparameters hp,
                                            const ModelOptions& options, ThreadPool& pool) {
  auto model = std::make_unique<Gemma3>(file, std::move(hp), options, pool);
  RETURN_IF_ERROR(model->LoadWeights());
  return std::unique_ptr<Model>(std::move(model));
}

}  // namespace jointkv::models
