// Small models with random weights and a tokenizer of their own, written when a test first asks for one.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "gguf/gguf_writer_for_test.h"

namespace jointkv::engine {

inline constexpr int kTestVocab = 1000;
inline constexpr int kTestContext = 2048;

class TestModelWriter {
 public:
  TestModelWriter(std::string architecture, int32_t type)
      : architecture_(std::move(architecture)), type_(type), gemma_(architecture_ == "gemma3") {}

  std::string Build() {
    AddHyperparameters();
    AddTokenizer();
    Matrix("token_embd", kModel, kTestVocab, 2);
    Vector("output_norm", kModel, 1, 0.1f);
    for (int layer = 0; layer < (gemma_ ? 3 : 2); ++layer) {
      const std::string block = "blk." + std::to_string(layer) + ".";
      Vector(block + "attn_norm", kModel, 1, 0.1f);
      Matrix(block + "attn_q", kModel, kHeads * kHeadDim, 1.5f);
      Matrix(block + "attn_k", kModel, kHeadDim, 1.5f);
      Matrix(block + "attn_v", kModel, kHeadDim, 1);
      Matrix(block + "attn_output", kHeads * kHeadDim, kModel, 1);
      Vector(block + "ffn_norm", kModel, 1, 0.1f);
      Matrix(block + "ffn_gate", kModel, kInner, 1);
      Matrix(block + "ffn_up", kModel, kInner, 1);
      Matrix(block + "ffn_down", kInner, kModel, 1);
      if (!gemma_) continue;
      Vector(block + "attn_q_norm", kHeadDim, 1.5f, 0.1f);
      Vector(block + "attn_k_norm", kHeadDim, 1.5f, 0.1f);
      Vector(block + "post_attention_norm", kModel, 1, 0.1f);
      Vector(block + "post_ffw_norm", kModel, 1, 0.1f);
    }
    return writer_.Build();
  }

 private:
  static constexpr int kModel = 128;
  static constexpr int kHeads = 2;  // and one KV head
  static constexpr int kHeadDim = 64;
  static constexpr int kInner = 160;

  void AddHyperparameters() {
    writer_.AddString("general.architecture", architecture_);
    const std::string prefix = architecture_ + ".";
    writer_.AddU32(prefix + "block_count", gemma_ ? 3 : 2);
    writer_.AddU32(prefix + "context_length", kTestContext);
    writer_.AddU32(prefix + "embedding_length", kModel);
    writer_.AddU32(prefix + "feed_forward_length", kInner);
    writer_.AddU32(prefix + "attention.head_count", kHeads);
    writer_.AddU32(prefix + "attention.head_count_kv", 1);
    writer_.AddU32(prefix + "attention.key_length", kHeadDim);
    writer_.AddU32(prefix + "attention.value_length", kHeadDim);
    writer_.AddF32(prefix + "attention.layer_norm_rms_epsilon", 1e-6f);
    writer_.AddU32(prefix + "rope.dimension_count", kHeadDim);
    writer_.AddF32(prefix + "rope.freq_base", 10000);
    if (!gemma_) return;
    writer_.AddU32(prefix + "attention.sliding_window", 24);
    writer_.AddU32(prefix + "attention.sliding_window_pattern", 2);
  }

  // SentencePiece with a token for every byte, three control tokens, and made-up words.
  void AddTokenizer() {
    constexpr int32_t kNormal = 1, kUnknown = 2, kControl = 3, kByte = 6;
    std::vector<std::string> tokens = {"<unk>", "<s>", "</s>"};
    std::vector<int32_t> types = {kUnknown, kControl, kControl};
    for (int byte = 0; byte < 256; ++byte) {
      const char* digits = "0123456789ABCDEF";
      tokens.push_back(std::string("<0x") + digits[byte / 16] + digits[byte % 16] + ">");
      types.push_back(kByte);
    }
    for (int word = 0; static_cast<int>(tokens.size()) < kTestVocab; ++word) {
      tokens.push_back("\u2581w" + std::to_string(word));
      types.push_back(kNormal);
    }
    writer_.AddString("tokenizer.ggml.model", "llama");
    writer_.AddStrings("tokenizer.ggml.tokens", tokens);
    writer_.AddNumbers("tokenizer.ggml.token_type", gguf::ValueType::kI32, types);
    writer_.AddNumbers("tokenizer.ggml.scores", gguf::ValueType::kF32, std::vector<float>(tokens.size(), 0.0f));
    writer_.AddU32("tokenizer.ggml.unknown_token_id", 0);
    writer_.AddU32("tokenizer.ggml.bos_token_id", 1);
    writer_.AddU32("tokenizer.ggml.eos_token_id", 2);
  }

  std::vector<float> Normal(int n, float mean, float deviation) {
    std::normal_distribution<float> normal(mean, deviation);
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = normal(random_);
    return values;
  }
  void Vector(const std::string& name, int n, float mean, float deviation) {
    writer_.AddTensorF32(name + ".weight", {n}, Normal(n, mean, deviation));
  }
  void Matrix(const std::string& name, int in, int out, float scale) {
    const std::vector<float> values = Normal(in * out, 0, scale / std::sqrt(static_cast<float>(in)));
    const auto type = static_cast<ggml_type>(type_);
    std::string data(ggml_row_size(type, in) * static_cast<size_t>(out), '\0');
    ggml_quantize_chunk(type, values.data(), data.data(), 0, out, in, nullptr);
    writer_.AddTensor({name + ".weight", {in, out}, type_, std::move(data), {}, {}});
  }

  std::string architecture_;
  int32_t type_;
  bool gemma_;
  std::mt19937 random_{1};
  gguf::GgufWriter writer_;
};

// "llama" and "gemma3" (two sliding-window layers) in f32, "llama-q4_1" quantised.
inline const std::string& TestModelPath(const std::string& name) {
  static std::map<std::string, std::unique_ptr<gguf::TempFile>> files;
  auto& file = files[name];
  if (file == nullptr) {
    const bool quantised = name.ends_with("-q4_1");
    TestModelWriter writer(name.substr(0, name.find('-')), quantised ? GGML_TYPE_Q4_1 : GGML_TYPE_F32);
    file = std::make_unique<gguf::TempFile>(writer.Build());
  }
  return file->path();
}

}  // namespace jointkv::engine
