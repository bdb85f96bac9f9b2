// Helpers of the AVX-512 BF16 kernels. Include between base/avx512bf16_push.h and base/avx512bf16_pop.h, after
// <immintrin.h>.
#pragma once

#include <cstdint>

namespace jointkv::attention {
namespace {

// The first n of 16 lanes; n may be negative or above 16.
inline __mmask16 LaneMask(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }

constexpr float kExp2Terms[] = {9.57009e-3f, 5.591786e-2f, 2.4024745e-1f, 6.9312181e-1f, 0.99999926f};

// 2^x for finite x <= 0, to 3e-6 relative (a weight is then rounded to bf16, 4e-3): an integer and a fraction in
// [-1/2, 1/2], and the polynomial of degree 4 with the least relative error there.
inline __m512 Exp2(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 y = _mm512_set1_ps(kExp2Terms[0]);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(kExp2Terms[1]));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(kExp2Terms[2]));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(kExp2Terms[3]));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(kExp2Terms[4]));
  return _mm512_scalef_ps(y, n);
}

inline __m256 Exp2(__m256 x) {
  const __m256 n = _mm256_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(x, n);
  __m256 y = _mm256_set1_ps(kExp2Terms[0]);
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(kExp2Terms[1]));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(kExp2Terms[2]));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(kExp2Terms[3]));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(kExp2Terms[4]));
  return _mm256_scalef_ps(y, n);
}

// Two vectors of floats to one of bf16 pairs: first in the low half of each lane.
inline __m512i PackPairs(__m512 first, __m512 second) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// Rotates kQueries queries q (2, n_pairs) f32, one after the other, and packs each as bf16 pairs, times `factor`, into
// out + its number * out_stride.
template <int kQueries>
inline __attribute__((always_inline)) void RotateToPairs(const float* q, int n_pairs, const float* cos,
                                                         const float* sin, float factor, uint32_t* out,
                                                         ptrdiff_t out_stride) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (int i = 0; i < n_pairs; i += 16) {
    const __mmask16 mask = LaneMask(n_pairs - i);
    const __m512 c = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, cos + i));
    const __m512 s = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, sin + i));
#pragma GCC unroll 4
    for (ptrdiff_t g = 0; g < kQueries; ++g) {
      const float* in = q + 2 * g * n_pairs + i;
      const __m512 x = _mm512_maskz_loadu_ps(mask, in);
      const __m512 y = _mm512_maskz_loadu_ps(mask, in + n_pairs);
      const __m512 first = _mm512_fmsub_ps(x, c, _mm512_mul_ps(y, s));
      const __m512 second = _mm512_fmadd_ps(x, s, _mm512_mul_ps(y, c));
      _mm512_storeu_si512(out + g * out_stride + i, PackPairs(first, second));
    }
  }
}

}  // namespace
}  // namespace jointkv::attention
