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
  (void)cudaFree(scratch_);
  (void)cudaStreamDestroy(stream_);
}

void Queue::synchronize() { check(cudaStreamSynchronize(stream_), "waiting for the queue"); }

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
  if (outgrown_.empty() && uploads_used_ <= uploads_.bytes / 2) return;
  synchronize();
  uploads_used_ = 0;
  for (const Uploads& uploads : outgrown_) free_uploads(uploads);
  outgrown_.clear();
}

void* Queue::upload_bytes(const void* values, int64_t bytes) {
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

void* Queue::scratch(int64_t bytes) {
  if (bytes > scratch_bytes_) {
    synchronize();
    check(cudaFree(scratch_), "freeing scratch memory");
    scratch_bytes_ = bytes + bytes / 2;
    check(cudaMalloc(&scratch_, static_cast<size_t>(scratch_bytes_)), "allocating scratch memory");
  }
  return scratch_;
}

Queue& queue_of(const Stream& stream) {
  stream.queue()->begin_op();
  return *stream.queue();
}

}  // namespace octet::cuda
