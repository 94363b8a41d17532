// Graph: work of a CUDA stream that was recorded once and is started again as a whole, at the price of one launch. What
// is recorded are kernels and copies with their arguments: addresses and sizes are those of the recording, what lies
// there may differ every time.
#pragma once

#include <functional>

#include "kernels/memory.h"

namespace octet {

namespace cuda {
class RecordedWork;
}

class Graph {
 public:
  // Records what `work` asks of `stream`, which outlives the graph, instead of doing it. REQUIRES: the stream computes
  // on a CUDA device; the same work was done once before, so that everything it needs is there: the recording neither
  // allocates nor waits, nor brings arrays from the host (ends the process otherwise).
  Graph(Stream& stream, const std::function<void()>& work);
  ~Graph();
  Graph(Graph&& other) noexcept;
  Graph& operator=(Graph&&) = delete;

  // Queues the work on the stream.
  void launch() const;

 private:
  Stream* stream_;
  cuda::RecordedWork* work_;
};

}  // namespace octet
