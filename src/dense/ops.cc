#include "dense/ops.h"

#include <algorithm>
#include <cmath>

#include "dense/gemm_int8.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "dense/ops.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h, as Highway asks.
#include "dense/bf16-inl.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace jointkv::dense::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;

// 1 / sqrt(mean(x^2) + eps). The sum's order depends on the vector width alone.
float InverseRms(const float* x, float eps, int n) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  auto sum = hn::Zero(d);
  int i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto v = hn::LoadU(d, x + i);
    sum = hn::MulAdd(v, v, sum);
  }
  float total = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < n; ++i) total += x[i] * x[i];
  return 1.0f / std::sqrt(total / static_cast<float>(n) + eps);
}

void NormRowF32(const float* x, const float* weight, float eps, int n, float* y) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const float inverse = InverseRms(x, eps, n);
  const auto scale = hn::Set(d, inverse);
  int i = 0;
  for (; i + lanes <= n; i += lanes)
    hn::StoreU(hn::Mul(hn::Mul(hn::LoadU(d, x + i), scale), hn::LoadU(d, weight + i)), d, y + i);
  for (; i < n; ++i) y[i] = x[i] * inverse * weight[i];
}

void NormRowBf16(const float* x, const float* weight, float eps, int n, uint16_t* y) {
  const DF d;
  const hn::CappedTag<float, 1> d1;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const float inverse = InverseRms(x, eps, n);
  const auto scale = hn::Set(d, inverse);
  int i = 0;
  for (; i + lanes <= n; i += lanes)
    StoreBf16(d, hn::Mul(hn::Mul(hn::LoadU(d, x + i), scale), hn::LoadU(d, weight + i)), y + i);
  for (; i < n; ++i) StoreBf16(d1, hn::Set(d1, x[i] * inverse * weight[i]), y + i);
}

void AddNormRow(float* x, const float* y, const float* weight, float eps, int n) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const float inverse = InverseRms(y, eps, n);
  const auto scale = hn::Set(d, inverse);
  int i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::MulAdd(hn::Mul(hn::LoadU(d, y + i), scale), hn::LoadU(d, weight + i), hn::LoadU(d, x + i)), d,
               x + i);
  }
  for (; i < n; ++i) x[i] += y[i] * inverse * weight[i];
}

template <class D>
HWY_INLINE hn::Vec<D> Activate(D d, Gate gate, hn::Vec<D> g) {
  auto exponent = hn::Neg(g);
  if (gate == Gate::kGelu) {
    const auto cubic = hn::MulAdd(hn::Mul(hn::Mul(g, g), g), hn::Set(d, 0.044715f), g);
    exponent = hn::Mul(cubic, hn::Set(d, -1.5957691216057308f));  // -2 sqrt(2/pi)
  }
  // Highway's Exp is defined up to 104 only; past 88 the result is zero but for denormals.
  exponent = hn::Min(exponent, hn::Set(d, 88.0f));
  return hn::Div(g, hn::Add(hn::Set(d, 1.0f), hn::Exp(d, exponent)));
}

template <class D>
HWY_INLINE void GatedStore(D d, Gate gate, const float* g, const float* u, const Activations& y, int row, int column) {
  const auto value = hn::Mul(Activate(d, gate, hn::LoadU(d, g)), hn::LoadU(d, u));
  if (y.precision == Precision::kBf16) {
    StoreBf16(d, value, y.bf16(row) + column);
  } else {
    hn::StoreU(value, d, y.f32(row) + column);
  }
}

void GatedProductImpl(Gate gate, const float* g, const float* u, ptrdiff_t ld, int rows, int cols, const Activations& y,
                      int first_row, int column) {
  const DF d;
  const hn::CappedTag<float, 1> d1;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int r = 0; r < rows; ++r) {
    int c = 0;
    for (; c + lanes <= cols; c += lanes)
      GatedStore(d, gate, g + r * ld + c, u + r * ld + c, y, first_row + r, column + c);
    for (; c < cols; ++c) GatedStore(d1, gate, g + r * ld + c, u + r * ld + c, y, first_row + r, column + c);
  }
}

void SoftCapImpl(float cap, float* x, size_t n) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::Mul(hn::Tanh(d, hn::Mul(hn::LoadU(d, x + i), hn::Set(d, 1.0f / cap))), hn::Set(d, cap)), d, x + i);
  }
  for (; i < n; ++i) x[i] = cap * std::tanh(x[i] / cap);
}

}  // namespace jointkv::dense::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace jointkv::dense {
namespace {

constexpr int kRowsPerTask = 8;

template <typename F>
void ForRows(ThreadPool& pool, int rows, F&& f) {
  pool.ParallelFor((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int task, int) {
    for (int row = task * kRowsPerTask; row < std::min(rows, (task + 1) * kRowsPerTask); ++row) f(row);
  });
}

}  // namespace

HWY_EXPORT(InverseRms);
HWY_EXPORT(NormRowF32);
HWY_EXPORT(NormRowBf16);
HWY_EXPORT(AddNormRow);
HWY_EXPORT(GatedProductImpl);
HWY_EXPORT(SoftCapImpl);

void RmsNorm(ThreadPool& pool, const float* x, const float* weight, float eps, const Activations& y) {
  ForRows(pool, y.rows, [&](int row) {
    const float* in = x + static_cast<ptrdiff_t>(row) * y.cols;
    switch (y.precision) {
      case Precision::kF32: HWY_DYNAMIC_DISPATCH(NormRowF32)(in, weight, eps, y.cols, y.f32(row)); break;
      case Precision::kBf16: HWY_DYNAMIC_DISPATCH(NormRowBf16)(in, weight, eps, y.cols, y.bf16(row)); break;
      case Precision::kInt8: {
        const float inverse = HWY_DYNAMIC_DISPATCH(InverseRms)(in, eps, y.cols);
        QuantiseScaledRow(in, inverse, weight, row, Int8Rows(static_cast<std::byte*>(y.data), y.rows, y.cols));
        break;
      }
    }
  });
}

void RmsNormRow(float* x, const float* weight, float eps, int n) {
  HWY_DYNAMIC_DISPATCH(NormRowF32)(x, weight, eps, n, x);
}

void AddRmsNorm(ThreadPool& pool, float* x, const float* y, const float* weight, float eps, int rows, int cols) {
  ForRows(pool, rows, [&](int row) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(row) * cols;
    HWY_DYNAMIC_DISPATCH(AddNormRow)(x + at, y + at, weight, eps, cols);
  });
}

void GatedProduct(Gate gate, const float* g, const float* u, ptrdiff_t ld, int rows, int cols, const Activations& y,
                  int first_row, int column) {
  HWY_DYNAMIC_DISPATCH(GatedProductImpl)(gate, g, u, ld, rows, cols, y, first_row, column);
}

void SoftCap(ThreadPool& pool, float cap, float* x, size_t n) {
  constexpr size_t kChunk = 16384;
  pool.ParallelFor(static_cast<int>((n + kChunk - 1) / kChunk), [&](int task, int) {
    const size_t begin = static_cast<size_t>(task) * kChunk;
    HWY_DYNAMIC_DISPATCH(SoftCapImpl)(cap, x + begin, std::min(kChunk, n - begin));
  });
}

void Scale(float factor, float* x, size_t n) {
  for (size_t i = 0; i < n; ++i) x[i] *= factor;
}

}  // namespace jointkv::dense
#endif
