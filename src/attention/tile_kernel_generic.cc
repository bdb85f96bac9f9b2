// Tiles on any CPU and for any codec, in f32 through Highway.
#include <algorithm>

#include "attention/head_reader.h"
#include "attention/kernels.h"
#include "base/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/tile_kernel_generic.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h, as Highway asks.
#include "attention/generic-inl.h"
#include "dense/bf16-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace jointkv::attention::HWY_NAMESPACE {

// A register tile: 6 queries x 2 vectors of sums leave 4 of AVX2's 16 registers.
constexpr int kRows = 6;
constexpr int kVectors = 2;
constexpr int kStep = kVectors * static_cast<int>(hn::MaxLanes(DF()));
constexpr int kBlockRows = 4 * kRows;  // queries that meet the same kStep keys while these are in the nearest cache
constexpr int kKeys = kGenericTileKeys;
constexpr ptrdiff_t kKeyStride = kGenericTileKeyStride;

// Where the buffers of one tile lie inside TileArgs::scratch.
struct Scratch {
  Scratch(std::byte* base, int head_dim, int queries)
      : v_stride(OddLines(RoundUp(head_dim, 32))), sum_stride(RoundUp(head_dim, 32)) {
    auto* at = reinterpret_cast<float*>(base);
    const auto take = [&](ptrdiff_t floats) {
      float* taken = at;
      at += RoundUp<ptrdiff_t>(floats, 16);
      return taken;
    };
    q = take(static_cast<ptrdiff_t>(queries) * head_dim);
    k = take(head_dim * kKeyStride);
    v = take((kKeys + 1) * v_stride);
    sums = take(queries * sum_stride);
    max = take(queries);
    total = take(queries);
    scores = take(static_cast<ptrdiff_t>(kBlockRows) * kKeys);
    v_scale = take(kKeys);
  }

  ptrdiff_t v_stride;    // strides of odd numbers of cache lines spread columns over all of a cache's sets
  ptrdiff_t sum_stride;  // whole register tiles
  float* q;              // (queries, head_dim) rotated
  float* k;              // (head_dim, kKeyStride) absolutely rotated
  float* v;              // (kKeys + 1, v_stride)
  float* sums;           // (queries, sum_stride)
  float* max;            // (queries)
  float* total;          // (queries)
  float* scores;         // (kBlockRows, kKeys), then weights
  float* v_scale;        // (kKeys), where values have scales
};

// Keys of one block, rotated on from the block's base and scaled, into tile columns [at, at + tokens); columns behind
// may change.
template <Codec kCodec>
void GatherKeys(const TileArgs& args, int index, float* k, int at) {
  const kv::LogicalBlock& block = args.run.blocks[index];
  const std::byte* source = args.reader->Keys(args.run, index, args.kv_head);
  const int n_pairs = args.run.layout->head_dim / 2;
  const float* cos = args.rope->cos(block.base);
  const float* sin = args.rope->sin(block.base);
  const float scale = args.run.KScale(index);
  CoverColumns(block.tokens, block.cap, [&](auto d, int token) HWY_ATTR {
    for (ptrdiff_t pair = 0; pair < n_pairs; ++pair) {
      const auto c = hn::Set(d, scale * cos[pair]);
      const auto s = hn::Set(d, scale * sin[pair]);
      const auto x = LoadRow<kCodec, 0>(d, source, block.cap, pair, token);
      const auto y = LoadRow<kCodec, 1>(d, source, block.cap, pair, token);
      float* to = k + 2 * pair * kKeyStride + at + token;
      hn::StoreU(hn::MulSub(x, c, hn::Mul(y, s)), d, to);
      hn::StoreU(hn::MulAdd(x, s, hn::Mul(y, c)), d, to + kKeyStride);
    }
  });
}

// Values of one block into tile rows [at, at + tokens), and one more if these are odd.
template <Codec kCodec>
void GatherValues(const TileArgs& args, int index, float* v, ptrdiff_t v_stride, int at) {
  const kv::LogicalBlock& block = args.run.blocks[index];
  const std::byte* source = args.reader->Values(args.run, index, args.kv_head);
  const int head_dim = args.run.layout->head_dim;
  CoverColumns(head_dim, head_dim, [&](auto d, int channel) HWY_ATTR {
    for (ptrdiff_t pair = 0; pair < (block.tokens + 1) / 2; ++pair) {
      float* to = v + (at + 2 * pair) * v_stride + channel;
      hn::StoreU(LoadRow<kCodec, 0>(d, source, head_dim, pair, channel), d, to);
      hn::StoreU(LoadRow<kCodec, 1>(d, source, head_dim, pair, channel), d, to + v_stride);
    }
  });
}

