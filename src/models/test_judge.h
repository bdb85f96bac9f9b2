// The judge: the pinned llama.cpp, run on the same file and tokens, and how far two sets of logits are apart.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/ids.h"
#include "llama.h"

namespace jointkv::models {

// One sequence through llama.cpp. Threads: one caller. Owns: its own copy of the model.
// Fails how: a test without its judge proves nothing, so CHECK.
class Judge {
 public:
  struct Options {
    bool f32 = false;  // f32 K and V, plain attention; otherwise llama.cpp's defaults
    int threads = 1;
    int tokens_max = 512;
  };

  Judge(const std::string& path, const Options& options) {
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = 0;
    model_.reset(llama_model_load_from_file(path.c_str(), model_params));
    CHECK(model_ != nullptr);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<uint32_t>(options.tokens_max);
    params.n_batch = params.n_ubatch = kStepTokensMax;
    params.n_threads = params.n_threads_batch = options.threads;
    if (options.f32) {
      params.type_k = params.type_v = GGML_TYPE_F32;
      params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
      params.cb_eval = ExactGelu;
    }
    context_.reset(llama_init_from_model(model_.get(), params));
    CHECK(context_ != nullptr);
  }

  int n_vocab() const { return llama_vocab_n_tokens(llama_model_get_vocab(model_.get())); }

  std::vector<TokenId> Tokenize(const std::string& text) const {
    const llama_vocab* vocab = llama_model_get_vocab(model_.get());
    std::vector<TokenId> tokens(text.size() + 8);
    const int n = llama_tokenize(vocab, text.data(), static_cast<int>(text.size()), tokens.data(),
                                 static_cast<int>(tokens.size()), /*add_special=*/true, /*parse_special=*/false);
    CHECK(n >= 0);
    tokens.resize(static_cast<size_t>(n));
    return tokens;
  }

  // Continues the sequence. Logits: (tokens, n_vocab), valid until the next call.
  std::span<const float> Next(std::span<const TokenId> tokens) {
    logits_.clear();
    while (!tokens.empty()) {
      const std::span<const TokenId> step = tokens.first(std::min<size_t>(tokens.size(), kStepTokensMax));
      tokens = tokens.subspan(step.size());
      llama_batch batch = llama_batch_init(static_cast<int>(step.size()), 0, 1);
      batch.n_tokens = static_cast<int>(step.size());
      for (size_t i = 0; i < step.size(); ++i) {
        batch.token[i] = step[i];
        batch.pos[i] = position_++;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
      }
      CHECK(llama_decode(context_.get(), batch) == 0);
      const float* logits = llama_get_logits(context_.get());
      logits_.insert(logits_.end(), logits, logits + step.size() * static_cast<size_t>(n_vocab()));
      llama_batch_free(batch);
    }
    return logits_;
  }

 private:
  static constexpr int kStepTokensMax = 256;

  // ggml's CPU looks GELU up in a table of f16 values at f16 points, an error of 2^-11 that would hide ours. This
  // callback computes the gate anew from the same operands, so that all of llama.cpp's pass is f32.
  static bool ExactGelu(ggml_tensor* tensor, bool ask, void* /*user_data*/) {
    const bool is_gelu_gate = tensor->op == GGML_OP_GLU && ggml_get_glu_op(tensor) == GGML_GLU_OP_GEGLU;
    if (ask || !is_gelu_gate) return !ask || is_gelu_gate;
    const ggml_tensor* gate = tensor->src[0];
    const ggml_tensor* value = tensor->src[1];
    CHECK(value != nullptr && ggml_is_contiguous(tensor) && ggml_is_contiguous(gate) && ggml_is_contiguous(value));
    const auto* g = static_cast<const float*>(gate->data);
    const auto* u = static_cast<const float*>(value->data);
    auto* out = static_cast<float*>(tensor->data);
    for (int64_t i = 0; i < ggml_nelements(tensor); ++i) {
      const double x = g[i];
      out[i] = static_cast<float>(0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))) * u[i]);
    }
    return true;
  }

  struct Deleter {
    void operator()(llama_model* model) const { llama_model_free(model); }
    void operator()(llama_context* context) const { llama_free(context); }
  };
  std::unique_ptr<llama_model, Deleter> model_;
  std::unique_ptr<llama_context, Deleter> context_;
  int position_ = 0;
  std::vector<float> logits_;
};

// How close logits come to the reference's, over all rows that were added.
class Agreement {
 public:
  // reference, ours: (rows, n_vocab)
  void Add(std::span<const float> reference, std::span<const float> ours, int n_vocab) {
    ASSERT_EQ(reference.size(), ours.size());
    const auto n = static_cast<size_t>(n_vocab);
    for (size_t at = 0; at < reference.size(); at += n) AddRow(reference.subspan(at, n), ours.subspan(at, n));
  }

  int rows() const { return rows_; }
  double mean_kl() const { return kl_ / rows_; }  // KL(reference || ours) of the next-token distributions, nats
  double top1() const { return static_cast<double>(same_top_) / rows_; }
  // The largest difference of two logits, over the reference's standard deviation within a row (mean of all rows).
  double max_error() const { return max_difference_ / (deviation_ / rows_); }
  // Root mean square of the differences, over the same.
  double rms_error() const { return std::sqrt(squares_ / static_cast<double>(values_)) / (deviation_ / rows_); }

 private:
  static double LogSumExp(std::span<const float> logits, double max) {
    double sum = 0;
    for (const float logit : logits) sum += std::exp(logit - max);
    return max + std::log(sum);
  }

  void AddRow(std::span<const float> reference, std::span<const float> ours) {
    const auto top_reference = std::max_element(reference.begin(), reference.end());
    const auto top_ours = std::max_element(ours.begin(), ours.end());
    same_top_ += top_reference - reference.begin() == top_ours - ours.begin() ? 1 : 0;
    const double z_reference = LogSumExp(reference, *top_reference);
    const double z_ours = LogSumExp(ours, *top_ours);
    double sum = 0;
    double sum_squares = 0;
    for (size_t i = 0; i < reference.size(); ++i) {
      const double a = reference[i];
      const double b = ours[i];
      kl_ += std::exp(a - z_reference) * ((a - z_reference) - (b - z_ours));
      // In this order so that a NaN wins.
      max_difference_ = std::abs(a - b) <= max_difference_ ? max_difference_ : std::abs(a - b);
      squares_ += (a - b) * (a - b);
      sum += a;
      sum_squares += a * a;
    }
    const auto n = static_cast<double>(reference.size());
    deviation_ += std::sqrt(std::max(0.0, sum_squares / n - sum / n * sum / n));
    values_ += reference.size();
    ++rows_;
  }

  int rows_ = 0;
  size_t values_ = 0;
  int same_top_ = 0;
  double kl_ = 0;
  double max_difference_ = 0;
  double squares_ = 0;
  double deviation_ = 0;
};

}  // namespace jointkv::models
