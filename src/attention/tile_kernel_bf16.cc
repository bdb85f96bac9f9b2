#include <algorithm>

#include "attention/head_reader.h"
#include "attention/kernels.h"
#include "base/check.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "base/avx512bf16_push.h"
// After the push: these helpers are for AVX-512 callers only.
#include "attention/avx512bf16-inl.h"

namespace jointkv::attention {
namespace {

constexpr int kRows = 6;      // query rows of one register tile: 6 x 4 vectors of sums
constexpr int kKeyStep = 64;  // keys of one register tile

// Where the buffers of one tile lie inside TileArgs::scratch.
struct Scratch {
  Scratch(std::byte* base, int head_dim, int queries) {
    const int n_pairs = head_dim / 2;
    const auto take = [&](size_t bytes) {
      std::byte* at = base;
      base += RoundUp<size_t>(bytes, 64);
      return at;
    };
    q = reinterpret_cast<uint32_t*>(take(static_cast<size_t>(queries) * RoundUp(n_pairs, 16) * 4));
    k = reinterpret_cast<uint32_t*>(take(static_cast<size_t>(n_pairs) * kTileKeys * 4));
    v = reinterpret_cast<uint32_t*>(take(static_cast<size_t>(kTileKeys) / 2 * head_dim * 4));
    sums = reinterpret_cast<float*>(take(static_cast<size_t>(queries) * head_dim * 4));
    max = reinterpret_cast<float*>(take(static_cast<size_t>(queries) * 4));
    total = reinterpret_cast<float*>(take(static_cast<size_t>(queries) * 4));
    scores = reinterpret_cast<float*>(take(static_cast<size_t>(kRows) * kTileKeys * 4));
    weights = reinterpret_cast<uint16_t*>(take(static_cast<size_t>(kRows) * kTileKeys * 2));
    v_scale = reinterpret_cast<float*>(take(static_cast<size_t>(kTileKeys) * 4));
  }

