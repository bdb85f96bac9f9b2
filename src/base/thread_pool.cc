#include "base/thread_pool.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>

#include "base/check.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jointkv {
namespace {

constexpr int kTaskBits = 24;
constexpr uint64_t kTaskMask = (uint64_t{1} << kTaskBits) - 1;

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

void FutexWait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void FutexWakeAll(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Spins until `ready` or until spin_ns have passed; returns whether it became ready.
template <typename F>
bool SpinUntil(int64_t spin_ns, F&& ready) {
  const int64_t end_ns = NowNs() + spin_ns;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      Pause();
    }
  } while (NowNs() < end_ns);
  return false;
}

bool HasTask(uint64_t state) { return (state & kTaskMask) < ((state >> kTaskBits) & kTaskMask); }

}  // namespace

ThreadPool::ThreadPool(int threads, int spin_us) : spin_ns_(int64_t{1000} * spin_us) {
  CHECK(threads >= 1);
  workers_.reserve(threads - 1);
  for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { WorkerLoop(thread); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  wake_.fetch_add(1);
  FutexWakeAll(wake_);
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(int n_tasks, TaskFunction function, void* context) {
  CHECK(n_tasks < kTasksMax);
  function_ = function;
  context_ = context;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t job = (state_.load(std::memory_order_relaxed) >> (2 * kTaskBits)) + 1;
  state_.store((job << (2 * kTaskBits)) | (static_cast<uint64_t>(n_tasks) << kTaskBits));
  if (sleepers_.load() != 0) {
    wake_.fetch_add(1);
    FutexWakeAll(wake_);
  }
  while (RunOneTask(0)) {
  }
  WaitForDone(static_cast<uint32_t>(n_tasks));
}

bool ThreadPool::RunOneTask(int thread) {
  if (!HasTask(state_.load(std::memory_order_relaxed))) return false;
  const uint64_t claimed = state_.fetch_add(1, std::memory_order_acq_rel);
  if (!HasTask(claimed)) return false;
  // The job cannot end before this task is done, so function_ and context_ are this job's.
  function_(context_, static_cast<int>(claimed & kTaskMask), thread);
  const uint32_t n_tasks = static_cast<uint32_t>((claimed >> kTaskBits) & kTaskMask);
  if (done_.fetch_add(1) + 1 == n_tasks && caller_sleeps_.load()) FutexWakeAll(done_);
  return true;
}

void ThreadPool::WorkerLoop(int thread) {
  while (!stop_.load(std::memory_order_relaxed)) {
    if (!RunOneTask(thread)) WaitForWork();
  }
}

void ThreadPool::WaitForWork() {
  const auto ready = [&] {
    return HasTask(state_.load(std::memory_order_relaxed)) || stop_.load(std::memory_order_relaxed);
  };
  if (SpinUntil(spin_ns_, ready)) return;
  const uint32_t seen = wake_.load();
  sleepers_.fetch_add(1);
  if (!HasTask(state_.load()) && !stop_.load()) FutexWait(wake_, seen);
  sleepers_.fetch_sub(1);
}

void ThreadPool::WaitForDone(uint32_t n_tasks) {
  const auto ready = [&] { return done_.load(std::memory_order_acquire) == n_tasks; };
  if (SpinUntil(spin_ns_, ready)) return;
  caller_sleeps_.store(true);
  for (uint32_t done = done_.load(); done != n_tasks; done = done_.load()) FutexWait(done_, done);
  caller_sleeps_.store(false);
}

}  // namespace jointkv
