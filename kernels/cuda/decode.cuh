// e4m3 codes to BF16 in registers, exactly: every finite code, subnormal ones too, is a BF16 value.
//
// A code's sign, exponent and mantissa are moved to where BF16 has them. Its exponent is then too small by the
// difference of the biases, 120, and a code's subnormal is a subnormal BF16: one multiplication by 2^120, which is
// exact and by an instruction that heeds denormals, puts both right. NaN codes become +-480: weights have none, and
// codes that stand for a row with a NaN come with a scale that is one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace octet::cuda {

// Two BF16 values times 2^120. REQUIRES: the products are finite and not subnormal.
__device__ inline uint32_t scale_up_bf16(uint32_t pair) {
#if defined(__CUDA_ARCH__)
  uint32_t scaled;
  // A sum with -0 keeps the sign of zeros.
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(scaled) : "r"(pair), "r"(0x7B807B80u), "r"(0x80008000u));
  return scaled;
#elif defined(__CUDACC__)
  return pair;  // never called: the host's pass over a kernel
#else
  return cuda_emulation::scale_bf16(pair, 120);
#endif
}

// Byte i of the result is byte (selector >> 4 i) % 8 of `low` and, from 4 on, `high`; or, where the selector's digit
// has 8 added, eight times that byte's sign bit.
__device__ inline uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t selected;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(selected) : "r"(low), "r"(high), "r"(selector));
  return selected;
#else
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t selected = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> 4 * i & 15;
    const uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (digit & 7)) & 0xFF;
    selected |= ((digit & 8) == 0 ? byte : (byte >> 7) * 0xFF) << 8 * i;
  }
  return selected;
#endif
}

// Codes 0 and 1 (`kPair` 0) or 2 and 3 (1) of a word as two BF16 values in the same order.
template <int kPair>
__device__ inline uint32_t decode_pair(uint32_t codes) {
  // Each half holds a code with its sign bit in all the bits above it.
  const uint32_t extended = select_bytes(codes, 0, kPair == 0 ? 0x9180u : 0xB3A2u);
  return scale_up_bf16(extended << 4 & 0x87F087F0u);
}

// The four codes of a word as BF16 values, in order.
__device__ inline void decode_e4m3(uint32_t codes, uint32_t& first, uint32_t& second) {
  first = decode_pair<0>(codes);
  second = decode_pair<1>(codes);
}

}  // namespace octet::cuda
