// Attention kernels over KV blocks, and how one is called. Plan and scratch: attention/attention.h.
//
// Queries come in pair order: (2, head_dim / 2) f32, first all first halves of the RoPE pairs, then all second halves,
// unrotated, already multiplied by attention scale and log2(e), so that softmax works in powers of two.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "base/ids.h"
#include "codec/layout.h"
#include "codec/quantised.h"
#include "dense/activations.h"
#include "dense/rope.h"
#include "kv/kv_cache.h"

namespace jointkv::attention {

class Ahead;
class HeadReader;

// One sequence's blocks in one layer.
struct BlockRun {
  const codec::BlockLayout* layout = nullptr;
  const kv::LogicalBlock* blocks = nullptr;  // by logical index
  const BlockId* k = nullptr;                // block table rows, by logical index
  const BlockId* v = nullptr;
  const float* k_scale = nullptr;  // by logical index: factors of the blocks' keys and values; null: all 1
  const float* v_scale = nullptr;
  const kv::KvCache* cache = nullptr;
  codec::Reference key_reference = {};  // of encoded keys

  float KScale(int index) const { return k_scale == nullptr ? 1.0f : k_scale[index]; }
  float VScale(int index) const { return v_scale == nullptr ? 1.0f : v_scale[index]; }
};

inline constexpr int kGroupMax = 4;      // queries that a block kernel handles at once
inline constexpr int kSplitBlocks = 16;  // logical blocks of one partial of an independent row

// The largest score of a query that has seen nothing yet: finite, so that it has a fraction, and 2^kUnseen is zero.
inline constexpr float kUnseen = -1e30f;

inline constexpr int kVisitsMax = 8;  // that a block kernel handles at once

// What some queries of a row have seen so far, not yet divided (online softmax, Milakov and Gimelshein 2018).
struct Partial {
  float* sums = nullptr;  // (queries, head_dim) weighted sums of V
  // (2, kGroupMax): the largest score, base 2, and the sum of 2^(score - largest). Lanes beyond `queries` are set and
  // mean nothing.
  float* stats = nullptr;

