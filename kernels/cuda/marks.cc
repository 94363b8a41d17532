#include "kernels/cuda/marks.h"

#include "kernels/cuda/queue.h"

namespace octet::cuda {

Marks::~Marks() {
  for (const cudaEvent_t event : events_) (void)cudaEventDestroy(event);
}

void Marks::set(cudaStream_t stream) {
  if (used_ == events_.size()) check(cudaEventCreate(&events_.emplace_back()), "making an event");
  check(cudaEventRecord(events_[used_++], stream), "recording an event");
}

std::vector<double> Marks::take() {
  std::vector<double> seconds;
  if (used_ > 0) check(cudaEventSynchronize(events_[used_ - 1]), "waiting for an event");
  for (size_t i = 1; i < used_; ++i) {
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, events_[i - 1], events_[i]), "reading the time between events");
    seconds.push_back(1e-3 * milliseconds);
  }
  used_ = 0;
  return seconds;
}

}  // namespace octet::cuda
