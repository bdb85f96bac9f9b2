// What the metadata says about a model, checked: sizes, RoPE, attention windows and scales.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "gguf/gguf_file.h"

namespace jointkv::gguf {

enum class Architecture { kLlama, kQwen2, kQwen3, kGemma3 };
const char* ArchitectureName(Architecture architecture);  // as general.architecture spells it

enum class RopeScaling { kNone, kLinear, kYarn };
const char* RopeScalingName(RopeScaling scaling);

// Rotary embedding of one kind of layer, with the arguments that ggml_rope_ext takes in the pinned llama.cpp. For pair
// i of n_rot/2 at position p: theta = p * freq_base^(-2i/n_rot) / freq_factors[i], then scaled by freq_scale, or under
// YaRN (ext_factor != 0) blended between scaled and unscaled. Both cos and sin are multiplied by magnitude().
struct Rope {
  int32_t n_rot = 0;  // rotated dimensions of a head; equals head_dim
  bool neox = false;  // pairs (i, i + n_rot/2); otherwise (2i, 2i + 1)
  float freq_base = 10000;
  float freq_scale = 1;   // 1 / scaling factor
  float ext_factor = 0;   // 1 under YaRN
  float attn_factor = 1;  // as passed to ggml_rope_ext, which multiplies magnitude's logarithm itself
  float beta_fast = 32;
  float beta_slow = 1;
  int32_t n_ctx_orig = 0;  // tokens, before YaRN extended the context

  float magnitude() const;
};

// Threads: a plain value. Owns: everything. The defaults and rules are those of the pinned llama.cpp for the four
// architectures; metadata that it does not read for them is not read here either.
struct Hyperparameters {
  Architecture architecture = Architecture::kLlama;
  std::string name;  // general.name, may be empty

  int32_t n_layers = 0;
  int32_t d_model = 0;
  int32_t n_heads = 0;     // query heads
  int32_t n_kv_heads = 0;  // divides n_heads
  int32_t head_dim = 0;    // of Q, K and V alike; even
  int32_t d_ff = 0;
  int32_t n_vocab = 0;         // rows of token_embd.weight
  int32_t context_length = 0;  // tokens the model was trained for
  float rms_eps = 0;

  RopeScaling rope_scaling = RopeScaling::kNone;
  float rope_scaling_factor = 1;
  Rope rope;                             // layers that see everything
  Rope rope_swa;                         // sliding-window layers: own base, never linearly scaled
  std::vector<float> rope_freq_factors;  // (n_rot / 2), from rope_freqs.weight; empty when the model has none

  int32_t sliding_window = 0;      // keys that a query sees, its own included; 0 = no layer has a window
  std::vector<bool> is_swa_layer;  // (n_layers)

  float attention_scale = 0;      // multiplies q.k
  float final_logit_softcap = 0;  // 0 = off; gemma3: logits = cap * tanh(logits / cap)
  float embedding_scale = 1;      // gemma3: sqrt(d_model)

  const Rope& rope_of_layer(int32_t layer) const { return is_swa_layer[static_cast<size_t>(layer)] ? rope_swa : rope; }
  int32_t d_q() const { return n_heads * head_dim; }
  int32_t d_kv() const { return n_kv_heads * head_dim; }
};

// Fails with kUnsupported (architecture, experts, LongRoPE, unequal heads, partial rotation...), kNotFound (missing key
// or token_embd.weight), kInvalidArgument (wrong type or impossible value), kOutOfRange (past a limit) or kDataLoss
// (two parts of the file disagree); each message names the key, its value and the rule.
Expected<Hyperparameters> ReadHyperparameters(const GgufFile& file);

// The tensor with exactly this shape ({ne0} or {ne0, ne1}), or kNotFound or kInvalidArgument naming both shapes.
Expected<const Tensor*> RequireTensor(const GgufFile& file, std::string_view name,
                                      std::initializer_list<int64_t> shape);

}  // namespace jointkv::gguf
