// Marks: when the work of a CUDA stream was done, place by place. Only the module's own sources include this.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <vector>

namespace octet::cuda {

// Only one thread at a time calls these.
class Marks {
 public:
  Marks() = default;
  ~Marks();
  Marks(const Marks&) = delete;
  Marks& operator=(const Marks&) = delete;

  // Notes when the work that `stream` has so far is done.
  void set(cudaStream_t stream);
  // Waits for the last mark; seconds from each to the next. The marks are forgotten, their events kept for others.
  std::vector<double> take();

 private:
  std::vector<cudaEvent_t> events_;
  size_t used_ = 0;
};

}  // namespace octet::cuda
