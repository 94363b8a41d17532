// What lies between two linear layers in one kernel each: norm and quantisation, SiLU and quantisation. A block has a
// token (of SiLU: one column group of it). Bound by latency at decode, where a token's row is all there is to do, so a
// row stays in registers or comes back from the first cache; bound by memory at prefill.
#include <algorithm>

#include "kernels/cuda/arithmetic.cuh"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/queue.h"

namespace octet::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;

// ---- Sums and maxima of a block, the same in all of its threads

template <typename Combine>
__device__ float of_block(float mine, const Combine& combine) {
  __shared__ float of_warp[kWarps];
  for (int width = kWarp / 2; width >= 1; width /= 2) mine = combine(mine, __shfl_xor_sync(0xFFFFFFFF, mine, width));
  __syncthreads();  // the last use is over
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = mine;
  __syncthreads();
  float result = of_warp[threadIdx.x % kWarp];
  for (int width = kWarp / 2; width >= 1; width /= 2) {
    result = combine(result, __shfl_xor_sync(0xFFFFFFFF, result, width));
  }
  return result;
}

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// Of magnitudes; a NaN is larger than all of them, as its bits are.
struct LargestMagnitude {
  __device__ float operator()(float a, float b) const {
    const uint32_t x = std::bit_cast<uint32_t>(a), y = std::bit_cast<uint32_t>(b);
    return std::bit_cast<float>(x > y ? x : y);
  }
};

// ---- Codes

struct Codes {
  uint8_t* codes;
  float* scales;
  bool dynamic;
  float upper_bound, static_scale;
};

__device__ float magnitude(uint16_t bf16) { return bf16_to_float(bf16 & 0x7FFF); }

// As quantize() has it, from the greatest magnitude of the group.
__device__ float scale_of(const Codes& to, float amax) {
  return to.dynamic ? dynamic_scale(amax, to.upper_bound) : to.static_scale;
}

Codes codes_of(const ActivationScheme& scheme, const Activations& out) {
  return {.codes = out.values.as<uint8_t>(),
          .scales = out.scales.as<float>(),
          .dynamic = scheme.kind == ActivationScheme::Kind::kDynamicPerToken,
          .upper_bound = scheme.upper_bound,
          .static_scale = scheme.scale};
}

// ---- Norm

constexpr int kVector = 8;  // elements of a load of 16 bytes
constexpr int kVectors = 4;
constexpr int64_t kLongestRow = int64_t{kVector} * kVectors * kThreads;

struct alignas(16) Elements {
  uint16_t of[kVector];
};
struct alignas(16) Factors {
  float of[kVector];
};
struct alignas(8) EightCodes {
  uint8_t of[kVector];
};

struct Norm {
  const uint16_t* x;
  const float* weight;
  uint16_t* normed;
  Codes to;
  int64_t n;
  float eps;
};

// The sum of squares in the block's own order.
template <bool kQuantize>
__global__ void __launch_bounds__(kThreads) norm_kernel(Norm a) {
  const int vectors = static_cast<int>(a.n / kVector);
  const Elements* const x = reinterpret_cast<const Elements*>(a.x + blockIdx.x * a.n);
  const Factors* const weight = reinterpret_cast<const Factors*>(a.weight);
  Elements row[kVectors];
  float squares = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kThreads + static_cast<int>(threadIdx.x);
    if (at >= vectors) continue;
    row[v] = x[at];
    for (int i = 0; i < kVector; ++i) {
      const float value = bf16_to_float(row[v].of[i]);
      squares = __fmaf_rn(value, value, squares);
    }
  }
  const float mean = __fdiv_rn(of_block(squares, Sum()), static_cast<float>(a.n));
  const float factor = __fdiv_rn(1.0f, __fsqrt_rn(mean + a.eps));
  float mine = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kThreads + static_cast<int>(threadIdx.x);
    if (at >= vectors) continue;
    const Factors weights = weight[at];
    for (int i = 0; i < kVector; ++i) {
      row[v].of[i] = float_to_bf16(bf16_to_float(row[v].of[i]) * factor * weights.of[i]);
      if (kQuantize) mine = LargestMagnitude()(mine, magnitude(row[v].of[i]));
    }
    if (!kQuantize) reinterpret_cast<Elements*>(a.normed + blockIdx.x * a.n)[at] = row[v];
  }
  if (!kQuantize) return;
  const float amax = of_block(mine, LargestMagnitude());
  const float scale = scale_of(a.to, amax), reciprocal = __fdiv_rn(1.0f, scale);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kThreads + static_cast<int>(threadIdx.x);
    if (at >= vectors) continue;
    EightCodes codes;
    for (int i = 0; i < kVector; ++i) codes.of[i] = float_to_e4m3(bf16_to_float(row[v].of[i]) * reciprocal);
    reinterpret_cast<EightCodes*>(a.to.codes + blockIdx.x * a.n)[at] = codes;
  }
  if (threadIdx.x == 0) a.to.scales[blockIdx.x] = amax == amax ? scale : amax;
}

