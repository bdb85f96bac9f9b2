// Products of 8-bit integers on AVX2. Its only fast dot product takes pairs of unsigned and signed bytes and saturates
// at 16 bits, so levels are multiplied four bits at a time: a pair of products is then at most 15 * 127 * 2, and the
// eight pairs of a group at most 30,480. Levels of more than four bits are two planes of four.
#include "dense/gemm_int8_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "base/bf16.h"
#include "base/check.h"

namespace jointkv::dense {

#include "base/avx2_push.h"
namespace {

constexpr int kLanes = 8;  // outputs of a vector
constexpr int kVectors = kPanel / kLanes;

inline __m256i LoadBytes(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }

void EncodeGroup(const float* weights, const Grid& grid, int bits, uint8_t* levels) {
  const __m256 inverse = _mm256_set1_ps(grid.step == 0 ? 0.0f : 1 / grid.step);
  const auto middle = static_cast<float>(1 << (bits - 1));
  for (int i = 0; i < kGroup; i += kLanes) {
    const __m256 w = _mm256_sub_ps(_mm256_loadu_ps(weights + i), _mm256_set1_ps(grid.offset));
    __m256 level = _mm256_fmadd_ps(w, inverse, _mm256_set1_ps(middle));
    // What is not a number becomes 0: the second operand is what max returns then.
    level = _mm256_min_ps(_mm256_max_ps(level, _mm256_setzero_ps()), _mm256_set1_ps(2 * middle - 1));
    const __m256i code = _mm256_slli_epi32(_mm256_cvtps_epi32(level), 8 - bits);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(levels + i), _mm_packus_epi16(words, words));
  }
}

template <bool kScaled>
void Quantise(const float* x, float factor, const float* weight, int row, const Int8Rows& out) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  uint32_t before = 0;  // of the even group before
  for (int g = 0; g < out.groups(); ++g) {
    __m256 values[kGroup / kLanes];
    __m256 largest = _mm256_setzero_ps();
    for (int i = 0; i < kGroup / kLanes; ++i) {
      const int at = g * kGroup + i * kLanes;
      values[i] = _mm256_loadu_ps(x + at);
      if (kScaled) {
        values[i] = _mm256_mul_ps(_mm256_mul_ps(values[i], _mm256_set1_ps(factor)), _mm256_loadu_ps(weight + at));
      }
      largest = _mm256_max_ps(largest, _mm256_and_ps(values[i], magnitude));
    }
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    const float limit = _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
    const __m256 inverse = _mm256_set1_ps(limit > 0 ? 127 / limit : 0);
    __m256i codes[kGroup / kLanes];
    for (int i = 0; i < kGroup / kLanes; ++i) codes[i] = _mm256_cvtps_epi32(_mm256_mul_ps(values[i], inverse));
    // Packing works within halves, so the fours of codes come out of order.
    const __m256i packed =
        _mm256_packs_epi16(_mm256_packs_epi32(codes[0], codes[1]), _mm256_packs_epi32(codes[2], codes[3]));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), packed);
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    __m128i total = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    total = _mm_add_epi32(total, _mm_shuffle_epi32(total, 0x4e));
    const int sum = _mm_cvtsi128_si32(_mm_add_epi32(total, _mm_shuffle_epi32(total, 0xb1)));

    Int8Group& group = *out.group(row, g);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(group.codes),
                        _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    group.scale = limit / 127;
    group.start = -128 * sum;
    const uint32_t own = Bf16FromF32(group.scale * static_cast<float>(sum));
    group.pair_sums = g % 2 == 0 ? own : before | own << 16;
    before = own;
  }
}

// A step's levels of eight outputs, from the panel itself: the upper four bits, or the lower ones of 8 bits.
template <bool kNibbles>
struct PackedLevels {
  const std::byte* levels;

  __m256i high(int step, int vector) const {
    const __m256i mask = _mm256_set1_epi8(15);
    if (!kNibbles) return _mm256_and_si256(_mm256_srli_epi16(Load(step, vector), 4), mask);
    const __m256i both = Load(step, vector % 2);
    return _mm256_and_si256(vector < 2 ? both : _mm256_srli_epi16(both, 4), mask);
  }
  __m256i low(int step, int vector) const { return _mm256_and_si256(Load(step, vector), _mm256_set1_epi8(15)); }

 private:
  __m256i Load(int step, int vector) const {
    return LoadBytes(levels + (step * (kNibbles ? kVectors / 2 : kVectors) + vector) * 32);
  }
};

// The same taken apart once for many rows.
template <bool kNibbles>
struct UnpackedLevels {
  __m256i planes[kNibbles ? 1 : 2][kSteps][kVectors];

