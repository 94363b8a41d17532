// The part of <cuda_runtime.h> that kernels/cuda uses, computed by this machine's CPU, so that the whole CUDA module
// can be built by a plain compiler and tested where there is no GPU: its indices and its arithmetic, not its speed.
//
// Blocks run one after the other. A block's threads are fibers of the calling thread, which take turns at barriers and
// shuffles in an order that changes from turn to turn: a result that depends on the order is a missing barrier. What
// would hang or be undefined on a GPU (a thread that left before a barrier, a lane that a shuffle names in vain) ends
// the process with a sentence. The host cannot touch device memory: outside of blocks and copies it is not mapped. With
// AddressSanitizer it is the heap, so that every access out of bounds is seen.
//
// Floating point: the caller builds without contraction, blocks run with denormals flushed, and __fmaf_rn, __fdiv_rn
// and
// __fsqrt_rn are the IEEE 754 operations that they are on the device.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <span>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // blocks of one thread run one after the other

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_emulation {

constexpr size_t kMemoryBytes = size_t{1} << 33;  // of the device
constexpr int kGarbage = 0xCB;
// Few, so that kernels which share a matrix out over them cut small ones in odd places, but not to single steps.
constexpr int kProcessors = 7;
// Bytes of dynamic shared memory. On a device a kernel may have 48 KiB unasked, less its static shared memory, of which
// the emulation does not know: some is assumed.
constexpr size_t kSharedUnasked = 40 << 10, kMostShared = 227 << 10;

// Runs `kernel` for every thread of the grid; every block finds `shared_bytes` of garbage as dynamic shared memory.
void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel, size_t shared_bytes = 0);
char* dynamic_shared();

// Memory of the device, filled with garbage as a device's is; null beyond kMemoryBytes.
void* allocate(size_t bytes);
void release(void* data);

// Device memory can be touched while one of these lives, by all threads.
class DeviceAccess {
 public:
  DeviceAccess();
  ~DeviceAccess();
  DeviceAccess(const DeviceAccess&) = delete;
};

void block_barrier();
// Barrier of the named lanes of the calling thread's warp.
void warp_barrier(unsigned lanes);
// An exchange of the named lanes: each brings some words, reads what others brought, and ends it.
void bring(unsigned lanes, std::span<const uint32_t> words);
std::span<const uint32_t> brought_by(int lane);
void end_exchange(unsigned lanes);
// Lets the block's other threads and other host threads run.
void yield();
// The bits that lane `from` of the warp brought to the same shuffle.
uint32_t shuffle(unsigned lanes, uint32_t bits, int from);
// Bit i: whether lane i said yes.
uint32_t vote(unsigned lanes, bool yes);
// A warp's tensor core, as kernels/cuda/mma.cuh says.
void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void multiply_e4m3(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
// As kernels/cuda/load_matrix.cuh says.
void load_matrices(uint32_t (&words)[4], const void* row, bool transposed);
// Two BF16 values times 2^exponent, denormals heeded. Products must be representable.
uint32_t scale_bf16(uint32_t pair, int exponent);
int lane();

// The calling thread's copies to shared memory, as kernels/cuda/copy_async.cuh says. They are made when they are waited
// for, and from their begin on what they replace is garbage, so that what is read too early or too late is; a thread
// that ends before ends the process.
void copy_async(void* shared, const void* global, bool there);
void commit_copies();
void wait_for_copies(size_t under_way);

}  // namespace cuda_emulation

// Of the thread that runs.
inline constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- Device functions

inline void __syncthreads() { cuda_emulation::block_barrier(); }
// Not 0 if no thread brought 0.
inline int __syncthreads_and(int mine) {
  static thread_local int all;  // of the block
  all = 1;
  cuda_emulation::block_barrier();
  if (mine == 0) all = 0;
  cuda_emulation::block_barrier();
  const int result = all;
  cuda_emulation::block_barrier();
  return result;
}
// Who waits for another block must let it run.
inline void __nanosleep(unsigned) { cuda_emulation::yield(); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_system() { __threadfence(); }
inline void __syncwarp(unsigned lanes = 0xFFFFFFFF) { cuda_emulation::warp_barrier(lanes); }

template <typename T>
T __shfl_sync(unsigned lanes, T value, int from) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = cuda_emulation::shuffle(lanes, bits, from);
  std::memcpy(&value, &bits, 4);
  return value;
}
// The first `delta` lanes keep their own value.
template <typename T>
T __shfl_up_sync(unsigned lanes, T value, int delta) {
  const int lane = cuda_emulation::lane();
  return __shfl_sync(lanes, value, lane < delta ? lane : lane - delta);
}
inline unsigned __ballot_sync(unsigned lanes, bool yes) { return cuda_emulation::vote(lanes, yes); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
// Lanes outside the segment of `width` keep their own value.
template <typename T>
T __shfl_down_sync(unsigned lanes, T value, int delta, int width = 32) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const int lane = cuda_emulation::lane();
  const bool inside = lane % width + delta < width;
  bits = cuda_emulation::shuffle(lanes, bits, inside ? lane + delta : lane);
  std::memcpy(&value, &bits, 4);
  return value;
}
template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int change) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = cuda_emulation::shuffle(lanes, bits, cuda_emulation::lane() ^ change);
  std::memcpy(&value, &bits, 4);
  return value;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
