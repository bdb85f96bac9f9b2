#include "gguf/hyperparameters.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <optional>

#include "gguf/dequantize.h"

namespace jointkv::gguf {

namespace {

// Far above every known dense model, and small enough that products of two stay within 63 bits.
constexpr uint32_t kLayersMax = 512;  // LLAMA_MAX_LAYERS
constexpr uint32_t kWidthMax = 1u << 20;
constexpr uint32_t kHeadsMax = 4096;
constexpr uint32_t kHeadDimMax = 256;  // the attention kernels' limit
constexpr uint32_t kVocabMax = 1u << 24;
constexpr uint32_t kContextMax = 1u << 27;
constexpr float kFreqBaseMax = 1e12f;
constexpr float kScalingFactorMax = 1e6f;
constexpr float kRmsEpsMax = 1e-1f;
constexpr float kSoftcapMax = 1e6f;
constexpr uint32_t kSwaPatternGemma3 = 6;  // five sliding-window layers, then one that sees everything
constexpr float kFreqBaseSwaDefault = 10000;
constexpr int32_t kLayersGemma3Large = 62;  // the 27B model, told apart by its depth as llama.cpp does

std::string FloatText(float value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%g", static_cast<double>(value));
  return text.data();
}

std::string ShapeText(const int64_t* begin, const int64_t* end) {
  std::string text = "[";
  for (const int64_t* at = begin; at != end; ++at) text += (at == begin ? "" : ", ") + std::to_string(*at);
  return text + "]";
}

// Fills the fields group by group; every group needs those before it.
class Reader {
 public:
  Reader(const GgufFile& file, Hyperparameters& out) : file_(file), out_(out) {}

  Status Read() {
    RETURN_IF_ERROR(ReadArchitecture());
    RETURN_IF_ERROR(RejectUnsupported());
    RETURN_IF_ERROR(ReadSizes());
    RETURN_IF_ERROR(ReadHeads());
    RETURN_IF_ERROR(ReadVocabulary());
    RETURN_IF_ERROR(ReadRope());
    RETURN_IF_ERROR(ReadRopeFactors());
    RETURN_IF_ERROR(ReadWindows());
    return ReadScales();
  }

 private:
  std::string Key(std::string_view suffix) const { return file_.architecture() + "." + std::string(suffix); }
  Status Fail(StatusCode code, const std::string& message) const {
    return {code, "gguf: '" + file_.path() + "': " + message};
  }

  Status CheckRange(const std::string& key, uint32_t value, uint32_t min, uint32_t max) const {
    if (value >= min && value <= max) return Status::Ok();
    return Fail(StatusCode::kOutOfRange, key + " is " + std::to_string(value) + ", expected " + std::to_string(min) +
                                             " to " + std::to_string(max));
  }

  Status ReadU32(std::string_view suffix, uint32_t min, uint32_t max, std::optional<uint32_t> fallback,
                 int32_t& out) const {
    const std::string key = Key(suffix);
    ASSIGN_OR_RETURN(const uint32_t value, fallback ? file_.GetU32Or(key, *fallback) : file_.GetU32(key));
    RETURN_IF_ERROR(CheckRange(key, value, min, max));
    out = static_cast<int32_t>(value);
    return Status::Ok();
  }

  // One number, or one per layer if all are the same.
  Status ReadUniform(std::string_view suffix, uint32_t min, uint32_t max, std::optional<uint32_t> fallback,
                     int32_t& out) const {
    const std::string key = Key(suffix);
    if (!file_.IsArray(key)) return ReadU32(suffix, min, max, fallback, out);
    ASSIGN_OR_RETURN(const std::vector<uint32_t> values, file_.GetU32Array(key));
    if (values.size() != static_cast<size_t>(out_.n_layers)) {
      return Fail(StatusCode::kDataLoss, key + " has " + std::to_string(values.size()) + " elements for " +
                                             std::to_string(out_.n_layers) + " layers");
    }
    if (!std::all_of(values.begin(), values.end(), [&](uint32_t v) { return v == values.front(); })) {
      return Fail(StatusCode::kUnsupported, key + " differs between layers");
    }
    RETURN_IF_ERROR(CheckRange(key, values.front(), min, max));
    out = static_cast<int32_t>(values.front());
    return Status::Ok();
  }

