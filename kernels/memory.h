// Buffer: the one owner of memory on a device. Stream: an ordered queue of work on a device and the first argument of
// every op; on the CPU it is the thread pool that the op runs on, and an op is done when it returns. On a CUDA device
// it is a queue of the CUDA module, an op is done when synchronize() returns, and the pool does what a step does on the
// host.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

#include "kernels/tensor.h"

namespace octet {

struct Backend;
class Stream;
namespace cpu {
class ThreadPool;
struct KernelTable;
}  // namespace cpu
namespace cuda {
class Queue;
struct ModuleTable;
}  // namespace cuda

// Zeroed memory; on the host 64-byte aligned (2 MiB aligned with transparent huge pages asked for when it is that
// large). Movable.
class Buffer {
 public:
  Buffer() = default;
  // On the host. Throws std::bad_alloc when the memory cannot be had: callers plan before they allocate
  // (worker/memory_plan.h).
  explicit Buffer(int64_t bytes);
  // Where `stream`, which outlives it, computes. Throws likewise.
  Buffer(int64_t bytes, const Stream& stream);
  // On the host, page-locked where `stream`, which outlives it, computes elsewhere: what queue_copy() copies from and
  // to. Throws likewise.
  static Buffer page_locked(int64_t bytes, const Stream& stream);
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
  const Stream* stream_ = nullptr;  // of device memory, and of page-locked memory
};

// The instruction family of the CPU kernels. kAvx512 means AVX-512 F/BW/DQ/VL/VBMI with BF16. kAvx2 and kAvx512 promise
// equal bits (see numerics_id()).
enum class Isa : uint8_t { kPortable, kAvx2, kAvx512 };

const char* name_of(Isa isa);
// The best family that this machine runs.
Isa best_isa();
// Whether this machine runs `isa`.
bool runs_here(Isa isa);

// Which order sums are made in. kReproducible: numerics' own, equal bits whatever the batch and however many ranks.
// kFast: whatever is fastest, a library's order included, and sums over ranks instead of slices; rounding points hold
// in both. The CPU back end only knows the former.
enum class Arithmetic : uint8_t { kReproducible, kFast };

// Only one thread at a time issues ops on a stream.
class Stream {
 public:
  struct CpuOptions {
    int threads = 1;       // including the calling one
    Isa isa = best_isa();  // REQUIRES: runs_here(isa)
    bool spin = true;      // idle pool threads spin a while before they sleep: only where each owns a core
  };
  explicit Stream(const CpuOptions& options);
  // On a device of an opened module that has passed check_device(); `host` is for what a step does on the host.
  Stream(const cuda::ModuleTable& module, int device, Arithmetic arithmetic, const CpuOptions& host);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  Device device() const { return module_ == nullptr ? Device::kCpu : Device::kCuda; }
  Arithmetic arithmetic() const { return arithmetic_; }
  // Waits until everything that was asked for is done.
  void synchronize();
  // Whether it is, without waiting.
  bool is_done() const;
  // From now on every wait for the device, in synchronize() as in an op that copies to the host, calls `watch` about
  // every 10 ms with how long this wait has lasted. It may end the process, or throw; then the stream cannot be used
  // again. Empty: nobody watches. On the CPU nothing waits.
  using Watch = std::function<void(std::chrono::milliseconds waited)>;
  void watch(Watch watch);

  const Backend& backend() const { return *backend_; }
  int threads() const;
  Isa isa() const { return isa_; }
  cpu::ThreadPool& pool() const { return *pool_; }
  const cpu::KernelTable& kernels() const { return *kernels_; }
  // REQUIRES: device() is kCuda.
  const cuda::ModuleTable& module() const { return *module_; }
  cuda::Queue* queue() const { return queue_; }

 private:
  std::unique_ptr<cpu::ThreadPool> pool_;
  const cpu::KernelTable* kernels_;
  Isa isa_;
  Arithmetic arithmetic_ = Arithmetic::kReproducible;
  const Backend* backend_;
  const cuda::ModuleTable* module_ = nullptr;
  cuda::Queue* queue_ = nullptr;
  Watch watch_;
};

}  // namespace octet
