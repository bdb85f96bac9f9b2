// Statistics: the scale of K and V in each layer, against which distortion is measured.
//
// E = mean over tokens of |x - mean|^2, from the first kTokensMin to kTokensMax tokens that the store seals, and fixed
// from then on: a budget means the same for every block. Keys count unrotated (a rotation moves their mean, not their
// energy). A sequence's first token is left out: many models park huge values there.
//
// Threads: Add and scale may run for different tables at once. Owns: sums. Fails how: never.
#pragma once

#include <span>
#include <vector>

#include "codec/layout.h"
#include "dense/rope.h"

namespace jointkv::joint {

class Statistics {
 public:
  static constexpr int kTokensMin = 512;   // what a scale is taken from at least
  static constexpr int kTokensMax = 1024;  // further ones do not count

  // rope: by layer, what keys were rotated with, which must outlive it and reach to the largest position; null: not.
  Statistics(const codec::BlockLayout& layout, std::vector<const dense::RopeTable*> rope);

  // Tokens [first, last) of a block of K or V, whose token t was rotated for position base + t.
  void Add(int table, codec::Kind kind, const std::byte* block, int cap, int base, int first, int last);
  bool enough(int table) const { return tables_[table].tokens >= kTokensMin; }

  // E of a table; 0 before any token.
  double energy(int table) const;
  // What each channel has of it: (n_kv_heads * head_dim), in the channel order of codec::LoadToken.
  std::vector<double> variance(int table) const;
  // The mean as it would be stored for tokens at `position` and after: (tokens, n_kv_heads * head_dim), in the channel
  // order of codec::LoadToken.
  void Mean(int table, codec::Kind kind, int position, int tokens, std::vector<float>& out) const;

 private:
  struct Table {
    std::vector<double> sum;      // (channels)
    std::vector<double> squares;  // (channels)
    int tokens = 0;
  };
  codec::BlockLayout layout_;
  std::vector<const dense::RopeTable*> rope_;
  std::vector<Table> tables_;
};

// Factors of keys' channel pairs with which encoding harms scores least (codec/quantised.h): (variance / energy)^(1/4),
// in each head over its geometric mean. variance: Statistics::variance of keys. query_energy: (n_kv_heads, head_dim /
// 2) mean squares of queries, in any unit. Pairs that have less than a thousandth of the mean count as having that.
std::vector<float> PairScales(std::span<const double> variance, std::span<const double> query_energy, int n_kv_heads);

}  // namespace jointkv::joint
