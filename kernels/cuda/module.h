// The contract between the octet binary and liboctet_cuda.so: one exported function that returns one table. Both sides
// include this file and no CUDA header; nothing of CUDA crosses it. Errors of the device after the start end the
// process, with the cause: a rank that limps would leave the others waiting.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cuda/peer.h"
#include "kernels/cuda/sample.h"

namespace octet::cuda {

// Raised by every change to ModuleTable, to Backend, or to a type that either names.
constexpr uint32_t kModuleAbi = 8;

// An ordered queue of work on one device, and the memory its arguments travel through. The module's own.
class Queue;
// What was recorded on a queue, ready to be started.
class RecordedWork;

// Looks after a wait that has lasted `waited_ms`; may end the process.
using WatchFunction = void(void* context, int64_t waited_ms);

struct DeviceFacts {
  char name[256];
  char uuid[48];         // "GPU-5c9f...", as nvidia-smi -L shows it: no two in the world have the same
  int major, minor;      // compute capability
  int64_t memory_bytes;  // that can be had now
};

// Device memory that a queue takes for itself at the start when its arithmetic is fast: what is recommended for
// cuBLASLt on an H100, and room for the parts of sums that our own kernels share out.
constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;

struct ModuleTable {
  uint32_t abi;           // the first member for ever: of a module with another number nothing else is read
  const char* built_for;  // "CUDA 13.0, sm_80 sm_90a"
  // The devices of this machine that the driver shows this process. 0 with *why set when there are none.
  int (*device_count)(const char** why);
  // REQUIRES: device < device_count().
  DeviceFacts (*device_facts)(int device);
  Queue* (*open_queue)(int device, Arithmetic arithmetic);
  void (*close_queue)(Queue* queue);
  // What this queue has to do without, with the remedy; empty when nothing. As long as the queue lives.
  const char* (*lacks)(const Queue* queue);
  // Waits until all work of the queue is done.
  void (*synchronize)(Queue* queue);
  // Whether it is, without waiting.
  bool (*is_done)(Queue* queue);
  // From now on every wait for the queue, whichever function it happens in, calls watch(context, ...) about every 10
  // ms. Null: nobody watches.
  void (*watch)(Queue* queue, WatchFunction* watch, void* context);
  // The CUDA stream, for a library that puts work on it; the calling thread's device is the queue's from here on.
  void* (*native_stream)(Queue* queue);
  // Zeroed memory on the queue's device, 256-byte aligned; null when it cannot be had.
  void* (*allocate)(Queue* queue, int64_t bytes);
  void (*release)(Queue* queue, void* data);
  // Zeroed page-locked memory of the host, which the device copies from and to while the host goes on; null when it
  // cannot be had.
  void* (*allocate_page_locked)(Queue* queue, int64_t bytes);
  void (*release_page_locked)(Queue* queue, void* data);
  // Between the two the queue's ops are recorded and not done. See kernels/graph.h.
  void (*begin_recording)(Queue* queue);
  RecordedWork* (*end_recording)(Queue* queue);
  void (*launch_recorded)(Queue* queue, RecordedWork* work);
  void (*release_recorded)(Queue* queue, RecordedWork* work);
  // Notes, without waiting, when the work that the queue has so far is done.
  void (*mark)(Queue* queue);
  // Waits for the queue, writes the seconds from each mark to the next, and forgets the marks. REQUIRES: `seconds` has
  // room for as many as there were marks, less one.
  void (*take_marks)(Queue* queue, double* seconds);
  // Waits, and returns the seconds that the device takes to read `bytes` at `data` once with nothing done to them.
  // REQUIRES: both are multiples of 16, and bytes is above 0.
  double (*read_seconds)(Queue* queue, const void* data, int64_t bytes);
  // Chooses tokens from rows of logits on the device.
  void (*sample)(Queue* queue, const SampleArguments& arguments);
  const Backend* backend;
  const PeerTable* peer;
};

constexpr const char* kModuleSymbol = "octet_cuda_module";
using ModuleEntry = const ModuleTable*();

}  // namespace octet::cuda
