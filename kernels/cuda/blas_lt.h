// BlasLt: the products of matrices that cuBLASLt takes. The library is opened when a queue is (blas_lt_library.cc), so
// that the module loads where there is none; built without its header there is never one.
//
// The library is always asked whether and how it computes a product, and its answers are remembered: that it refuses is
// a normal outcome, which depends on its version and on the device. Fast accumulation of FP8, an option that is off
// unless set, stays off: an H100's tensor cores then keep about 14 bits of a sum, too few for rows of 16,384 columns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <string>

#include "kernels/cuda/gemm.h"

namespace octet::cuda {

struct BlasLtFunctions;  // blas_lt_functions.h

// Only the thread that uses the queue calls these.
class BlasLt {
 public:
  // For the calling thread's device, with memory there for the library to work in, which outlives it. Null, with *why
  // set, where the library or this device's part of it is missing.
  static std::unique_ptr<BlasLt> open(void* workspace, int64_t workspace_bytes, std::string* why);
  ~BlasLt();
  BlasLt(const BlasLt&) = delete;
  BlasLt& operator=(const BlasLt&) = delete;

  enum class Outcome : uint8_t {
    kRefused,   // nothing was done
    kUnscaled,  // out has the sums, before scales: such libraries or devices know none for rows
    kDone
  };
  Outcome multiply(cudaStream_t stream, const Product& product);

 private:
  struct State;
  explicit BlasLt(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace octet::cuda