  Status ReadF32(std::string_view suffix, float min, float max, std::optional<float> fallback, float& out) const {
    const std::string key = Key(suffix);
    ASSIGN_OR_RETURN(const float value, fallback ? file_.GetF32Or(key, *fallback) : file_.GetF32(key));
    if (!(value >= min && value <= max)) {
      return Fail(StatusCode::kOutOfRange,
                  key + " is " + FloatText(value) + ", expected " + FloatText(min) + " to " + FloatText(max));
    }
    out = value;
    return Status::Ok();
  }

  Status ReadArchitecture() {
    for (const Architecture a :
         {Architecture::kLlama, Architecture::kQwen2, Architecture::kQwen3, Architecture::kGemma3}) {
      if (file_.architecture() != ArchitectureName(a)) continue;
      out_.architecture = a;
      ASSIGN_OR_RETURN(out_.name, file_.GetStringOr("general.name", ""));
      return Status::Ok();
    }
    return Fail(StatusCode::kUnsupported,
                "architecture '" + file_.architecture() + "'; supported are llama, qwen2, qwen3 and gemma3");
  }

  Status RejectUnsupported() const {
    ASSIGN_OR_RETURN(const uint32_t experts, file_.GetU32Or(Key("expert_count"), 0));
    if (experts > 0)
      return Fail(StatusCode::kUnsupported, "mixture of experts (" + std::to_string(experts) + " experts)");
    ASSIGN_OR_RETURN(const uint32_t nextn, file_.GetU32Or(Key("nextn_predict_layers"), 0));
    if (nextn > 0) return Fail(StatusCode::kUnsupported, Key("nextn_predict_layers") + " is " + std::to_string(nextn));
    for (const char* suffix :
         {"attn_logit_softcapping", "logit_scale", "attention.scale", "embedding_scale", "residual_scale"}) {
      // Other architectures' scales, which llama.cpp ignores for these four: 0 and 1 mean none.
      ASSIGN_OR_RETURN(const float scale, file_.GetF32Or(Key(suffix), 0));
      if (scale != 0 && scale != 1) return Fail(StatusCode::kUnsupported, Key(suffix) + " is " + FloatText(scale));
    }
    ASSIGN_OR_RETURN(const bool causal, file_.GetBoolOr(Key("attention.causal"), true));
    if (!causal) return Fail(StatusCode::kUnsupported, Key("attention.causal") + " is false: not a text generator");
    return Status::Ok();
  }

  Status ReadSizes() {
    RETURN_IF_ERROR(ReadU32("block_count", 1, kLayersMax, {}, out_.n_layers));
    RETURN_IF_ERROR(ReadU32("embedding_length", 1, kWidthMax, {}, out_.d_model));
    RETURN_IF_ERROR(ReadU32("context_length", 1, kContextMax, {}, out_.context_length));
    RETURN_IF_ERROR(ReadUniform("feed_forward_length", 1, kWidthMax, {}, out_.d_ff));
    return ReadF32("attention.layer_norm_rms_epsilon", 0, kRmsEpsMax, {}, out_.rms_eps);
  }