  uint32_t* q;        // (queries, pairs rounded up to 16) rotated bf16 pairs
  uint32_t* k;        // (pairs, kTileKeys) absolutely rotated bf16 pairs
  uint32_t* v;        // (kTileKeys / 2, head_dim) bf16 token pairs
  float* sums;        // (queries, head_dim)
  float* max;         // (queries)
  float* total;       // (queries)
  float* scores;      // (kRows, kTileKeys)
  uint16_t* weights;  // (kRows, kTileKeys) bf16
  float* v_scale;     // (kTileKeys), where values have scales
};

// Keys of one block, rotated on from the block's base and scaled, into tile columns [at, at + tokens).
void GatherKeys(const TileArgs& args, int index, uint32_t* k, int at) {
  const kv::LogicalBlock& block = args.run.blocks[index];
  const std::byte* source = args.reader->Keys(args.run, index, args.kv_head);
  const int n_pairs = args.run.layout->head_dim / 2;
  const float* cos = args.rope->cos(block.base);
  const float* sin = args.rope->sin(block.base);
  const float scale = args.run.KScale(index);
  const __m512i high_mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int pair = 0; pair < n_pairs; ++pair) {
    const __m512 c = _mm512_set1_ps(scale * cos[pair]);
    const __m512 s = _mm512_set1_ps(scale * sin[pair]);
    for (int token = 0; token < block.tokens; token += 16) {
      const __mmask16 mask = LaneMask(block.tokens - token);
      const __m512i raw =
          _mm512_maskz_loadu_epi32(mask, source + (static_cast<ptrdiff_t>(pair) * block.cap + token) * 4);
      const __m512 x = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
      const __m512 y = _mm512_castsi512_ps(_mm512_and_si512(raw, high_mask));
      const __m512 first = _mm512_fmsub_ps(x, c, _mm512_mul_ps(y, s));
      const __m512 second = _mm512_fmadd_ps(x, s, _mm512_mul_ps(y, c));
      _mm512_mask_storeu_epi32(k + static_cast<ptrdiff_t>(pair) * kTileKeys + at + token, mask,
                               PackPairs(first, second));
    }
  }
}

// Values of one block into tile rows; a token's place in its pair may change on the way.
void GatherValues(const TileArgs& args, int index, uint32_t* v, int at) {
  const kv::LogicalBlock& block = args.run.blocks[index];
  const auto* source = reinterpret_cast<const uint32_t*>(args.reader->Values(args.run, index, args.kv_head));
  const int head_dim = args.run.layout->head_dim;
  for (int token = 0; token < block.tokens; ++token) {
    const uint32_t* from = source + static_cast<ptrdiff_t>(token / 2) * head_dim;
    uint32_t* to = v + static_cast<ptrdiff_t>((at + token) / 2) * head_dim;
    for (int channel = 0; channel < head_dim; channel += 16) {
      const __mmask16 mask = LaneMask(head_dim - channel);
      const __m512i pair = _mm512_maskz_loadu_epi32(mask, from + channel);
      const __m512i value =
          token % 2 == 0 ? _mm512_and_si512(pair, _mm512_set1_epi32(0xffff)) : _mm512_srli_epi32(pair, 16);
      const __m512i target = (at + token) % 2 == 0 ? value
                                                   : _mm512_or_si512(_mm512_maskz_loadu_epi32(mask, to + channel),
                                                                     _mm512_slli_epi32(value, 16));
      _mm512_mask_storeu_epi32(to + channel, mask, target);
    }
  }
}

// scores (kRows, kKeyStep) of keys [key, key + kKeyStep).
void ScoreStep(const uint32_t* q, ptrdiff_t q_stride, const uint32_t* k, int n_pairs, float* scores) {
  __m512 sum[kRows][4];
  for (auto& row : sum) {
    for (auto& vector : row) vector = _mm512_setzero_ps();
  }
  for (int pair = 0; pair < n_pairs; ++pair) {
    __m512bh keys[4];
    for (int i = 0; i < 4; ++i)
      keys[i] = (__m512bh)_mm512_loadu_si512(k + static_cast<ptrdiff_t>(pair) * kTileKeys + 16 * i);
    for (int r = 0; r < kRows; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(q[r * q_stride + pair]));
      for (int i = 0; i < 4; ++i) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], x, keys[i]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < 4; ++i) _mm512_storeu_ps(scores + static_cast<ptrdiff_t>(r) * kTileKeys + 16 * i, sum[r][i]);
  }
}

// sums (kRows, head_dim) = sums * correction + weights * v, channels [channel, channel + 16 kVectors).
template <int kVectors>
void ValueStep(const uint16_t* weights, const float* correction, const uint32_t* v, int n_token_pairs, int head_dim,
               int channel, float* sums) {
  __m512 sum[kRows][kVectors];
  __mmask16 mask[kVectors];
  for (int i = 0; i < kVectors; ++i) mask[i] = LaneMask(head_dim - channel - 16 * i);
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVectors; ++i) {
      sum[r][i] =
          _mm512_mul_ps(_mm512_set1_ps(correction[r]),
                        _mm512_maskz_loadu_ps(mask[i], sums + static_cast<ptrdiff_t>(r) * head_dim + channel + 16 * i));
    }
  }
  for (int pair = 0; pair < n_token_pairs; ++pair) {
    __m512bh values[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      values[i] =
          (__m512bh)_mm512_maskz_loadu_epi32(mask[i], v + static_cast<ptrdiff_t>(pair) * head_dim + channel + 16 * i);
    }
    for (int r = 0; r < kRows; ++r) {
      int both;
      __builtin_memcpy(&both, weights + r * kTileKeys + 2 * pair, sizeof(both));
      const __m512bh x = (__m512bh)_mm512_set1_epi32(both);
      for (int i = 0; i < kVectors; ++i) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], x, values[i]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVectors; ++i) {
      _mm512_mask_storeu_ps(sums + static_cast<ptrdiff_t>(r) * head_dim + channel + 16 * i, mask[i], sum[r][i]);
    }
  }
}