  // Sets what has seen nothing.
  void Clear(int queries, int head_dim) const {
    std::fill_n(sums, static_cast<ptrdiff_t>(queries) * head_dim, 0.0f);
    std::fill_n(stats, kGroupMax, kUnseen);
    std::fill_n(stats + kGroupMax, kGroupMax, 0.0f);
  }
};

// A visit: one query row (one position) of one KV head's group against one block, added to what the row has seen
// before.
struct Visit {
  const std::byte* k = nullptr;  // this head's part of the block
  const std::byte* v = nullptr;
  int cap = 0;
  int begin = 0;  // visible tokens [begin, end), at least one
  int end = 0;
  float k_scale = 1;
  float v_scale = 1;
  const float* cos = nullptr;  // (head_dim / 2) from the block's base to the row's position
  const float* sin = nullptr;
  const float* q = nullptr;  // (queries, 2, head_dim / 2)
  Partial sum = {};          // in and out: of the row so far
  bool fresh = false;        // it has seen nothing yet: `sum` is only written
};

struct VisitArgs {
  const codec::BlockLayout* layout = nullptr;
  const Visit* visits = nullptr;
  int n = 0;                 // <= kVisitsMax, in the order in which they are added up
  int queries = 0;           // <= kGroupMax
  float* scratch = nullptr;  // VisitScratchFloats(head_dim), 64-byte aligned
  Ahead* ahead = nullptr;    // what AttendBf16 and AttendAvx2 ask memory for meanwhile
};

inline constexpr int kAvx2HeadDimMax = 256;  // of AttendAvx2

constexpr size_t VisitScratchFloats(int head_dim) {
  return static_cast<size_t>(kVisitsMax) * kGroupMax *
         (std::max(RoundUp(head_dim, 32), kAvx2HeadDimMax) + 2 * codec::kBlockTokensMax);
}

// bf16 blocks with AVX-512 BF16: dot products of bf16 pairs, f32 sums; probabilities rounded to bf16. Visits of one
// row, one after the other in a call, are added up with one softmax: where calls end, results differ by rounding. Of
// the others they do not depend on calls.
void AttendBf16(const VisitArgs& args);
// bf16 blocks, f32 arithmetic throughout; only where HasAvx2Kernel(head_dim). Visits to one block, one after the other,
// meet it together.
void AttendAvx2(const VisitArgs& args);
bool HasAvx2Kernel(int head_dim);
// Any codec, any target, f32 arithmetic throughout.
void AttendGeneric(const VisitArgs& args);

// Adds a partial result of some queries to another one, of earlier blocks.
void Combine(const Partial& sum, const Partial& more, int queries, int head_dim);
// The average that the sums of one query are, into n of out's columns; `total` is its sum of 2^(score - largest).
void WriteAverage(const float* sums, float total, int n, const dense::Activations& out, int row, int column);

inline constexpr int kTileKeys = 256;
inline constexpr int kTileQueries = 192;  // rows times group, at most

// A run of rows of one sequence (a prefill chunk) of one KV head's group against all earlier tokens: keys are rotated
// to their absolute positions once per tile, queries once, then it is two dense products with an online softmax
// between.
struct TileArgs {
  BlockRun run;
  HeadReader* reader = nullptr;
  int kv_head = 0;
  const dense::RopeTable* rope = nullptr;
  float inverse_magnitude = 1;  // 1 / the rope table's magnitude (keys meet the table twice)
  const float* q = nullptr;     // first row's first query of this group
  ptrdiff_t q_row_stride = 0;   // floats from row to row
  int group = 0;                // queries per row
  int rows = 0;                 // rows * group <= kTileQueries
  int position = 0;             // of the first row
  int window = 0;
  int first = 0;  // logical blocks [first, last) that any row may see
  int last = 0;
  dense::Activations out;  // (rows, n_heads * head_dim)
  int out_row = 0;         // row of out for the first row
  int out_column = 0;
  std::byte* scratch = nullptr;  // (Generic)TileScratchBytes(head_dim), 64-byte aligned
};

constexpr size_t TileScratchBytes(int head_dim) {
  const size_t hd = RoundUp(head_dim, 32);
  return hd * 2 * (kTileQueries + 8) + 4 * hd * kTileKeys + hd * 4 * (kTileQueries + 8) + 8 * (kTileQueries + 8) +
         6 * kTileKeys * 6 + 4 * kTileKeys + 1024;
}

// Requires bf16 blocks and AVX-512 BF16.
void TileAttentionBf16(const TileArgs& args);

// In f32, keys and values of a tile take twice the bytes: half as many stay in the second cache.
inline constexpr int kGenericTileKeys = 128;

// The least row of so many floats that is an odd number of cache lines: columns then spread over all sets of a cache.
constexpr int OddLines(int floats) { return (CeilDiv(floats, 16) | 1) * 16; }

inline constexpr int kGenericTileKeyStride = OddLines(kGenericTileKeys + 16);  // blocks are gathered in whole vectors

constexpr size_t GenericTileScratchBytes(int head_dim) {
  const size_t hd = RoundUp(head_dim, 32);
  const size_t rows = 2 * kTileQueries + kGenericTileKeyStride;
  return 4 * (rows * hd + (kGenericTileKeys + 1) * (hd + 16) + 2 * kTileQueries + 25 * kGenericTileKeys) + 1024;
}

// Any codec, any target, f32 arithmetic throughout.
void TileAttentionGeneric(const TileArgs& args);

// Prepares one token after the QKV product: queries into pair order and scaled; K rotated by its position from the base
// of its block; K and V into the block.
struct TokenArgs {
  const codec::BlockLayout* layout = nullptr;
  const float* qkv = nullptr;  // (n_heads + 2 n_kv_heads, head_dim)
  int n_heads = 0;
  bool neox = false;  // RoPE pairs (i, i + head_dim / 2); otherwise (2i, 2i + 1)
  float q_scale = 1;
  const float* cos = nullptr;  // (head_dim / 2) of the key's rotation
  const float* sin = nullptr;
  float* q = nullptr;  // out: (n_heads, 2, head_dim / 2)
  std::byte* k_block = nullptr;
  std::byte* v_block = nullptr;
  int cap = 0;
  int offset = 0;            // token's place in the block
  float* scratch = nullptr;  // (2, head_dim)
};
void StoreToken(const TokenArgs& args);

}  // namespace jointkv::attention
