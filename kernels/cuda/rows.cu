// Operations on rows: a block has a row, or a thread has an element. All of them are bound by memory. Where a row is
// summed, the whole block brings a tile of it to shared memory and sixteen threads add it up, in the order of the CPU's
// sixteen lanes.
#include <algorithm>
#include <cmath>

#include "kernels/backend.h"
#include "kernels/cuda/arithmetic.cuh"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/queue.h"

namespace octet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 2048;  // elements of a row in shared memory; whole rounds of the lanes

__device__ int64_t element_of_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

// ---- Quantisation: a block has one column group of one token

struct Quantize {
  const uint16_t* x;
  uint8_t* codes;
  float* scales;
  const int64_t* group_ends;
  int64_t n, groups;
  bool dynamic;
  float upper_bound, static_scale;
};

__global__ void quantize_kernel(Quantize a) {
  __shared__ unsigned largest;  // |x| as bits, of which a NaN's are the largest
  const int64_t group = blockIdx.x % a.groups;
  const int64_t row = blockIdx.x / a.groups * a.n;
  const int64_t begin = row + (group == 0 ? 0 : a.group_ends[group - 1]);
  const int64_t end = row + a.group_ends[group];
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  unsigned mine = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    mine = std::max(mine, static_cast<unsigned>(a.x[i] & 0x7FFF) << 16);
  }
  atomicMax(&largest, mine);
  __syncthreads();
  const float amax = std::bit_cast<float>(largest);
  const float scale = a.dynamic ? dynamic_scale(amax, a.upper_bound) : a.static_scale;
  const float factor = __fdiv_rn(1.0f, scale);
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    a.codes[i] = float_to_e4m3(bf16_to_float(a.x[i]) * factor);
  }
  if (threadIdx.x == 0) a.scales[blockIdx.x] = amax == amax ? scale : amax;
}

// ---- Norm

struct RmsNorm {
  const uint16_t* x;
  const float* weight;
  uint16_t* out;
  int64_t n;
  float eps;
};

__global__ void rms_norm_kernel(RmsNorm a) {
  __shared__ float tile[kTile];
  __shared__ float factor;
  const uint16_t* const x = a.x + blockIdx.x * a.n;
  uint16_t* const out = a.out + blockIdx.x * a.n;
  float squares = 0;
  for (int64_t begin = 0; begin < a.n; begin += kTile) {
    const int count = lesser(kTile, a.n - begin);
    for (int i = threadIdx.x; i < count; i += blockDim.x) tile[i] = bf16_to_float(x[begin + i]);
    __syncthreads();
    if (threadIdx.x < kLanes) {
      for (int i = threadIdx.x; i < count; i += kLanes) squares = __fmaf_rn(tile[i], tile[i], squares);
    }
    __syncthreads();
  }
  if (threadIdx.x < kLanes) {
    const float sum = sum_lanes(squares);
    const float mean = __fdiv_rn(sum, static_cast<float>(a.n));
    if (threadIdx.x == 0) factor = __fdiv_rn(1.0f, __fsqrt_rn(mean + a.eps));
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.n; i += blockDim.x) {
    out[i] = float_to_bf16(bf16_to_float(x[i]) * factor * a.weight[i]);
  }
}

// ---- Element by element

__global__ void silu_mul_kernel(const float* gate, const float* up, uint16_t* out, int64_t n) {
  const int64_t i = element_of_thread();
  if (i < n) out[i] = silu_times(gate[i], up[i]);
}

struct TreeSum {
  const float* pieces[kMaxPieces];
  const int* program;
  int program_length;
  int64_t n;
};

__device__ float sum_of_pieces(const TreeSum& a, int64_t i) {
  float stack[kMaxSumDepth];
  int depth = 0;
  for (int step = 0; step < a.program_length; ++step) {
    if (a.program[step] >= 0) {
      stack[depth++] = a.pieces[a.program[step]][i];
    } else {
      --depth;
      stack[depth - 1] += stack[depth];
    }
  }
  return stack[0];
}

__global__ void add_tree_sum_kernel(TreeSum a, uint16_t* residual) {
  const int64_t i = element_of_thread();
  if (i < a.n) residual[i] = float_to_bf16(bf16_to_float(residual[i]) + sum_of_pieces(a, i));
}