template <Codec kCodec>
void GatherBlock(const TileArgs& args, int index, const Scratch& scratch, int at) {
  GatherKeys<kCodec>(args, index, scratch.k, at);
  GatherValues<kCodec>(args, index, scratch.v, scratch.v_stride, at);
}

// out (kRows, columns [column, column + kStep)) = out * factor + x (kRows, rows) times rows [0, rows) of `matrix`.
// factor: (kRows), or null: 0.
HWY_INLINE void RegisterTile(const float* x, ptrdiff_t x_stride, const float* matrix, ptrdiff_t width, int rows,
                             int column, const float* factor, float* out, ptrdiff_t out_stride) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const ptrdiff_t columns[kVectors] = {column, column + lanes};
  hn::Vec<DF> sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVectors; ++i) {
      sum[r][i] = factor == nullptr ? hn::Zero(d)
                                    : hn::Mul(hn::Set(d, factor[r]), hn::LoadU(d, out + r * out_stride + columns[i]));
    }
  }
  AddProduct<Codec::kF32>(d, reinterpret_cast<const std::byte*>(matrix), width, columns, 0, rows, x, x_stride, sum);
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVectors; ++i) hn::StoreU(sum[r][i], d, out + r * out_stride + columns[i]);
  }
}

// Masks a query's scores of keys [0, width) to [begin, end), turns them into weights, scaled as their values are, and
// returns the factor by which its earlier sums shrink (online softmax, Milakov and Gimelshein 2018).
HWY_INLINE float SoftmaxRow(float* scores, const float* v_scale, int width, int begin, int end, float& max,
                            float& total) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const auto unseen = hn::Set(d, kUnseen);
  auto largest = unseen;
  for (int key = 0; key < width; key += lanes) {
    auto seen = hn::LoadU(d, scores + key);
    if (key < begin || key + lanes > end) {
      const auto index = hn::Iota(di, key);
      const auto visible = hn::And(hn::Lt(hn::Set(di, begin - 1), index), hn::Lt(index, hn::Set(di, end)));
      seen = hn::IfThenElse(hn::RebindMask(d, visible), seen, unseen);
      hn::StoreU(seen, d, scores + key);
    }
    largest = hn::Max(largest, seen);
  }
  const float old_max = max;
  max = std::max(max, hn::GetLane(hn::MaxOfLanes(d, largest)));
  const float shift = max == kUnseen ? 0.0f : max;  // nothing seen yet: weights are zero
  auto sum = hn::Zero(d);
  for (int key = 0; key < width; key += lanes) {
    const auto weight = Exp2(d, hn::Sub(hn::LoadU(d, scores + key), hn::Set(d, shift)));
    sum = hn::Add(sum, weight);
    hn::StoreU(v_scale == nullptr ? weight : hn::Mul(weight, hn::LoadU(d, v_scale + key)), d, scores + key);
  }
  const float correction = hn::GetLane(Exp2(d, hn::Set(d, old_max - shift)));
  total = total * correction + hn::GetLane(hn::SumOfLanes(d, sum));
  return correction;
}

