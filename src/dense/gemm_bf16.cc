#include "dense/gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "base/bf16.h"
#include "base/check.h"

namespace jointkv::dense {

void PackPanelBf16(const float* rows, int n_rows, int k, uint16_t* panel) {
  std::fill_n(panel, static_cast<size_t>(k) * kPanel, uint16_t{0});
  for (int column = 0; column < n_rows; ++column) {
    const float* row = rows + static_cast<size_t>(column) * k;
    for (int i = 0; i < k; ++i) panel[(i / 2 * kPanel + column) * 2 + i % 2] = Bf16FromF32(row[i]);
  }
}

#if defined(__x86_64__)
#include "base/avx512bf16_push.h"
namespace {

constexpr int kRowsMax = 12;  // 12 rows x 2 vectors: 24 of the 32 registers are sums

template <int kRows>
inline __attribute__((always_inline)) void Tile(const PanelArgs& args, const uint16_t* a, float* c, const char* ahead,
                                                int ahead_step) {
  __m512 low[kRows];
  __m512 high[kRows];
  for (int r = 0; r < kRows; ++r) {
    low[r] = args.bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(args.bias);
    high[r] = args.bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(args.bias + 16);
  }
  const auto* panel = static_cast<const uint16_t*>(args.panel);
  for (int i = 0; i < args.k / 2; ++i) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(panel + static_cast<ptrdiff_t>(i) * 64);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(panel + static_cast<ptrdiff_t>(i) * 64 + 32);
    if (ahead_step > 0) {
      _mm_prefetch(ahead, _MM_HINT_T1);
      if (ahead_step > 64) _mm_prefetch(ahead + 64, _MM_HINT_T1);
      ahead += ahead_step;
    }
    for (int r = 0; r < kRows; ++r) {
      int pair;
      __builtin_memcpy(&pair, a + r * args.lda + 2 * i, sizeof(pair));
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      low[r] = _mm512_dpbf16_ps(low[r], x, b0);
      high[r] = _mm512_dpbf16_ps(high[r], x, b1);
    }
  }
  const __mmask16 mask_low = args.cols >= 16 ? 0xffff : static_cast<__mmask16>((1u << args.cols) - 1);
  const __mmask16 mask_high = args.cols <= 16 ? 0 : static_cast<__mmask16>((1u << (args.cols - 16)) - 1);
  for (int r = 0; r < kRows; ++r) {
    float* out = c + r * args.ldc;
    if (args.accumulate) {
      low[r] = _mm512_add_ps(low[r], _mm512_maskz_loadu_ps(mask_low, out));
      high[r] = _mm512_add_ps(high[r], _mm512_maskz_loadu_ps(mask_high, out + 16));
    }
    _mm512_mask_storeu_ps(out, mask_low, low[r]);
    _mm512_mask_storeu_ps(out + 16, mask_high, high[r]);
  }
}

template <int kRows>
void RemainingTile(const PanelArgs& args, int rows, const uint16_t* a, float* c, const char* ahead, int ahead_step) {
  if (rows == kRows) {
    Tile<kRows>(args, a, c, ahead, ahead_step);
  } else if constexpr (kRows > 1) {
    RemainingTile<kRows - 1>(args, rows, a, c, ahead, ahead_step);
  }
}

}  // namespace

void PanelProductBf16(const PanelArgs& args) {
  const auto* a = static_cast<const uint16_t*>(args.a);
  float* c = args.c;
  // The next panel's lines are read ahead evenly by the first two tiles, so that memory is busy in all of a short
  // product: two lines a step in a single tile, one where there are more. With so few rows that the product only
  // streams, the processor's own prefetcher is faster alone (bench/dense_bench.cc).
  constexpr int kStreamingRows = 6;
  const auto* ahead = static_cast<const char*>(args.next_panel);
  int ahead_step = ahead == nullptr || args.rows <= kStreamingRows ? 0 : args.rows <= kRowsMax ? 128 : 64;
  int tiles_ahead = 2;
  // Two tiles of equal height rather than a tall and a short one.
  int height = kRowsMax;
  if (args.rows > kRowsMax && args.rows < 2 * kRowsMax) height = (args.rows + 1) / 2;
  for (int rows = args.rows; rows > 0; rows -= height) {
    if (rows >= kRowsMax && height == kRowsMax) {
      Tile<kRowsMax>(args, a, c, ahead, ahead_step);
    } else {
      RemainingTile<kRowsMax - 1>(args, std::min(rows, height), a, c, ahead, ahead_step);
    }
    a += height * args.lda;
    c += height * args.ldc;
    ahead += static_cast<ptrdiff_t>(ahead_step) * (args.k / 2);
    if (--tiles_ahead == 0) ahead_step = 0;
  }
}
#include "base/avx512bf16_pop.h"
#else
void PanelProductBf16(const PanelArgs&) { CHECK(false); }
#endif

}  // namespace jointkv::dense
