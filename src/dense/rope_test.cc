#include "dense/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include <gtest/gtest.h>

#include "dense/test_matrices.h"

namespace jointkv::dense {
namespace {

struct Angle {
  double cos = 0;
  double sin = 0;
};

// One element of the cache that ggml's rope operator builds, as its CPU code computes it, in double.
Angle GgmlAngle(const gguf::Rope& rope, const std::vector<float>& freq_factors, int pair, int position) {
  const double theta_scale = std::pow(static_cast<double>(rope.freq_base), -2.0 / rope.n_rot);
  double theta_extrap = position;
  for (int i = 0; i < pair; ++i) theta_extrap *= theta_scale;
  if (!freq_factors.empty()) theta_extrap /= freq_factors[pair];
  const double theta_interp = rope.freq_scale * theta_extrap;
  double theta = theta_interp;
  double magnitude = rope.attn_factor;
  if (rope.ext_factor != 0) {
    const auto corr_dim = [&](double turns) {
      return rope.n_rot * std::log(rope.n_ctx_orig / (turns * 2 * std::numbers::pi)) / (2 * std::log(static_cast<double>(rope.freq_base)));
    };
    const double start = std::max(0.0, std::floor(corr_dim(rope.beta_fast)));
    const double end = std::min(rope.n_rot - 1.0, std::ceil(corr_dim(rope.beta_slow)));
    const double y = (pair - start) / std::max(0.001, end - start);
    const double ramp = (1 - std::min(1.0, std::max(0.0, y))) * rope.ext_factor;
    theta = theta_interp * (1 - ramp) + theta_extrap * ramp;
    magnitude *= 1 + 0.1 * std::log(1 / static_cast<double>(rope.freq_scale));
  }
  return {std::cos(theta) * magnitude, std::sin(theta) * magnitude};
}

struct RopeCase {
  gguf::Rope rope;
  std::vector<float> freq_factors;
};

std::vector<RopeCase> Cases() {
  std::vector<RopeCase> cases;
  cases.push_back({{.n_rot = 64, .freq_base = 10000}, {}});
  cases.push_back({{.n_rot = 16, .freq_base = 10000}, {}});
  cases.push_back({{.n_rot = 128, .freq_base = 500000}, {}});
  cases.push_back({{.n_rot = 256, .freq_base = 1e6f, .freq_scale = 0.125f}, {}});  // linear scaling
  cases.push_back({{.n_rot = 128, .freq_base = 10000, .freq_scale = 0.25f, .ext_factor = 1, .n_ctx_orig = 4096}, {}});
  cases.push_back({{.n_rot = 80,
                    .freq_base = 1e6f,
                    .freq_scale = 1 / 3.0f,
                    .ext_factor = 1,
                    .attn_factor = 0.9f,
                    .beta_fast = 16,
                    .beta_slow = 2,
                    .n_ctx_orig = 32768},
                   {}});
  std::vector<float> factors(32);
  for (size_t i = 0; i < factors.size(); ++i) factors[i] = i < 12 ? 1.0f : i < 20 ? 1.0f + 0.8f * static_cast<float>(i - 11) : 8.0f;
  cases.push_back({{.n_rot = 64, .freq_base = 500000}, factors});
  cases.push_back({{.n_rot = 64, .freq_base = 10000, .freq_scale = 0.5f, .ext_factor = 1, .n_ctx_orig = 2048}, factors});
  return cases;
}

// The table is rounded to float once (half a unit of its magnitude); frequency and angle are computed in double, where
// the two ways to form base^(-2i/n) differ by some 1e-14 of an angle of at most 2e4 radians.
TEST(RopeTest, TableIsGgmlsFormula) {
  for (const RopeCase& c : Cases()) {
    RopeTable table(c.rope, c.freq_factors);
    ASSERT_EQ(table.n_pairs(), c.rope.n_rot / 2);
    table.Ensure(20001);
    const double tolerance = c.rope.magnitude() * (2 * kF32Unit) + 1e-9;
    for (const int position : {0, 1, 2, 31, 32, 511, 512, 1000, 4095, 20000}) {
      for (int pair = 0; pair < table.n_pairs(); ++pair) {
        const Angle angle = GgmlAngle(c.rope, c.freq_factors, pair, position);
        ASSERT_NEAR(table.cos(position)[pair], angle.cos, tolerance) << "pair " << pair << " position " << position;
        ASSERT_NEAR(table.sin(position)[pair], angle.sin, tolerance) << "pair " << pair << " position " << position;
      }
    }
  }
}

TEST(RopeTest, GrowingKeepsRows) {
  const gguf::Rope rope{.n_rot = 64, .freq_base = 10000};
  RopeTable once(rope, {});
  once.Ensure(3000);
  RopeTable stepwise(rope, {});
  for (int positions = 1; positions <= 3000; positions += 1 + positions / 2) stepwise.Ensure(positions);
  stepwise.Ensure(3000);
  stepwise.Ensure(10);
  for (int position = 0; position < 3000; ++position) {
    ASSERT_TRUE(std::equal(once.cos(position), once.cos(position) + 2 * once.n_pairs(), stepwise.cos(position))) << position;
  }
}

// Score of a query at q_position and a key at k_position, from the table, summed in double.
double Score(const RopeTable& table, const std::vector<float>& q, const std::vector<float>& k, int q_position, int k_position) {
  const int n = table.n_pairs();
  double score = 0;
  for (int i = 0; i < n; ++i) {
    const double qc = table.cos(q_position)[i];
    const double qs = table.sin(q_position)[i];
    const double kc = table.cos(k_position)[i];
    const double ks = table.sin(k_position)[i];
    score += (q[i] * qc - q[n + i] * qs) * (k[i] * kc - k[n + i] * ks) + (q[i] * qs + q[n + i] * qc) * (k[i] * ks + k[n + i] * kc);
  }
  return score;
}

// Position-free keys: the query at p - b against the key at its offset o is the query at p against the key at b + o.
// Each score takes four table entries, each half a unit off, per pair: at most 4 sqrt(2) units of |q| |k| on either side.
TEST(RopeTest, PositionFreeScoresAreAbsoluteScores) {
  for (const RopeCase& c : Cases()) {
    RopeTable table(c.rope, c.freq_factors);
    table.Ensure(4200);
    const int n = table.n_pairs();
    const std::vector<float> q = RandomFloats(2 * n, 1);
    const std::vector<float> k = RandomFloats(2 * n, 2);
    double magnitude = 0;
    for (int i = 0; i < n; ++i) magnitude += std::hypot(q[i], q[n + i]) * std::hypot(k[i], k[n + i]);
    const double tolerance = 12 * kF32Unit * magnitude * c.rope.magnitude() * c.rope.magnitude();
    for (const int start : {0, 5, 32, 999, 4000}) {
      for (const int offset : {0, 1, 17, 31}) {
        for (const int position : {start + offset, start + 31, start + 32, 4100}) {
          EXPECT_NEAR(Score(table, q, k, position - start, offset), Score(table, q, k, position, start + offset), tolerance);
        }
      }
    }
  }
}

}  // namespace
}  // namespace jointkv::dense
