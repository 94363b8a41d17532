// Stopwatch: how long the pieces of a stream's work take, on the device itself where that is not the CPU.
#pragma once

#include <chrono>
#include <vector>

#include "kernels/memory.h"

namespace octet {

// Only the thread that issues ops on the stream calls these. One at a time for each stream.
class Stopwatch {
 public:
  // `stream` outlives it.
  explicit Stopwatch(Stream& stream) : stream_(stream) {}

  // Notes when all that the stream was asked for so far is done; does not wait for it.
  void mark();
  // Waits; the seconds from each mark to the next. The marks are forgotten.
  std::vector<double> take();

 private:
  Stream& stream_;
  size_t marks_ = 0;
  std::vector<std::chrono::steady_clock::time_point> times_;  // of the marks, on the CPU
};

}  // namespace octet
