#include "base/thread_pool.h"

#include <chrono>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace jointkv {
namespace {

void SleepMs(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// Plain ints: a task that ran twice at once, or whose effect is not visible to the caller, is also a data race.
void ExpectEachTaskOnce(ThreadPool& pool, int n_tasks) {
  std::vector<int> runs(n_tasks, 0);
  std::atomic<int> bad_threads{0};
  pool.ParallelFor(n_tasks, [&](int task, int thread) {
    ++runs[task];
    if (thread < 0 || thread >= pool.size()) ++bad_threads;
  });
  EXPECT_EQ(bad_threads, 0);
  for (int task = 0; task < n_tasks; ++task) ASSERT_EQ(runs[task], 1) << "task " << task << " of " << n_tasks;
}

TEST(ThreadPoolTest, RunsEachTaskOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.size(), threads);
    for (const int n_tasks : {0, 1, 2, 3, 7, 64, 1000, 70000}) ExpectEachTaskOnce(pool, n_tasks);
  }
}

TEST(ThreadPoolTest, GrowingAndShrinkingJobsDoNotMix) {
  ThreadPool pool(3);
  for (int n_tasks = 1; n_tasks < 300; ++n_tasks) {
    ExpectEachTaskOnce(pool, n_tasks);
    ExpectEachTaskOnce(pool, 300 - n_tasks);
  }
}

TEST(ThreadPoolTest, ManyTinyJobsSeeEachOthersResults) {
  for (const int spin_us : {0, ThreadPool::kSpinUs}) {
    ThreadPool pool(2, spin_us);
    std::vector<int64_t> values(5, 0);
    for (int job = 0; job < 20000; ++job) {
      // A task reads what another thread may have written in the job before.
      const size_t n = 2 + job % 4;
      pool.ParallelFor(static_cast<int>(n), [&](int task, int) { ++values[task]; });
    }
    EXPECT_EQ(values[0], 20000);
    EXPECT_EQ(values[1], 20000);
    EXPECT_EQ(values[4], 5000);
  }
}

TEST(ThreadPoolTest, WakesSleepers) {
  ThreadPool pool(3, 0);
  for (int round = 0; round < 50; ++round) {
    if (round % 5 == 0) SleepMs(2);  // long enough for every worker to sleep in the kernel
    ExpectEachTaskOnce(pool, 1 + round * 7);
  }
}

TEST(ThreadPoolTest, CallerSleepsUntilASlowWorkerIsDone) {
  ThreadPool pool(2, 0);
  for (int round = 0; round < 10; ++round) {
    std::atomic<bool> worker_has_one{false};
    std::vector<int> done(2, 0);
    pool.ParallelFor(2, [&](int task, int thread) {
      if (thread == 0) {
        while (!worker_has_one) std::this_thread::yield();
      } else {
        worker_has_one = true;
        SleepMs(5);
      }
      done[task] = 1;
    });
    EXPECT_EQ(done, std::vector<int>(2, 1));
  }
}

TEST(ThreadPoolTest, MoreThreadsThanCores) {
  ThreadPool pool(static_cast<int>(std::thread::hardware_concurrency()) * 4 + 5);
  for (int round = 0; round < 100; ++round) ExpectEachTaskOnce(pool, 1 + round * 13 % 500);
}

TEST(ThreadPoolTest, EndsWhileWorkersSpinOrSleepOrHaveJustWorked) {
  for (int round = 0; round < 100; ++round) {
    ThreadPool pool(1 + round % 4, round % 3 == 0 ? 0 : 200);
    if (round % 2 == 0) ExpectEachTaskOnce(pool, round % 9);
    if (round % 10 == 0) SleepMs(1);
  }
}

TEST(ThreadPoolTest, PoolsAreIndependent) {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([] {
      ThreadPool pool(2);
      for (int round = 0; round < 200; ++round) ExpectEachTaskOnce(pool, round);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

TEST(ThreadPoolTest, AnyThreadMayCallOneAfterTheOther) {
  ThreadPool pool(2);
  for (int round = 0; round < 20; ++round) {
    std::thread([&] { ExpectEachTaskOnce(pool, 100); }).join();
    ExpectEachTaskOnce(pool, 100);
  }
}

}  // namespace
}  // namespace jointkv
