#include "gguf/hyperparameters.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>

#include "gguf/gguf_writer_for_test.h"

namespace jointkv::gguf {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Two layers of width 64 with four query heads, two KV heads and ten tokens.
GgufWriter Model(const std::string& arch) {
  GgufWriter w;
  w.AddString("general.architecture", arch);
  w.AddString("general.name", "tiny");
  w.AddU32(arch + ".block_count", 2);
  w.AddU32(arch + ".embedding_length", 64);
  w.AddU32(arch + ".context_length", 4096);
  w.AddU32(arch + ".feed_forward_length", 128);
  w.AddU32(arch + ".attention.head_count", 4);
  w.AddU32(arch + ".attention.head_count_kv", 2);
  w.AddF32(arch + ".attention.layer_norm_rms_epsilon", 1e-6f);
  w.AddTensorF32("token_embd.weight", {64, 10}, 0.5f);
  return w;
}

Expected<Hyperparameters> ReadModel(const GgufWriter& w) {
  const TempFile temp(w.Build());
  const Expected<GgufFile> file = GgufFile::Open(temp.path());
  if (!file.ok()) return file.status();
  return ReadHyperparameters(*file);
}

Hyperparameters Parsed(const GgufWriter& w) {
  Expected<Hyperparameters> parsed = ReadModel(w);
  EXPECT_TRUE(parsed.ok()) << parsed.status().ToString();
  return parsed.ok() ? *parsed : Hyperparameters();
}

TEST(HyperparametersTest, Llama) {
  const Hyperparameters h = Parsed(Model("llama"));
  EXPECT_EQ(h.architecture, Architecture::kLlama);
  EXPECT_EQ(h.name, "tiny");
  EXPECT_EQ(h.n_layers, 2);
  EXPECT_EQ(h.d_model, 64);
  EXPECT_EQ(h.n_heads, 4);
  EXPECT_EQ(h.n_kv_heads, 2);
  EXPECT_EQ(h.head_dim, 16);
  EXPECT_EQ(h.d_q(), 64);
  EXPECT_EQ(h.d_kv(), 32);
  EXPECT_EQ(h.d_ff, 128);
  EXPECT_EQ(h.n_vocab, 10);
  EXPECT_EQ(h.context_length, 4096);
  EXPECT_EQ(h.rms_eps, 1e-6f);
  EXPECT_EQ(h.rope_scaling, RopeScaling::kNone);
  EXPECT_FALSE(h.rope.neox);
  EXPECT_EQ(h.rope.n_rot, 16);
  EXPECT_EQ(h.rope.freq_base, 10000);
  EXPECT_EQ(h.rope.freq_scale, 1);
  EXPECT_EQ(h.rope.ext_factor, 0);
  EXPECT_EQ(h.rope.magnitude(), 1);
  EXPECT_EQ(h.rope.n_ctx_orig, 4096);
  EXPECT_TRUE(h.rope_freq_factors.empty());
  EXPECT_EQ(h.sliding_window, 0);
  EXPECT_EQ(h.is_swa_layer, (std::vector<bool>{false, false}));
  EXPECT_EQ(h.attention_scale, 0.25f);
  EXPECT_EQ(h.embedding_scale, 1);
  EXPECT_EQ(h.final_logit_softcap, 0);
}

TEST(HyperparametersTest, HeadCountsMayBeOnePerLayer) {
  GgufWriter w = Model("llama");
  w.Remove("llama.attention.head_count_kv");
  EXPECT_EQ(Parsed(w).n_kv_heads, 4);
  w.AddNumbers<int32_t>("llama.attention.head_count_kv", ValueType::kI32, {2, 2});
  EXPECT_EQ(Parsed(w).n_kv_heads, 2);
  w.AddNumbers<int32_t>("llama.attention.head_count_kv", ValueType::kI32, {2, 4});
  EXPECT_EQ(ReadModel(w).status().code(), StatusCode::kUnsupported);
}

TEST(HyperparametersTest, LinearScalingAndItsOldName) {
  GgufWriter w = Model("llama");
  w.AddF32("llama.rope.scale_linear", 4);
  EXPECT_EQ(Parsed(w).rope.freq_scale, 0.25f);
  w.AddF32("llama.rope.scaling.factor", 2);  // goes before the old name
  EXPECT_EQ(Parsed(w).rope.freq_scale, 0.5f);
  EXPECT_EQ(Parsed(w).rope_scaling, RopeScaling::kLinear);
  w.AddString("llama.rope.scaling.type", "none");
  EXPECT_EQ(Parsed(w).rope.freq_scale, 1);
  EXPECT_EQ(Parsed(w).rope_scaling, RopeScaling::kNone);
}

TEST(HyperparametersTest, Yarn) {
  GgufWriter w = Model("qwen3");
  w.AddString("qwen3.rope.scaling.type", "yarn");
  w.AddF32("qwen3.rope.scaling.factor", 4);
  w.AddU32("qwen3.rope.scaling.original_context_length", 1024);
  const Hyperparameters h = Parsed(w);
  EXPECT_EQ(h.rope_scaling, RopeScaling::kYarn);
  EXPECT_TRUE(h.rope.neox);
  EXPECT_EQ(h.rope.freq_scale, 0.25f);
  EXPECT_EQ(h.rope.ext_factor, 1);
  EXPECT_EQ(h.rope.n_ctx_orig, 1024);
  EXPECT_EQ(h.rope.beta_fast, 32);
  EXPECT_EQ(h.rope.beta_slow, 1);
  // Two roundings of numbers near 1.
  EXPECT_NEAR(h.rope.attn_factor, 1, 2e-7);
  EXPECT_NEAR(h.rope.magnitude(), 1 + 0.1 * std::log(4.0), 4e-7);
  w.AddF32("qwen3.rope.scaling.attn_factor", 0.5f);
  EXPECT_NEAR(Parsed(w).rope.attn_factor, 0.5, 2e-7);
}

TEST(HyperparametersTest, FrequencyFactors) {
  GgufWriter w = Model("llama");
  w.AddTensorF32("rope_freqs.weight", {8}, {1, 1, 1, 1, 2, 4, 8, 8});
  EXPECT_EQ(Parsed(w).rope_freq_factors, (std::vector<float>{1, 1, 1, 1, 2, 4, 8, 8}));
}

TEST(HyperparametersTest, Gemma3Windows) {
  GgufWriter w = Model("gemma3");
  w.AddU32("gemma3.block_count", 8);
  w.AddU32("gemma3.attention.key_length", 32);
  w.AddU32("gemma3.attention.value_length", 32);
  w.AddF32("gemma3.rope.freq_base", 1e6f);
  w.AddF32("gemma3.rope.scaling.factor", 8);
  EXPECT_EQ(Parsed(w).is_swa_layer, std::vector<bool>(8, false));  // no window, no such layers

  w.AddU32("gemma3.attention.sliding_window", 512);
  const Hyperparameters h = Parsed(w);
  EXPECT_EQ(h.head_dim, 32);
  EXPECT_EQ(h.d_q(), 128);
  EXPECT_EQ(h.sliding_window, 512);
  EXPECT_EQ(h.is_swa_layer, (std::vector<bool>{true, true, true, true, true, false, true, true}));
  EXPECT_EQ(h.rope_of_layer(0).freq_base, 10000);
  EXPECT_EQ(h.rope_of_layer(0).freq_scale, 1);
  EXPECT_EQ(h.rope_of_layer(5).freq_base, 1e6f);
  EXPECT_EQ(h.rope_of_layer(5).freq_scale, 0.125f);
  EXPECT_EQ(h.embedding_scale, 8);
  EXPECT_EQ(h.attention_scale, 1 / std::sqrt(32.0f));

  w.AddF32("gemma3.rope.freq_base_swa", 5000);
  w.AddU32("gemma3.attention.sliding_window_pattern", 2);
  w.AddF32("gemma3.final_logit_softcapping", 30);
  EXPECT_EQ(Parsed(w).is_swa_layer, (std::vector<bool>{true, false, true, false, true, false, true, false}));
  EXPECT_EQ(Parsed(w).rope_of_layer(0).freq_base, 5000);
  EXPECT_EQ(Parsed(w).final_logit_softcap, 30);

  w.AddNumbers<uint8_t>("gemma3.attention.sliding_window_pattern", ValueType::kBool, {1, 1, 1, 0, 1, 1, 1, 0});
  EXPECT_EQ(Parsed(w).is_swa_layer, (std::vector<bool>{true, true, true, false, true, true, true, false}));
  w.AddU32("gemma3.attention.sliding_window_pattern", 0);
  EXPECT_EQ(Parsed(w).is_swa_layer, std::vector<bool>(8, true));
}

TEST(HyperparametersTest, Gemma3LargestHasItsOwnScale) {
  GgufWriter w = Model("gemma3");
  w.AddU32("gemma3.block_count", 62);
  w.AddU32("gemma3.attention.key_length", 64);
  w.AddU32("gemma3.attention.value_length", 64);
  EXPECT_EQ(Parsed(w).attention_scale, 0.25f);  // from d_model / n_heads = 16
}

struct BadModel {
  const char* name;
  std::function<void(GgufWriter&)> change;
  StatusCode code;
  const char* message;
};

TEST(HyperparametersTest, BadModelsSayWhatIsWrong) {
  using enum StatusCode;
  using W = GgufWriter;
  const std::vector<BadModel> models = {
      {"architecture", [](W& w) { w.AddString("general.architecture", "mamba"); }, kUnsupported,
       "architecture 'mamba'"},
      {"experts", [](W& w) { w.AddU32("gemma3.expert_count", 8); }, kUnsupported, "mixture of experts (8 experts)"},
      {"next token layers", [](W& w) { w.AddU32("gemma3.nextn_predict_layers", 1); }, kUnsupported,
       "nextn_predict_layers is 1"},
      {"not causal", [](W& w) { w.AddBool("gemma3.attention.causal", false); }, kUnsupported,
       "attention.causal is false"},
      {"soft cap of scores", [](W& w) { w.AddF32("gemma3.attn_logit_softcapping", 50); }, kUnsupported,
       "attn_logit_softcapping is 50"},
      {"no layers key", [](W& w) { w.Remove("gemma3.block_count"); }, kNotFound,
       "'gemma3.block_count' (an integer) is missing"},
      {"no layers", [](W& w) { w.AddU32("gemma3.block_count", 0); }, kOutOfRange,
       "gemma3.block_count is 0, expected 1 to 512"},
      {"many layers", [](W& w) { w.AddU32("gemma3.block_count", 513); }, kOutOfRange, "gemma3.block_count is 513"},
      {"layers as text", [](W& w) { w.AddString("gemma3.block_count", "2"); }, kInvalidArgument,
       "'gemma3.block_count' is of type string"},
      {"layers as float", [](W& w) { w.AddF32("gemma3.block_count", 2); }, kInvalidArgument,
       "is of type f32, expected an integer"},
      {"negative width", [](W& w) { w.Add("gemma3.embedding_length", ValueType::kI32, W::Raw(-64)); }, kOutOfRange,
       "-64 is not in [0"},
      {"width too large", [](W& w) { w.AddU32("gemma3.embedding_length", 1u << 30); }, kOutOfRange,
       "embedding_length is 1073741824"},
      {"no context", [](W& w) { w.AddU32("gemma3.context_length", 0); }, kOutOfRange, "context_length is 0"},
      {"d_ff array too short",
       [](W& w) { w.AddNumbers<uint32_t>("gemma3.feed_forward_length", ValueType::kU32, {128}); }, kDataLoss,
       "has 1 elements for 2 layers"},
      {"d_ff differs",
       [](W& w) {
         w.AddNumbers<uint32_t>("gemma3.feed_forward_length", ValueType::kU32, {128, 256});
       },
       kUnsupported, "differs between layers"},
      {"eps missing", [](W& w) { w.Remove("gemma3.attention.layer_norm_rms_epsilon"); }, kNotFound,
       "layer_norm_rms_epsilon"},
      {"eps NaN", [](W& w) { w.AddF32("gemma3.attention.layer_norm_rms_epsilon", std::nanf("")); }, kOutOfRange,
       "epsilon is nan"},
      {"eps negative", [](W& w) { w.AddF32("gemma3.attention.layer_norm_rms_epsilon", -1e-6f); }, kOutOfRange,
       "epsilon is -1e-06"},
      {"no heads", [](W& w) { w.AddU32("gemma3.attention.head_count", 0); }, kOutOfRange, "head_count is 0"},
      {"no KV heads", [](W& w) { w.AddU32("gemma3.attention.head_count_kv", 0); }, kOutOfRange, "head_count_kv is 0"},
      {"heads not a multiple", [](W& w) { w.AddU32("gemma3.attention.head_count_kv", 3); }, kInvalidArgument,
       "head_count 4 is not a multiple of head_count_kv 3"},
      {"width not a multiple",
       [](W& w) { w.AddU32("gemma3.attention.head_count", 5).AddU32("gemma3.attention.head_count_kv", 5); },
       kInvalidArgument, "embedding_length 64 is not a multiple of head_count 5"},
      {"unequal heads", [](W& w) { w.AddU32("gemma3.attention.key_length", 32); }, kUnsupported,
       "key heads of 32 and value heads of 16"},
      {"odd heads",
       [](W& w) { w.AddU32("gemma3.attention.key_length", 15).AddU32("gemma3.attention.value_length", 15); },
       kUnsupported, "head dimension 15"},
      {"large heads",
       [](W& w) { w.AddU32("gemma3.attention.key_length", 512).AddU32("gemma3.attention.value_length", 512); },
       kUnsupported, "head dimension 512, expected an even number up to 256"},
      {"other heads in windows", [](W& w) { w.AddU32("gemma3.attention.key_length_swa", 32); }, kUnsupported,
       "key_length_swa 32 differs"},
      {"partial rotation", [](W& w) { w.AddU32("gemma3.rope.dimension_count", 8); }, kUnsupported,
       "rope.dimension_count 8 differs"},
      {"embedding of other width", [](W& w) { w.AddU32("gemma3.embedding_length", 32); }, kDataLoss,
       "'token_embd.weight' is [64, 10], expected [32, n_vocab]"},
      {"vocabulary of other size",
       [](W& w) {
         w.AddStrings("tokenizer.ggml.tokens", {"a", "b"});
       },
       kDataLoss, "has 2 tokens, but token_embd.weight 10 rows"},
      {"tokens of numbers", [](W& w) { w.AddNumbers<uint32_t>("tokenizer.ggml.tokens", ValueType::kU32, {1}); },
       kInvalidArgument, "expected an array of string"},
      {"frequency base 0", [](W& w) { w.AddF32("gemma3.rope.freq_base", 0); }, kOutOfRange, "rope.freq_base is 0"},
      {"frequency base infinite", [](W& w) { w.AddF32("gemma3.rope.freq_base", kInfinity); }, kOutOfRange,
       "rope.freq_base is inf"},
      {"LongRoPE", [](W& w) { w.AddString("gemma3.rope.scaling.type", "longrope"); }, kUnsupported,
       "rope.scaling.type 'longrope'"},
      {"LongRoPE factors", [](W& w) { w.AddTensorF32("rope_factors_long.weight", {8}, 1.0f); }, kUnsupported,
       "rope_factors_long.weight"},
      {"factors for gemma3", [](W& w) { w.AddTensorF32("rope_freqs.weight", {8}, 1.0f); }, kUnsupported,
       "rope_freqs.weight"},
      {"negative scaling", [](W& w) { w.AddF32("gemma3.rope.scaling.factor", -2); }, kOutOfRange,
       "rope.scaling.factor is -2"},
      {"tiny scaling", [](W& w) { w.AddF32("gemma3.rope.scaling.factor", 1e-30f); }, kOutOfRange,
       "rope.scaling.factor is 1e-30"},
      {"NaN scaling", [](W& w) { w.AddF32("gemma3.rope.scaling.factor", std::nanf("")); }, kOutOfRange,
       "rope.scaling.factor is nan"},
      {"YaRN below 1",
       [](W& w) { w.AddString("gemma3.rope.scaling.type", "yarn").AddF32("gemma3.rope.scaling.factor", 1e-5f); },
       kOutOfRange, "too small for YaRN"},
      {"YaRN on base 1",
       [](W& w) { w.AddString("gemma3.rope.scaling.type", "yarn").AddF32("gemma3.rope.freq_base", 1); },
       kInvalidArgument, "rope.freq_base is 1"},
      {"window too large", [](W& w) { w.AddU32("gemma3.attention.sliding_window", 1u << 30); }, kOutOfRange,
       "sliding_window is"},
      {"window pattern too short",
       [](W& w) {
         w.AddU32("gemma3.attention.sliding_window", 8);
         w.AddNumbers<uint8_t>("gemma3.attention.sliding_window_pattern", ValueType::kBool, {1});
       },
       kDataLoss, "has 1 elements for 2 layers"},
      {"window pattern of strings",
       [](W& w) {
         w.AddU32("gemma3.attention.sliding_window", 8);
         w.AddStrings("gemma3.attention.sliding_window_pattern", {"a", "b"});
       },
       kInvalidArgument, "sliding_window_pattern"},
      {"negative soft cap", [](W& w) { w.AddF32("gemma3.final_logit_softcapping", -30); }, kOutOfRange,
       "softcapping is -30"},
  };
  for (const BadModel& bad : models) {
    SCOPED_TRACE(bad.name);
    GgufWriter w = Model("gemma3");
    bad.change(w);
    const Status status = ReadModel(w).status();
    EXPECT_EQ(StatusCodeName(status.code()), std::string(StatusCodeName(bad.code))) << status.message();
    EXPECT_NE(status.message().find(bad.message), std::string::npos) << status.message();
  }
}

TEST(HyperparametersTest, BadFrequencyFactors) {
  GgufWriter wrong_shape = Model("llama");
  wrong_shape.AddTensorF32("rope_freqs.weight", {4}, 1.0f);
  EXPECT_NE(ReadModel(wrong_shape).status().message().find("'rope_freqs.weight' is [4], expected [8]"),
            std::string::npos);
  GgufWriter zero = Model("llama");
  zero.AddTensorF32("rope_freqs.weight", {8}, 0.0f);
  EXPECT_EQ(ReadModel(zero).status().code(), StatusCode::kOutOfRange);
}

TEST(HyperparametersTest, NeedsAnEmbedding) {
  GgufWriter w;
  w.AddString("general.architecture", "llama").AddU32("llama.block_count", 1).AddU32("llama.embedding_length", 8);
  w.AddU32("llama.context_length", 8).AddU32("llama.feed_forward_length", 8).AddU32("llama.attention.head_count", 1);
  w.AddF32("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  const Status status = ReadModel(w).status();
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_NE(status.message().find("token_embd.weight"), std::string::npos);
}

TEST(HyperparametersTest, RequireTensorNamesBothShapes) {
  const TempFile temp(Model("llama").Build());
  const Expected<GgufFile> file = GgufFile::Open(temp.path());
  ASSERT_TRUE(file.ok());
  EXPECT_TRUE(RequireTensor(*file, "token_embd.weight", {64, 10}).ok());
  const Status shape = RequireTensor(*file, "token_embd.weight", {64, 11}).status();
  EXPECT_EQ(shape.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(shape.message().find("'token_embd.weight' is [64, 10], expected [64, 11]"), std::string::npos);
  EXPECT_EQ(RequireTensor(*file, "token_embd.weight", {640}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(RequireTensor(*file, "output.weight", {64, 10}).status().code(), StatusCode::kNotFound);
}

TEST(HyperparametersTest, ReadsARealModel) {
  const char* path = std::getenv("JOINTKV_MODEL");
  if (path == nullptr) GTEST_SKIP() << "JOINTKV_MODEL names no model file";
  const Expected<GgufFile> file = GgufFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  const Expected<Hyperparameters> parsed = ReadHyperparameters(*file);
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_EQ(parsed->is_swa_layer.size(), static_cast<size_t>(parsed->n_layers));
  EXPECT_TRUE(RequireTensor(*file, "output_norm.weight", {parsed->d_model}).ok());
}

}  // namespace
}  // namespace jointkv::gguf
