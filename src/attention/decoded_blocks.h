// DecodedBlocks: the encoded blocks that a batch of visits reads, each decoded once for all of them, head after head.
//
// Threads: one. Owns: nothing; `scratch` is the caller's. Fails how: never.
#pragma once

#include <algorithm>
#include <cstddef>

#include "attention/head_reader.h"

namespace jointkv::attention {

class DecodedBlocks {
 public:
  static size_t ScratchBytes(int head_dim) {
    return RoundUp<size_t>((2 * Places(head_dim) + 1) * HeadReader::PlaceBytes(head_dim), 64);
  }

  // scratch: ScratchBytes(head_dim), 64-byte aligned.
  DecodedBlocks(int head_dim, std::byte* scratch)
      : place_bytes_(HeadReader::PlaceBytes(head_dim)), places_(Places(head_dim)), scratch_(scratch) {}

  void Clear() { kinds_[0].n = kinds_[1].n = 0; }

  // Whether Add may be called for one more block of each kind.
  bool HasRoom() const { return std::max(kinds_[0].n, kinds_[1].n) < places_; }

  // Where Decode puts the head of an encoded block, until Clear. `run` must stay.
  const std::byte* Add(const BlockRun& run, codec::Kind kind, BlockId block, int cap) {
    OfKind& blocks = kinds_[static_cast<size_t>(kind)];
    int place = blocks.n - 1;  // that of the visit before, as a rule
    while (place >= 0 && blocks.block[place] != block) --place;
    if (place < 0) {
      place = blocks.n++;
      blocks.block[place] = block;
      blocks.run[place] = &run;
      blocks.cap[place] = cap;
    }
    return Place(kind, place);
  }

  void Decode(int kv_head) {
    for (const codec::Kind kind : {codec::Kind::kK, codec::Kind::kV}) {
      const OfKind& blocks = kinds_[static_cast<size_t>(kind)];
      for (int i = 0; i < blocks.n; ++i) {
        HeadReader::Decode(*blocks.run[i], kind, blocks.block[i], blocks.cap[i], kv_head, Place(kind, i),
                           scratch_ + 2 * places_ * place_bytes_);
      }
    }
  }

 private:
  static constexpr int kPlacesMax = 16;

  // As many as leave the second cache room for other things, but enough for a call of the kernel.
  static int Places(int head_dim) {
    constexpr size_t kBytes = 64 << 10;
    return std::clamp<int>(kBytes / HeadReader::PlaceBytes(head_dim), kVisitsMax, kPlacesMax);
  }

  std::byte* Place(codec::Kind kind, int place) const {
    return scratch_ + (static_cast<size_t>(kind) * places_ + place) * place_bytes_;
  }

  struct OfKind {
    int n = 0;
    BlockId block[kPlacesMax];
    const BlockRun* run[kPlacesMax];
    int cap[kPlacesMax];
  };

  size_t place_bytes_;
  int places_;  // of each kind
  std::byte* scratch_;  // (kinds, places_, one head of a whole block), and one more for what differences are from
  OfKind kinds_[2];
};

}  // namespace jointkv::attention
