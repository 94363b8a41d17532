#include "kernels/cuda/queue.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>

#include "kernels/check.h"
#include "kernels/cuda/blas_lt.h"
#include "kernels/cuda/module.h"

namespace octet::cuda {
namespace {

constexpr int64_t kFirstUploads = int64_t{1} << 20;
constexpr int64_t kAlignment = 256;
constexpr std::chrono::milliseconds kBetweenLooks{10};

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

void check(cudaError_t error, const char* what) {
  OCTET_CHECK(error == cudaSuccess, std::string("CUDA, ") + what + ": " + cudaGetErrorString(error));
}

Queue::Queue(int device, Arithmetic arithmetic) : device_(device), arithmetic_(arithmetic) {
  check(cudaSetDevice(device), "choosing the device");
  check(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, device), "reading its compute capability");
  check(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device), "counting its multiprocessors");
  check(cudaDeviceGetAttribute(&most_shared_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking for its shared memory");
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "opening a stream");
  uploads_ = make_uploads(kFirstUploads);
  if (arithmetic != Arithmetic::kFast) return;
  const size_t bytes = static_cast<size_t>(processors_ * kMailboxWords) * sizeof(uint64_t);
  void* mailboxes = nullptr;
  check(cudaMalloc(&mailboxes, bytes), "allocating mailboxes");
  check(cudaMemsetAsync(mailboxes, 0, bytes, stream_), "emptying mailboxes");
  mailboxes_ = static_cast<uint64_t*>(mailboxes);
  check(cudaMalloc(&workspace_, kWorkspaceBytes), "allocating the workspace");
  std::string why;
  blas_lt_ = BlasLt::open(workspace_, kWorkspaceBytes, &why);
  if (blas_lt_ == nullptr) lacks_ = "cuBLASLt, so that Octet multiplies matrices more slowly itself: " + why;
}

Queue::~Queue() {
  (void)cudaSetDevice(device_);
  (void)cudaStreamSynchronize(stream_);
  outgrown_.push_back(uploads_);
  for (const Uploads& uploads : outgrown_) free_uploads(uploads);
  for (const auto& [contents, data] : constants_) (void)cudaFree(data);
  for (void* const scratch : outgrown_scratch_) (void)cudaFree(scratch);
  (void)cudaFree(scratch_);
  (void)cudaFree(mailboxes_);
  blas_lt_.reset();
  (void)cudaFree(workspace_);
  (void)cudaStreamDestroy(stream_);
}

void Queue::forbid_while_recording(const char* what) const {
  OCTET_CHECK(!recording_, std::string("while work is recorded as a graph, ") + what +
                               ": the same work must have been done once before, with arguments that do not change");
}

// Polling costs the core that the driver's own wait would spin on as well, and a wait that nothing can end is one that
// a lost peer makes endless.
void Queue::synchronize() {
  forbid_while_recording("the queue was to be waited for");
  watch_ == nullptr ? check(cudaStreamSynchronize(stream_), "waiting for the queue") : wait_watched();
  if (after_wait_) after_wait_();
}

void Queue::wait_watched() {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = Clock::now();
  Clock::time_point look = begin + kBetweenLooks;
  while (!is_done()) {
    std::this_thread::yield();
    const Clock::time_point now = Clock::now();
    if (now < look) continue;
    watch_(watch_context_, std::chrono::duration_cast<std::chrono::milliseconds>(now - begin).count());
    look = now + kBetweenLooks;
  }
}

bool Queue::is_done() {
  const cudaError_t error = cudaStreamQuery(stream_);
  if (error == cudaErrorNotReady) {
    (void)cudaGetLastError();  // it is kept as if it were an error
    return false;
  }
  check(error, "asking the queue whether it is done");
  return true;
}

Queue::Uploads Queue::make_uploads(int64_t bytes) {
  void* host = nullptr;
  void* device = nullptr;
  check(cudaMallocHost(&host, static_cast<size_t>(bytes)), "allocating pinned memory");
  check(cudaMalloc(&device, static_cast<size_t>(bytes)), "allocating device memory for arguments");
  return {static_cast<char*>(host), static_cast<char*>(device), bytes};
}

void Queue::free_uploads(const Uploads& uploads) {
  (void)cudaFreeHost(uploads.host);
  (void)cudaFree(uploads.device);
}

void Queue::begin_op() {
  check(cudaSetDevice(device_), "choosing the device");
  if (recording_ || (outgrown_.empty() && uploads_used_ <= uploads_.bytes / 2)) return;
  synchronize();
  uploads_used_ = 0;
  for (const Uploads& uploads : outgrown_) free_uploads(uploads);
  outgrown_.clear();
}

void* Queue::upload_bytes(const void* values, int64_t bytes) {
  forbid_while_recording("an array of the host was to be copied");
  if (uploads_used_ + bytes > uploads_.bytes) {
    outgrown_.push_back(uploads_);
    uploads_ = make_uploads(2 * aligned(std::max(bytes, uploads_.bytes)));
    uploads_used_ = 0;
  }
  char* const host = uploads_.host + uploads_used_;
  char* const device = uploads_.device + uploads_used_;
  if (bytes > 0) {
    std::memcpy(host, values, static_cast<size_t>(bytes));
    check(cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream_),
          "copying arguments to the device");
  }
  uploads_used_ += aligned(bytes);
  return device;
}

