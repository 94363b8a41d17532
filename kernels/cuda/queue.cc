#include "kernels/cuda/queue.h"

#include <algorithm>
#include <string>

#include "kernels/check.h"

namespace octet::cuda {
namespace {

constexpr int64_t kFirstUploads = int64_t{1} << 20;
constexpr int64_t kAlignment = 256;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

void check(cudaError_t error, const char* what) {
  OCTET_CHECK(error == cudaSuccess, std::string("CUDA, ") + what + ": " + cudaGetErrorString(error));
}

Queue::Queue(int device, Arithmetic arithmetic) : device_(device), arithmetic_(arithmetic) {
  check(cudaSetDevice(device), "choosing the device");
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "opening a stream");
  uploads_ = make_uploads(kFirstUploads);
}

Queue::~Queue() {
  (void)cudaSetDevice(device_);
  (void)cudaStreamSynchronize(stream_);
  outgrown_.push_back(uploads_);
  for (const Uploads& uploads : outgrown_) free_uploads(uploads);
  for (const auto& [contents, data] : constants_) (void)cudaFree(data);
  for (void* const scratch : outgrown_scratch_) (void)cudaFree(scratch);
  (void)cudaFree(scratch_);
  (void)cudaStreamDestroy(stream_);
}

void Queue::forbid_while_recording(const char* what) const {
  OCTET_CHECK(!recording_, std::string("while work is recorded as a graph, ") + what +
                               ": the same work must have been done once before, with arguments that do not change");
}

void Queue::synchronize() {
  forbid_while_recording("the queue was to be waited for");
  check(cudaStreamSynchronize(stream_), "waiting for the queue");
  if (after_wait_) after_wait_();
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

Queue& queue_of(const Stream& stream) {
  stream.queue()->begin_op();
  return *stream.queue();
}

}  // namespace octet::cuda
