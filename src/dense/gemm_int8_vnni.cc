#include "dense/gemm_int8_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#include "base/check.h"

namespace jointkv::dense {
#include "base/avx512vnni_push.h"
namespace {

// 32 levels of one output from its weights, as the panel holds them.
inline void EncodeGroup(const float* weights, const Grid& grid, int bits, uint8_t* out) {
  const __m512 inverse = _mm512_set1_ps(grid.step == 0 ? 0.0f : 1 / grid.step);
  const auto middle = static_cast<float>(1 << (bits - 1));
  for (int half = 0; half < 2; ++half) {
    const __m512 w = _mm512_sub_ps(_mm512_loadu_ps(weights + half * 16), _mm512_set1_ps(grid.offset));
    __m512 level = _mm512_fmadd_ps(w, inverse, _mm512_set1_ps(middle));
    // What is not a number becomes 0: the second operand is what max returns then.
    level = _mm512_min_ps(_mm512_max_ps(level, _mm512_setzero_ps()), _mm512_set1_ps(2 * middle - 1));
    const __m512i code = _mm512_slli_epi32(_mm512_cvtps_epi32(level), static_cast<unsigned>(8 - bits));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + half * 16), _mm512_cvtepi32_epi8(code));
  }
}

inline __m512 LoadHalves(const std::byte* halves) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
}

// Adds one group of `rows` <= Int8Rows::kBlock rows from first_row on to sums (rows, kPanel); with kOffsets also the
// offsets of this group and of the one before it.
template <bool kNibbles, bool kOffsets>
inline __attribute__((always_inline)) void AddGroup(const Int8PanelArgs& args, int group, int first_row, int rows,
                                                    float* sums) {
  const GridShape& shape = args.format.shape;
  const std::byte* levels = args.panel + group * GroupBytes(shape);
  const std::byte* steps = levels + LevelBytes(shape);
  const std::byte* offsets = args.panel + args.a->groups() * GroupBytes(shape) + group / 2 * kPanelOffsetsBytes;
  __m512i low[kSteps];
  __m512i high[kSteps];
  for (int s = 0; s < kSteps; ++s) {
    if constexpr (kNibbles) {
      const __m512i mask = _mm512_set1_epi8(static_cast<char>(0xf0));
      const __m512i both = _mm512_loadu_si512(levels + s * 64);
      low[s] = _mm512_and_si512(_mm512_slli_epi16(both, 4), mask);
      high[s] = _mm512_and_si512(both, mask);
    } else {
      low[s] = _mm512_loadu_si512(levels + s * 128);
      high[s] = _mm512_loadu_si512(levels + s * 128 + 64);
    }
  }
  const __m512 unit = _mm512_set1_ps(1.0f / static_cast<float>(1 << (8 - shape.bits)));
  const __m512 low_step = _mm512_mul_ps(LoadHalves(steps), unit);
  const __m512 high_step = _mm512_mul_ps(LoadHalves(steps + 32), unit);
  __m512bh low_offset;
  __m512bh high_offset;
  if constexpr (kOffsets) {
    low_offset = (__m512bh)_mm512_loadu_si512(offsets);
    high_offset = (__m512bh)_mm512_loadu_si512(offsets + 64);
  }
  const Int8Group* x = args.a->group(first_row, group);
  for (int r = 0; r < rows; ++r, ++x, sums += kPanel) {
    __m512i low_dot = _mm512_set1_epi32(x->start);
    __m512i high_dot = low_dot;
    for (int s = 0; s < kSteps; ++s) {
      int four;
      __builtin_memcpy(&four, x->codes + 4 * s, sizeof(four));
      const __m512i codes = _mm512_set1_epi32(four);
      low_dot = _mm512_dpbusd_epi32(low_dot, low[s], codes);
      high_dot = _mm512_dpbusd_epi32(high_dot, high[s], codes);
    }
    const __m512 scale = _mm512_set1_ps(x->scale);
    __m512 low_sum = _mm512_load_ps(sums);
    __m512 high_sum = _mm512_load_ps(sums + 16);
    low_sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low_dot), _mm512_mul_ps(low_step, scale), low_sum);
    high_sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high_dot), _mm512_mul_ps(high_step, scale), high_sum);
    if constexpr (kOffsets) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(x->pair_sums));
      low_sum = _mm512_dpbf16_ps(low_sum, low_offset, pair);
      high_sum = _mm512_dpbf16_ps(high_sum, high_offset, pair);
    }
    _mm512_store_ps(sums, low_sum);
    _mm512_store_ps(sums + 16, high_sum);
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
      for (ptrdiff_t i = 0; i < pair_bytes; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T0);
      ahead += pair_bytes;
    }
    AddGroup<kNibbles, false>(args, group, first_row, rows, sums);
    AddGroup<kNibbles, kOffsets>(args, group + 1, first_row, rows, sums);
  }
  if (group < groups) AddGroup<kNibbles, kOffsets>(args, group, first_row, rows, sums);
}

