// Copies from global to shared memory that go on while their threads compute (cp.async; Ampere and later), the dynamic
// shared memory that holds them, and the seam between two kernels.
//
// A thread's copies form groups in the order in which it commits them. wait_for_copies<n>() waits for all of the
// calling thread's groups but the n last; what other threads copied can be read after a barrier that they passed behind
// their wait.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace octet::cuda {

// The block's dynamic shared memory, 128-byte aligned; its size was given at the launch.
__device__ inline char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) char octet_dynamic_shared[];
  return octet_dynamic_shared;
#else
  return cuda_emulation::dynamic_shared();
#endif
}

// Begins to copy 16 bytes, both ends 16-byte aligned, past the L1 cache. Where `there` is false, nothing is read and
// the bytes become 0.
__device__ inline void copy_async(void* shared, const void* global, bool there) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(there ? 16 : 0)
               : "memory");
#elif !defined(__CUDACC__)
  cuda_emulation::copy_async(shared, global, there);
#endif
}

// What the L2 cache is told of bytes that are read once: they are the first to go, so that they drive nothing out.
__device__ inline uint64_t read_once() {
  uint64_t policy = 0;
#if defined(__CUDA_ARCH__)
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

// copy_async() of bytes under read_once().
__device__ inline void stream_async(void* shared, const void* global, bool there, [[maybe_unused]] uint64_t read_once) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(there ? 16 : 0), "l"(read_once)
               : "memory");
#elif !defined(__CUDACC__)
  cuda_emulation::copy_async(shared, global, there);
#endif
}

__device__ inline void commit_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  cuda_emulation::commit_copies();
#endif
}

template <int kUnderWay>
__device__ inline void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kUnderWay) : "memory");
#elif !defined(__CUDACC__)
  cuda_emulation::wait_for_copies(kUnderWay);
#endif
}

// In a kernel that was launched early (Queue::Launch): waits until everything queued before is done and can be seen.
// At once in any other kernel.
__device__ inline void wait_for_previous_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a next kernel that is launched early begin once every block has called this or ended.
__device__ inline void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace octet::cuda
