// Block arithmetic against plain double precision, for every codec, kind and Highway target.
#include "joint/block_math.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "codec/block_io.h"
#include "dense/test_matrices.h"

namespace jointkv::joint {
namespace {

using codec::Codec;
using codec::kBlockTokensMax;

constexpr double kUnit = dense::kF32Unit;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// What storing may be off by, relative. To f16 CPUs without F16C truncate.
double StoredUnit(Codec codec) {
  return codec == Codec::kBf16 ? dense::kBf16Unit : codec == Codec::kF16 ? 0x1p-10 : kUnit;
}

struct Block {
  // `tokens` tokens of random values, and past them what `stale` says.
  Block(const BlockLayout& block_layout, Kind block_kind, int block_cap, int tokens, uint64_t seed, float stale)
      : layout(block_layout), kind(block_kind), cap(block_cap), bytes(layout.block_bytes(cap)) {
    const size_t width = Width();
    const auto values = dense::RandomFloats(width * tokens, seed);
    for (int t = 0; t < cap; ++t) {
      std::vector<float> row(width, stale);
      if (t < tokens) row.assign(values.begin() + width * t, values.begin() + width * (t + 1));
      codec::StoreToken(layout, kind, bytes.data(), cap, t, row);
    }
  }
  size_t Width() const { return static_cast<size_t>(layout.n_kv_heads) * layout.head_dim; }
  std::vector<float> Token(int t) const {
    std::vector<float> row(Width());
    codec::LoadToken(layout, kind, bytes.data(), cap, t, row);
    return row;
  }

