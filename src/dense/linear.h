// Linear: y = x W^T + b over weights from a model file.
//
// Two ways to compute it, chosen by the number of rows (few rows are bound by reading weights, many by arithmetic):
//   quantised   rows of the file as they are, through ggml's dot products; the activations are quantised to the type
//               that ggml pairs with the weights'. Least bytes per weight, one pass per row of x.
//   packed      panels of 8-bit or 4-bit integers (dense/gemm_int8.h), bf16 or f32 (dense/gemm.h), as `precision`
//               asks. Packed once at load, or in `lean` mode unpacked panel by panel into scratch each time.
//
// Threads: Forward is called by one thread and works on the pool's; Linears are const after Create.
// Owns: its packed panels; the file's bytes must outlive it. Fails how: Create returns kUnsupported for shapes that the
// kernels cannot take, and for integers without HasInt8Products(); Forward cannot fail.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "base/huge_buffer.h"
#include "base/status.h"
#include "base/thread_pool.h"
#include "dense/activations.h"
#include "dense/gemm.h"
#include "dense/gemm_int8.h"
#include "dense/ops.h"
#include "gguf/gguf_file.h"

namespace jointkv::dense {

// Bytes of one packed panel with `in` inputs. kInt8 stands for NativePrecision() where the type is not quantised.
size_t PanelBytes(Precision precision, ggml_type type, int in);

enum class WeightsMemory { kPacked, kLean };

struct LinearOptions {
  Precision precision = Precision::kF32;
  WeightsMemory memory = WeightsMemory::kPacked;
  HugeArena* arena = nullptr;  // where packed panels go; null: a buffer of the Linear's own
};

// Memory that Forward needs besides its arguments. One per engine; Reserve before the first step, so that steps do not
// allocate.
class LinearScratch {
 public:
  void Reserve(int threads, int max_rows, int max_quantised_rows, int max_inner, const LinearOptions& options);

 private:
  friend class Linear;
  std::vector<std::byte> quantised_;          // (rows, row bytes) activations in ggml's type
  HugeBuffer converted_;                      // activations as integers, or in bf16 for weights that are not
  std::vector<std::vector<float>> unpacked_;  // per thread: one panel's rows in f32
  std::vector<std::vector<float>> panel_;     // per thread: the panel itself (lean)
  std::vector<std::vector<float>> gated_;     // per thread: (2, kRowBlock, kPanel)
  int max_quantised_rows_ = 0;
};

class Linear {
 public:
  Linear() = default;
  // Weights stacked along `out`: part i gives outputs after those of parts before it. Each part is (in, out_i) in GGUF
  // order (ne[0] = in); bias i is (out_i) or null.
  static Expected<Linear> Create(std::span<const gguf::Tensor* const> parts,
                                 std::span<const gguf::Tensor* const> biases, const LinearOptions& options,
                                 ThreadPool& pool);

  int in() const { return in_; }
  int out() const { return out_; }
  size_t packed_bytes() const { return packed_ == nullptr ? 0 : packed_bytes_; }
  // Whether ggml can multiply every part as it is; otherwise only the packed way exists.
  bool has_quantised() const { return has_quantised_; }
  // As asked, but NativePrecision() instead of integers where a part is not quantised.
  Precision precision() const { return options_.precision; }

  // y (x.rows, out) = x W^T + b, or += when accumulate. The quantised way when x is f32 and x.rows <= quantised_rows;
  // else x must be in precision(), or f32 where integers were asked for.
  void Forward(ThreadPool& pool, LinearScratch& scratch, const Activations& x, int quantised_rows, float* y,
               bool accumulate = false) const;

  // For feed-forward layers: the first half of the outputs is the gate g, the second the value u;
  // y (x.rows, out / 2) = act(g) * u, in y's own precision.
  void ForwardGated(ThreadPool& pool, LinearScratch& scratch, const Activations& x, int quantised_rows, Gate gate,
                    const Activations& y) const;

 private:
  struct Part {
    const gguf::Tensor* tensor = nullptr;
    int first_output = 0;
    int first_panel = 0;
    int outputs = 0;
  };
  struct Panel {
    int part = 0;
    int row = 0;   // first row inside the part
    int cols = 0;  // outputs, <= kPanel
    int first_output = 0;
    size_t offset = 0;  // in packed_
  };
  // x as the panels want it.
  struct Input {
    Activations x;
    Int8Rows int8;
  };

  Int8Panel PanelFormat(int panel) const;
  Input Prepare(ThreadPool& pool, LinearScratch& scratch, const Activations& x) const;
  void ForwardQuantised(ThreadPool& pool, LinearScratch& scratch, const Activations& x, float* y, bool accumulate,
                        const Activations* gated, Gate gate) const;
  const void* PanelData(int panel, int slot, LinearScratch& scratch, int thread) const;
  void UnpackPanel(int panel, float* rows, void* out) const;
  void ProductOfPanel(int panel, const void* data, const Input& x, int first_row, int rows, float* c, ptrdiff_t ldc,
                      bool accumulate) const;

  int in_ = 0;
  int out_ = 0;
  LinearOptions options_;
  std::vector<Part> parts_;
  std::vector<Panel> panels_;
  std::vector<float> bias_;      // (panels, kPanel); empty: none
  std::byte* packed_ = nullptr;  // the panels one after the other; null in lean mode
  HugeBuffer own_;               // holds packed_ without an arena
  size_t packed_bytes_ = 0;
  bool has_quantised_ = true;
};

}  // namespace jointkv::dense
