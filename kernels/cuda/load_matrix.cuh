// Four 8 x 8 matrices of 16-bit elements from shared memory into the fragments of mma.cuh, by a warp that calls
// together. A row is 16 bytes, aligned; row r of matrix i is where lane 8 i + r says. Lane 4 g + t gets, of matrix i in
// words[i], elements (g, 2 t) and (g, 2 t + 1): an operand a with its rows, or b with its columns, as they lie there;
// transposed, elements (2 t, g) and (2 t + 1, g).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace octet::cuda {

__device__ inline void load_matrices(uint32_t (&words)[4], const void* row) {
#if defined(__CUDACC__)
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
#else
  cuda_emulation::load_matrices(words, row, false);
#endif
}

__device__ inline void load_transposed_matrices(uint32_t (&words)[4], const void* row) {
#if defined(__CUDACC__)
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
#else
  cuda_emulation::load_matrices(words, row, true);
#endif
}

}  // namespace octet::cuda