// All queries against the `keys` keys of the present tile, the first of which stands at position first_key.
void AttendTile(const TileArgs& args, const Scratch& scratch, int queries, int first_key, int keys) {
  const int head_dim = args.run.layout->head_dim;
  const float* v_scale = args.run.v_scale == nullptr ? nullptr : scratch.v_scale;
  const int last_query = args.rows * args.group - 1;
  const auto position = [&](int query) { return args.position + std::min(query, last_query) / args.group; };
  for (int block = 0; block < queries; block += kBlockRows) {
    const int end_row = std::min(block + kBlockRows, queries);
    const int visible = std::min(keys, position(end_row - 1) + 1 - first_key);
    if (visible <= 0) continue;
    if (args.window != 0 && position(block) - args.window >= first_key + keys - 1) continue;
    const auto scores = [&](int row) { return scratch.scores + static_cast<ptrdiff_t>(row - block) * kKeys; };
    for (int key = 0; key < visible; key += kStep) {
      for (int row = block; row < end_row; row += kRows) {
        RegisterTile(scratch.q + static_cast<ptrdiff_t>(row) * head_dim, head_dim, scratch.k, kKeyStride, head_dim, key,
                     nullptr, scores(row), kKeys);
      }
    }
    float correction[kBlockRows];
    for (int row = block; row < end_row; ++row) {
      const int begin = args.window == 0 ? 0 : position(row) - args.window + 1 - first_key;
      const int end = std::min(keys, position(row) + 1 - first_key);
      correction[row - block] =
          SoftmaxRow(scores(row), v_scale, RoundUp(visible, kStep), begin, end, scratch.max[row], scratch.total[row]);
    }
    for (int channel = 0; channel < head_dim; channel += kStep) {
      for (int row = block; row < end_row; row += kRows) {
        RegisterTile(scores(row), kKeys, scratch.v, scratch.v_stride, visible, channel, correction + (row - block),
                     scratch.sums + row * scratch.sum_stride, scratch.sum_stride);
      }
    }
  }
}

void WriteOut(const TileArgs& args, const Scratch& scratch) {
  const int head_dim = args.run.layout->head_dim;
  for (int query = 0; query < args.rows * args.group; ++query) {
    const int row = args.out_row + query / args.group;
    const int column = args.out_column + query % args.group * head_dim;
    const float* sums = scratch.sums + query * scratch.sum_stride;
    const float scale = 1.0f / scratch.total[query];
    CoverColumns(head_dim, head_dim, [&](auto d, int channel) HWY_ATTR {
      const auto value = hn::Mul(hn::Set(d, scale), hn::LoadU(d, sums + channel));
      if (args.out.precision == dense::Precision::kBf16) {
        dense::HWY_NAMESPACE::StoreBf16(d, value, args.out.bf16(row) + column + channel);
      } else {
        hn::StoreU(value, d, args.out.f32(row) + column + channel);
      }
    });
  }
}

void TileAttentionImpl(const TileArgs& args) {
  const codec::BlockLayout& layout = *args.run.layout;
  const int head_dim = layout.head_dim;
  const int queries = RoundUp(args.rows * args.group, kRows);
  CHECK(args.rows * args.group <= kTileQueries);
  const Scratch scratch(args.scratch, head_dim, queries);
  std::fill_n(scratch.q, static_cast<ptrdiff_t>(queries) * head_dim, 0.0f);
  std::fill_n(scratch.sums, queries * scratch.sum_stride, 0.0f);
  std::fill_n(scratch.max, queries, kUnseen);
  std::fill_n(scratch.total, queries, 0.0f);
  for (int row = 0; row < args.rows; ++row) {
    const int position = args.position + row;
    for (int g = 0; g < args.group; ++g) {
      RotateQuery(args.q + row * args.q_row_stride + static_cast<ptrdiff_t>(g) * head_dim, head_dim / 2,
                  args.rope->cos(position), args.rope->sin(position), args.inverse_magnitude,
                  scratch.q + (static_cast<ptrdiff_t>(row) * args.group + g) * head_dim);
    }
  }
  const auto gather = layout.codec == Codec::kBf16  ? GatherBlock<Codec::kBf16>
                      : layout.codec == Codec::kF16 ? GatherBlock<Codec::kF16>
                                                    : GatherBlock<Codec::kF32>;
  for (int index = args.first; index < args.last;) {
    const int first_key = args.run.blocks[index].start;
    int keys = 0;
    for (; index < args.last && keys + args.run.blocks[index].tokens <= kKeys; ++index) {
      gather(args, index, scratch, keys);
      if (args.run.v_scale != nullptr)
        std::fill_n(scratch.v_scale + keys, args.run.blocks[index].tokens, args.run.v_scale[index]);
      keys += args.run.blocks[index].tokens;
    }
    AttendTile(args, scratch, queries, first_key, keys);
  }
  WriteOut(args, scratch);
}

}  // namespace jointkv::attention::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace jointkv::attention {

HWY_EXPORT(TileAttentionImpl);
void TileAttentionGeneric(const TileArgs& args) { HWY_DYNAMIC_DISPATCH(TileAttentionImpl)(args); }

}  // namespace jointkv::attention
#endif
