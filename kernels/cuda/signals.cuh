// How blocks of different GPUs, or of different processes on one, tell one another that something is done: a number in
// memory that all of them reach, stored with release and loaded with acquire at the scope of the system. And the clock
// that ends a wait.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if !defined(__CUDACC__)
#include <atomic>
#include <chrono>
#endif

namespace octet::cuda {

#if defined(__CUDACC__)

__device__ inline void store_release(uint64_t* at, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

__device__ inline uint64_t load_acquire(const uint64_t* at) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}

// Nanoseconds of a clock that runs everywhere on a GPU.
__device__ inline uint64_t clock_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Between two looks at a number that has not come.
__device__ inline void pause() {}

// Brings a line of memory nearer; nothing else.
__device__ inline void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

#else

inline void store_release(uint64_t* at, uint64_t value) {
  std::atomic_ref(*at).store(value, std::memory_order_release);
}
inline uint64_t load_acquire(const uint64_t* at) {
  return std::atomic_ref(*const_cast<uint64_t*>(at)).load(std::memory_order_acquire);
}
inline uint64_t clock_ns() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
}
inline void pause() { __nanosleep(0); }
inline void prefetch(const void*) {}

#endif

}  // namespace octet::cuda
