// Products of matrices for fast mode, where sums may be made in any order: cuBLASLt where it takes them, our own tiles
// where it does not. Both sum in FP32 and multiply with the scales afterwards, so the rounding points are those of
// every other kernel; the same product has the same bits again on the same device.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

namespace octet::cuda {

class Queue;

// out[t, n] = sum over k of x[t, k] weight[n, k], times weight_scales[n], times x_scales[t]. All on the device.
struct Product {
  const void* x;  // [tokens, columns], BF16, or F8_E4M3 where the weights are that too
  DType x_type;
  const float* x_scales;  // [tokens], or null: 1
  const void* weight;     // [outputs, columns], BF16 or F8_E4M3, row by row
  DType weight_type;
  const float* weight_scales;  // [outputs], or null: 1
  float* out;                  // [tokens, outputs]
  int64_t tokens, outputs, columns;
};

void multiply(Queue& queue, const Product& product);

// By tensor core tiles of our own: any sizes.
void multiply_in_tiles(Queue& queue, const Product& product);

// out = (the parts' sum, one after the other) * scales, for parts [count, tokens, outputs]; `parts` may be out.
void add_parts(Queue& queue, const Product& product, const float* parts, int count);

}  // namespace octet::cuda