// Masks one row's scores of keys [0, width) at positions from first_key on, turns them into weights, scaled as their
// values are, and returns the factor by which its earlier sums shrink (online softmax, Milakov and Gimelshein 2018).
template <bool kScaled>
float SoftmaxRow(float* scores, uint16_t* weights, const float* v_scale, int width, int first_visible, int end_visible,
                 float& max, float& total) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512 unseen = _mm512_set1_ps(kUnseen);
  __m512 largest = unseen;
  if (first_visible <= 0 && end_visible >= width) {
    for (int i = 0; i < width; i += 16) largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores + i));
  } else {
    for (int i = 0; i < width; i += 16) {
      const __m512i key = _mm512_add_epi32(lanes, _mm512_set1_epi32(i));
      const __mmask16 keep = _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(first_visible)) &
                             _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32(end_visible));
      const __m512 masked = _mm512_mask_blend_ps(keep, unseen, _mm512_loadu_ps(scores + i));
      _mm512_storeu_ps(scores + i, masked);
      largest = _mm512_max_ps(largest, masked);
    }
  }
  const float old_max = max;
  max = std::max(max, _mm512_reduce_max_ps(largest));
  const float shift = max == kUnseen ? 0.0f : max;
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < width; i += 16) {
    __m512 weight = Exp2(_mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(shift)));
    sum = _mm512_add_ps(sum, weight);
    if (kScaled) weight = _mm512_mul_ps(weight, _mm512_loadu_ps(v_scale + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + i), (__m256i)_mm512_cvtneps_pbh(weight));
  }
  const float correction = _mm512_cvtss_f32(Exp2(_mm512_set1_ps(old_max - shift)));
  total = total * correction + _mm512_reduce_add_ps(sum);
  return correction;
}

// All query rows against the `keys` keys of the present tile, the first of which stands at position first_key.
template <bool kScaled>
void AttendTile(const TileArgs& args, const Scratch& scratch, int queries, int first_key, int keys) {
  const int head_dim = args.run.layout->head_dim;
  const int n_pairs = head_dim / 2;
  const ptrdiff_t q_stride = RoundUp(n_pairs, 16);
  for (int row = 0; row < queries; row += kRows) {
    const int last_position = args.position + std::min(row + kRows - 1, args.rows * args.group - 1) / args.group;
    const int first_position = args.position + row / args.group;
    const int visible = std::min(keys, last_position + 1 - first_key);
    if (visible <= 0) continue;
    if (args.window != 0 && first_position - args.window >= first_key + keys - 1) continue;
    const int width = RoundUp(visible, 16);
    for (int key = 0; key < visible; key += kKeyStep) {
      ScoreStep(scratch.q + row * q_stride, q_stride, scratch.k + key, n_pairs, scratch.scores + key);
    }
    float correction[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int position = args.position + (row + r) / args.group;
      const int begin = args.window == 0 ? 0 : position - args.window + 1 - first_key;
      const int end = std::min(keys, position + 1 - first_key);
      correction[r] =
          SoftmaxRow<kScaled>(scratch.scores + r * kTileKeys, scratch.weights + r * kTileKeys, scratch.v_scale, width,
                              begin, end, scratch.max[row + r], scratch.total[row + r]);
    }
    float* sums = scratch.sums + static_cast<ptrdiff_t>(row) * head_dim;
    const int token_pairs = (visible + 1) / 2;
    int channel = 0;
    for (; channel + 48 < head_dim; channel += 64)
      ValueStep<4>(scratch.weights, correction, scratch.v, token_pairs, head_dim, channel, sums);
    for (; channel < head_dim; channel += 16)
      ValueStep<1>(scratch.weights, correction, scratch.v, token_pairs, head_dim, channel, sums);
  }
}

