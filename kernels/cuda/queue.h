// Queue: a CUDA stream, and the memories that ops need beside their tensors: small arrays on their way from the host to
// the device, scratch, and a workspace that is there from the start. Only the module's own sources include this.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/cuda/marks.h"
#include "kernels/cuda/module.h"
#include "kernels/memory.h"

namespace octet::cuda {

class BlasLt;

// Ends the process when the device reports an error; `what` was being done.
void check(cudaError_t error, const char* what);

// A CUDA graph, ready to be launched.
class RecordedWork {
 public:
  explicit RecordedWork(cudaGraphExec_t graph) : graph_(graph) {}
  ~RecordedWork() { (void)cudaGraphExecDestroy(graph_); }
  RecordedWork(const RecordedWork&) = delete;
  cudaGraphExec_t graph() const { return graph_; }

 private:
  const cudaGraphExec_t graph_;
};

// Only one thread at a time calls these, not always the same one. While the queue records, whatever would allocate,
// wait, or bring an array from the host ends the process.
class Queue {
 public:
  Queue(int device, Arithmetic arithmetic);
  ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  int device() const { return device_; }
  Arithmetic arithmetic() const { return arithmetic_; }
  // Multiprocessors of the device.
  int processors() const { return processors_; }
  // Of shared memory that one block may have.
  int64_t most_shared_bytes() const { return most_shared_bytes_; }
  cudaStream_t stream() const { return stream_; }
  // Every wait for the device is this one, so that a watch sees them all.
  void synchronize();
  bool is_done();
  void watch(WatchFunction* watch, void* context) {
    watch_ = watch;
    watch_context_ = context;
  }

  // Called after every wait, to look at what the work may have left to tell. Null: nothing.
  void after_wait(std::function<void()> look) { after_wait_ = std::move(look); }

  Marks& marks() { return marks_; }

  // The calling thread's device is this one from here on, and what was uploaded for ops before may go.
  void begin_op();

  // The device's copy of a host array that comes with the model or its cut, not with a step: uploaded when it is first
  // asked for, kept until the queue goes, at one address for all arrays of equal contents.
  template <typename T>
  const T* constant(std::span<const T> values) {
    return static_cast<const T*>(constant_bytes({reinterpret_cast<const char*>(values.data()), values.size_bytes()}));
  }

  // A copy of a host array on the device, for work queued before the next begin_op(); the host's may change at once.
  template <typename T>
  const T* upload(std::span<const T> values) {
    return static_cast<const T*>(upload_bytes(values.data(), static_cast<int64_t>(values.size_bytes())));
  }

  // Device memory that the next op may use as well, contents undefined.
  void* scratch(int64_t bytes);

  void begin_recording();
  std::unique_ptr<RecordedWork> end_recording();
  void launch(const RecordedWork& work);

  // In fast mode, device memory in which blocks of a launch leave one another numbers, kMailboxWords for each
  // multiprocessor: all 0 before an op, and it leaves them so.
  static constexpr int64_t kMailboxWords = 1024;
  uint64_t* mailboxes() const { return mailboxes_; }

  // In fast mode, kWorkspaceBytes of device memory that the next op may use as well, and that never move: products of
  // matrices choose how they are computed by what fits.
  void* workspace() const { return workspace_; }

  // Null where the library is missing, or its orders of sums are not allowed.
  BlasLt* blas_lt() const { return blas_lt_.get(); }
  // As in ModuleTable.
  const std::string& lacks() const { return lacks_; }

  // How a kernel is started.
  struct Launch {
    dim3 grid, block;
    int64_t shared_bytes = 0;  // of dynamic shared memory
    // The kernel may begin while the one before it still runs, where device and code can (9.0 and later). Until it has
    // called wait_for_previous_kernels() it reads only what was written before that one was queued, and writes nothing.
    bool early = false;
  };

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), const Launch& how, Arguments&&... arguments) {
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = how.grid;
    config.blockDim = how.block;
    config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
    config.stream = stream_;
    config.attrs = &early;
    config.numAttrs = kEarlyLaunches && how.early && may_begin_early(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
    allow_shared(reinterpret_cast<const void*>(kernel), how.shared_bytes);
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "starting a kernel");
  }
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments&&... arguments) {
    launch(kernel, Launch{.grid = grid, .block = block}, std::forward<Arguments>(arguments)...);
  }

 private:
  void wait_watched();

  // The one switch of Launch::early: everything is as right without.
  static constexpr bool kEarlyLaunches = true;

  // Pinned memory and its twin on the device.
  struct Uploads {
    char* host = nullptr;
    char* device = nullptr;
    int64_t bytes = 0;
  };
  static Uploads make_uploads(int64_t bytes);
  static void free_uploads(const Uploads& uploads);
  void* upload_bytes(const void* values, int64_t bytes);
  const void* constant_bytes(std::string_view bytes);
  // Dynamic shared memory is asked for once by every kernel that has any: unasked it may have 48 KiB less its static
  // shared memory, of which the host does not know.
  void allow_shared(const void* kernel, int64_t bytes);

  // Whether the code that runs has been compiled to wait: newer devices may run what was compiled for 8.0.
  bool may_begin_early(const void* kernel);

  const int device_;
  const Arithmetic arithmetic_;
  int major_ = 0, processors_ = 0, most_shared_bytes_ = 0;
  cudaStream_t stream_ = nullptr;
  WatchFunction* watch_ = nullptr;
  void* watch_context_ = nullptr;
  // Filled from the front; begun anew, when the queue was waited for, at the first op that finds it half full.
  Uploads uploads_;
  int64_t uploads_used_ = 0;
  std::vector<Uploads> outgrown_;                        // which this op's arguments still lie in
  std::map<std::string, void*, std::less<>> constants_;  // by contents
  void forbid_while_recording(const char* what) const;

  bool recording_ = false;
  bool has_recorded_ = false;
  Marks marks_;
  void* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
  std::vector<void*> outgrown_scratch_;  // which recorded work still uses
  std::function<void()> after_wait_;
  uint64_t* mailboxes_ = nullptr;
  void* workspace_ = nullptr;
  std::unique_ptr<BlasLt> blas_lt_;  // computes in the workspace
  std::string lacks_;
  std::map<const void*, int64_t> shared_allowed_;  // by kernel
  std::map<const void*, bool> may_begin_early_;    // by kernel
};

// The stream's queue, at the begin of an op.
Queue& queue_of(const Stream& stream);

// Blocks of `threads` that cover n.
inline unsigned blocks_for(int64_t n, int64_t threads) { return static_cast<unsigned>((n + threads - 1) / threads); }

}  // namespace octet::cuda