  explicit UnpackedLevels(const PackedLevels<kNibbles>& packed) {
    for (int s = 0; s < kSteps; ++s) {
      for (int v = 0; v < kVectors; ++v) {
        planes[0][s][v] = packed.high(s, v);
        if constexpr (!kNibbles) planes[1][s][v] = packed.low(s, v);
      }
    }
  }
  __m256i high(int step, int vector) const { return planes[0][step][vector]; }
  __m256i low(int step, int vector) const { return planes[kNibbles ? 0 : 1][step][vector]; }
};

// What a group's integer sums are multiplied with.
struct Scales {
  __m256 steps[kVectors];
  __m256 offsets[2][kVectors];  // of the group before and of this one

  Scales(const std::byte* packed_steps, float unit, const std::byte* packed_offsets) {
    for (int v = 0; v < kVectors; ++v) {
      const auto* halves = reinterpret_cast<const __m128i*>(packed_steps) + v;
      steps[v] = _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_set1_ps(unit));
      if (packed_offsets == nullptr) continue;
      const __m256i pair = LoadBytes(packed_offsets + v * 32);
      offsets[0][v] = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
      offsets[1][v] = _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
    }
  }
};

// Makes GCC keep a value in its register. Left alone it reorders the additions of a group so that all products wait for
// theirs on the stack, and loads levels once more for each row.
inline void Hold(__m256i& value) { __asm__("" : "+x"(value)); }

// Adds the products of four levels and codes of each output, as two sums of pairs.
inline void AddProducts(__m256i levels, __m256i codes, __m256i& sum) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(levels, codes));
  Hold(sum);
}