// ---- SiLU

struct Gated {
  const float *gate, *up;
  uint16_t* gated;
  Codes to;
  const int64_t* group_ends;
  int64_t n, groups;
};

// Element by element and a maximum: no order to keep. A thread reads back what it wrote itself.
__global__ void __launch_bounds__(kThreads) silu_mul_and_quantize_kernel(Gated a) {
  const int64_t group = blockIdx.x % a.groups;
  const int64_t row = blockIdx.x / a.groups * a.n;
  const int64_t begin = row + (group == 0 ? 0 : a.group_ends[group - 1]);
  const int64_t end = row + a.group_ends[group];
  float mine = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    a.gated[i] = silu_times(a.gate[i], a.up[i]);
    mine = LargestMagnitude()(mine, magnitude(a.gated[i]));
  }
  const float amax = of_block(mine, LargestMagnitude());
  const float scale = scale_of(a.to, amax), reciprocal = __fdiv_rn(1.0f, scale);
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    a.to.codes[i] = float_to_e4m3(bf16_to_float(a.gated[i]) * reciprocal);
  }
  if (threadIdx.x == 0) a.to.scales[blockIdx.x] = amax == amax ? scale : amax;
}

}  // namespace

void rms_norm_and_quantize(Stream& stream, const Tensor& x, const NormedInput& next) {
  if (x.elements() == 0) return;
  Queue& queue = queue_of(stream);
  const int64_t n = x.dim(1);
  const bool codes = next.scheme.kind != ActivationScheme::Kind::kNone;
  if (queue.arithmetic() != Arithmetic::kFast || n % kVector != 0 || n > kLongestRow) {
    cuda::rms_norm(stream, x, next.weight, next.eps, next.normed);
    const int64_t whole[] = {n};
    if (codes) cuda::quantize(stream, next.normed, next.scheme, whole, next.out);
    return;
  }
  queue.launch(codes ? norm_kernel<true> : norm_kernel<false>, static_cast<unsigned>(x.dim(0)), kThreads,
               Norm{.x = x.as<uint16_t>(),
                    .weight = next.weight.as<float>(),
                    .normed = next.normed.as<uint16_t>(),
                    .to = codes ? codes_of(next.scheme, next.out) : Codes{},
                    .n = n,
                    .eps = next.eps});
}

void silu_mul_and_quantize(Stream& stream, const Tensor& gate, const Tensor& up, const ActivationScheme& scheme,
                           std::span<const int64_t> group_ends, const Tensor& gated, const Activations& out) {
  if (gate.elements() == 0) return;
  Queue& queue = queue_of(stream);
  const int64_t groups = static_cast<int64_t>(group_ends.size());
  queue.launch(silu_mul_and_quantize_kernel, static_cast<unsigned>(gate.dim(0) * groups), kThreads,
               Gated{.gate = gate.as<float>(),
                     .up = up.as<float>(),
                     .gated = gated.as<uint16_t>(),
                     .to = codes_of(scheme, out),
                     .group_ends = queue.constant(group_ends),
                     .n = gate.dim(1),
                     .groups = groups});
}

}  // namespace octet::cuda
