#include "codec/block_io.h"

#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include <gtest/gtest.h>

namespace jointkv::codec {
namespace {

constexpr std::byte kGuard{0xa5};

std::vector<BlockLayout> Layouts() {
  std::vector<BlockLayout> layouts;
  for (const Codec codec : {Codec::kBf16, Codec::kF16, Codec::kF32}) {
    for (const auto& [heads, head_dim] : {std::pair{1, 2}, {3, 6}, {2, 16}})
      layouts.push_back({heads, head_dim, codec});
  }
  return layouts;
}

TEST(BlockIo, StoredTokensComeBackAndTouchNothingElse) {
  std::mt19937 random(2);
  for (const BlockLayout& layout : Layouts()) {
    const int width = layout.n_kv_heads * layout.head_dim;
    for (int cap = kClassStep; cap <= kBlockTokensMax; cap += kClassStep) {
      for (const Kind kind : {Kind::kK, Kind::kV}) {
        std::vector<std::byte> block(layout.block_bytes(cap) + 64, kGuard);
        std::vector<std::vector<float>> values(cap, std::vector<float>(width));
        for (int token = 0; token < cap; ++token) {
          for (float& value : values[token]) value = static_cast<float>(static_cast<int>(random() % 255) - 127);
          StoreToken(layout, kind, block.data(), cap, token, values[token]);
        }
        std::vector<float> loaded(width);
        for (int token = 0; token < cap; ++token) {
          LoadToken(layout, kind, block.data(), cap, token, loaded);
          ASSERT_EQ(loaded, values[token]);
        }
        for (size_t i = layout.n_kv_heads * layout.head_bytes(cap); i < block.size(); ++i) ASSERT_EQ(block[i], kGuard);
      }
    }
  }
}

TEST(BlockIo, StoreRoundsByTheCodec) {
  std::vector<float> loaded(2);
  for (const Codec codec : {Codec::kBf16, Codec::kF16, Codec::kF32}) {
    const BlockLayout layout{1, 2, codec};
    std::vector<std::byte> block(layout.block_bytes(4));
    const std::vector<float> values = {0.1f, -3.14159f};
    StoreToken(layout, Kind::kK, block.data(), 4, 3, values);
    LoadToken(layout, Kind::kK, block.data(), 4, 3, loaded);
    for (int i = 0; i < 2; ++i) {
      const float expected = codec == Codec::kF32   ? values[i]
                             : codec == Codec::kF16 ? F32FromF16(F16FromF32(values[i]))
                                                    : F32FromBf16(Bf16FromF32(values[i]));
      EXPECT_EQ(loaded[i], expected);
    }
  }
}

// Random bit patterns, NaNs among them, so a copy by value would show.
TEST(BlockIo, CopyIsBitForBitWithAZeroTail) {
  std::mt19937 random(3);
  for (const BlockLayout& layout : Layouts()) {
    const size_t element = ElementBytes(layout.codec);
    for (int from_cap = kClassStep; from_cap <= kBlockTokensMax; from_cap += kClassStep) {
      std::vector<std::byte> from(layout.block_bytes(from_cap));
      for (std::byte& byte : from) byte = static_cast<std::byte>(random());
      for (int to_cap = kClassStep; to_cap <= kBlockTokensMax; to_cap += kClassStep) {
        for (const Kind kind : {Kind::kK, Kind::kV}) {
          for (int tokens = 0; tokens <= std::min(from_cap, to_cap); ++tokens) {
            std::vector<std::byte> to(layout.block_bytes(to_cap) + 64, kGuard);
            CopyBlock(layout, kind, from.data(), from_cap, to.data(), to_cap, tokens);
            for (int head = 0; head < layout.n_kv_heads; ++head) {
              for (int token = 0; token < to_cap; ++token) {
                for (int channel = 0; channel < layout.head_dim; ++channel) {
                  const size_t at = layout.offset(kind, head, token, channel, to_cap);
                  const size_t source = token < tokens ? layout.offset(kind, head, token, channel, from_cap) : 0;
                  for (size_t byte = 0; byte < element; ++byte) {
                    ASSERT_EQ(to[at + byte], token < tokens ? from[source + byte] : std::byte{0})
                        << CodecName(layout.codec) << " " << from_cap << " -> " << to_cap << ", " << tokens
                        << " tokens";
                  }
                }
              }
            }
            for (size_t i = layout.n_kv_heads * layout.head_bytes(to_cap); i < to.size(); ++i) ASSERT_EQ(to[i], kGuard);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace jointkv::codec