__global__ void tree_sum_kernel(TreeSum a, float* out) {
  const int64_t i = element_of_thread();
  if (i < a.n) out[i] = sum_of_pieces(a, i);
}

__global__ void copy_rows_kernel(const uint16_t* table, const int32_t* row_ids, uint16_t* out, int64_t n) {
  const uint16_t* const from = table + row_ids[blockIdx.x] * n;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) out[blockIdx.x * n + i] = from[i];
}

struct JoinColumns {
  const float* parts;
  const int64_t* ends;
  float* out;
  int64_t rows, n;
};

__global__ void join_columns_kernel(JoinColumns a) {
  const int64_t i = element_of_thread();
  if (i >= a.rows * a.n) return;
  const int64_t row = i / a.n, column = i % a.n;
  int64_t begin = 0, end = *a.ends;
  for (const int64_t* next = a.ends; column >= end;) {
    begin = end;
    end = *++next;
  }
  a.out[i] = a.parts[a.rows * begin + row * (end - begin) + column - begin];
}

// ---- Softmax of logits: a block has one column group of one row

struct SoftmaxParts {
  const float* logits;
  const int64_t* group_ends;
  float* parts;
  int64_t n, groups;
};

__device__ float largest_of_block(float mine) {
  __shared__ float of_warp[kThreads / kWarp];
  for (int width = kWarp / 2; width >= 1; width /= 2) mine = larger(mine, __shfl_xor_sync(0xFFFFFFFF, mine, width));
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = mine;
  __syncthreads();
  float largest = of_warp[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) largest = larger(largest, of_warp[warp]);
  return largest;
}

__global__ void softmax_parts_kernel(SoftmaxParts a) {
  __shared__ float tile[kTile];
  const int64_t group = blockIdx.x % a.groups;
  const int64_t begin = group == 0 ? 0 : a.group_ends[group - 1];
  const int64_t n = a.group_ends[group] - begin;
  const float* const x = a.logits + blockIdx.x / a.groups * a.n + begin;
  float most = -kInfinity;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) most = larger(most, x[i]);
  const float max = largest_of_block(most);
  float sum = 0;
  for (int64_t at = 0; at < n; at += kTile) {
    const int count = lesser(kTile, n - at);
    for (int i = threadIdx.x; i < count; i += blockDim.x) tile[i] = exponential(x[at + i] - max);
    __syncthreads();
    if (threadIdx.x < kLanes) {
      for (int i = threadIdx.x; i < count; i += kLanes) sum += tile[i];
    }
    __syncthreads();
  }
  if (threadIdx.x >= kLanes) return;
  sum = sum_lanes(sum);
  if (threadIdx.x == 0) {
    a.parts[2 * blockIdx.x] = max;
    a.parts[2 * blockIdx.x + 1] = sum;
  }
}

TreeSum arguments(Queue& queue, std::span<const Tensor> pieces, std::span<const int> program, int64_t n) {
  TreeSum sum = {
      .pieces = {}, .program = queue.constant(program), .program_length = static_cast<int>(program.size()), .n = n};
  for (size_t i = 0; i < pieces.size(); ++i) sum.pieces[i] = pieces[i].as<float>();
  return sum;
}

}  // namespace

// Waits: a copy from or to the host is over when it returns.
void copy(Stream& stream, const Tensor& from, const Tensor& to) {
  // A copy to pageable memory waits within the driver, where no watch sees it: let there be nothing left to wait for.
  if (from.device() == Device::kCuda && to.device() == Device::kCpu) stream.queue()->synchronize();
  cuda::queue_copy(stream, from, to);
  if (from.device() != to.device()) stream.queue()->synchronize();
}

void queue_copy(Stream& stream, const Tensor& from, const Tensor& to) {
  const cudaMemcpyKind kind = from.device() == to.device()    ? cudaMemcpyDeviceToDevice
                              : from.device() == Device::kCpu ? cudaMemcpyHostToDevice
                                                              : cudaMemcpyDeviceToHost;
  const cudaStream_t queue = queue_of(stream).stream();
  const auto pitch = [](const Tensor& tensor) {
    return static_cast<size_t>(tensor.dim(tensor.shape().rank() - 1) * size_of(tensor.dtype()));
  };
  if (pitch(from) == pitch(to)) {
    check(cudaMemcpyAsync(to.data(), from.data(), static_cast<size_t>(from.bytes()), kind, queue), "copying");
  } else {
    check(cudaMemcpy2DAsync(to.data(), pitch(to), from.data(), pitch(from), pitch(from),
                            static_cast<size_t>(from.bytes()) / pitch(from), kind, queue),
          "copying rows");
  }
}

