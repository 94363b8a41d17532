// Queue: a CUDA stream, and the two memories that ops need beside their tensors: small arrays on their way from the
// host to the device, and scratch. Only the module's own sources include this.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "kernels/memory.h"

namespace octet::cuda {

// Ends the process when the device reports an error; `what` was being done.
void check(cudaError_t error, const char* what);

// Only one thread at a time calls these, not always the same one.
class Queue {
 public:
  Queue(int device, Arithmetic arithmetic);
  ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  int device() const { return device_; }
  Arithmetic arithmetic() const { return arithmetic_; }
  cudaStream_t stream() const { return stream_; }
  void synchronize();

  // The calling thread's device is this one from here on, and what was uploaded for ops before may go.
  void begin_op();

  // A copy of a host array on the device, for work queued before the next begin_op(); the host's may change at once.
  // Arrays of a step travel with each op that reads them; where steps become CUDA graphs they must live on the device.
  template <typename T>
  const T* upload(std::span<const T> values) {
    return static_cast<const T*>(upload_bytes(values.data(), static_cast<int64_t>(values.size_bytes())));
  }

  // Device memory that the next op may use as well, contents undefined.
  void* scratch(int64_t bytes);

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments&&... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "starting a kernel");
  }

 private:
  // Pinned memory and its twin on the device.
  struct Uploads {
    char* host = nullptr;
    char* device = nullptr;
    int64_t bytes = 0;
  };
  static Uploads make_uploads(int64_t bytes);
  static void free_uploads(const Uploads& uploads);
  void* upload_bytes(const void* values, int64_t bytes);

  const int device_;
  const Arithmetic arithmetic_;
  cudaStream_t stream_ = nullptr;
  // Filled from the front; begun anew, when the queue was waited for, at the first op that finds it half full.
  Uploads uploads_;
  int64_t uploads_used_ = 0;
  std::vector<Uploads> outgrown_;  // which this op's arguments still lie in
  void* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
};

// The stream's queue, at the begin of an op.
Queue& queue_of(const Stream& stream);

// Blocks of `threads` that cover n.
inline unsigned blocks_for(int64_t n, int64_t threads) { return static_cast<unsigned>((n + threads - 1) / threads); }

}  // namespace octet::cuda
