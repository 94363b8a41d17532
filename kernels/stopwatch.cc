#include "kernels/stopwatch.h"

#include "kernels/cuda/module.h"

namespace octet {

void Stopwatch::mark() {
  ++marks_;
  if (stream_.device() == Device::kCuda) return stream_.module().mark(stream_.queue());
  times_.push_back(std::chrono::steady_clock::now());
}

std::vector<double> Stopwatch::take() {
  std::vector<double> seconds(marks_ > 0 ? marks_ - 1 : 0);
  marks_ = 0;
  if (stream_.device() == Device::kCuda) {
    stream_.module().take_marks(stream_.queue(), seconds.data());
    return seconds;
  }
  for (size_t i = 0; i < seconds.size(); ++i) {
    seconds[i] = std::chrono::duration<double>(times_[i + 1] - times_[i]).count();
  }
  times_.clear();
  return seconds;
}

}  // namespace octet