  Status ReadHeads() {
    RETURN_IF_ERROR(ReadUniform("attention.head_count", 1, kHeadsMax, {}, out_.n_heads));
    RETURN_IF_ERROR(
        ReadUniform("attention.head_count_kv", 1, kHeadsMax, static_cast<uint32_t>(out_.n_heads), out_.n_kv_heads));
    if (out_.n_heads % out_.n_kv_heads != 0) {
      return Fail(StatusCode::kInvalidArgument, Key("attention.head_count") + " " + std::to_string(out_.n_heads) +
                                                    " is not a multiple of head_count_kv " +
                                                    std::to_string(out_.n_kv_heads));
    }
    const bool explicit_dims = file_.Has(Key("attention.key_length")) && file_.Has(Key("attention.value_length"));
    if (!explicit_dims && out_.d_model % out_.n_heads != 0) {
      return Fail(StatusCode::kInvalidArgument, Key("embedding_length") + " " + std::to_string(out_.d_model) +
                                                    " is not a multiple of head_count " + std::to_string(out_.n_heads));
    }
    const auto fallback = static_cast<uint32_t>(out_.d_model / out_.n_heads);
    int32_t value_dim = 0;
    RETURN_IF_ERROR(ReadU32("attention.key_length", 1, kWidthMax, fallback, out_.head_dim));
    RETURN_IF_ERROR(ReadU32("attention.value_length", 1, kWidthMax, fallback, value_dim));
    if (out_.head_dim != value_dim) {
      return Fail(StatusCode::kUnsupported, "key heads of " + std::to_string(out_.head_dim) + " and value heads of " +
                                                std::to_string(value_dim) + " dimensions; they must be equal");
    }
    if (out_.head_dim % 2 != 0 || out_.head_dim > static_cast<int32_t>(kHeadDimMax)) {
      return Fail(StatusCode::kUnsupported, "head dimension " + std::to_string(out_.head_dim) +
                                                ", expected an even number up to " + std::to_string(kHeadDimMax));
    }
    for (const char* suffix : {"attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"}) {
      int32_t dim = 0;
      RETURN_IF_ERROR(ReadU32(suffix, 0, kWidthMax, static_cast<uint32_t>(out_.head_dim), dim));
      if (dim == out_.head_dim) continue;
      return Fail(StatusCode::kUnsupported, Key(suffix) + " " + std::to_string(dim) +
                                                " differs from the head dimension " + std::to_string(out_.head_dim));
    }
    return Status::Ok();
  }

  Status ReadVocabulary() {
    const Tensor* const embedding = file_.Find("token_embd.weight");
    if (embedding == nullptr) return Fail(StatusCode::kNotFound, "tensor 'token_embd.weight' is missing");
    if (embedding->n_dims != 2 || embedding->ne[0] != out_.d_model) {
      return Fail(StatusCode::kDataLoss, "tensor 'token_embd.weight' is " +
                                             ShapeText(embedding->ne.data(), embedding->ne.data() + embedding->n_dims) +
                                             ", expected [" + std::to_string(out_.d_model) + ", n_vocab]");
    }
    RETURN_IF_ERROR(CheckRange("rows of token_embd.weight",
                               static_cast<uint32_t>(std::min<int64_t>(embedding->ne[1], UINT32_MAX)), 1, kVocabMax));
    out_.n_vocab = static_cast<int32_t>(embedding->ne[1]);
    if (!file_.Has("tokenizer.ggml.tokens")) return Status::Ok();
    ASSIGN_OR_RETURN(const size_t tokens, file_.StringArraySize("tokenizer.ggml.tokens"));
    if (tokens == static_cast<size_t>(out_.n_vocab)) return Status::Ok();
    return Fail(StatusCode::kDataLoss, "tokenizer.ggml.tokens has " + std::to_string(tokens) +
                                           " tokens, but token_embd.weight " + std::to_string(out_.n_vocab) + " rows");
  }

  Status ReadScalingType() {
    const std::string key = Key("rope.scaling.type");
    ASSIGN_OR_RETURN(const std::string type, file_.GetStringOr(key, "linear"));
    if (type == "linear") {
      out_.rope_scaling = RopeScaling::kLinear;
    } else if (type == "yarn") {
      out_.rope_scaling = RopeScaling::kYarn;
    } else if (type == "none") {
      out_.rope_scaling = RopeScaling::kNone;
    } else {
      return Fail(StatusCode::kUnsupported, key + " '" + type + "'; supported are none, linear and yarn");
    }
    // The second key is the name that older files use.
    const char* suffix = file_.Has(Key("rope.scaling.factor")) ? "rope.scaling.factor" : "rope.scale_linear";
    float factor = 0;
    RETURN_IF_ERROR(ReadF32(suffix, 0, kScalingFactorMax, 0.0f, factor));
    if (factor > 0 && factor < 1 / kScalingFactorMax) {
      return Fail(StatusCode::kOutOfRange, Key(suffix) + " is " + FloatText(factor) + ", expected 0 or at least 1e-06");
    }
    if (factor == 0 || out_.rope_scaling == RopeScaling::kNone) factor = 1;  // 0 stands for unset
    if (out_.rope_scaling == RopeScaling::kLinear && factor == 1) out_.rope_scaling = RopeScaling::kNone;
    out_.rope_scaling_factor = factor;
    return Status::Ok();
  }

