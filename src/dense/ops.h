// The element-wise and row-wise parts of a forward pass, vectorised with Highway and dispatched at run time.
#pragma once

#include <cstddef>

#include "base/thread_pool.h"
#include "dense/activations.h"

namespace jointkv::dense {

// y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, rows of `cols` floats. (Zhang and Sennrich 2019.)
// x: (y.rows, y.cols) f32; weight: (y.cols).
void RmsNorm(ThreadPool& pool, const float* x, const float* weight, float eps, const Activations& y);

// The same for one row in place, for per-head norms. x: (n).
void RmsNormRow(float* x, const float* weight, float eps, int n);

// x[r] += RmsNorm(y[r]) * weight: the norm after a block, added to the residual stream. x, y: (rows, cols) f32.
void AddRmsNorm(ThreadPool& pool, float* x, const float* y, const float* weight, float eps, int rows, int cols);

enum class Gate {
  kSilu,  // g / (1 + exp(-g))
  kGelu,  // the tanh approximation: g * sigmoid(2 * sqrt(2/pi) * (g + 0.044715 g^3))
};

// y[first_row + r][column + c] = act(g[r][c]) * u[r][c] for rows x cols elements; g and u have row stride `ld` floats.
void GatedProduct(Gate gate, const float* g, const float* u, ptrdiff_t ld, int rows, int cols, const Activations& y,
                  int first_row, int column);

// x = cap * tanh(x / cap), n floats in place.
void SoftCap(ThreadPool& pool, float cap, float* x, size_t n);

// y = x * factor, n floats in place.
void Scale(float factor, float* x, size_t n);

}  // namespace jointkv::dense
