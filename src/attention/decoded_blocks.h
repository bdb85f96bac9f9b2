// DecodedBlocks: the encoded blocks that a batch of visits reads, each decoded once for all of them, head after head.
//
// Threads: one. Owns: nothing; `scratch` is the caller's. Fails how: never.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>

#include "attention/head_reader.h"

namespace jointkv::attention {

class DecodedBlocks {
 public:
  // As much as leaves the second cache room for other things, but enough for a call of the kernel, where each block may
  // be a difference from another encoded one.
  static size_t ScratchBytes(int head_dim) {
    const size_t least = 4 * kVisitsMax * RoundUp<size_t>(HeadReader::PlaceBytes(head_dim), kAlignment);
    return std::max<size_t>(128 << 10, least);
  }

  // scratch: ScratchBytes(head_dim), 64-byte aligned.
  DecodedBlocks(int head_dim, std::byte* scratch)
      : place_bytes_(RoundUp<size_t>(HeadReader::PlaceBytes(head_dim), kAlignment)),
        scratch_bytes_(ScratchBytes(head_dim)),
        scratch_(scratch) {}

  void Clear() {
    used_ = 0;
    for (OfKind& blocks : kinds_) blocks.n = 0;
  }

  // Whether Add may be called for one more block of each kind.
  bool HasRoom() const {
    return std::max(kinds_[0].n, kinds_[1].n) + 2 <= kBlocksMax && used_ + 4 * place_bytes_ <= scratch_bytes_;
  }

  // How much has been added, and back to that.
  struct Mark {
    size_t used;
    int n[2];
  };
  Mark mark() const { return {used_, {kinds_[0].n, kinds_[1].n}}; }
  void Return(const Mark& mark) {
    used_ = mark.used;
    for (size_t kind = 0; kind < kinds_.size(); ++kind) kinds_[kind].n = mark.n[kind];
  }

  // Where Decode puts the head of an encoded block, until Clear or Return. `run` must stay.
  const std::byte* Add(const BlockRun& run, codec::Kind kind, BlockId id, const kv::LogicalBlock& logical) {
    OfKind& blocks = kinds_[static_cast<size_t>(kind)];
    // That of the visit before, as a rule.
    for (int i = blocks.n - 1; i >= 0; --i) {
      if (blocks.all[i].id == id) return blocks.all[i].at;
    }
    Block block = {id, &run, logical.cap, logical.tokens};
    // What it is a difference from comes before it.
    if (const BlockId base = run.cache->base(id); base.valid()) {
      block.base_in_place = HeadReader::InPlace(run, base);
      if (block.base_in_place == nullptr) block.base_at = Add(run, kind, base, logical);
    }
    block.at = scratch_ + used_;
    // One behind the other: places of a whole block each would all share the same part of a cache.
    used_ += RoundUp<size_t>(run.layout->head_bytes(logical.cap), kAlignment);
    blocks.all[blocks.n++] = block;
    return block.at;
  }

  // Returns how many.
  int Decode(int kv_head) {
    for (const codec::Kind kind : {codec::Kind::kK, codec::Kind::kV}) {
      const OfKind& blocks = kinds_[static_cast<size_t>(kind)];
      for (const Block& block : std::span(blocks.all).first(blocks.n)) {
        const std::byte* base = block.base_at;
        if (block.base_in_place != nullptr)
          base = block.base_in_place + block.run->layout->head_offset(kv_head, block.cap);
        HeadReader::Decode(*block.run, kind, block.id, block.cap, block.tokens, kv_head, base, block.at);
      }
    }
    return kinds_[0].n + kinds_[1].n;
  }

 private:
  static constexpr size_t kAlignment = 64;
  static constexpr int kBlocksMax = 32;  // of each kind
  static_assert(kBlocksMax >= 2 * kVisitsMax);

  struct Block {
    BlockId id;
    const BlockRun* run = nullptr;
    int cap = 0;
    int tokens = 0;
    const std::byte* base_in_place = nullptr;  // of a difference: the first head of its base,
    const std::byte* base_at = nullptr;        // or where that is decoded
    std::byte* at = nullptr;
  };
  struct OfKind {
    int n = 0;
    std::array<Block, kBlocksMax> all;
  };

  size_t place_bytes_;  // of a whole block
  size_t scratch_bytes_;
  size_t used_ = 0;
  std::byte* scratch_;
  std::array<OfKind, 2> kinds_;
};

}  // namespace jointkv::attention
