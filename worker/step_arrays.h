// StepArrays: a step's small arrays on their way to where its stream computes. They are laid out side by side in
// page-locked memory and sent in one copy; on the CPU they are read where they were laid out.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/memory.h"
#include "kernels/tensor.h"

namespace octet {

class StepArrays {
 public:
  // What an array of so many numbers takes.
  static int64_t bytes_of(int64_t numbers);

  // Room for arrays that take `bytes` together. `stream` outlives it.
  StepArrays(Stream& stream, int64_t bytes);

  // Forgets what was added. REQUIRES: the stream was synchronised after send().
  void begin() { used_ = 0; }
  // Where `values` will be once they are sent, I32.
  Tensor add(std::span<const int32_t> values, Shape shape);
  void send();

 private:
  Stream& stream_;
  Buffer host_, device_;  // the latter only where the stream computes elsewhere
  int64_t used_ = 0;
};

}  // namespace octet
