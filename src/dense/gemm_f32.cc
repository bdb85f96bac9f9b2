#include "dense/gemm.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "dense/gemm_f32.cc"
#include <algorithm>

#include "hwy/foreach_target.h"
// After foreach_target.h, as Highway asks.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace jointkv::dense::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// kRows rows times kVectors vectors of columns from `column` on.
template <int kRows, int kVectors, class D>
HWY_INLINE void TileF32(D d, const PanelArgs& args, const float* a, float* c, int column) {
  const int lanes = static_cast<int>(hn::Lanes(d));
  hn::Vec<D> sum[kRows][kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const auto start = args.bias == nullptr ? hn::Zero(d) : hn::LoadU(d, args.bias + column + v * lanes);
    for (int r = 0; r < kRows; ++r) sum[r][v] = start;
  }
  const float* panel = static_cast<const float*>(args.panel) + column;
  for (int i = 0; i < args.k; ++i) {
    hn::Vec<D> b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = hn::LoadU(d, panel + static_cast<ptrdiff_t>(i) * kPanel + v * lanes);
    for (int r = 0; r < kRows; ++r) {
      const auto x = hn::Set(d, a[r * args.lda + i]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(x, b[v], sum[r][v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const int first = column + v * lanes;
    const int cols = std::min(lanes, args.cols - first);
    if (cols <= 0) break;
    for (int r = 0; r < kRows; ++r) {
      float* out = c + r * args.ldc + first;
      if (cols == lanes) {
        hn::StoreU(args.accumulate ? hn::Add(sum[r][v], hn::LoadU(d, out)) : sum[r][v], d, out);
      } else {
        HWY_ALIGN float tail[hn::MaxLanes(d)];
        hn::Store(sum[r][v], d, tail);
        for (int j = 0; j < cols; ++j) out[j] = args.accumulate ? out[j] + tail[j] : tail[j];
      }
    }
  }
}

void PanelProductF32Impl(const PanelArgs& args) {
  const hn::CappedTag<float, kPanel> d;
  constexpr int kRows = 6;
  constexpr int kVectors = 2;
  const int step = static_cast<int>(hn::Lanes(d)) * kVectors;
  for (int column = 0; column < args.cols; column += step) {
    const auto* a = static_cast<const float*>(args.a);
    float* c = args.c;
    int rows = args.rows;
    for (; rows >= kRows; rows -= kRows) {
      TileF32<kRows, kVectors>(d, args, a, c, column);
      a += kRows * args.lda;
      c += kRows * args.ldc;
    }
    for (; rows > 0; --rows) {
      TileF32<1, kVectors>(d, args, a, c, column);
      a += args.lda;
      c += args.ldc;
    }
  }
}

}  // namespace jointkv::dense::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace jointkv::dense {

HWY_EXPORT(PanelProductF32Impl);
void PanelProductF32(const PanelArgs& args) { HWY_DYNAMIC_DISPATCH(PanelProductF32Impl)(args); }

void PackPanelF32(const float* rows, int n_rows, int k, float* panel) {
  std::fill_n(panel, static_cast<size_t>(k) * kPanel, 0.0f);
  for (int column = 0; column < n_rows; ++column) {
    for (int i = 0; i < k; ++i)
      panel[static_cast<size_t>(i) * kPanel + column] = rows[static_cast<size_t>(column) * k + i];
  }
}

}  // namespace jointkv::dense
#endif
