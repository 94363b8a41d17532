#include "kernels/graph.h"

#include <utility>

#include "kernels/cuda/module.h"

namespace octet {

Graph::Graph(Stream& stream, const std::function<void()>& work) : stream_(&stream) {
  OCTET_CHECK(stream.device() == Device::kCuda, "graphs are recorded on CUDA streams");
  stream.module().begin_recording(stream.queue());
  work();
  work_ = stream.module().end_recording(stream.queue());
}

Graph::~Graph() {
  if (work_ != nullptr) stream_->module().release_recorded(stream_->queue(), work_);
}

Graph::Graph(Graph&& other) noexcept : stream_(other.stream_), work_(std::exchange(other.work_, nullptr)) {}

void Graph::launch() const { stream_->module().launch_recorded(stream_->queue(), work_); }

}  // namespace octet
