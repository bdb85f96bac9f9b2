#include "codec/rounding.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "base/check.h"
#include "codec/block_io.h"

namespace jointkv::codec {
namespace {

// The least squared error that 16 levels leave of a unit Gaussian, 0.009497 (Max, Quantizing for Minimum Distortion,
// 1960): levels on either side of zero, and where one ends and the next begins.
constexpr std::array<float, 8> kLevels = {0.128395F, 0.388048F, 0.656759F, 0.942340F,
                                          1.256231F, 1.618047F, 2.069017F, 2.732590F};
constexpr std::array<float, 7> kBoundaries = [] {
  std::array<float, 7> middles{};
  for (size_t i = 0; i < middles.size(); ++i) middles[i] = (kLevels[i] + kLevels[i + 1]) / 2;
  return middles;
}();
// Scales to try, in root mean squares.
constexpr std::array<float, 3> kScales = {0.94F, 1.0F, 1.06F};

constexpr int kDotLanes = 8;

// The sum of products in kDotLanes parts, so that compilers may vectorise it.
float Dot(const float* a, const float* b, int n) {
  std::array<float, kDotLanes> sums{};
  int i = 0;
  for (; i + kDotLanes <= n; i += kDotLanes) {
    for (int lane = 0; lane < kDotLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  float sum = 0;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (const float part : sums) sum += part;
  return sum;
}

float RoundedScale(float scale) { return F32FromBf16(Bf16FromF32(scale)); }

void RoundQ8(std::span<float> x) {
  float largest = 0;
  for (const float value : x) largest = std::max(largest, std::abs(value));
  const float scale = RoundedScale(largest / 127);
  if (scale == 0) {
    std::ranges::fill(x, 0.0F);
    return;
  }
  for (float& value : x) value = scale * std::clamp(std::nearbyint(value / scale), -127.0F, 127.0F);
}

// The transform and the grid of q4 for one head_dim.
class Q4 {
 public:
  // A dimension that is no power of two is transformed in equal parts that are.
  explicit Q4(int head_dim) : part_(head_dim & -head_dim), signs_(head_dim), grid_(head_dim), best_(head_dim) {
    const float norm = 1 / std::sqrt(static_cast<float>(part_));
    uint32_t state = 1;
    for (float& sign : signs_) {
      state = state * 1664525U + 1013904223U;  // Numerical Recipes' generator: the top bit is its best
      sign = (state >> 31) != 0 ? norm : -norm;
    }
  }

  void Round(std::span<float> x) {
    const int n = static_cast<int>(x.size());
    for (int i = 0; i < n; ++i) x[i] *= signs_[i];
    Hadamard(x);
    const float rms = std::sqrt(Dot(x.data(), x.data(), n) / static_cast<float>(n));
    if (RoundedScale(rms) == 0) {
      std::ranges::fill(x, 0.0F);
      return;
    }
    // Once the levels are chosen, the scale with the least error is <x, g> / <g, g>, and removes <x, g>^2 / <g, g>.
    float scale = 0;
    float most = -1;
    for (const float candidate : kScales) {
      ToGrid(x, 1 / (candidate * rms));
      const float along = Dot(x.data(), grid_.data(), n);
      const float squares = Dot(grid_.data(), grid_.data(), n);
      if (along / squares * along <= most) continue;
      most = along / squares * along;
      scale = along / squares;
      best_.swap(grid_);
    }
    scale = RoundedScale(scale);
    for (int i = 0; i < n; ++i) x[i] = scale * best_[i];
    Hadamard(x);
    for (int i = 0; i < n; ++i) x[i] *= signs_[i];
  }

 private:
  // Walsh-Hadamard, part by part, times sqrt(part_): `signs_` holds the norm.
  void Hadamard(std::span<float> x) const {
    for (int half = 1; half < part_; half *= 2) {
      for (size_t at = 0; at < x.size(); at += static_cast<size_t>(2) * half) {
        float* a = x.data() + at;
        float* b = a + half;
        for (int i = 0; i < half; ++i) {
          const float sum = a[i] + b[i];
          b[i] = a[i] - b[i];
          a[i] = sum;
        }
      }
    }
  }

  // The nearest level of each element of x * inverse.
  void ToGrid(std::span<const float> x, float inverse) {
    for (size_t i = 0; i < x.size(); ++i) {
      const float magnitude = std::abs(x[i]) * inverse;
      float level = kLevels[0];
      for (size_t b = 0; b < kBoundaries.size(); ++b) level = magnitude > kBoundaries[b] ? kLevels[b + 1] : level;
      grid_[i] = std::copysign(level, x[i]);
    }
  }

  int part_;
  std::vector<float> signs_;  // (head_dim) +- 1 / sqrt(part_)
  std::vector<float> grid_;   // (head_dim) levels
  std::vector<float> best_;   // (head_dim)
};

}  // namespace

const char* RoundingName(Rounding rounding) {
  switch (rounding) {
    case Rounding::kNone: return "none";
    case Rounding::kQ8: return "q8";
    case Rounding::kQ4: return "q4";
  }
  return "?";
}

std::optional<Rounding> ParseRounding(std::string_view name) {
  for (const Rounding rounding : {Rounding::kNone, Rounding::kQ8, Rounding::kQ4}) {
    if (name == RoundingName(rounding)) return rounding;
  }
  return std::nullopt;
}

double RoundedHeadBytes(Rounding rounding, int head_dim) {
  switch (rounding) {
    case Rounding::kNone: break;
    case Rounding::kQ8: return head_dim + 2.0;
    case Rounding::kQ4: return head_dim / 2.0 + 2.0;
  }
  return head_dim * 2.0;
}

void RoundBlock(const BlockLayout& layout, Kind kind, Rounding rounding, std::span<const float> mean, std::byte* block,
                int cap, int tokens) {
  if (rounding == Rounding::kNone) return;
  const size_t head_dim = layout.head_dim;
  std::vector<float> values(layout.n_kv_heads * head_dim);
  CHECK(mean.empty() || mean.size() == tokens * values.size());
  CHECK(tokens <= cap);
  Q4 q4(layout.head_dim);
  for (int token = 0; token < tokens; ++token) {
    LoadToken(layout, kind, block, cap, token, values);
    const auto center = mean.empty() ? mean : mean.subspan(token * values.size(), values.size());
    for (size_t i = 0; i < center.size(); ++i) values[i] -= center[i];
    for (int head = 0; head < layout.n_kv_heads; ++head) {
      const auto vector = std::span(values).subspan(head * head_dim, head_dim);
      rounding == Rounding::kQ4 ? q4.Round(vector) : RoundQ8(vector);
    }
    for (size_t i = 0; i < center.size(); ++i) values[i] += center[i];
    StoreToken(layout, kind, block, cap, token, values);
  }
}

}  // namespace jointkv::codec
