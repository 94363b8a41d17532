// The pool: a region is one atomic word that workers claim items from; idle workers spin for a while, then sleep.
#include "kernels/cpu/thread_pool.h"

#include <chrono>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/check.h"

namespace octet::cpu {
namespace {

constexpr int kFieldBits = 24;
constexpr uint64_t kFieldMask = (uint64_t{1} << kFieldBits) - 1;
constexpr auto kSpinFor = std::chrono::microseconds(200);

int64_t next_of(uint64_t region) { return static_cast<int64_t>(region & kFieldMask); }
int64_t items_of(uint64_t region) { return static_cast<int64_t>(region >> kFieldBits & kFieldMask); }
uint64_t epoch_of(uint64_t region) { return region >> (2 * kFieldBits); }

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

#if defined(__x86_64__)
constexpr unsigned kFlushBits = 0x8040;  // FTZ and DAZ
FlushDenormals::FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(static_cast<unsigned>(saved_) | kFlushBits); }
FlushDenormals::~FlushDenormals() { _mm_setcsr(static_cast<unsigned>(saved_)); }
#elif defined(__aarch64__)
FlushDenormals::FlushDenormals() {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" ::"r"(saved_ | uint64_t{1} << 24));
}
FlushDenormals::~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
FlushDenormals::FlushDenormals() : saved_(0) {}
FlushDenormals::~FlushDenormals() {}
#endif

ThreadPool::ThreadPool(int threads, bool spin) : spin_(spin), scratch_(threads) {
  OCTET_CHECK(threads >= 1, "a pool has at least the calling thread");
  workers_.reserve(threads - 1);
  for (int worker = 1; worker < threads; ++worker) workers_.emplace_back([this, worker] { work(worker); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stopping_.store(true);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void* ThreadPool::grown(Buffer& buffer, int64_t bytes) {
  // Half as much again, so that slowly growing batches stop allocating soon.
  if (buffer.bytes() < bytes) buffer = Buffer(bytes + bytes / 2);
  return buffer.data();
}

void ThreadPool::run(int64_t items, const void* context, Call call) {
  OCTET_CHECK(items < int64_t{1} << (kFieldBits - 1), std::to_string(items) + " items in one region");
  call_ = call;
  context_ = context;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t epoch = epoch_of(region_.load(std::memory_order_relaxed)) + 1;
  region_.store(epoch << (2 * kFieldBits) | static_cast<uint64_t>(items) << kFieldBits);
  if (sleepers_.load() > 0) {
    std::lock_guard lock(mutex_);
    wake_.notify_all();
  }
  work_on_items(0);
  for (int spins = 0; done_.load(std::memory_order_acquire) != items; ++spins) {
    // An item that takes this long may be waiting for this very core.
    if (!spin_ || spins > 20000) {
      std::this_thread::yield();
    } else {
      pause();
    }
  }
}

void ThreadPool::work_on_items(int worker) {
  uint64_t region = region_.load(std::memory_order_acquire);
  while (next_of(region) < items_of(region)) {
    region = region_.fetch_add(1, std::memory_order_acq_rel);
    if (next_of(region) >= items_of(region)) return;
    call_(context_, next_of(region), worker);
    done_.fetch_add(1, std::memory_order_release);
    region = region_.load(std::memory_order_acquire);
  }
}

void ThreadPool::work(int worker) {
  const FlushDenormals flush;
  uint64_t seen = 0;
  while (wait_for_items(seen)) {
    seen = epoch_of(region_.load(std::memory_order_acquire));
    work_on_items(worker);
  }
}

// Returns when a region newer than `seen` exists, false when the pool ends.
bool ThreadPool::wait_for_items(uint64_t seen) {
  const auto has_news = [&] { return epoch_of(region_.load()) != seen || stopping_.load(); };
  if (spin_) {
    const auto give_up = std::chrono::steady_clock::now() + kSpinFor;
    while (!has_news()) {
      for (int i = 0; i < 32 && !has_news(); ++i) pause();
      if (std::chrono::steady_clock::now() > give_up) break;
    }
  }
  if (!has_news()) {
    std::unique_lock lock(mutex_);
    // Announced before the last look: run() stores the region first and looks for sleepers second.
    sleepers_.fetch_add(1);
    wake_.wait(lock, has_news);
    sleepers_.fetch_sub(1);
  }
  return !stopping_.load();
}

}  // namespace octet::cpu
