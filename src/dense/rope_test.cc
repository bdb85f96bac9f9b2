#include "dense/rope.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "dense/test_matrices.h"
#include "dense/test_rope.h"

namespace jointkv::dense {
namespace {

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
  for (size_t i = 0; i < factors.size(); ++i)
    factors[i] = i < 12 ? 1.0f : i < 20 ? 1.0f + 0.8f * static_cast<float>(i - 11) : 8.0f;
  cases.push_back({{.n_rot = 64, .freq_base = 500000}, factors});
  cases.push_back(
      {{.n_rot = 64, .freq_base = 10000, .freq_scale = 0.5f, .ext_factor = 1, .n_ctx_orig = 2048}, factors});
  return cases;
}

// The table is rounded to float once (half a unit of its magnitude); frequency and angle are computed in double, where
// the two ways to form base^(-2i/n) differ by some 1e-14 of an angle of at most 2e4 radians.
TEST(RopeTest, TableIsGgmlsFormula) {
  for (const RopeCase& c : Cases()) {
    RopeTable table(c.rope, c.freq_factors);
    ASSERT_EQ(table.n_pairs(), c.rope.n_rot / 2);
    table.Ensure(20001);
    const PlainRope plain{c.rope, c.freq_factors};
    const double tolerance = plain.Magnitude() * (2 * kF32Unit) + 1e-9;
    for (const int position : {0, 1, 2, 31, 32, 511, 512, 1000, 4095, 20000}) {
      for (int pair = 0; pair < table.n_pairs(); ++pair) {
        const double theta = plain.Theta(pair, position);
        ASSERT_NEAR(table.cos(position)[pair], std::cos(theta) * plain.Magnitude(), tolerance)
            << "pair " << pair << " position " << position;
        ASSERT_NEAR(table.sin(position)[pair], std::sin(theta) * plain.Magnitude(), tolerance)
            << "pair " << pair << " position " << position;
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
    ASSERT_TRUE(std::equal(once.cos(position), once.cos(position) + 2 * once.n_pairs(), stepwise.cos(position)))
        << position;
  }
}

// Score of a query at q_position and a key at k_position, from the table, summed in double.
double Score(const RopeTable& table, const std::vector<float>& q, const std::vector<float>& k, int q_position,
             int k_position) {
  const int n = table.n_pairs();
  double score = 0;
  for (int i = 0; i < n; ++i) {
    const double qc = table.cos(q_position)[i];
    const double qs = table.sin(q_position)[i];
    const double kc = table.cos(k_position)[i];
    const double ks = table.sin(k_position)[i];
    score += (q[i] * qc - q[n + i] * qs) * (k[i] * kc - k[n + i] * ks) +
             (q[i] * qs + q[n + i] * qc) * (k[i] * ks + k[n + i] * kc);
  }
  return score;
}

// Position-free keys: the query at p - b against the key at its offset o is the query at p against the key at b + o.
// Each score takes four table entries, each half a unit off, per pair: at most 4 sqrt(2) units of |q| |k| on either
// side.
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
          EXPECT_NEAR(Score(table, q, k, position - start, offset), Score(table, q, k, position, start + offset),
                      tolerance);
        }
      }
    }
  }
}

}  // namespace
}  // namespace jointkv::dense
