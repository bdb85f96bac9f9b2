#include "cli/machine_peaks.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/clock.h"
#include "base/cpu.h"
#include "base/huge_buffer.h"
#include "base/thread_pool.h"

namespace jointkv::cli {
namespace {

constexpr int kRepeats = 5;
constexpr size_t kBytesPerThread = size_t{256} << 20;  // beyond any cache
constexpr int kChainSteps = 1 << 22;
constexpr int kChains = 12;  // enough to hide the latency of one operation

// The best of some repeats: seconds until every thread has done `work`(thread).
template <typename F>
double BestSeconds(ThreadPool& pool, const F& work) {
  double best_s = 1e9;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const double start_s = MonotonicSeconds();
    pool.ParallelFor(pool.size(), [&](int task, int) { work(task); });
    best_s = std::min(best_s, MonotonicSeconds() - start_s);
  }
  return best_s;
}

uint64_t SumWords(const std::byte* bytes, size_t size) {
  using Words = uint64_t __attribute__((vector_size(64)));
  Words sums[4] = {};
  const auto* words = reinterpret_cast<const Words*>(bytes);
  for (size_t i = 0; i + 4 <= size / sizeof(Words); i += 4) {
    for (int j = 0; j < 4; ++j) sums[j] += words[i + static_cast<size_t>(j)];
  }
  const Words sum = sums[0] + sums[1] + sums[2] + sums[3];
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

}  // namespace

double ReadBandwidthGbS(int threads) {
  ThreadPool pool(threads);
  const HugeBuffer buffer(kBytesPerThread * static_cast<size_t>(threads));
  std::vector<uint64_t> sums(static_cast<size_t>(threads));
  std::fill_n(buffer.data(), buffer.size(), std::byte{1});  // pages that were never written are all the same zeros
  const double seconds = BestSeconds(pool, [&](int thread) {
    sums[static_cast<size_t>(thread)] +=
        SumWords(buffer.data() + kBytesPerThread * static_cast<size_t>(thread), kBytesPerThread);
  });
  volatile uint64_t used = sums[0];
  (void)used;
  return static_cast<double>(buffer.size()) / seconds / 1e9;
}

}  // namespace jointkv::cli

#if defined(__x86_64__)
#include "base/avx512bf16_push.h"

namespace jointkv::cli {
namespace {

// Multiply-adds of ones, of f32 or of pairs of bf16.
template <bool kBf16>
float Chains512() {
  __m512 sums[kChains];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  __m512i ones = _mm512_set1_epi32(kBf16 ? 0x3f803f80 : 0x3f800000);
  for (int step = 0; step < kChainSteps; ++step) {
    __asm__ volatile("" : "+v"(ones));
#pragma GCC unroll 12
    for (__m512& sum : sums) {
      if constexpr (kBf16) {
        sum = _mm512_dpbf16_ps(sum, (__m512bh)ones, (__m512bh)ones);
      } else {
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(ones), _mm512_castsi512_ps(ones), sum);
      }
    }
  }
  __m512 total = _mm512_setzero_ps();
  for (const __m512& sum : sums) total = _mm512_add_ps(total, sum);
  return _mm512_reduce_add_ps(total);
}

}  // namespace
}  // namespace jointkv::cli

#include "base/avx512bf16_pop.h"

#include "base/avx2_push.h"

namespace jointkv::cli {
namespace {

float Chains256() {
  __m256 sums[kChains];
  for (__m256& sum : sums) sum = _mm256_setzero_ps();
  __m256 ones = _mm256_set1_ps(1);
  for (int step = 0; step < kChainSteps; ++step) {
    __asm__ volatile("" : "+x"(ones));
#pragma GCC unroll 12
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(ones, ones, sum);
  }
  __m256 total = _mm256_setzero_ps();
  for (const __m256& sum : sums) total = _mm256_add_ps(total, sum);
  return _mm256_cvtss_f32(total);
}

}  // namespace
}  // namespace jointkv::cli

#include "base/avx2_pop.h"

namespace jointkv::cli {
namespace {

// flops: of one step of one chain.
double PeakGflopS(int threads, float (*chains)(), double flops) {
  ThreadPool pool(threads);
  std::vector<float> sums(static_cast<size_t>(threads));
  const double seconds = BestSeconds(pool, [&](int thread) { sums[static_cast<size_t>(thread)] += chains(); });
  volatile float used = sums[0];
  (void)used;
  return flops * kChains * kChainSteps * threads / seconds / 1e9;
}

}  // namespace

double Bf16PeakGflopS(int threads) {
  return HasAvx512Bf16() ? PeakGflopS(threads, Chains512<true>, 64) : 0;  // 16 lanes of two multiply-adds
}

double F32PeakGflopS(int threads) {
  if (HasAvx512Bf16()) return PeakGflopS(threads, Chains512<false>, 32);
  return HasAvx2() ? PeakGflopS(threads, Chains256, 16) : 0;
}

}  // namespace jointkv::cli
#else
namespace jointkv::cli {

double Bf16PeakGflopS(int) { return 0; }
double F32PeakGflopS(int) { return 0; }

}  // namespace jointkv::cli
#endif
