#include "dense/linear.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "base/bf16.h"
#include "base/checked.h"
#include "base/cpu.h"
#include "dense/ops.h"
#include "ggml-cpu.h"
#include "gguf/dequantize.h"

namespace jointkv::dense {
namespace {

// Rows of x that one task multiplies with one panel: their bf16 form and the panel fit the second-level cache together.
constexpr int kRowBlock = 192;

// Few rows are bound by reading panels, and each thread reads ahead: give it a long run of neighbours. Large matrices
// are cut finer, so that a thread that was put aside holds back less.
int PanelRun(int n_panels, int threads) {
  constexpr int kLongRun = 64;
  const int tasks = n_panels >= 2 * kLongRun * threads ? n_panels / kLongRun : threads;
  return CeilDiv(n_panels, tasks);
}

const ggml_type_traits_cpu& CpuTraits(ggml_type type) {
  static const bool ready = [] {
    ggml_cpu_init();
    return true;
  }();
  CHECK(ready);
  return *ggml_get_type_traits_cpu(type);
}

bool HasQuantisedDot(ggml_type type) {
  const ggml_type_traits_cpu& traits = CpuTraits(type);
  return traits.vec_dot != nullptr &&
         (traits.vec_dot_type == GGML_TYPE_F32 || CpuTraits(traits.vec_dot_type).from_float != nullptr);
}

}  // namespace

size_t PanelBytes(Precision precision, ggml_type type, int in) {
  const size_t weights = static_cast<size_t>(in) * kPanel;
  const GridShape shape = GridShapeOf(type);
  if (precision == Precision::kInt8 && shape.bits != 0) return Int8Panel{shape, in}.bytes();
  if (precision == Precision::kInt8) precision = NativePrecision();
  return RoundUp<size_t>(weights * (precision == Precision::kF32 ? sizeof(float) : sizeof(uint16_t)), 64);
}

const char* PrecisionName(Precision precision) {
  switch (precision) {
    case Precision::kF32: return "f32";
    case Precision::kBf16: return "bf16";
    case Precision::kInt8: return "int8";
  }
  return "";
}

Precision NativePrecision() { return HasAvx512Bf16() ? Precision::kBf16 : Precision::kF32; }

void LinearScratch::Reserve(int threads, int max_rows, int max_quantised_rows, int max_inner,
                            const LinearOptions& options) {
  const bool lean = options.memory == WeightsMemory::kLean;
  if (options.precision == Precision::kInt8) {
    converted_ = HugeBuffer(
        std::max(Int8Rows::Bytes(max_rows, max_inner), static_cast<size_t>(max_rows) * max_inner * sizeof(uint16_t)));
  }
  // No activation type of ggml takes more bytes than f32.
  max_quantised_rows_ = max_quantised_rows;
  quantised_.resize(static_cast<size_t>(max_quantised_rows) * (static_cast<size_t>(max_inner) * sizeof(float) + 64));
  unpacked_.resize(threads);
  panel_.resize(threads);
  gated_.resize(threads);
  for (int t = 0; t < threads; ++t) {
    gated_[t].resize(static_cast<size_t>(2) * kRowBlock * kPanel);
    if (!lean) continue;
    unpacked_[t].resize(static_cast<size_t>(kPanel) * max_inner);
    panel_[t].resize(static_cast<size_t>(2 * kPanel) * max_inner);  // gate and value at once
  }
}

Expected<Linear> Linear::Create(std::span<const gguf::Tensor* const> parts, std::span<const gguf::Tensor* const> biases,
                                const LinearOptions& options, ThreadPool& pool) {
  CHECK(!parts.empty() && (biases.empty() || biases.size() == parts.size()));
  Linear linear;
  linear.options_ = options;
  linear.in_ = static_cast<int>(parts[0]->ne[0]);
  if (options.precision == Precision::kInt8 && !HasInt8Products()) {
    return Status(StatusCode::kUnsupported, "tensor '" + parts[0]->name + "': int8 needs a CPU with AVX2");
  }
  if (options.precision == Precision::kInt8 &&
      !std::ranges::all_of(parts, [](const gguf::Tensor* part) { return GridShapeOf(part->type).bits != 0; })) {
    linear.options_.precision = NativePrecision();
  }
  if (linear.options_.precision == Precision::kBf16 && linear.in_ % 2 != 0) {
    return Status(StatusCode::kUnsupported, "tensor '" + parts[0]->name + "': " + std::to_string(linear.in_) +
                                                " inputs: bf16 needs an even number");
  }
  bool any_bias = false;
  for (size_t i = 0; i < parts.size(); ++i) {
    const gguf::Tensor& tensor = *parts[i];
    CHECK(tensor.ne[0] == linear.in_ && tensor.ne[2] == 1 && tensor.ne[3] == 1);
    const int outputs = static_cast<int>(tensor.ne[1]);
    linear.parts_.push_back({&tensor, linear.out_, static_cast<int>(linear.panels_.size()), outputs});
    for (int row = 0; row < outputs; row += kPanel) {
      linear.panels_.push_back({static_cast<int>(i), row, std::min(kPanel, outputs - row), linear.out_ + row});
    }
    linear.out_ += outputs;
    linear.has_quantised_ = linear.has_quantised_ && HasQuantisedDot(tensor.type);
    any_bias = any_bias || (!biases.empty() && biases[i] != nullptr);
  }
  if (any_bias) {
    linear.bias_.assign(linear.panels_.size() * kPanel, 0.0f);
    std::vector<float> values;
    for (size_t p = 0; p < linear.panels_.size(); ++p) {
      const Panel& panel = linear.panels_[p];
      const gguf::Tensor* bias = biases[panel.part];
      if (bias == nullptr) continue;
      values.resize(bias->ne[0]);
      RETURN_IF_ERROR(gguf::Dequantize(*bias, 0, 1, values.data()));
      std::copy_n(values.begin() + panel.row, panel.cols, linear.bias_.begin() + static_cast<ptrdiff_t>(p) * kPanel);
    }
  }
  for (size_t p = 0; p < linear.panels_.size(); ++p) {
    linear.panels_[p].offset = linear.packed_bytes_;
    linear.packed_bytes_ += PanelBytes(linear.options_.precision, parts[linear.panels_[p].part]->type, linear.in_);
  }
  if (options.memory == WeightsMemory::kPacked) {
    const size_t bytes = linear.packed_bytes_;
    if (options.arena == nullptr) linear.own_ = HugeBuffer(bytes);
    linear.packed_ = options.arena == nullptr ? linear.own_.data() : options.arena->Allocate(bytes);
    std::vector<std::vector<float>> rows(pool.size(), std::vector<float>(static_cast<size_t>(kPanel) * linear.in_));
    pool.ParallelFor(static_cast<int>(linear.panels_.size()), [&](int panel, int thread) {
      linear.UnpackPanel(panel, rows[thread].data(), linear.packed_ + linear.panels_[panel].offset);
    });
  }
  return linear;
}

Int8Panel Linear::PanelFormat(int panel) const { return {GridShapeOf(parts_[panels_[panel].part].tensor->type), in_}; }

void Linear::UnpackPanel(int index, float* rows, void* out) const {
  const Panel& panel = panels_[index];
  const gguf::Tensor& tensor = *parts_[panel.part].tensor;
  const Status status = gguf::Dequantize(tensor, panel.row, panel.cols, rows);
  CHECK(status.ok());
  switch (options_.precision) {
    case Precision::kF32: PackPanelF32(rows, panel.cols, in_, static_cast<float*>(out)); break;
    case Precision::kBf16: PackPanelBf16(rows, panel.cols, in_, static_cast<uint16_t*>(out)); break;
    case Precision::kInt8: PackPanelInt8(PanelFormat(index), tensor, panel.row, rows, panel.cols, out); break;
  }
}

// `slot` (0 or 1): which half of the thread's lean scratch to use.
const void* Linear::PanelData(int panel, int slot, LinearScratch& scratch, int thread) const {
  if (options_.memory == WeightsMemory::kPacked) return packed_ + panels_[panel].offset;
  float* target = scratch.panel_[thread].data() + static_cast<size_t>(slot) * kPanel * in_;
  UnpackPanel(panel, scratch.unpacked_[thread].data(), target);
  return target;
}

Linear::Input Linear::Prepare(ThreadPool& pool, LinearScratch& scratch, const Activations& x) const {
  Input input = {x, {}};
  if (x.precision == options_.precision) {
    if (x.precision == Precision::kInt8) input.int8 = Int8Rows(static_cast<std::byte*>(x.data), x.rows, in_);
    return input;
  }
  CHECK(x.precision == Precision::kF32);
  const bool integers = options_.precision == Precision::kInt8;
  if (integers) {
    input.int8 = Int8Rows(scratch.converted_.data(), x.rows, in_);
  } else {
    input.x.data = scratch.converted_.data();
    input.x.precision = Precision::kBf16;
  }
  CHECK((integers ? Int8Rows::Bytes(x.rows, in_) : sizeof(uint16_t) * x.rows * in_) <= scratch.converted_.size());
  constexpr int kRowsPerTask = 8;
  pool.ParallelFor(CeilDiv(x.rows, kRowsPerTask), [&](int task, int) {
    for (int row = task * kRowsPerTask; row < std::min(x.rows, (task + 1) * kRowsPerTask); ++row) {
      if (integers) {
        QuantiseRow(x.f32(row), row, input.int8);
      } else {
        std::transform(x.f32(row), x.f32(row) + in_, input.x.bf16(row), Bf16FromF32);
      }
    }
  });
  return input;
}

void Linear::ProductOfPanel(int index, const void* data, const Input& input, int first_row, int rows, float* c,
                            ptrdiff_t ldc, bool accumulate) const {
  const Panel& panel = panels_[index];
  const float* bias = bias_.empty() ? nullptr : bias_.data() + static_cast<ptrdiff_t>(index) * kPanel;
  if (options_.precision == Precision::kInt8) {
    PanelProductInt8({&input.int8, first_row, rows, PanelFormat(index), static_cast<const std::byte*>(data), c, ldc,
                      panel.cols, bias, accumulate});
    return;
  }
  PanelArgs args;
  args.lda = in_;
  args.rows = rows;
  args.k = in_;
  args.panel = data;
  args.c = c;
  args.ldc = ldc;
  args.cols = panel.cols;
  args.bias = bias;
  args.accumulate = accumulate;
  if (options_.precision == Precision::kBf16) {
    args.a = input.x.bf16(first_row);
    if (options_.memory == WeightsMemory::kPacked && index + 1 < static_cast<int>(panels_.size())) {
      args.next_panel = packed_ + panels_[index + 1].offset;
    }
    PanelProductBf16(args);
  } else {
    args.a = input.x.f32(first_row);
    PanelProductF32(args);
  }
}

void Linear::Forward(ThreadPool& pool, LinearScratch& scratch, const Activations& x, int quantised_rows, float* y,
                     bool accumulate) const {
  CHECK(x.cols == in_);
  if (x.precision == Precision::kF32 && x.rows <= quantised_rows) {
    ForwardQuantised(pool, scratch, x, y, accumulate, nullptr, Gate::kSilu);
    return;
  }
  const Input input = Prepare(pool, scratch, x);
  const int n_panels = static_cast<int>(panels_.size());
  const int row_blocks = CeilDiv(x.rows, kRowBlock);
  if (options_.memory == WeightsMemory::kLean || row_blocks == 1) {
    const int run = options_.memory == WeightsMemory::kLean ? 1 : PanelRun(n_panels, pool.size());
    pool.ParallelFor(CeilDiv(n_panels, run), [&](int task, int thread) {
      for (int panel = task * run; panel < std::min(n_panels, (task + 1) * run); ++panel) {
        const void* data = PanelData(panel, 0, scratch, thread);
        ProductOfPanel(panel, data, input, 0, x.rows, y + panels_[panel].first_output, out_, accumulate);
      }
    });
    return;
  }
  pool.ParallelFor(n_panels * row_blocks, [&](int task, int thread) {
    const int panel = task % n_panels;
    const int first = task / n_panels * kRowBlock;
    const int rows = std::min(kRowBlock, x.rows - first);
    const void* data = PanelData(panel, 0, scratch, thread);
    ProductOfPanel(panel, data, input, first, rows,
                   y + static_cast<ptrdiff_t>(first) * out_ + panels_[panel].first_output, out_, accumulate);
  });
}

void Linear::ForwardGated(ThreadPool& pool, LinearScratch& scratch, const Activations& x, int quantised_rows, Gate gate,
                          const Activations& y) const {
  CHECK(x.cols == in_ && y.cols * 2 == out_ && y.rows == x.rows && parts_.size() == 2);
  if (x.precision == Precision::kF32 && x.rows <= quantised_rows) {
    ForwardQuantised(pool, scratch, x, nullptr, false, &y, gate);
    return;
  }
  const Input input = Prepare(pool, scratch, x);
  const int n_panels = static_cast<int>(panels_.size()) / 2;
  const int row_blocks = CeilDiv(x.rows, kRowBlock);
  // One task is a run of panels times a range of row blocks. Few rows: long runs, as in Forward. Lean: all row blocks,
  // so that a panel is unpacked once.
  const bool all_rows = options_.memory == WeightsMemory::kLean || row_blocks == 1;
  const int run = row_blocks == 1 && options_.memory == WeightsMemory::kPacked ? PanelRun(n_panels, pool.size()) : 1;
  const int runs = CeilDiv(n_panels, run);
  pool.ParallelFor(all_rows ? runs : runs * row_blocks, [&](int task, int thread) {
    float* g = scratch.gated_[thread].data();
    float* u = g + static_cast<ptrdiff_t>(kRowBlock) * kPanel;
    const int first_panel = task % runs * run;
    for (int panel = first_panel; panel < std::min(n_panels, first_panel + run); ++panel) {
      const void* gate_data = PanelData(panel, 0, scratch, thread);
      const void* value_data = PanelData(n_panels + panel, 1, scratch, thread);
      const int cols = panels_[panel].cols;
      const int column = panels_[panel].first_output;
      const int first_block = all_rows ? 0 : task / runs;
      const int last_block = all_rows ? row_blocks : first_block + 1;
      for (int block = first_block; block < last_block; ++block) {
        const int first = block * kRowBlock;
        const int rows = std::min(kRowBlock, x.rows - first);
        ProductOfPanel(panel, gate_data, input, first, rows, g, kPanel, false);
        ProductOfPanel(n_panels + panel, value_data, input, first, rows, u, kPanel, false);
        GatedProduct(gate, g, u, kPanel, rows, cols, y, first, column);
      }
    }
  });
}

void Linear::ForwardQuantised(ThreadPool& pool, LinearScratch& scratch, const Activations& x, float* y, bool accumulate,
                              const Activations* gated, Gate gate) const {
  CHECK(x.rows <= scratch.max_quantised_rows_);
  // Parts may differ in type, so each keeps its own copy of the activations; parts of one type share it.
  constexpr int kPartsMax = 4;
  CHECK(parts_.size() <= kPartsMax);
  size_t offset[kPartsMax] = {};
  size_t row_bytes[kPartsMax] = {};
  int source[kPartsMax] = {};  // the first part of the same type
  size_t bytes = 0;
  const auto type_of = [&](size_t part) { return CpuTraits(parts_[part].tensor->type).vec_dot_type; };
  for (size_t p = 0; p < parts_.size(); ++p) {
    row_bytes[p] = ggml_row_size(type_of(p), in_);
    while (type_of(source[p]) != type_of(p)) ++source[p];
    offset[p] = bytes;
    if (source[p] == static_cast<int>(p)) bytes += RoundUp<size_t>(row_bytes[p] * x.rows, 64);
  }
  if (bytes > scratch.quantised_.size()) scratch.quantised_.resize(bytes);
  const std::byte* quantised[kPartsMax] = {};
  for (size_t p = 0; p < parts_.size(); ++p) {
    if (source[p] != static_cast<int>(p)) {
      quantised[p] = quantised[source[p]];
    } else if (type_of(p) == GGML_TYPE_F32) {
      quantised[p] = static_cast<const std::byte*>(x.data);
    } else {
      std::byte* target = scratch.quantised_.data() + offset[p];
      for (int row = 0; row < x.rows; ++row)
        CpuTraits(type_of(p)).from_float(x.f32(row), target + row * row_bytes[p], in_);
      quantised[p] = target;
    }
  }
  ggml_vec_dot_t vec_dot[kPartsMax] = {};
  size_t weight_row_bytes[kPartsMax] = {};
  for (size_t p = 0; p < parts_.size(); ++p) {
    vec_dot[p] = CpuTraits(parts_[p].tensor->type).vec_dot;
    weight_row_bytes[p] = ggml_row_size(parts_[p].tensor->type, in_);
  }
  const auto dot = [&](int part, int row, int x_row) {
    float sum = 0;
    vec_dot[part](in_, &sum, 0, parts_[part].tensor->data + row * weight_row_bytes[part], 0,
                  quantised[part] + x_row * row_bytes[part], 0, 1);
    return sum;
  };
  const auto bias = [&](int part, int row) {
    return bias_.empty() ? 0.0f
                         : bias_[static_cast<size_t>(parts_[part].first_panel + row / kPanel) * kPanel + row % kPanel];
  };
  constexpr int kRunMax = 512;
  const int outputs = gated == nullptr ? out_ : out_ / 2;
  const int run = std::clamp(outputs / (pool.size() * 6), 16, kRunMax);
  pool.ParallelFor(CeilDiv(outputs, run), [&](int task, int) {
    const int begin = task * run;
    const int end = std::min(outputs, begin + run);
    for (int x_row = 0; x_row < x.rows; ++x_row) {
      if (gated != nullptr) {
        float g[kRunMax];
        float u[kRunMax];
        for (int output = begin; output < end; ++output) {
          g[output - begin] = dot(0, output, x_row) + bias(0, output);
          u[output - begin] = dot(1, output, x_row) + bias(1, output);
        }
        GatedProduct(gate, g, u, 0, 1, end - begin, *gated, x_row, begin);
        continue;
      }
      int part = 0;
      for (int output = begin; output < end; ++output) {
        while (output >= parts_[part].first_output + parts_[part].outputs) ++part;
        const int row = output - parts_[part].first_output;
        const float value = dot(part, row, x_row) + bias(part, row);
        float& target = y[static_cast<ptrdiff_t>(x_row) * out_ + output];
        target = accumulate ? target + value : value;
      }
    }
  });
}

}  // namespace jointkv::dense