void quantize(Stream& stream, const Tensor& x, const ActivationScheme& scheme, std::span<const int64_t> group_ends,
              const Activations& out) {
  if (x.elements() == 0) return;
  Queue& queue = queue_of(stream);
  const int64_t groups = static_cast<int64_t>(group_ends.size());
  queue.launch(quantize_kernel, static_cast<unsigned>(x.dim(0) * groups), kThreads,
               Quantize{.x = x.as<uint16_t>(),
                        .codes = out.values.as<uint8_t>(),
                        .scales = out.scales.as<float>(),
                        .group_ends = queue.constant(group_ends),
                        .n = x.dim(1),
                        .groups = groups,
                        .dynamic = scheme.kind == ActivationScheme::Kind::kDynamicPerToken,
                        .upper_bound = scheme.upper_bound,
                        .static_scale = scheme.scale});
}

void add_tree_sum(Stream& stream, std::span<const Tensor> pieces, std::span<const int> program,
                  const Tensor& residual) {
  const int64_t n = residual.elements();
  if (n == 0) return;
  Queue& queue = queue_of(stream);
  queue.launch(add_tree_sum_kernel, blocks_for(n, kThreads), kThreads, arguments(queue, pieces, program, n),
               residual.as<uint16_t>());
}

void tree_sum(Stream& stream, std::span<const Tensor> pieces, std::span<const int> program, const Tensor& out) {
  const int64_t n = out.elements();
  if (n == 0) return;
  Queue& queue = queue_of(stream);
  queue.launch(tree_sum_kernel, blocks_for(n, kThreads), kThreads, arguments(queue, pieces, program, n),
               out.as<float>());
}

void copy_rows(Stream& stream, const Tensor& table, const Tensor& row_ids, const Tensor& out) {
  if (row_ids.dim(0) == 0) return;
  queue_of(stream).launch(copy_rows_kernel, static_cast<unsigned>(row_ids.dim(0)), kThreads, table.as<uint16_t>(),
                          row_ids.as<int32_t>(), out.as<uint16_t>(), table.dim(1));
}

void rms_norm(Stream& stream, const Tensor& x, const Tensor& weight, float eps, const Tensor& out) {
  if (x.elements() == 0) return;
  queue_of(stream).launch(
      rms_norm_kernel, static_cast<unsigned>(x.dim(0)), kThreads,
      RmsNorm{
          .x = x.as<uint16_t>(), .weight = weight.as<float>(), .out = out.as<uint16_t>(), .n = x.dim(1), .eps = eps});
}

void silu_mul(Stream& stream, const Tensor& gate, const Tensor& up, const Tensor& out) {
  const int64_t n = out.elements();
  if (n == 0) return;
  queue_of(stream).launch(silu_mul_kernel, blocks_for(n, kThreads), kThreads, gate.as<float>(), up.as<float>(),
                          out.as<uint16_t>(), n);
}

void join_columns(Stream& stream, const Tensor& parts, std::span<const int64_t> column_ends, const Tensor& out) {
  if (out.elements() == 0) return;
  Queue& queue = queue_of(stream);
  queue.launch(join_columns_kernel, blocks_for(out.elements(), kThreads), kThreads,
               JoinColumns{.parts = parts.as<float>(),
                           .ends = queue.constant(column_ends),
                           .out = out.as<float>(),
                           .rows = out.dim(0),
                           .n = out.dim(1)});
}

void softmax_parts(Stream& stream, const Tensor& logits, std::span<const int64_t> group_ends, const Tensor& parts) {
  if (logits.elements() == 0) return;
  Queue& queue = queue_of(stream);
  const int64_t groups = static_cast<int64_t>(group_ends.size());
  queue.launch(softmax_parts_kernel, static_cast<unsigned>(logits.dim(0) * groups), kThreads,
               SoftmaxParts{.logits = logits.as<float>(),
                            .group_ends = queue.constant(group_ends),
                            .parts = parts.as<float>(),
                            .n = logits.dim(1),
                            .groups = groups});
}

}  // namespace octet::cuda