void WriteOut(const TileArgs& args, const Scratch& scratch) {
  const int head_dim = args.run.layout->head_dim;
  for (int query = 0; query < args.rows * args.group; ++query) {
    const int row = args.out_row + query / args.group;
    const int column = args.out_column + query % args.group * head_dim;
    const __m512 scale = _mm512_set1_ps(1.0f / scratch.total[query]);
    for (int channel = 0; channel < head_dim; channel += 16) {
      const __mmask16 mask = LaneMask(head_dim - channel);
      const __m512 value = _mm512_mul_ps(
          scale, _mm512_maskz_loadu_ps(mask, scratch.sums + static_cast<ptrdiff_t>(query) * head_dim + channel));
      if (args.out.precision == dense::Precision::kBf16) {
        _mm256_mask_storeu_epi16(args.out.bf16(row) + column + channel, mask, (__m256i)_mm512_cvtneps_pbh(value));
      } else {
        _mm512_mask_storeu_ps(args.out.f32(row) + column + channel, mask, value);
      }
    }
  }
}

}  // namespace

void TileAttentionBf16(const TileArgs& args) {
  const int head_dim = args.run.layout->head_dim;
  const int n_pairs = head_dim / 2;
  const int queries = RoundUp(args.rows * args.group, kRows);
  CHECK(args.rows * args.group <= kTileQueries);
  const Scratch scratch(args.scratch, head_dim, queries);
  const ptrdiff_t q_stride = RoundUp(n_pairs, 16);
  std::fill_n(scratch.q, queries * q_stride, 0u);
  std::fill_n(scratch.sums, static_cast<ptrdiff_t>(queries) * head_dim, 0.0f);
  std::fill_n(scratch.max, queries, kUnseen);
  std::fill_n(scratch.total, queries, 0.0f);
  for (int row = 0; row < args.rows; ++row) {
    const int position = args.position + row;
    for (int g = 0; g < args.group; ++g) {
      RotateToPairs<1>(args.q + row * args.q_row_stride + static_cast<ptrdiff_t>(g) * head_dim, n_pairs,
                       args.rope->cos(position), args.rope->sin(position), args.inverse_magnitude,
                       scratch.q + (row * args.group + g) * q_stride, q_stride);
    }
  }
  const bool scaled = args.run.v_scale != nullptr;
  for (int index = args.first; index < args.last;) {
    const int first_key = args.run.blocks[index].start;
    int keys = 0;
    for (; index < args.last && keys + args.run.blocks[index].tokens <= kTileKeys; ++index) {
      GatherKeys(args, index, scratch.k, keys);
      GatherValues(args, index, scratch.v, keys);
      if (scaled) std::fill_n(scratch.v_scale + keys, args.run.blocks[index].tokens, args.run.v_scale[index]);
      keys += args.run.blocks[index].tokens;
    }
    // A register tile may reach past the last key: scores there are masked, but must be finite to be harmless.
    for (int pair = 0; pair < n_pairs; ++pair) {
      std::fill(scratch.k + pair * kTileKeys + keys,
                scratch.k + pair * kTileKeys + std::min(kTileKeys, RoundUp(keys, kKeyStep)), 0u);
    }
    // Keys past the last have a weight of zero, so their scales must be finite as well.
    if (scaled) std::fill(scratch.v_scale + keys, scratch.v_scale + RoundUp(keys, 16), 0.0f);
    (scaled ? AttendTile<true> : AttendTile<false>)(args, scratch, queries, first_key, keys);
  }
  WriteOut(args, scratch);
}

}  // namespace jointkv::attention
#include "base/avx512bf16_pop.h"

#else
namespace jointkv::attention {
void TileAttentionBf16(const TileArgs&) { CHECK(false); }
}  // namespace jointkv::attention
#endif