  Status ReadRope() {
    RETURN_IF_ERROR(ReadScalingType());
    Rope& rope = out_.rope;
    RETURN_IF_ERROR(ReadU32("rope.dimension_count", 0, kWidthMax, static_cast<uint32_t>(out_.head_dim), rope.n_rot));
    if (rope.n_rot != out_.head_dim) {
      return Fail(StatusCode::kUnsupported, Key("rope.dimension_count") + " " + std::to_string(rope.n_rot) +
                                                " differs from the head dimension " + std::to_string(out_.head_dim));
    }
    rope.neox = out_.architecture != Architecture::kLlama;
    RETURN_IF_ERROR(ReadF32("rope.freq_base", 1, kFreqBaseMax, 10000.0f, rope.freq_base));
    RETURN_IF_ERROR(ReadU32("rope.scaling.original_context_length", 0, kContextMax,
                            static_cast<uint32_t>(out_.context_length), rope.n_ctx_orig));
    if (rope.n_ctx_orig == 0) rope.n_ctx_orig = out_.context_length;
    rope.freq_scale = 1 / out_.rope_scaling_factor;
    float attn_factor = 1;
    RETURN_IF_ERROR(ReadF32("rope.scaling.attn_factor", 0, kScalingFactorMax, 1.0f, attn_factor));
    rope.attn_factor = attn_factor;
    if (out_.rope_scaling == RopeScaling::kYarn) {
      if (rope.freq_base == 1)
        return Fail(StatusCode::kInvalidArgument,
                    Key("rope.freq_base") + " is 1, which YaRN divides by the logarithm of");
      rope.ext_factor = 1;
      // llama.cpp's context: YaRN's temperature, which is 1 when shrinking, over the factor that the kernel applies
      // itself.
      const float factor = 1.0f / rope.freq_scale;
      const float applied_by_kernel = 1.0f + 0.1f * std::log(factor);
      if (!(applied_by_kernel > 0)) {
        return Fail(StatusCode::kOutOfRange,
                    Key("rope.scaling.factor") + " " + FloatText(factor) + " is too small for YaRN");
      }
      const float temperature = factor <= 1.0f ? 1.0f : 0.1f * std::log(factor) + 1.0f;
      rope.attn_factor = temperature * (1.0f / applied_by_kernel) * attn_factor;
    }
    out_.rope_swa = rope;
    return Status::Ok();
  }

  Status ReadRopeFactors() {
    for (const char* name : {"rope_factors_long.weight", "rope_factors_short.weight"}) {
      if (file_.Find(name) != nullptr)
        return Fail(StatusCode::kUnsupported, "LongRoPE (tensor '" + std::string(name) + "')");
    }
    if (file_.Find("rope_freqs.weight") == nullptr) return Status::Ok();
    if (out_.architecture != Architecture::kLlama) {
      return Fail(StatusCode::kUnsupported,
                  "RoPE frequency factors (tensor 'rope_freqs.weight') for " + file_.architecture());
    }
    ASSIGN_OR_RETURN(const Tensor* tensor, RequireTensor(file_, "rope_freqs.weight", {out_.rope.n_rot / 2}));
    out_.rope_freq_factors.resize(static_cast<size_t>(tensor->ne[0]));
    RETURN_IF_ERROR(Dequantize(*tensor, 0, 1, out_.rope_freq_factors.data()));
    for (const float factor : out_.rope_freq_factors) {
      if (factor > 0 && factor <= kScalingFactorMax && std::isfinite(1 / factor)) continue;
      return Fail(StatusCode::kOutOfRange, "tensor 'rope_freqs.weight' holds " + FloatText(factor) +
                                               ", expected above 0 and up to " + FloatText(kScalingFactorMax));
    }
    return Status::Ok();
  }