inline unsigned atomicMin(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at = std::min(before, value);
  return before;
}
inline unsigned atomicMax(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at = std::max(before, value);
  return before;
}

inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}

inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }

// ---- Host functions: they do at once what a stream would do later, unless it records

enum cudaError_t {
  cudaSuccess,
  cudaErrorMemoryAllocation,
  cudaErrorInvalidValue,
  cudaErrorNotReady,
  cudaErrorStreamCaptureUnsupported,
  cudaErrorInvalidResourceHandle,
  cudaErrorPeerAccessAlreadyEnabled
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum { cudaStreamNonBlocking };
enum { cudaHostAllocMapped };
enum { cudaIpcMemLazyEnablePeerAccess };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };

namespace cuda_emulation {

using Work = std::function<void()>;
struct Stream {
  bool records = false;
  std::vector<Work> recorded;
  // How many of the things that somebody else (a library of collectives) has put on the stream are not done.
  std::atomic<int> unfinished = 0;

  // Does `work`, or takes it down. It holds by value what it is given.
  cudaError_t put(Work work) {
    if (records) {
      recorded.push_back(std::move(work));
    } else {
      work();
    }
    return cudaSuccess;
  }
};

}  // namespace cuda_emulation

using cudaStream_t = cuda_emulation::Stream*;
using cudaGraph_t = std::vector<cuda_emulation::Work>*;
using cudaGraphExec_t = std::vector<cuda_emulation::Work>*;

struct cudaUUID_t {
  char bytes[16];
};

struct cudaDeviceProp {
  char name[256];
  cudaUUID_t uuid;
  int major, minor;
};

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaFuncAttributes {
  int ptxVersion;
};

// Between processes that were forked when the emulation was there already: they have its memory in common.
struct cudaIpcMemHandle_t {
  void* data;
  char reserved[56];
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum { cudaSharedmemCarveoutMaxShared = 100 };

namespace cuda_emulation {
// Dynamic shared memory that a kernel may have.
inline thread_local std::map<const void*, size_t> shared_allowed;
}  // namespace cuda_emulation

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (static_cast<size_t>(value) > cuda_emulation::kMostShared) return cudaErrorInvalidValue;
  cuda_emulation::shared_allowed[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const size_t shared = config->dynamicSmemBytes;
  const auto allowed = cuda_emulation::shared_allowed.find(reinterpret_cast<const void*>(kernel));
  if (shared > cuda_emulation::kSharedUnasked &&
      (allowed == cuda_emulation::shared_allowed.end() || shared > allowed->second)) {
    return cudaErrorInvalidValue;
  }
  std::tuple<Parameters...> held(std::forward<Arguments>(arguments)...);
  return config->stream->put(
      [grid = config->gridDim, block = config->blockDim, shared, kernel, held = std::move(held)] {
        cuda_emulation::run_grid(
            grid, block, [&] { std::apply(kernel, held); }, shared);
      });
}

using cudaEvent_t = std::chrono::steady_clock::time_point*;
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new std::chrono::steady_clock::time_point;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *event = std::chrono::steady_clock::now();
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = std::chrono::duration<float, std::milli>(*to - *from).count();
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorNotReady:
      return "not ready";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    default:
      return "invalid resource handle";
  }
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 8;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  *properties = {.name = "emulated", .uuid = {.bytes = {static_cast<char>(device + 1)}}, .major = 9, .minor = 0};
  return cudaSuccess;
}
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_emulation::kProcessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(cuda_emulation::kMostShared);
      break;
  }
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = cuda_emulation::kMemoryBytes;
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, int) {
  *stream = new cuda_emulation::Stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  while (stream->unfinished != 0) std::this_thread::yield();
  return stream->records ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
inline cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (stream->records) return cudaErrorStreamCaptureUnsupported;
  return stream->unfinished == 0 ? cudaSuccess : cudaErrorNotReady;
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream->records = true;
  stream->recorded.clear();
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  stream->records = false;
  *graph = new std::vector<cuda_emulation::Work>(std::move(stream->recorded));
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* ready, cudaGraph_t graph, unsigned long long) {
  *ready = new std::vector<cuda_emulation::Work>(*graph);
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  for (const cuda_emulation::Work& work : *graph) stream->put(work);
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = cuda_emulation::allocate(bytes);
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFree(void* data) {
  cuda_emulation::release(data);
  return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void** data, size_t bytes) {
  *data = std::malloc(bytes);
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* data) {
  std::free(data);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  return stream->put([=] {
    const cuda_emulation::DeviceAccess access;
    std::memset(data, value, bytes);
  });
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                     size_t height, cudaMemcpyKind, cudaStream_t stream) {
  return stream->put([=] {
    const cuda_emulation::DeviceAccess access;
    for (size_t row = 0; row < height; ++row) {
      std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
    }
  });
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** data, size_t bytes, int) { return cudaMallocHost(data, bytes); }
inline cudaError_t cudaHostGetDevicePointer(void** seen, void* data, int) {
  *seen = data;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceEnablePeerAccess(int, int) { return cudaSuccess; }
inline cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* data) {
  *handle = {.data = data, .reserved = {}};
  return cudaSuccess;
}
inline cudaError_t cudaIpcOpenMemHandle(void** data, cudaIpcMemHandle_t handle, int) {
  *data = handle.data;
  return handle.data != nullptr ? cudaSuccess : cudaErrorInvalidResourceHandle;
}