const void* Queue::constant_bytes(std::string_view bytes) {
  const auto found = constants_.find(bytes);
  if (found != constants_.end()) return found->second;
  forbid_while_recording("a constant was to be copied");
  void* data = nullptr;
  check(cudaMalloc(&data, std::max<size_t>(bytes.size(), 1)), "allocating device memory for constants");
  check(cudaMemcpyAsync(data, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream_), "copying constants");
  synchronize();
  constants_.emplace(bytes, data);
  return data;
}

void* Queue::scratch(int64_t bytes) {
  if (bytes > scratch_bytes_) {
    forbid_while_recording("scratch memory was to grow");
    synchronize();
    if (has_recorded_) {
      outgrown_scratch_.push_back(scratch_);
    } else {
      check(cudaFree(scratch_), "freeing scratch memory");
    }
    scratch_bytes_ = bytes + bytes / 2;
    check(cudaMalloc(&scratch_, static_cast<size_t>(scratch_bytes_)), "allocating scratch memory");
  }
  return scratch_;
}

// Other threads may go on using the device as they like.
void Queue::begin_recording() {
  forbid_while_recording("another recording was begun");
  begin_op();
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "beginning to record a graph");
  recording_ = true;
}

std::unique_ptr<RecordedWork> Queue::end_recording() {
  recording_ = false;
  has_recorded_ = true;
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream_, &graph), "recording a graph");
  cudaGraphExec_t ready = nullptr;
  check(cudaGraphInstantiate(&ready, graph, 0), "preparing a graph");
  check(cudaGraphDestroy(graph), "freeing a graph");
  check(cudaGraphUpload(ready, stream_), "bringing a graph to the device");
  return std::make_unique<RecordedWork>(ready);
}

void Queue::launch(const RecordedWork& work) {
  begin_op();
  check(cudaGraphLaunch(work.graph(), stream_), "starting a graph");
}

void Queue::allow_shared(const void* kernel, int64_t bytes) {
  if (bytes == 0) return;
  int64_t& allowed = shared_allowed_[kernel];
  if (bytes <= allowed) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "asking for shared memory");
  // Such kernels keep nothing in the L1 cache, which is the same memory: so that two blocks fit where they can.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "asking for shared memory");
  allowed = bytes;
}

bool Queue::may_begin_early(const void* kernel) {
  if (major_ < 9) return false;
  const auto [known, is_new] = may_begin_early_.try_emplace(kernel, false);
  if (is_new) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "asking what a kernel was compiled for");
    known->second = attributes.ptxVersion >= 90;
  }
  return known->second;
}

Queue& queue_of(const Stream& stream) {
  stream.queue()->begin_op();
  return *stream.queue();
}

}  // namespace octet::cuda
