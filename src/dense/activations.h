// A row-major matrix of activations, in the precision that its consumer wants.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jointkv::dense {

// Of matrix products, and of what they are fed. kInt8: 8-bit integers where the weights are quantised to that or less,
// else NativePrecision(); fed with f32 or with Int8Rows (gemm_int8.h).
enum class Precision { kF32, kBf16, kInt8 };

// Best precision of this CPU for products in floating point: bf16 with AVX-512 BF16, f32 otherwise.
Precision NativePrecision();
const char* PrecisionName(Precision precision);  // "bf16"

// Of activations that are plain numbers.
inline Precision ActivationPrecision(Precision precision) {
  return precision == Precision::kInt8 ? Precision::kF32 : precision;
}

struct Activations {
  void* data = nullptr;  // (rows, cols), or the memory of Int8Rows
  Precision precision = Precision::kF32;
  int rows = 0;
  int cols = 0;

  float* f32(int row) const { return static_cast<float*>(data) + static_cast<ptrdiff_t>(row) * cols; }
  uint16_t* bf16(int row) const { return static_cast<uint16_t*>(data) + static_cast<ptrdiff_t>(row) * cols; }
};

}  // namespace jointkv::dense