  Status ReadWindows() {
    out_.is_swa_layer.assign(static_cast<size_t>(out_.n_layers), false);
    if (out_.architecture != Architecture::kGemma3) return Status::Ok();
    RETURN_IF_ERROR(ReadU32("attention.sliding_window", 0, kContextMax, 0, out_.sliding_window));
    if (out_.sliding_window == 0) return Status::Ok();
    RETURN_IF_ERROR(ReadF32("rope.freq_base_swa", 1, kFreqBaseMax, kFreqBaseSwaDefault, out_.rope_swa.freq_base));
    if (out_.rope_swa.ext_factor != 0 && out_.rope_swa.freq_base == 1) {
      return Fail(StatusCode::kInvalidArgument,
                  Key("rope.freq_base_swa") + " is 1, which YaRN divides by the logarithm of");
    }
    out_.rope_swa.freq_scale = 1;
    const std::string key = Key("attention.sliding_window_pattern");
    if (!file_.IsArray(key)) {
      ASSIGN_OR_RETURN(const uint32_t period, file_.GetU32Or(key, kSwaPatternGemma3));
      for (uint32_t i = 0; i < out_.is_swa_layer.size(); ++i)
        out_.is_swa_layer[i] = period == 0 || i % period < period - 1;
      return Status::Ok();
    }
    Expected<std::vector<bool>> flags = file_.GetBoolArray(key);
    if (!flags.ok()) {
      ASSIGN_OR_RETURN(const std::vector<uint32_t> numbers, file_.GetU32Array(key));
      std::vector<bool> converted(numbers.size());
      for (size_t i = 0; i < numbers.size(); ++i) converted[i] = numbers[i] != 0;
      flags = std::move(converted);
    }
    if (flags->size() != out_.is_swa_layer.size()) {
      return Fail(StatusCode::kDataLoss, key + " has " + std::to_string(flags->size()) + " elements for " +
                                             std::to_string(out_.n_layers) + " layers");
    }
    out_.is_swa_layer = std::move(flags).value();
    return Status::Ok();
  }

  Status ReadScales() {
    out_.attention_scale = 1.0f / std::sqrt(static_cast<float>(out_.head_dim));
    if (out_.architecture != Architecture::kGemma3) return Status::Ok();
    if (out_.n_layers == kLayersGemma3Large) {
      out_.attention_scale = 1.0f / std::sqrt(static_cast<float>(out_.d_model / out_.n_heads));
    }
    out_.embedding_scale = std::sqrt(static_cast<float>(out_.d_model));
    return ReadF32("final_logit_softcapping", 0, kSoftcapMax, 0.0f, out_.final_logit_softcap);
  }

  const GgufFile& file_;
  Hyperparameters& out_;
};

}  // namespace

const char* ArchitectureName(Architecture architecture) {
  switch (architecture) {
    case Architecture::kLlama: return "llama";
    case Architecture::kQwen2: return "qwen2";
    case Architecture::kQwen3: return "qwen3";
    case Architecture::kGemma3: return "gemma3";
  }
  return "unknown";
}

const char* RopeScalingName(RopeScaling scaling) {
  switch (scaling) {
    case RopeScaling::kNone: return "none";
    case RopeScaling::kLinear: return "linear";
    case RopeScaling::kYarn: return "yarn";
  }
  return "unknown";
}

float Rope::magnitude() const {
  return ext_factor == 0 ? attn_factor : attn_factor * (1.0f + 0.1f * std::log(1.0f / freq_scale));
}

Expected<Hyperparameters> ReadHyperparameters(const GgufFile& file) {
  Hyperparameters out;
  RETURN_IF_ERROR(Reader(file, out).Read());
  return out;
}

Expected<const Tensor*> RequireTensor(const GgufFile& file, std::string_view name,
                                      std::initializer_list<int64_t> shape) {
  const std::string expected = ShapeText(shape.begin(), shape.end());
  const std::string what = "gguf: '" + file.path() + "': tensor '" + std::string(name) + "'";
  const Tensor* const tensor = file.Find(name);
  if (tensor == nullptr) return Status(StatusCode::kNotFound, what + " " + expected + " is missing");
  const int64_t* const ne = tensor->ne.data();
  if (static_cast<size_t>(tensor->n_dims) != shape.size() || !std::equal(shape.begin(), shape.end(), ne)) {
    return Status(StatusCode::kInvalidArgument,
                  what + " is " + ShapeText(ne, ne + tensor->n_dims) + ", expected " + expected);
  }
  return tensor;
}

}  // namespace jointkv::gguf