void StartSums(const float* bias, int rows, float* sums) {
  const __m512 low = bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(bias);
  const __m512 high = bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(bias + 16);
  for (int r = 0; r < rows; ++r) {
    _mm512_store_ps(sums + r * kPanel, low);
    _mm512_store_ps(sums + r * kPanel + 16, high);
  }
}

void WriteSums(const Int8PanelArgs& args, int rows, const float* sums, float* c) {
  const __mmask16 mask_low = args.cols >= 16 ? 0xffff : static_cast<__mmask16>((1u << args.cols) - 1);
  const __mmask16 mask_high = args.cols <= 16 ? 0 : static_cast<__mmask16>((1u << (args.cols - 16)) - 1);
  for (int r = 0; r < rows; ++r, sums += kPanel, c += args.ldc) {
    __m512 low = _mm512_load_ps(sums);
    __m512 high = _mm512_load_ps(sums + 16);
    if (args.accumulate) {
      low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(mask_low, c));
      high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(mask_high, c + 16));
    }
    _mm512_mask_storeu_ps(c, mask_low, low);
    _mm512_mask_storeu_ps(c + 16, mask_high, high);
  }
}

// The reductions of four vectors at once, which share their shuffles.
inline __m128 LargestOfFour(const __m512 v[4]) {
  const __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 all = _mm512_max_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline __m128i SumOfFour(const __m512i v[4]) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti32x8_epi32(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

template <bool kScaled>
void Quantise(const float* x, float factor, const float* weight, int row, const Int8Rows& out) {
  for (int first = 0; first < out.groups(); first += 4) {
    const int n = std::min(4, out.groups() - first);
    __m512 values[4][2];
    __m512 magnitudes[4];
    for (int g = 0; g < 4; ++g) {
      for (int half = 0; half < 2; ++half) {
        const int i = (first + g) * kGroup + half * 16;
        values[g][half] = g < n ? _mm512_loadu_ps(x + i) : _mm512_setzero_ps();
        if (!kScaled || g >= n) continue;
        values[g][half] =
            _mm512_mul_ps(_mm512_mul_ps(values[g][half], _mm512_set1_ps(factor)), _mm512_loadu_ps(weight + i));
      }
      magnitudes[g] = _mm512_max_ps(_mm512_abs_ps(values[g][0]), _mm512_abs_ps(values[g][1]));
    }
    const __m128 largest = LargestOfFour(magnitudes);
    const __m128 limit = _mm_set1_ps(127);
    const __mmask8 some = _mm_cmp_ps_mask(largest, _mm_setzero_ps(), _CMP_GT_OQ);
    alignas(16) float inverses[4];
    _mm_store_ps(inverses, _mm_maskz_div_ps(some, limit, largest));
    __m512i sums[4];
    for (int g = 0; g < 4; ++g) {
      const __m512 inverse = _mm512_set1_ps(inverses[g]);
      const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(values[g][0], inverse));
      const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(values[g][1], inverse));
      sums[g] = _mm512_add_epi32(low, high);
      if (g >= n) continue;
      auto* codes = reinterpret_cast<__m128i*>(out.group(row, first + g)->codes);
      _mm_storeu_si128(codes, _mm512_cvtepi32_epi8(low));
      _mm_storeu_si128(codes + 1, _mm512_cvtepi32_epi8(high));
    }
    const __m128i sum = SumOfFour(sums);
    const __m128 scale = _mm_div_ps(largest, limit);
    alignas(16) float scales[4];
    alignas(16) int32_t starts[4];
    alignas(16) uint32_t products[4];
    _mm_store_ps(scales, scale);
    _mm_store_si128(reinterpret_cast<__m128i*>(starts), _mm_slli_epi32(_mm_sub_epi32(_mm_setzero_si128(), sum), 7));
    _mm_store_si128(reinterpret_cast<__m128i*>(products),
                    (__m128i)_mm_cvtneps_pbh(_mm_mul_ps(scale, _mm_cvtepi32_ps(sum))));
    for (int g = 0; g < n; ++g) {
      Int8Group& group = *out.group(row, first + g);
      group.scale = scales[g];
      group.start = starts[g];
      group.pair_sums = products[g / 2];
    }
  }
}

void PanelProduct(const Int8PanelArgs& args) {
  CHECK(args.first_row % Int8Rows::kBlock == 0);
  alignas(64) float sums[Int8Rows::kBlock * kPanel];
  for (int first = 0; first < args.rows; first += Int8Rows::kBlock) {
    const int rows = std::min(Int8Rows::kBlock, args.rows - first);
    StartSums(args.bias, rows, sums);
    const GridShape& shape = args.format.shape;
    const auto add = shape.bits == 4 ? shape.offsets ? AddGroups<true, true> : AddGroups<true, false>
                     : shape.offsets ? AddGroups<false, true>
                                     : AddGroups<false, false>;
    add(args, args.first_row + first, rows, sums);
    WriteSums(args, rows, sums, args.c + first * args.ldc);
  }
}

}  // namespace
#include "base/avx512bf16_pop.h"

const Int8Kernel kInt8Avx512Vnni = {"avx512vnni", Quantise<false>, Quantise<true>, EncodeGroup, PanelProduct};

}  // namespace jointkv::dense
#endif
