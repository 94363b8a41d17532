// What device code shares: the exponential and the sum of sixteen lanes, operation for operation those of the CPU's
// kernels (kernels/cpu/vector_kernels.h says how they were chosen).
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>

#include "kernels/fp8.h"

namespace octet::cuda {

constexpr int kLanes = 16;  // a sum inside a row runs over so many strided lanes, then up a tree
constexpr int kWarp = 32;
constexpr float kInfinity = __builtin_inff();

__device__ inline float decode(uint16_t bf16) { return bf16_to_float(bf16); }
__device__ inline float decode(uint8_t e4m3) { return e4m3_to_float(e4m3); }

// By value, as device code has no constants to refer to.
__device__ inline int lesser(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// The second operand where either is NaN.
__device__ inline float larger(float a, float b) { return a > b ? a : b; }

// 2^n of a whole number in [-126, 127]; anything for NaN.
__device__ inline float power_of_two(float n) {
  const int32_t exponent = n == n ? static_cast<int32_t>(n) : 0;
  return std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
}

// e^x within 2 ulp; results below the smallest normal number are 0.
__device__ inline float exponential(float x) {
  x = larger(-104.0f, x);
  x = 89.0f < x ? 89.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float n = __fmaf_rn(x, 1.44269504f, magic) - magic;
  float r = __fmaf_rn(n, -0.693359375f, x);
  r = __fmaf_rn(n, 2.12194442e-4f, r);
  float p = 0.0013814539415761828f;
  p = __fmaf_rn(p, r, 0.00836874544620514f);
  p = __fmaf_rn(p, r, 0.04166838899254799f);
  p = __fmaf_rn(p, r, 0.1666652113199234f);
  p = __fmaf_rn(p, r, 0.4999999403953552f);
  p = __fmaf_rn(r * r, p, r) + 1.0f;
  const float half = __fmaf_rn(n, 0.5f, magic) - magic;
  return p * power_of_two(half) * power_of_two(n - half);
}

// silu(gate) * up, rounded.
__device__ inline uint16_t silu_times(float gate, float up) {
  return float_to_bf16(__fdiv_rn(gate, 1.0f + exponential(0.0f - gate)) * up);
}

// The tree over the lanes' sums; the result is lane 0's. Called by the first sixteen threads of a warp.
__device__ inline float sum_lanes(float lane) {
  for (int width = kLanes / 2; width >= 1; width /= 2) lane += __shfl_down_sync(0xFFFF, lane, width, kLanes);
  return lane;
}

// The scale of e4m3 codes, from the greatest magnitude among what they stand for: quantize()'s dynamic one.
__device__ inline float dynamic_scale(float amax, float upper_bound) {
  const float scale = __fdiv_rn(amax > upper_bound ? upper_bound : amax, 448.0f);
  return scale < 1.0f / (448.0f * 512.0f) ? 1.0f / (448.0f * 512.0f) : scale;
}

}  // namespace octet::cuda
