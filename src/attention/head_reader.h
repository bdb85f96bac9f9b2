// HeadReader: one KV head's part of blocks, in the layout that kernels read.
//
// Blocks as a forward pass wrote them are read where they lie. Encoded ones are decoded into scratch; the block read
// last is not decoded again. A block that is a difference from another one is added to that, which is itself read like
// any.
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

  static size_t ScratchBytes(int head_dim) { return RoundUp<size_t>(2 * kPlaces * PlaceBytes(head_dim), 64); }

  // Room for one head of a whole block.
  static size_t PlaceBytes(int head_dim) {
    return static_cast<size_t>(codec::kBlockTokensMax) * head_dim * sizeof(uint16_t);
  }

  // scratch: ScratchBytes(head_dim), 64-byte aligned.
  explicit HeadReader(std::byte* scratch) : scratch_(scratch) {}

  // The first head of a block that lies as kernels read it, its heads one after the other; null: it does not.
  static const std::byte* InPlace(const BlockRun& run, BlockId block) {
    return run.cache->codec(block) == run.layout->codec ? run.cache->data(block) : nullptr;
  }

  // A head of an encoded block into `out`, PlaceBytes. base: the same head of what it is a difference from, as kernels
  // read it; null: it stands alone.
  static void Decode(const BlockRun& run, codec::Kind kind, BlockId block, int cap, int tokens, int kv_head,
                     const std::byte* base, std::byte* out) {
    codec::Reference reference = {base, cap};
    if (base == nullptr)
      reference = kind == codec::Kind::kK ? run.key_reference.OfHead(*run.layout, kv_head) : codec::Reference();
    codec::DecodeHead(*run.layout, kind, run.cache->codec(block), run.cache->data(block), kv_head, cap, tokens,
                      reference, out);
  }

  const std::byte* Keys(const BlockRun& run, int index, int kv_head) {
    return Read(run, codec::Kind::kK, run.k[index], run.blocks[index], kv_head);
  }
  const std::byte* Values(const BlockRun& run, int index, int kv_head) {
    return Read(run, codec::Kind::kV, run.v[index], run.blocks[index], kv_head);
  }

 private:
  static constexpr int kPlaces = kInFlight + 1;  // the last one is for what differences are from

  struct Last {
    BlockId block;
    int kv_head = 0;
    int place = 0;
  };

  const std::byte* Read(const BlockRun& run, codec::Kind kind, BlockId block, const kv::LogicalBlock& logical,
                        int kv_head) {
    const int cap = logical.cap;
    if (const std::byte* data = InPlace(run, block)) return data + run.layout->head_offset(kv_head, cap);
    Last& last = last_[static_cast<size_t>(kind)];
    const size_t place_bytes = PlaceBytes(run.layout->head_dim);
    std::byte* places = scratch_ + static_cast<size_t>(kind) * kPlaces * place_bytes;
    if (last.block != block || last.kv_head != kv_head) {
      last = {block, kv_head, (last.place + 1) % kInFlight};
      const std::byte* from = nullptr;
      if (const BlockId base = run.cache->base(block); base.valid()) {
        std::byte* spare = places + kInFlight * place_bytes;
        from = InPlace(run, base);
        if (from != nullptr) {
          from += run.layout->head_offset(kv_head, cap);
        } else {
          Decode(run, kind, base, cap, logical.tokens, kv_head, nullptr, spare);
          from = spare;
        }
      }
      Decode(run, kind, block, cap, logical.tokens, kv_head, from, places + last.place * place_bytes);
    }
    return places + last.place * place_bytes;
  }

  std::byte* scratch_;          // (kinds, kPlaces, one head of a whole block)
  std::array<Last, 2> last_{};  // by kind
};

}  // namespace jointkv::attention
