#include "codec/block_io.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"

namespace jointkv::codec {

void StoreToken(const BlockLayout& layout, Kind kind, std::byte* block, int cap, int token,
                std::span<const float> values) {
  CHECK(values.size() == static_cast<size_t>(layout.n_kv_heads) * layout.head_dim);
  for (int head = 0; head < layout.n_kv_heads; ++head) {
    for (int channel = 0; channel < layout.head_dim; ++channel) {
      const float value = values[head * layout.head_dim + channel];
      std::byte* at = block + layout.offset(kind, head, token, channel, cap);
      if (layout.codec == Codec::kF32) {
        std::memcpy(at, &value, sizeof(value));
      } else {
        const uint16_t half = layout.codec == Codec::kBf16 ? Bf16FromF32(value) : F16FromF32(value);
        std::memcpy(at, &half, sizeof(half));
      }
    }
  }
}

void LoadToken(const BlockLayout& layout, Kind kind, const std::byte* block, int cap, int token,
               std::span<float> values) {
  CHECK(values.size() == static_cast<size_t>(layout.n_kv_heads) * layout.head_dim);
  for (int head = 0; head < layout.n_kv_heads; ++head) {
    for (int channel = 0; channel < layout.head_dim; ++channel) {
      const std::byte* at = block + layout.offset(kind, head, token, channel, cap);
      float& value = values[head * layout.head_dim + channel];
      if (layout.codec == Codec::kF32) {
        std::memcpy(&value, at, sizeof(value));
      } else {
        uint16_t half = 0;
        std::memcpy(&half, at, sizeof(half));
        value = layout.codec == Codec::kBf16 ? F32FromBf16(half) : F32FromF16(half);
      }
    }
  }
}

void CopyBlock(const BlockLayout& layout, Kind kind, const std::byte* from, int from_cap, std::byte* to, int to_cap,
               int tokens) {
  CHECK(tokens <= from_cap && tokens <= to_cap);
  // Each head is `rows` rows, one per channel (pair) for K and one per token (pair) for V.
  const bool paired = layout.codec == Codec::kBf16;
  const size_t element = ElementBytes(layout.codec);
  for (int head = 0; head < layout.n_kv_heads; ++head) {
    const std::byte* source = from + layout.head_offset(head, from_cap);
    std::byte* target = to + layout.head_offset(head, to_cap);
    if (kind == Kind::kK) {
      const size_t token_bytes = paired ? 4 : element;
      const int rows = paired ? layout.head_dim / 2 : layout.head_dim;
      for (int row = 0; row < rows; ++row) {
        std::memcpy(target, source, tokens * token_bytes);
        std::memset(target + tokens * token_bytes, 0, (to_cap - tokens) * token_bytes);
        source += from_cap * token_bytes;
        target += to_cap * token_bytes;
      }
    } else {
      const size_t row_bytes = layout.head_dim * element * (paired ? 2 : 1);
      const int full = paired ? tokens / 2 : tokens;
      const int rows = paired ? to_cap / 2 : to_cap;
      std::memcpy(target, source, full * row_bytes);
      std::memset(target + full * row_bytes, 0, (rows - full) * row_bytes);
      if (paired && tokens % 2 != 0) {
        for (int channel = 0; channel < layout.head_dim; ++channel) {
          std::memcpy(target + full * row_bytes + channel * 4, source + full * row_bytes + channel * 4, 2);
        }
      }
    }
  }
}

}  // namespace jointkv::codec
