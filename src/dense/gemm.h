// The inner kernels of every matrix product: rows of A times one packed panel of B.
//
// A panel is kPanel output columns of a weight matrix W (out, in), stored so that a SIMD lane is a column:
//   bf16  [in/2 pairs][kPanel columns][2]     for AVX-512 BF16's dot product of pairs
//   f32   [in][kPanel columns]
// Each output element is one chain of multiply-adds over `in` in order, whatever the number of rows or the machine's
// vector width, so a row's result never depends on its batch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jointkv::dense {

inline constexpr int kPanel = 32;

struct PanelArgs {
  const void* a = nullptr;  // (rows, k) bf16 or f32, like the panel
  ptrdiff_t lda = 0;        // elements
  int rows = 0;
  int k = 0;  // inner size; even for bf16
  const void* panel = nullptr;
  const void* next_panel = nullptr;  // read ahead into the cache while this one is used; may be null
  float* c = nullptr;                // (rows, cols)
  ptrdiff_t ldc = 0;                 // elements
  int cols = kPanel;                 // columns to write, <= kPanel
  const float* bias = nullptr;       // (kPanel) or null
  bool accumulate = false;           // c += a * panel instead of c =
};

// bf16 in, f32 sums. Requires HasAvx512Bf16().
void PanelProductBf16(const PanelArgs& args);
// f32 throughout, on any target.
void PanelProductF32(const PanelArgs& args);

// rows: (n_rows <= kPanel, k) f32, row after row; missing columns become zero.
void PackPanelBf16(const float* rows, int n_rows, int k, uint16_t* panel);
void PackPanelF32(const float* rows, int n_rows, int k, float* panel);

}  // namespace jointkv::dense
