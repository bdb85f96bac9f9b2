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
constexpr int kDotSteps = 1 << 22;
constexpr int kDotChains = 12;  // enough to hide the latency of one dot product

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

float DotChains() {
  __m512 sums[kDotChains];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  __m512i bits = _mm512_set1_epi32(0x3f803f80);  // ones
  for (int step = 0; step < kDotSteps; ++step) {
    __asm__ volatile("" : "+v"(bits));
#pragma GCC unroll 12
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, (__m512bh)bits, (__m512bh)bits);
  }
  __m512 total = _mm512_setzero_ps();
  for (const __m512& sum : sums) total = _mm512_add_ps(total, sum);
  return _mm512_reduce_add_ps(total);
}

}  // namespace
}  // namespace jointkv::cli

#include "base/avx512bf16_pop.h"
#endif

namespace jointkv::cli {

double Bf16PeakGflopS(int threads) {
#if defined(__x86_64__)
  if (!HasAvx512Bf16()) return 0;
  ThreadPool pool(threads);
  std::vector<float> sums(static_cast<size_t>(threads));
  const double seconds = BestSeconds(pool, [&](int thread) { sums[static_cast<size_t>(thread)] += DotChains(); });
  volatile float used = sums[0];
  (void)used;
  constexpr double kFlopsPerDot = 64;  // 16 lanes of two multiply-adds
  return kFlopsPerDot * kDotChains * kDotSteps * threads / seconds / 1e9;
#else
  (void)threads;
  return 0;
#endif
}

}  // namespace jointkv::cli
