// What liboctet_cuda.so shows of itself: one table.
#include "kernels/cuda/module.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/queue.h"

namespace octet::cuda {
namespace {

int device_count(const char** why) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return count;
  *why = error == cudaSuccess ? "the driver shows none" : cudaGetErrorString(error);
  return 0;
}

DeviceFacts device_facts(int device) {
  check(cudaSetDevice(device), "choosing the device");
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for a device's memory");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "reading a device's properties");
  DeviceFacts facts = {
      .name = {}, .major = properties.major, .minor = properties.minor, .memory_bytes = static_cast<int64_t>(free)};
  std::memcpy(facts.name, properties.name, std::min(sizeof(facts.name), sizeof(properties.name)) - 1);
  return facts;
}

Queue* open_queue(int device, Arithmetic arithmetic) { return new Queue(device, arithmetic); }
void close_queue(Queue* queue) { delete queue; }
void synchronize(Queue* queue) { queue->synchronize(); }

void* allocate(Queue* queue, int64_t bytes) {
  check(cudaSetDevice(queue->device()), "choosing the device");
  void* data = nullptr;
  if (cudaMalloc(&data, static_cast<size_t>(bytes)) != cudaSuccess) {
    (void)cudaGetLastError();  // the next call must not find it
    return nullptr;
  }
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), queue->stream()), "clearing memory");
  return data;
}

void release(Queue* queue, void* data) {
  queue->synchronize();
  check(cudaFree(data), "freeing memory");
}

void* allocate_page_locked(Queue* queue, int64_t bytes) {
  check(cudaSetDevice(queue->device()), "choosing the device");
  void* data = nullptr;
  if (cudaMallocHost(&data, static_cast<size_t>(bytes)) != cudaSuccess) {
    (void)cudaGetLastError();  // the next call must not find it
    return nullptr;
  }
  std::memset(data, 0, static_cast<size_t>(bytes));
  return data;
}

void release_page_locked(Queue* queue, void* data) {
  queue->synchronize();
  check(cudaFreeHost(data), "freeing page-locked memory");
}

void begin_recording(Queue* queue) { queue->begin_recording(); }
RecordedWork* end_recording(Queue* queue) { return queue->end_recording().release(); }
void launch_recorded(Queue* queue, RecordedWork* work) { queue->launch(*work); }
void release_recorded(Queue* queue, RecordedWork* work) {
  queue->synchronize();
  delete work;
}

constexpr Backend kBackend = {.copy = copy,
                              .queue_copy = queue_copy,
                              .pack_rows = pack_rows,
                              .quantize = quantize,
                              .linear = linear,
                              .linear_over_slices = linear_over_slices,
                              .add_tree_sum = add_tree_sum,
                              .tree_sum = tree_sum,
                              .copy_rows = copy_rows,
                              .rms_norm = rms_norm,
                              .silu_mul = silu_mul,
                              .rms_norm_and_quantize = rms_norm_and_quantize,
                              .silu_mul_and_quantize = silu_mul_and_quantize,
                              .rope_angles = rope_angles,
                              .rope_and_cache = rope_and_cache,
                              .attention = attention,
                              .copy_blocks = copy_blocks,
                              .softmax_parts = softmax_parts};

constexpr ModuleTable kTable = {.abi = kModuleAbi,
                                .built_for = OCTET_CUDA_BUILT_FOR,
                                .device_count = device_count,
                                .device_facts = device_facts,
                                .open_queue = open_queue,
                                .close_queue = close_queue,
                                .synchronize = synchronize,
                                .allocate = allocate,
                                .release = release,
                                .allocate_page_locked = allocate_page_locked,
                                .release_page_locked = release_page_locked,
                                .begin_recording = begin_recording,
                                .end_recording = end_recording,
                                .launch_recorded = launch_recorded,
                                .release_recorded = release_recorded,
                                .backend = &kBackend,
                                .peer = &kPeerTable};

}  // namespace
}  // namespace octet::cuda

extern "C" __attribute__((visibility("default"))) const octet::cuda::ModuleTable* octet_cuda_module() {
  return &octet::cuda::kTable;
}
