// ThreadPool: the CPU back end's threads and their scratch memory. A region costs about a microsecond while the threads
// spin; a thread that sleeps through a region is never waited for, because items are claimed, not assigned.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/memory.h"

namespace octet::cpu {

// Flushes denormals (results and inputs) for its lifetime, as the BF16 dot instruction always does, and restores the
// thread's mode afterwards.
class FlushDenormals {
 public:
  FlushDenormals();
  ~FlushDenormals();
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  uint64_t saved_;
};

// Only one thread at a time calls parallel_for and the scratch functions.
class ThreadPool {
 public:
  // `threads` counts the caller of parallel_for, so a pool of 1 starts none and never locks.
  ThreadPool(int threads, bool spin);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(item, worker) once for every item in [0, items), on any worker (0..threads()-1), and returns when all
  // are done. `nanoseconds` is a rough guess of the whole work: what is not worth sharing runs on the caller. REQUIRES:
  // items < 2^23; body does not throw.
  template <typename Body>
  void parallel_for(int64_t items, int64_t nanoseconds, const Body& body) {
    if (workers_.empty() || items <= 1 || nanoseconds < kWorthSharingNs) {
      for (int64_t item = 0; item < items; ++item) body(item, 0);
      return;
    }
    run(items, &body,
        [](const void* context, int64_t item, int worker) { (*static_cast<const Body*>(context))(item, worker); });
  }

  // A worker's own memory, at least `bytes` long and 64-byte aligned, contents undefined. Valid until its next call.
  void* scratch(int worker, int64_t bytes) { return grown(scratch_[worker], bytes); }
  // Memory that all workers of an operation share; asked for outside of parallel_for.
  void* shared_scratch(int64_t bytes) { return grown(shared_scratch_, bytes); }

 private:
  using Call = void (*)(const void* context, int64_t item, int worker);
  static constexpr int64_t kWorthSharingNs = 5000;

  static void* grown(Buffer& buffer, int64_t bytes);
  void run(int64_t items, const void* context, Call call);
  void work(int worker);
  void work_on_items(int worker);
  bool wait_for_items(uint64_t seen);

  // [epoch : 16][items : 24][next item : 24]. One word, so that a claim can never mix two regions: whoever gets an item
  // below the count of the same word knows that the region cannot end, nor call_ and context_ change, before it is
  // done.
  std::atomic<uint64_t> region_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  Call call_ = nullptr;
  const void* context_ = nullptr;

  const bool spin_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Buffer> scratch_;
  Buffer shared_scratch_;
  std::vector<std::thread> workers_;
};

}  // namespace octet::cpu
