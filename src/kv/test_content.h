// Made-up K and V for tests: each value is a pure function of the fusion domain, the tokens up to its position, the
// layer and the kind, just as a model's would be. So blocks that are shared rightly verify for every sharer, and one
// that was shared wrongly, overwritten or lost does not.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/block_io.h"
#include "codec/quantised.h"
#include "kv/kv_cache.h"

namespace jointkv::kv {

inline uint64_t MixContent(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15u + b + 0x632be59bd9b4e019u;
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
  return x ^ (x >> 32);
}

inline uint64_t HistoryStart(DomainId domain) { return MixContent(0, static_cast<uint64_t>(domain.value)); }
inline uint64_t HistoryAfter(uint64_t before, TokenId token) {
  return MixContent(before, static_cast<uint32_t>(token));
}

// [p]: the hash of domain and tokens[0..p]
inline std::vector<uint64_t> Histories(DomainId domain, std::span<const TokenId> tokens) {
  std::vector<uint64_t> histories;
  uint64_t history = HistoryStart(domain);
  for (const TokenId token : tokens) histories.push_back(history = HistoryAfter(history, token));
  return histories;
}

// Integers of 8 bits, so every codec holds them exactly.
inline void FillContent(uint64_t history, int table, std::span<float> values) {
  uint64_t bits = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    bits = i % 8 == 0 ? MixContent(history, static_cast<uint64_t>(table) << 32 | i) : bits >> 8;
    values[i] = static_cast<float>(static_cast<int8_t>(bits & 0xff));
  }
}

inline size_t ContentWidth(const KvCache& cache) {
  return static_cast<size_t>(cache.shape().layout.n_kv_heads) * cache.shape().layout.head_dim;
}

// What a forward pass would do: writes the tokens from `from` on.
inline void WriteContent(const KvCache& cache, SequenceId id, std::span<const uint64_t> histories, int from) {
  std::vector<float> values(ContentWidth(cache));
  const auto blocks = cache.blocks(id);
  for (size_t i = 0; i < blocks.size(); ++i) {
    for (int token = std::max(0, from - blocks[i].start); token < blocks[i].tokens; ++token) {
      for (int table = 0; table < cache.shape().n_tables(); ++table) {
        const Kind kind = static_cast<Kind>(table % 2);
        FillContent(histories[blocks[i].start + token], table, values);
        std::byte* block = cache.data(cache.table(id, table / 2, kind)[i]);
        codec::StoreToken(cache.shape().layout, kind, block, blocks[i].cap, token, values);
      }
    }
  }
}

// A block as the forward pass would have written what it holds: decoded, where it is encoded.
inline std::vector<std::byte> StoredBlock(const KvCache& cache, int table, BlockId id, int cap, int tokens) {
  const codec::BlockLayout& layout = cache.shape().layout;
  const auto kind = static_cast<Kind>(table % 2);
  const codec::Codec codec = cache.codec(id);
  if (codec == layout.codec) return {cache.data(id), cache.data(id) + layout.block_bytes(cap)};
  std::vector<std::byte> decoded(layout.block_bytes(cap));
  if (const BlockId base = cache.base(id); base.valid()) {
    const std::vector<std::byte> mean = StoredBlock(cache, table, base, cap, tokens);
    codec::DecodeBlock(layout, kind, codec, cache.data(id), cap, tokens, {mean.data(), cap}, decoded.data());
    return decoded;
  }
  codec::DecodeBlock(layout, kind, codec, cache.data(id), cap, tokens,
                     kind == Kind::kK ? cache.key_reference(table / 2) : codec::Reference(), decoded.data());
  return decoded;
}

// How many of the first `length` tokens' vectors are not what WriteContent put there. Every vector that a query at
// position `length` may look back on must be there; those that left a window need not.
inline int WrongContent(const KvCache& cache, SequenceId id, std::span<const uint64_t> histories, int length) {
  std::vector<float> expected(ContentWidth(cache));
  std::vector<float> values(ContentWidth(cache));
  int wrong = 0;
  const auto blocks = cache.blocks(id);
  for (int table = 0; table < cache.shape().n_tables(); ++table) {
    const Kind kind = static_cast<Kind>(table % 2);
    const int window = cache.shape().window[table / 2];
    const BlockId* row = cache.table(id, table / 2, kind);
    for (size_t i = 0; i < blocks.size() && blocks[i].start < length; ++i) {
      const int tokens = std::min<int>(blocks[i].tokens, length - blocks[i].start);
      if (!row[i].valid()) {
        wrong += window == 0 || blocks[i].start + tokens > length - window + 1;
        continue;
      }
      for (int token = 0; token < tokens; ++token) {
        FillContent(histories[blocks[i].start + token], table, expected);
        codec::LoadToken(cache.shape().layout, kind, cache.data(row[i]), blocks[i].cap, token, values);
        wrong += values != expected;
      }
    }
  }
  return wrong;
}

}  // namespace jointkv::kv
