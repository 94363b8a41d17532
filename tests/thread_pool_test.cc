// The pool: every item exactly once, whatever the number of threads, the length of regions and who sleeps.
#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <limits>
#include <thread>
#include <vector>

namespace octet::cpu {
namespace {

constexpr int64_t kAlways = int64_t{1} << 40;  // nanoseconds: worth sharing

class ThreadPoolTest : public testing::TestWithParam<bool> {};  // spin
INSTANTIATE_TEST_SUITE_P(SpinningAndSleeping, ThreadPoolTest, testing::Bool(),
                         [](const auto& info) { return info.param ? "spinning" : "sleeping"; });

TEST_P(ThreadPoolTest, DoesEveryItemOfManyShortRegionsOnce) {
  for (int threads = 1; threads <= 4; ++threads) {
    ThreadPool pool(threads, GetParam());
    std::vector<int> times(97);
    for (int region = 0; region < 500; ++region) {
      pool.parallel_for(region % 98, kAlways, [&](int64_t item, int worker) {
        ASSERT_LT(worker, threads);
        ++times[item];
      });
    }
    for (int item = 0; item < 97; ++item) {
      int expected = 0;
      for (int region = 0; region < 500; ++region) expected += region % 98 > item;
      EXPECT_EQ(times[item], expected);
    }
  }
}

TEST_P(ThreadPoolTest, WakesSleepersAfterAPause) {
  ThreadPool pool(3, GetParam());
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // longer than idle threads spin
    // Each item waits for another thread's: only possible when all three take part.
    std::atomic<int> here{0};
    pool.parallel_for(3, kAlways, [&](int64_t, int) {
      ++here;
      while (here < 3) std::this_thread::yield();
    });
    EXPECT_EQ(here, 3);
  }
}

TEST_P(ThreadPoolTest, KeepsSmallWorkOnTheCaller) {
  ThreadPool pool(4, GetParam());
  const std::thread::id caller = std::this_thread::get_id();
  pool.parallel_for(100, 10, [&](int64_t, int worker) {
    EXPECT_EQ(worker, 0);
    EXPECT_EQ(std::this_thread::get_id(), caller);
  });
}

TEST_P(ThreadPoolTest, GivesEachWorkerItsOwnScratchThatGrows) {
  ThreadPool pool(4, GetParam());
  for (int64_t bytes = 64; bytes < (1 << 20); bytes *= 5) {
    std::atomic<int> wrong{0};
    pool.parallel_for(64, kAlways, [&](int64_t item, int worker) {
      volatile int64_t* const mine = static_cast<int64_t*>(pool.scratch(worker, bytes));
      mine[0] = item;
      mine[bytes / 8 - 1] = item;
      std::this_thread::yield();
      if (mine[0] != item || mine[bytes / 8 - 1] != item) ++wrong;
    });
    EXPECT_EQ(wrong, 0);
  }
}

TEST_P(ThreadPoolTest, FlushesDenormalsInItsThreadsAndOnlyThereForTheCaller) {
  ThreadPool pool(2, GetParam());
  volatile float tiny = 1e-38f;
  const auto halves_to_zero = [&] { return tiny * 0.5f == 0.0f; };
  ASSERT_FALSE(halves_to_zero());
  {
    const FlushDenormals flush;
    std::atomic<int> flushed{0};
    std::atomic<int> here{0};
    pool.parallel_for(2, kAlways, [&](int64_t, int) {
      ++here;
      while (here < 2) std::this_thread::yield();
      flushed += halves_to_zero();
    });
    EXPECT_EQ(flushed, 2);
  }
  EXPECT_FALSE(halves_to_zero());
}

}  // namespace
}  // namespace octet::cpu
