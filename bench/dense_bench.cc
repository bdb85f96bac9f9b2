// Matrix products of SmolLM2-135M's shapes: dense::Linear in f32, in bf16, with 8-bit integers over Q8_0 and over Q4_1,
// and oneDNN's bf16 matmul with weights in the layout that it likes best, all on 2 threads. Weights rotate through
// copies larger than the last-level cache, as a model's layers do. peak_share, where the CPU has AVX-512 BF16: of a
// loop of dot products that touches registers only, on the same threads.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

#include <benchmark/benchmark.h>
#include <oneapi/dnnl/dnnl.hpp>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/bf16.h"
#include "base/clock.h"
#include "base/cpu.h"
#include "dense/linear.h"

// Of GCC's OpenMP, on which oneDNN runs; clang has another omp.h, or none.
extern "C" void omp_set_num_threads(int n);

namespace jointkv::bench {
namespace {

// Of both sides; JOINTKV_BENCH_THREADS, 2 when unset.
const int kThreads = [] {
  const char* value = std::getenv("JOINTKV_BENCH_THREADS");
  return value == nullptr ? 2 : std::max(1, std::atoi(value));
}();
constexpr size_t kWeightBytes = size_t{96} << 20;

std::vector<uint16_t> RandomBf16(size_t n) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> values(n);
  for (uint16_t& value : values) value = Bf16FromF32(normal(random));
  return values;
}

#if defined(__x86_64__)
#include "base/avx512bf16_push.h"
// Twelve chains of dot products, enough to fill the pipeline; 64 operations each.
float DotLoop(int iterations) {
  constexpr int kChains = 12;
  __m512 sums[kChains];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  const __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int i = 0; i < iterations; ++i) {
    for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, x, x);
  }
  for (int c = 1; c < kChains; ++c) sums[0] = _mm512_add_ps(sums[0], sums[c]);
  return _mm512_reduce_add_ps(sums[0]);
}
#include "base/avx512bf16_pop.h"
#else
float DotLoop(int) { return 0; }
#endif

// Operations per second of all threads: the best of many runs shorter than a time slice, because peak means peak.
double PeakFlops() {
  static const double peak = [] {
    constexpr int kIterations = 50'000;
    ThreadPool pool(kThreads);
    double best = 0;
    for (int run = 0; run < 1000; ++run) {
      const double start = MonotonicSeconds();
      pool.ParallelFor(kThreads, [](int, int) { benchmark::DoNotOptimize(DotLoop(kIterations)); });
      best = std::max(best, 12.0 * 64 * kIterations * kThreads / (MonotonicSeconds() - start));
    }
    return best;
  }();
  return peak;
}

void Report(benchmark::State& state, int rows, int in, int out, size_t weight_bytes) {
  const double flops = 2.0 * rows * in * out;
  state.counters["GFLOP/s"] = benchmark::Counter(flops / 1e9, benchmark::Counter::kIsIterationInvariantRate);
  if (HasAvx512Bf16()) {
    state.counters["peak_share"] =
        benchmark::Counter(flops / PeakFlops(), benchmark::Counter::kIsIterationInvariantRate);
  }
  state.counters["weights_GB/s"] =
      benchmark::Counter(static_cast<double>(weight_bytes) / 1e9, benchmark::Counter::kIsIterationInvariantRate);
}

int Copies(size_t bytes) { return static_cast<int>(std::max<size_t>(2, kWeightBytes / bytes)); }

constexpr const char* kNotHere = "this CPU lacks the instructions";

void Peak(benchmark::State& state) {
  if (!HasAvx512Bf16()) return state.SkipWithError(kNotHere);
  for (auto _ : state) benchmark::DoNotOptimize(PeakFlops());
  state.counters["GFLOP/s"] = PeakFlops() / 1e9;
}

void Ours(benchmark::State& state, ggml_type type, dense::Precision precision) {
  const int rows = static_cast<int>(state.range(0));
  const int in = static_cast<int>(state.range(1));
  const int out = static_cast<int>(state.range(2));
  if ((precision == dense::Precision::kInt8 && !dense::HasInt8Products()) ||
      (precision == dense::Precision::kBf16 && !HasAvx512Bf16())) {
    return state.SkipWithError(kNotHere);
  }
  ThreadPool pool(kThreads);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(in) * out);
  for (float& value : values) value = normal(random);
  std::vector<std::byte> weights(ggml_row_size(type, in) * static_cast<size_t>(out));
  ggml_quantize_chunk(type, values.data(), weights.data(), 0, out, in, nullptr);
  gguf::Tensor tensor;
  tensor.type = type;
  tensor.n_dims = 2;
  tensor.ne = {in, out, 1, 1};
  tensor.data = weights.data();
  tensor.size_bytes = weights.size();
  const gguf::Tensor* parts[] = {&tensor};
  const dense::LinearOptions options = {precision, dense::WeightsMemory::kPacked};
  std::vector<dense::Linear> layers;
  do {
    layers.push_back(dense::Linear::Create(parts, {}, options, pool).value());
  } while (static_cast<int>(layers.size()) < Copies(layers[0].packed_bytes()));
  dense::LinearScratch scratch;
  scratch.Reserve(kThreads, rows, 0, in, options);
  values.resize(static_cast<size_t>(rows) * in);
  std::vector<uint16_t> x = RandomBf16(values.size());
  const dense::Activations input = precision == dense::Precision::kBf16
                                       ? dense::Activations{x.data(), dense::Precision::kBf16, rows, in}
                                       : dense::Activations{values.data(), dense::Precision::kF32, rows, in};
  std::vector<float> y(static_cast<size_t>(rows) * out);
  size_t layer = 0;
  for (auto _ : state) {
    layers[layer++ % layers.size()].Forward(pool, scratch, input, 0, y.data());
    benchmark::DoNotOptimize(y.data());
  }
  Report(state, rows, in, out, layers[0].packed_bytes());
}

