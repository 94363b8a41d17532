// Memory of both back ends, and the choice of the instruction family at run time.
#include "kernels/memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "kernels/check.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cuda/module.h"

namespace octet {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

int64_t rounded_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

// Zero pages of the kernel, aligned for huge ones: the spare ends of a larger mapping are given back.
void* map_zeroed(int64_t bytes) {
  const int64_t wanted = rounded_up(bytes, kHugePage);
  void* mapped = mmap(nullptr, wanted + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(mapped);
  const int64_t skip = rounded_up(reinterpret_cast<intptr_t>(begin), kHugePage) - reinterpret_cast<intptr_t>(begin);
  if (skip > 0) munmap(begin, skip);
  if (skip < kHugePage) munmap(begin + skip + wanted, kHugePage - skip);
  // Advice: without huge pages everything still works, with more TLB misses.
  (void)madvise(begin + skip, wanted, MADV_HUGEPAGE);
  return begin + skip;
}

void* allocate_zeroed(int64_t bytes) {
  if (bytes >= kHugePage) return map_zeroed(bytes);
  const int64_t wanted = rounded_up(bytes, 64);
  void* data = std::aligned_alloc(64, wanted);
  if (data == nullptr) throw std::bad_alloc();
  std::memset(data, 0, wanted);
  return data;
}

void release(void* data, int64_t bytes, Device device, const Stream* stream) {
  if (data == nullptr) return;
  if (device == Device::kCuda) {
    stream->module().release(stream->queue(), data);
  } else if (stream != nullptr) {
    stream->module().release_page_locked(stream->queue(), data);
  } else if (bytes >= kHugePage) {
    munmap(data, rounded_up(bytes, kHugePage));
  } else {
    std::free(data);
  }
}

}  // namespace

Buffer::Buffer(int64_t bytes) : bytes_(bytes) {
  OCTET_CHECK(bytes >= 0, "a buffer of " + std::to_string(bytes) + " bytes");
  if (bytes > 0) data_ = allocate_zeroed(bytes);
}

Buffer::Buffer(int64_t bytes, const Stream& stream) {
  if (stream.device() == Device::kCpu) {
    *this = Buffer(bytes);
    return;
  }
  OCTET_CHECK(bytes >= 0, "a buffer of " + std::to_string(bytes) + " bytes");
  bytes_ = bytes;
  device_ = Device::kCuda;
  stream_ = &stream;
  if (bytes > 0) data_ = stream.module().allocate(stream.queue(), bytes);
  if (bytes > 0 && data_ == nullptr) throw std::bad_alloc();
}

Buffer Buffer::page_locked(int64_t bytes, const Stream& stream) {
  if (stream.device() == Device::kCpu) return Buffer(bytes);
  OCTET_CHECK(bytes >= 0, "a buffer of " + std::to_string(bytes) + " bytes");
  Buffer buffer;
  buffer.bytes_ = bytes;
  buffer.stream_ = &stream;
  if (bytes > 0) buffer.data_ = stream.module().allocate_page_locked(stream.queue(), bytes);
  if (bytes > 0 && buffer.data_ == nullptr) throw std::bad_alloc();
  return buffer;
}

Buffer::~Buffer() { release(data_, bytes_, device_, stream_); }

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      device_(other.device_),
      stream_(other.stream_) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this != &other) {
    release(data_, bytes_, device_, stream_);
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
    device_ = other.device_;
    stream_ = other.stream_;
  }
  return *this;
}

Tensor Buffer::tensor(DType dtype, Shape shape) const {
  const Tensor view(data_, dtype, shape, device_);
  OCTET_CHECK(view.bytes() <= bytes_, std::string("a ") + name_of(dtype) + " " + shape.to_string() +
                                          " tensor in a buffer of " + std::to_string(bytes_) + " bytes");
  return view;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "?";
}

bool runs_here(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return runs_here(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::kPortable;
}

Isa best_isa() {
  if (runs_here(Isa::kAvx512)) return Isa::kAvx512;
  return runs_here(Isa::kAvx2) ? Isa::kAvx2 : Isa::kPortable;
}

Stream::Stream(const CpuOptions& options)
    : pool_(std::make_unique<cpu::ThreadPool>(options.threads, options.spin)),
      kernels_(&cpu::kernels_for(options.isa)),
      isa_(options.isa),
      backend_(&cpu::backend()) {}

Stream::Stream(const cuda::ModuleTable& module, int device, Arithmetic arithmetic, const CpuOptions& host)
    : Stream(host) {
  arithmetic_ = arithmetic;
  backend_ = module.backend;
  module_ = &module;
  queue_ = module.open_queue(device, arithmetic);
}

Stream::~Stream() {
  if (module_ != nullptr) module_->close_queue(queue_);
}

void Stream::synchronize() {
  if (module_ != nullptr) module_->synchronize(queue_);
}

bool Stream::is_done() const { return module_ == nullptr || module_->is_done(queue_); }

void Stream::watch(Watch watch) {
  watch_ = std::move(watch);
  if (module_ == nullptr) return;
  const auto look = [](void* context, int64_t waited_ms) {
    (*static_cast<Watch*>(context))(std::chrono::milliseconds(waited_ms));
  };
  module_->watch(queue_, watch_ ? +look : nullptr, &watch_);
}

int Stream::threads() const { return pool_->threads(); }

}  // namespace octet
