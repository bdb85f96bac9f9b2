// ThreadPool: the compute threads of one engine.
//
// ParallelFor hands out tasks one by one, so a thread that the operating system has put aside holds back only the task
// it is in. Idle threads spin for a short while and then sleep in the kernel: under load from other processes a sleeper
// is woken at once, where a spinner would have burnt its time slice.
//
// Threads: ParallelFor is called by one thread at a time, which takes part as thread 0. Owns: size() - 1 workers.
// Fails how: never; a task must not throw.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace jointkv {

class ThreadPool {
 public:
  // threads >= 1, the caller's own included. spin_us: how long an idle thread spins before it sleeps.
  explicit ThreadPool(int threads, int spin_us = kSpinUs);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls f(task, thread) for each task in [0, n_tasks), each once, in no particular order; returns when all are done.
  // No heap allocation.
  template <typename F>
  void ParallelFor(int n_tasks, F&& f) {
    if (n_tasks <= 0) return;
    if (n_tasks == 1 || workers_.empty()) {
      for (int task = 0; task < n_tasks; ++task) f(task, 0);
      return;
    }
    Run(
        n_tasks,
        [](void* context, int task, int thread) { (*static_cast<std::remove_reference_t<F>*>(context))(task, thread); },
        &f);
  }

  static constexpr int kSpinUs = 40;  // longer than the gaps inside a step, far shorter than a time slice
  static constexpr int kTasksMax = 1 << 23;

 private:
  using TaskFunction = void (*)(void* context, int task, int thread);

  void Run(int n_tasks, TaskFunction function, void* context);
  bool RunOneTask(int thread);
  void WorkerLoop(int thread);
  void WaitForWork();
  void WaitForDone(uint32_t n_tasks);

  // One word, so that claiming a task and learning which job it belongs to is one atomic step:
  // job (16 bits) | number of tasks (24 bits) | next task (24 bits).
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<uint32_t> wake_{0};
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stop_{false};
  TaskFunction function_ = nullptr;
  void* context_ = nullptr;
  int64_t spin_ns_;
  std::vector<std::thread> workers_;
};

}  // namespace jointkv
