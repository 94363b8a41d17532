// The contract between the octet binary and liboctet_cuda.so: one exported function that returns one table. Both sides
// include this file and no CUDA header; nothing of CUDA crosses it. Errors of the device after the start end the
// process, with the cause: a rank that limps would leave the others waiting.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cuda/peer.h"

namespace octet::cuda {

// Raised by every change to ModuleTable, to Backend, or to a type that either names.
constexpr uint32_t kModuleAbi = 4;

// An ordered queue of work on one device, and the memory its arguments travel through. The module's own.
class Queue;
// What was recorded on a queue, ready to be started.
class RecordedWork;

struct DeviceFacts {
  char name[256];
  int major, minor;      // compute capability
  int64_t memory_bytes;  // that can be had now
};

struct ModuleTable {
  uint32_t abi;           // the first member for ever: of a module with another number nothing else is read
  const char* built_for;  // "CUDA 13.0, sm_80 sm_90a"
  // The devices of this machine that the driver shows this process. 0 with *why set when there are none.
  int (*device_count)(const char** why);
  // REQUIRES: device < device_count().
  DeviceFacts (*device_facts)(int device);
  Queue* (*open_queue)(int device, Arithmetic arithmetic);
  void (*close_queue)(Queue* queue);
  // Waits until all work of the queue is done.
  void (*synchronize)(Queue* queue);
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
  const Backend* backend;
  const PeerTable* peer;
};

constexpr const char* kModuleSymbol = "octet_cuda_module";
using ModuleEntry = const ModuleTable*();

}  // namespace octet::cuda
