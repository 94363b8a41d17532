// What liboctet_cuda.so shows of itself: one table.
#include "kernels/cuda/module.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "kernels/cuda/calibrate.h"
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

// As the driver's tools write it: GPU-8-4-4-4-12 digits.
void write_uuid(const cudaUUID_t& uuid, char (&text)[48]) {
  size_t at = static_cast<size_t>(std::snprintf(text, sizeof(text), "GPU"));
  for (int i = 0; i < 16; ++i) {
    const char* const separator = i == 0 || i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "";
    at += static_cast<size_t>(std::snprintf(text + at, sizeof(text) - at, "%s%02x", separator,
                                            static_cast<unsigned>(static_cast<unsigned char>(uuid.bytes[i]))));
  }
}

DeviceFacts device_facts(int device) {
  check(cudaSetDevice(device), "choosing the device");
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for a device's memory");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "reading a device's properties");
  DeviceFacts facts = {
      .major = properties.major, .minor = properties.minor, .memory_bytes = static_cast<int64_t>(free)};
  write_uuid(properties.uuid, facts.uuid);
  std::memcpy(facts.name, properties.name, std::min(sizeof(facts.name), sizeof(properties.name)) - 1);
  return facts;
}

Queue* open_queue(int device, Arithmetic arithmetic) { return new Queue(device, arithmetic); }
void close_queue(Queue* queue) { delete queue; }
const char* lacks(const Queue* queue) { return queue->lacks().c_str(); }
void synchronize(Queue* queue) { queue->synchronize(); }
bool is_done(Queue* queue) { return queue->is_done(); }
void watch(Queue* queue, WatchFunction* watch, void* context) { queue->watch(watch, context); }

void* native_stream(Queue* queue) {
  check(cudaSetDevice(queue->device()), "choosing the device");
  return queue->stream();
}

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

void mark(Queue* queue) {
  queue->begin_op();
  queue->marks().set(queue->stream());
}

void take_marks(Queue* queue, double* seconds) {
  for (const double interval : queue->marks().take()) *seconds++ = interval;
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
                              .softmax_parts = softmax_parts,
                              .join_columns = join_columns};

constexpr ModuleTable kTable = {.abi = kModuleAbi,
                                .built_for = OCTET_CUDA_BUILT_FOR,
                                .device_count = device_count,
                                .device_facts = device_facts,
                                .open_queue = open_queue,
                                .close_queue = close_queue,
                                .lacks = lacks,
                                .synchronize = synchronize,
                                .is_done = is_done,
                                .watch = watch,
                                .native_stream = native_stream,
                                .allocate = allocate,
                                .release = release,
                                .allocate_page_locked = allocate_page_locked,
                                .release_page_locked = release_page_locked,
                                .begin_recording = begin_recording,
                                .end_recording = end_recording,
                                .launch_recorded = launch_recorded,
                                .release_recorded = release_recorded,
                                .mark = mark,
                                .take_marks = take_marks,
                                .read_seconds = read_seconds,
                                .sample = sample,
                                .backend = &kBackend,
                                .peer = &kPeerTable};

}  // namespace
}  // namespace octet::cuda

extern "C" __attribute__((visibility("default"))) const octet::cuda::ModuleTable* octet_cuda_module() {
  return &octet::cuda::kTable;
}
