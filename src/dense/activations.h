// A row-major matrix of activations, in the precision that its consumer wants.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jointkv::dense {

enum class Precision { kF32, kBf16 };

// Best precision of this CPU for matrix products: bf16 with AVX-512 BF16, f32 otherwise.
Precision NativePrecision();

struct Activations {
  void* data = nullptr;  // (rows, cols) f32 or bf16
  Precision precision = Precision::kF32;
  int rows = 0;
  int cols = 0;

  float* f32(int row) const { return static_cast<float*>(data) + static_cast<ptrdiff_t>(row) * cols; }
  uint16_t* bf16(int row) const { return static_cast<uint16_t*>(data) + static_cast<ptrdiff_t>(row) * cols; }
};

}  // namespace jointkv::dense
