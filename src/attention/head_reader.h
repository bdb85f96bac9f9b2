// HeadReader: one KV head's part of blocks, in the layout that kernels read.
//
// Blocks as a forward pass wrote them are read where they lie. Encoded ones are decoded into scratch; the block read
// last is not decoded again, so blocks that many visit one after the other are decoded once for all of them.
//
// Threads: one. Owns: nothing; `scratch` is the caller's. Results stay while kInFlight further ones of the same kind
// have not been asked for, and blocks do not change. Fails how: never.
#pragma once

#include <array>
#include <cstddef>

#include "attention/kernels.h"
#include "codec/quantised.h"

namespace jointkv::attention {

class HeadReader {
 public:
  static constexpr int kInFlight = kVisitsMax;

  static size_t ScratchBytes(int head_dim) { return RoundUp<size_t>(2 * kInFlight * PlaceBytes(head_dim), 64); }

  // scratch: ScratchBytes(head_dim), 64-byte aligned.
  explicit HeadReader(std::byte* scratch) : scratch_(scratch) {}

  const std::byte* Keys(const BlockRun& run, int index, int kv_head) {
    return Read(run, codec::Kind::kK, run.k[index], run.blocks[index].cap, kv_head);
  }
  const std::byte* Values(const BlockRun& run, int index, int kv_head) {
    return Read(run, codec::Kind::kV, run.v[index], run.blocks[index].cap, kv_head);
  }

 private:
  struct Last {
    BlockId block;
    int kv_head = 0;
    int place = 0;
  };

  static size_t PlaceBytes(int head_dim) {
    return static_cast<size_t>(codec::kBlockTokensMax) * head_dim * sizeof(uint16_t);
  }

  const std::byte* Read(const BlockRun& run, codec::Kind kind, BlockId block, int cap, int kv_head) {
    const codec::Codec codec = run.cache->codec(block);
    const std::byte* data = run.cache->data(block);
    if (codec == run.layout->codec) return data + run.layout->head_offset(kv_head, cap);
    Last& last = last_[static_cast<size_t>(kind)];
    std::byte* places = scratch_ + static_cast<size_t>(kind) * kInFlight * PlaceBytes(run.layout->head_dim);
    if (last.block != block || last.kv_head != kv_head) {
      last = {block, kv_head, (last.place + 1) % kInFlight};
      const std::byte* mean = kind == codec::Kind::kK ? run.key_mean : nullptr;
      codec::DecodeHead(*run.layout, kind, codec, data, kv_head, cap, mean,
                        places + last.place * PlaceBytes(run.layout->head_dim));
    }
    return places + last.place * PlaceBytes(run.layout->head_dim);
  }

  std::byte* scratch_;          // (kinds, kInFlight, one head of a whole block)
  std::array<Last, 2> last_{};  // by kind
};

}  // namespace jointkv::attention