// Adds kRows rows' sums over one group to kTile vectors of sums (kRows, kPanel) from `first` on.
template <bool kNibbles, bool kOffsets, int kRows, int kTile, typename Levels>
inline __attribute__((always_inline)) void AddTile(const Levels& levels, const Scales& scales, const Int8Group* x,
                                                   int first, float* sums) {
  // Of pairs of products, two to an output, in 16 bits. `start` is of levels times 16: a sixteenth of it goes into the
  // upper of the two, which then ends within 16 * (8 + 8) * 127 of zero, whatever an addition on the way carries out.
  __m256i high[kRows][kTile];
  __m256i low[kRows][kTile];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kTile; ++v) {
      high[r][v] = _mm256_slli_epi32(_mm256_set1_epi32(x[r].start), 16 - 4);
      low[r][v] = _mm256_setzero_si256();
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < kSteps; ++s) {
    __m256i codes[kRows];
    for (int r = 0; r < kRows; ++r) {
      int four;
      __builtin_memcpy(&four, x[r].codes + 4 * s, sizeof(four));
      codes[r] = _mm256_set1_epi32(four);
    }
    for (int v = 0; v < kTile; ++v) {
      __m256i upper = levels.high(s, first + v);
      Hold(upper);
      for (int r = 0; r < kRows; ++r) AddProducts(upper, codes[r], high[r][v]);
      if constexpr (!kNibbles) {
        __m256i lower = levels.low(s, first + v);
        Hold(lower);
        for (int r = 0; r < kRows; ++r) AddProducts(lower, codes[r], low[r][v]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const __m256 scale = _mm256_set1_ps(x[r].scale);
    const __m256i pair = _mm256_set1_epi32(static_cast<int>(x[r].pair_sums));
    for (int v = 0; v < kTile; ++v) {
      __m256i dot = _mm256_madd_epi16(high[r][v], _mm256_set1_epi16(kNibbles ? 1 : 16));
      if constexpr (!kNibbles) dot = _mm256_add_epi32(dot, _mm256_madd_epi16(low[r][v], _mm256_set1_epi16(1)));
      float* at = sums + r * kPanel + (first + v) * kLanes;
      __m256 sum =
          _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(scales.steps[first + v], scale), _mm256_load_ps(at));
      if constexpr (kOffsets) {
        const __m256 own = _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
        const __m256 before = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
        sum = _mm256_fmadd_ps(scales.offsets[1][first + v], own, sum);
        sum = _mm256_fmadd_ps(scales.offsets[0][first + v], before, sum);
      }
      _mm256_store_ps(at, sum);
    }
  }
}

// As many rows as fill the registers at a time. Not inlined: scales are then operands in memory, and registers are left
// for levels.
template <bool kNibbles, bool kOffsets, int kRows, typename Levels>
__attribute__((noinline)) void AddRows(const Levels& levels, const Scales& scales, const Int8Group* x, int rows,
                                       float* sums) {
  constexpr int kTile = kNibbles ? kVectors : kVectors / 2;
  for (; rows >= kRows; rows -= kRows, x += kRows, sums += kRows * kPanel) {
    for (int v = 0; v < kVectors; v += kTile) AddTile<kNibbles, kOffsets, kRows, kTile>(levels, scales, x, v, sums);
  }
  for (; rows > 0; --rows, ++x, sums += kPanel) {
    for (int v = 0; v < kVectors; v += kTile) AddTile<kNibbles, kOffsets, 1, kTile>(levels, scales, x, v, sums);
  }
}

// Adds one group of `rows` <= Int8Rows::kBlock rows from first_row on to sums (rows, kPanel); with kOffsets also the
// offsets of this group and of the one before it.
template <bool kNibbles, bool kOffsets>
void AddGroup(const Int8PanelArgs& args, int group, int first_row, int rows, float* sums) {
  const GridShape& shape = args.format.shape;
  const PackedLevels<kNibbles> packed = {args.panel + group * GroupBytes(shape)};
  const std::byte* offsets = args.panel + args.a->groups() * GroupBytes(shape) + group / 2 * kPanelOffsetsBytes;
  const float unit = kNibbles ? 1 : 1.0f / static_cast<float>(1 << (8 - shape.bits));
  const Scales scales(packed.levels + LevelBytes(shape), unit, kOffsets ? offsets : nullptr);
  const Int8Group* x = args.a->group(first_row, group);
  constexpr int kFew = 3;  // rows for which it is not worth while to take levels apart
  if (rows <= kFew) {
    AddRows<kNibbles, kOffsets, 1>(packed, scales, x, rows, sums);
  } else {
    AddRows<kNibbles, kOffsets, 2>(UnpackedLevels<kNibbles>(packed), scales, x, rows, sums);
  }
}

template <bool kNibbles, bool kOffsets>
void AddGroups(const Int8PanelArgs& args, int first_row, int rows, float* sums) {
  const int groups = args.a->groups();
  int group = 0;
  const auto* ahead = reinterpret_cast<const char*>(args.panel) + kAheadBytes;
  const auto pair_bytes = static_cast<ptrdiff_t>(2 * GroupBytes(args.format.shape));
  for (; group + 2 <= groups; group += 2) {
    if (first_row == args.first_row) {
      for (ptrdiff_t i = 0; i < pair_bytes; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T1);
      ahead += pair_bytes;
    }
    AddGroup<kNibbles, false>(args, group, first_row, rows, sums);
    AddGroup<kNibbles, kOffsets>(args, group + 1, first_row, rows, sums);
  }
  if (group < groups) AddGroup<kNibbles, kOffsets>(args, group, first_row, rows, sums);
}

void StartSums(const float* bias, int rows, float* sums) {
  for (int v = 0; v < kVectors; ++v) {
    const __m256 start = bias == nullptr ? _mm256_setzero_ps() : _mm256_loadu_ps(bias + v * kLanes);
    for (int r = 0; r < rows; ++r) _mm256_store_ps(sums + r * kPanel + v * kLanes, start);
  }
}

void WriteSums(const Int8PanelArgs& args, int rows, const float* sums, float* c) {
  for (int r = 0; r < rows; ++r, sums += kPanel, c += args.ldc) {
    int j = 0;
    for (; j + kLanes <= args.cols; j += kLanes) {
      __m256 sum = _mm256_load_ps(sums + j);
      if (args.accumulate) sum = _mm256_add_ps(sum, _mm256_loadu_ps(c + j));
      _mm256_storeu_ps(c + j, sum);
    }
    for (; j < args.cols; ++j) c[j] = args.accumulate ? sums[j] + c[j] : sums[j];
  }
}

void PanelProduct(const Int8PanelArgs& args) {
  CHECK(args.first_row % Int8Rows::kBlock == 0);
  alignas(64) float sums[Int8Rows::kBlock * kPanel];
  for (int first = 0; first < args.rows; first += Int8Rows::kBlock) {
    const int rows = std::min(Int8Rows::kBlock, args.rows - first);
    StartSums(args.bias, rows, sums);
    const bool nibbles = args.format.shape.bits == 4;
    const auto add = nibbles ? args.format.shape.offsets ? AddGroups<true, true> : AddGroups<true, false>
                     : args.format.shape.offsets ? AddGroups<false, true>
                                                 : AddGroups<false, false>;
    add(args, args.first_row + first, rows, sums);
    WriteSums(args, rows, sums, args.c + first * args.ldc);
  }
}

}  // namespace
#include "base/avx2_pop.h"

const Int8Kernel kInt8Avx2 = {"avx2", Quantise<false>, Quantise<true>, EncodeGroup, PanelProduct};

}  // namespace jointkv::dense
#endif
