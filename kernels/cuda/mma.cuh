// A warp's tensor core: c += a b for fragments that lie in the registers of its 32 lanes, all of which call together.
// Lane 4 g + t holds, k being the column of a and the row of b:
//
//                     m16n8k16, BF16                m16n8k32, e4m3
//   a[0]  row g       k = 2 t, 2 t + 1              k = 4 t .. 4 t + 3
//   a[1]  row g + 8   the same                      the same
//   a[2]  row g       k = 8 + 2 t, 8 + 2 t + 1      k = 16 + 4 t .. 16 + 4 t + 3
//   a[3]  row g + 8   the same                      the same
//   b[0]  column g    k as in a[0]                  k as in a[0]
//   b[1]  column g    k as in a[2]                  k as in a[2]
//   c[0], c[1]        row g, columns 2 t, 2 t + 1
//   c[2], c[3]        row g + 8, the same columns
//
// The lower k is in the lower bits. A sum does not care which k is which as long as a and b agree: kernels give a lane
// neighbouring bytes of a row and call them what they like. Sums are FP32, in the hardware's order and with its
// rounding: not for arithmetic that promises bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace octet::cuda {

__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  cuda_emulation::multiply_bf16(c, a, b);
#endif
}

// Whether the device being compiled for multiplies e4m3: an A100 does not, its kernels decode to BF16.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
#define OCTET_MULTIPLIES_E4M3 1
__device__ inline void mma_e4m3(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  cuda_emulation::multiply_e4m3(c, a, b);
#endif
}
#endif

}  // namespace octet::cuda