  BlockLayout layout;
  Kind kind;
  int cap;
  std::vector<std::byte> bytes;
};

// f(layout, kind, cap, tokens, seed) over codecs, kinds, classes, head sizes and token counts.
template <typename F>
void ForEachShape(F&& f) {
  uint64_t seed = 1;
  for (const Codec codec : {Codec::kBf16, Codec::kF16, Codec::kF32}) {
    for (const Kind kind : {Kind::kK, Kind::kV}) {
      for (const int head_dim : {2, 6, 18, 80, 96, 256}) {
        for (int cap = codec::kClassStep; cap <= kBlockTokensMax; cap += codec::kClassStep) {
          const BlockLayout layout = {head_dim > 96 ? 1 : 3, head_dim, codec};
          const testing::ScopedTrace trace(__FILE__, __LINE__,
                                           std::string(codec::CodecName(codec)) + (kind == Kind::kK ? " K" : " V") +
                                               ", head_dim " + std::to_string(head_dim) + ", cap " +
                                               std::to_string(cap));
          for (const int tokens : {cap, cap - 1, std::max(1, cap - 3)}) f(layout, kind, cap, tokens, seed += 2);
        }
      }
    }
  }
}

TEST(BlockMath, DistancesAreThoseOfTheStoredValues) {
  dense::ForEachTarget([] {
    ForEachShape([](const BlockLayout& layout, Kind kind, int cap, int tokens, uint64_t seed) {
      const Block a(layout, kind, cap, tokens, seed, kNan);
      const Block b(layout, kind, cap, tokens, seed + 1, kNan);
      std::vector<float> out(kBlockTokensMax, -1);
      TokenDistances(layout, kind, a.bytes.data(), b.bytes.data(), cap, tokens, std::span<float, kBlockTokensMax>(out));
      for (int t = 0; t < tokens; ++t) {
        const auto x = a.Token(t);
        const auto y = b.Token(t);
        double expected = 0;
        for (size_t i = 0; i < x.size(); ++i) expected += std::pow(static_cast<double>(x[i]) - y[i], 2);
        ASSERT_NEAR(out[t], expected, (static_cast<double>(x.size()) + 4) * kUnit * expected) << "token " << t;
      }
      for (int t = tokens; t < kBlockTokensMax; ++t) ASSERT_EQ(out[t], 0) << "token " << t;
    });
  });
}

TEST(BlockMath, ProductsAreThoseOfTheStoredValues) {
  dense::ForEachTarget([] {
    ForEachShape([](const BlockLayout& layout, Kind kind, int cap, int tokens, uint64_t seed) {
      const Block a(layout, kind, cap, tokens, seed, kNan);
      const Block b(layout, kind, cap, tokens, seed + 1, kNan);
      std::vector<float> out(kBlockTokensMax, -1);
      TokenProducts(layout, kind, a.bytes.data(), b.bytes.data(), cap, tokens, std::span<float, kBlockTokensMax>(out));
      for (int t = 0; t < tokens; ++t) {
        const auto x = a.Token(t);
        const auto y = b.Token(t);
        dense::Dot dot;
        for (size_t i = 0; i < x.size(); ++i) dot.Add(x[i], y[i]);
        ASSERT_NEAR(out[t], dot.value, dot.Tolerance()) << "token " << t;
      }
      for (int t = tokens; t < kBlockTokensMax; ++t) ASSERT_EQ(out[t], 0) << "token " << t;
    });
  });
}

TEST(BlockMath, ABlockIsAtDistanceZeroFromItself) {
  dense::ForEachTarget([] {
    ForEachShape([](const BlockLayout& layout, Kind kind, int cap, int tokens, uint64_t seed) {
      const Block a(layout, kind, cap, tokens, seed, kNan);
      std::vector<float> out(kBlockTokensMax, -1);
      TokenDistances(layout, kind, a.bytes.data(), a.bytes.data(), cap, tokens, std::span<float, kBlockTokensMax>(out));
      ASSERT_EQ(out, std::vector<float>(kBlockTokensMax));
    });
  });
}

TEST(BlockMath, BlendsAreRoundedToTheCodec) {
  dense::ForEachTarget([] {
    ForEachShape([](const BlockLayout& layout, Kind kind, int cap, int tokens, uint64_t seed) {
      const Block a(layout, kind, cap, tokens, seed, kNan);
      const Block b(layout, kind, cap, tokens, seed + 1, 7);
      const float wa = seed % 3 == 0 ? 0.75F : 1.25F;
      const float wb = 1 - wa;
      Block out(layout, kind, cap, 0, 0, -3);
      Blend(layout, a.bytes.data(), wa, b.bytes.data(), wb, cap, out.bytes.data());
      for (int t = 0; t < tokens; ++t) {
        const auto x = a.Token(t);
        const auto y = b.Token(t);
        const auto z = out.Token(t);
        for (size_t i = 0; i < x.size(); ++i) {
          const double xa = static_cast<double>(wa) * x[i];
          const double yb = static_cast<double>(wb) * y[i];
          const double bound = 3 * kUnit * (std::abs(xa) + std::abs(yb)) +
                               StoredUnit(layout.codec) * std::abs(xa + yb) + 0x1p-24;  // f16 has subnormals
          ASSERT_NEAR(z[i], xa + yb, bound) << "token " << t << " channel " << i;
        }
      }
      // In place, from either side.
      for (const bool first : {true, false}) {
        Block place = first ? a : b;
        Blend(layout, first ? place.bytes.data() : a.bytes.data(), wa, first ? b.bytes.data() : place.bytes.data(), wb,
              cap, place.bytes.data());
        for (int t = 0; t < tokens; ++t) ASSERT_EQ(place.Token(t), out.Token(t)) << "token " << t;
      }
    });
  });
}

TEST(BlockMath, AFullWeightCopies) {
  dense::ForEachTarget([] {
    ForEachShape([](const BlockLayout& layout, Kind kind, int cap, int tokens, uint64_t seed) {
      const Block a(layout, kind, cap, tokens, seed, 2);
      const Block b(layout, kind, cap, tokens, seed + 1, 7);
      Block out(layout, kind, cap, 0, 0, -3);
      Blend(layout, a.bytes.data(), 0, b.bytes.data(), 1, cap, out.bytes.data());
      for (int t = 0; t < cap; ++t) ASSERT_EQ(out.Token(t), b.Token(t));
    });
  });
}

}  // namespace
}  // namespace jointkv::joint
