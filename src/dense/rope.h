// Rotary position embedding (Su et al. 2021) as a table of cos and sin, with the frequency rules of the pinned
// llama.cpp: linear scaling, YaRN (Peng et al. 2023), frequency factors.
//
// Every rule gives pair i at position p the angle p * frequency[i], linear in p. So a key rotated by its offset o
// inside a block that starts at b, met by a query rotated for position p - b, scores exactly as absolute rotation
// would: (p - b) - o = p - (b + o).
//
// Threads: const after Ensure; Ensure only between steps. Owns: the table. Fails how: never.
#pragma once

#include <span>
#include <vector>

#include "gguf/hyperparameters.h"

namespace jointkv::dense {

class RopeTable {
 public:
  RopeTable() = default;
  // freq_factors: (n_rot / 2) divisors of the frequencies, or empty.
  RopeTable(const gguf::Rope& rope, std::span<const float> freq_factors);

  // Makes rows [0, positions) available.
  void Ensure(int positions);

  int n_pairs() const { return static_cast<int>(frequency_.size()); }
  // (n_pairs) each, both already multiplied by YaRN's magnitude.
  const float* cos(int position) const { return table_.data() + static_cast<size_t>(position) * 2 * frequency_.size(); }
  const float* sin(int position) const { return cos(position) + frequency_.size(); }

 private:
  std::vector<double> frequency_;  // radians per position
  double magnitude_ = 1;
  int positions_ = 0;
  std::vector<float> table_;  // (positions, 2, n_pairs)
};

}  // namespace jointkv::dense