void OneDnn(benchmark::State& state) {
  using dnnl::memory;
  const int rows = static_cast<int>(state.range(0));
  const int in = static_cast<int>(state.range(1));
  const int out = static_cast<int>(state.range(2));
  omp_set_num_threads(kThreads);
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const memory::desc x_desc({rows, in}, memory::data_type::bf16, memory::format_tag::ab);
  const memory::desc any_desc({in, out}, memory::data_type::bf16, memory::format_tag::any);
  const memory::desc plain_desc({in, out}, memory::data_type::bf16, memory::format_tag::ba);
  const memory::desc y_desc({rows, out}, memory::data_type::f32, memory::format_tag::ab);
#if DNNL_VERSION_MAJOR >= 3
  const dnnl::matmul::primitive_desc product_desc(engine, x_desc, any_desc, y_desc);
#else
  const dnnl::matmul::primitive_desc product_desc(dnnl::matmul::desc(x_desc, any_desc, y_desc), engine);
#endif
  const dnnl::matmul product(product_desc);
  std::vector<uint16_t> x = RandomBf16(static_cast<size_t>(rows) * in);
  std::vector<uint16_t> plain = RandomBf16(static_cast<size_t>(in) * out);
  std::vector<float> y(static_cast<size_t>(rows) * out);
  memory x_memory(x_desc, engine, x.data());
  memory plain_memory(plain_desc, engine, plain.data());
  memory y_memory(y_desc, engine, y.data());
  std::vector<std::unordered_map<int, memory>> layers;
  const size_t bytes = size_t{2} * in * out;
  for (int i = 0; i < Copies(bytes); ++i) {
    memory packed(product_desc.weights_desc(), engine);
    dnnl::reorder(plain_memory, packed).execute(stream, plain_memory, packed);
    layers.push_back({{DNNL_ARG_SRC, x_memory}, {DNNL_ARG_WEIGHTS, packed}, {DNNL_ARG_DST, y_memory}});
  }
  stream.wait();
  size_t layer = 0;
  for (auto _ : state) {
    product.execute(stream, layers[layer++ % layers.size()]);
    stream.wait();
    benchmark::DoNotOptimize(y.data());
  }
  Report(state, rows, in, out, bytes);
}

// (rows, in, out) of the output, QKV, gate-and-up, down and vocabulary products.
void Shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"rows", "in", "out"});
  const std::pair<int, int> shapes[] = {{576, 576}, {576, 960}, {576, 3072}, {1536, 576}, {576, 49152}};
  for (const auto& [in, out] : shapes) {
    for (const int rows : {1, 4, 16, 64, 1024}) bench->Args({rows, in, out});
  }
  bench->UseRealTime()->Unit(benchmark::kMicrosecond)->MinTime(0.02)->Repetitions(9)->ReportAggregatesOnly();
  // On a machine with other work: the least time and the highest rates are the quiet ones.
  bench->ComputeStatistics("min", [](const std::vector<double>& v) { return *std::ranges::min_element(v); });
  bench->ComputeStatistics("max", [](const std::vector<double>& v) { return *std::ranges::max_element(v); });
}

BENCHMARK(Peak)->Iterations(1);
BENCHMARK_CAPTURE(Ours, f32, GGML_TYPE_F32, dense::Precision::kF32)->Apply(Shapes);
BENCHMARK_CAPTURE(Ours, bf16, GGML_TYPE_BF16, dense::Precision::kBf16)->Apply(Shapes);
BENCHMARK_CAPTURE(Ours, int8_q8_0, GGML_TYPE_Q8_0, dense::Precision::kInt8)->Apply(Shapes);
BENCHMARK_CAPTURE(Ours, int8_q4_1, GGML_TYPE_Q4_1, dense::Precision::kInt8)->Apply(Shapes);
BENCHMARK(OneDnn)->Apply(Shapes);

}  // namespace
}  // namespace jointkv::bench

BENCHMARK_MAIN();
