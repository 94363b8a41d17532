// A read of memory, the yardstick of every other kernel: parallel over 16-byte words, each thread several of them at a
// time and each warp neighbouring ones. Bound by the memory alone.
#include "kernels/cuda/calibrate.h"

#include <algorithm>

namespace octet::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kMostBlocks = 2048;  // several for each multiprocessor of any GPU
constexpr int kAtATime = 8;            // loads of a thread under way, so that the latency of memory is hidden

struct alignas(16) Word {
  uint32_t parts[4];
};

// The result is of no interest, but without one the compiler would take the loads away.
__global__ void read_kernel(const Word* data, int64_t words, int64_t stride, uint32_t* sink) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  uint32_t all = 0;
  for (int64_t at = thread; at < words; at += kAtATime * stride) {
    Word loaded[kAtATime];
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      if (at + i * stride < words) loaded[i] = data[at + i * stride];
    }
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      if (at + i * stride >= words) continue;
      all ^= loaded[i].parts[0] ^ loaded[i].parts[1] ^ loaded[i].parts[2] ^ loaded[i].parts[3];
    }
  }
  sink[thread] = all;
}

}  // namespace

double read_seconds(Queue* queue, const void* data, int64_t bytes) {
  const int64_t words = bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t blocks = std::min<int64_t>(kMostBlocks, blocks_for(words, kThreads));
  const int64_t threads = blocks * kThreads;
  queue->begin_op();
  auto* const sink = static_cast<uint32_t*>(queue->scratch(threads * int64_t{sizeof(uint32_t)}));
  Marks marks;
  marks.set(queue->stream());
  queue->launch(read_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, static_cast<const Word*>(data), words,
                threads, sink);
  marks.set(queue->stream());
  return marks.take()[0];
}

}  // namespace octet::cuda
