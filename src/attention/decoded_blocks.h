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
  static size_t ScratchBytes(int head_dim) {
    return RoomBytes(head_dim) + RoundUp<size_t>(HeadReader::PlaceBytes(head_dim), kAlignment);
  }

  // scratch: ScratchBytes(head_dim), 64-byte aligned.
  DecodedBlocks(int head_dim, std::byte* scratch)
      : place_bytes_(HeadReader::PlaceBytes(head_dim)),
        room_bytes_(RoomBytes(head_dim)),
        spare_(scratch + RoomBytes(head_dim)),
        scratch_(scratch) {}

  void Clear() {
    used_ = 0;
    for (OfKind& blocks : kinds_) blocks.n = 0;
  }

  // Whether Add may be called for one more block of each kind.
  bool HasRoom() const {
    return std::max(kinds_[0].n, kinds_[1].n) < kBlocksMax && used_ + 2 * place_bytes_ <= room_bytes_;
  }

  // Where Decode puts the head of an encoded block, until Clear. `run` must stay.
  const std::byte* Add(const BlockRun& run, codec::Kind kind, BlockId block, int cap) {
    OfKind& blocks = kinds_[static_cast<size_t>(kind)];
    int i = blocks.n - 1;  // that of the visit before, as a rule
    while (i >= 0 && blocks.all[i].id != block) --i;
    if (i < 0) {
      i = blocks.n++;
      blocks.all[i] = {block, &run, cap, scratch_ + used_};
      // One behind the other: places of a whole block each would all share the same part of a cache.
      used_ += RoundUp<size_t>(run.layout->head_bytes(cap), kAlignment);
    }
    return blocks.all[i].at;
  }

  // Returns how many.
  int Decode(int kv_head) {
    for (const codec::Kind kind : {codec::Kind::kK, codec::Kind::kV}) {
      const OfKind& blocks = kinds_[static_cast<size_t>(kind)];
      for (const Block& block : std::span(blocks.all).first(blocks.n))
        HeadReader::Decode(*block.run, kind, block.id, block.cap, kv_head, block.at, spare_);
    }
    return kinds_[0].n + kinds_[1].n;
  }

 private:
  static constexpr size_t kAlignment = 64;
  static constexpr int kBlocksMax = 32;  // of each kind

  // As much as leaves the second cache room for other things, but enough for a call of the kernel.
  static size_t RoomBytes(int head_dim) {
    return RoundUp<size_t>(std::max<size_t>(128 << 10, 2 * kVisitsMax * HeadReader::PlaceBytes(head_dim)), kAlignment);
  }

  struct Block {
    BlockId id;
    const BlockRun* run = nullptr;
    int cap = 0;
    std::byte* at = nullptr;
  };
  struct OfKind {
    int n = 0;
    std::array<Block, kBlocksMax> all;
  };

  size_t place_bytes_;
  size_t room_bytes_;
  size_t used_ = 0;
  std::byte* spare_;    // for what differences are from
  std::byte* scratch_;  // room_bytes_
  std::array<OfKind, 2> kinds_;
};

}  // namespace jointkv::attention
