#include "codec/layout.h"

#include <vector>

#include <gtest/gtest.h>

namespace jointkv::codec {
namespace {

std::vector<BlockLayout> Layouts() {
  std::vector<BlockLayout> layouts;
  for (const Codec codec : {Codec::kBf16, Codec::kF16, Codec::kF32}) {
    for (const auto& [heads, head_dim] : {std::pair{1, 2}, {1, 4}, {3, 6}, {3, 64}, {5, 10}, {8, 128}, {1, 256}}) {
      layouts.push_back({heads, head_dim, codec});
    }
  }
  return layouts;
}

// Every element has bytes of its own inside the block, and head after head fills its bytes without a gap.
TEST(Layout, OffsetsAreABijection) {
  for (const BlockLayout& layout : Layouts()) {
    const size_t element = ElementBytes(layout.codec);
    for (int cap = kClassStep; cap <= kBlockTokensMax; cap += kClassStep) {
      for (const Kind kind : {Kind::kK, Kind::kV}) {
        const size_t payload = layout.n_kv_heads * layout.head_bytes(cap);
        ASSERT_LE(payload, layout.block_bytes(cap));
        std::vector<bool> taken(payload / element);
        for (int head = 0; head < layout.n_kv_heads; ++head) {
          for (int token = 0; token < cap; ++token) {
            for (int channel = 0; channel < layout.head_dim; ++channel) {
              const size_t offset = layout.offset(kind, head, token, channel, cap);
              ASSERT_EQ(offset % element, 0u);
              ASSERT_GE(offset, layout.head_offset(head, cap));
              ASSERT_LT(offset, layout.head_offset(head, cap) + layout.head_bytes(cap));
              ASSERT_FALSE(taken[offset / element]);
              taken[offset / element] = true;
            }
          }
        }
        for (const bool one : taken) ASSERT_TRUE(one);
      }
    }
  }
}

TEST(Layout, BlocksAreWholeGranulesOfCacheLines) {
  for (const BlockLayout& layout : Layouts()) {
    EXPECT_EQ(layout.granule_bytes() % 64, 0u);
    EXPECT_EQ(layout.block_bytes(kClassStep), layout.granule_bytes());
    EXPECT_EQ(layout.block_bytes(kBlockTokensMax), kClasses * layout.granule_bytes());
  }
}

// The shapes that kernels rely on (see the table in layout.h).
TEST(Layout, PairsLieTogether) {
  const BlockLayout bf16{2, 8, Codec::kBf16};
  EXPECT_EQ(bf16.offset(Kind::kK, 0, 5, 3, 12), bf16.offset(Kind::kK, 0, 5, 2, 12) + 2);  // both halves of a RoPE pair
  EXPECT_EQ(bf16.offset(Kind::kK, 0, 6, 2, 12), bf16.offset(Kind::kK, 0, 5, 2, 12) + 4);  // next lane: next token
  EXPECT_EQ(bf16.offset(Kind::kV, 1, 5, 3, 12), bf16.offset(Kind::kV, 1, 4, 3, 12) + 2);  // two tokens in a lane
  EXPECT_EQ(bf16.offset(Kind::kV, 1, 4, 4, 12), bf16.offset(Kind::kV, 1, 4, 3, 12) + 4);  // next lane: next channel
  const BlockLayout f32{2, 8, Codec::kF32};
  EXPECT_EQ(f32.offset(Kind::kK, 0, 6, 2, 12), f32.offset(Kind::kK, 0, 5, 2, 12) + 4);
  EXPECT_EQ(f32.offset(Kind::kV, 0, 5, 3, 12), f32.offset(Kind::kV, 0, 5, 2, 12) + 4);
}

TEST(Layout, ClassCapacityIsTheNextStep) {
  for (int tokens = 1; tokens <= kBlockTokensMax; ++tokens) {
    const int cap = ClassCapacity(tokens);
    EXPECT_EQ(cap % kClassStep, 0);
    EXPECT_GE(cap, tokens);
    EXPECT_LT(cap, tokens + kClassStep);
  }
}

}  // namespace
}  // namespace jointkv::codec
