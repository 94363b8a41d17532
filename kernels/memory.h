// Buffer: the one owner of memory on a device. Stream: an ordered queue of work on a device and the first argument of
// every op; on the CPU it is the thread pool that the op runs on, and an op is done when it returns.
#pragma once

#include <cstdint>
#include <memory>

#include "kernels/tensor.h"

namespace octet {

namespace cpu {
class ThreadPool;
struct KernelTable;
}  // namespace cpu

// Zeroed, 64-byte aligned memory (2 MiB aligned with transparent huge pages asked for when it is that large). Movable.
class Buffer {
 public:
  Buffer() = default;
  // Throws std::bad_alloc when the memory cannot be had: callers plan before they allocate (worker/memory_plan.h).
  explicit Buffer(int64_t bytes, Device device = Device::kCpu);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  // The whole buffer, or its front, seen as a tensor. REQUIRES: it is large enough.
  Tensor tensor(DType dtype, Shape shape) const;

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  Device device_ = Device::kCpu;
};

// The instruction family of the CPU kernels. kAvx512 means AVX-512 F/BW/DQ/VL/VBMI with BF16. kAvx2 and kAvx512 promise equal
// bits (see numerics_id()).
enum class Isa : uint8_t { kPortable, kAvx2, kAvx512 };

const char* name_of(Isa isa);
// The best family that this machine runs.
Isa best_isa();
// Whether this machine runs `isa`.
bool runs_here(Isa isa);

// Only one thread at a time issues ops on a stream.
class Stream {
 public:
  struct CpuOptions {
    int threads = 1;          // including the calling one
    Isa isa = best_isa();     // REQUIRES: runs_here(isa)
    bool spin = true;         // idle pool threads spin a while before they sleep: only where each owns a core
  };
  explicit Stream(const CpuOptions& options);
  ~Stream();

  Device device() const { return Device::kCpu; }
  int threads() const;
  Isa isa() const { return isa_; }
  cpu::ThreadPool& pool() const { return *pool_; }
  const cpu::KernelTable& kernels() const { return *kernels_; }

 private:
  std::unique_ptr<cpu::ThreadPool> pool_;
  const cpu::KernelTable* kernels_;
  Isa isa_;
};

}  // namespace octet
