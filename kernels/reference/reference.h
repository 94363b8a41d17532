// The functions of ops.h written the obvious way, one loop per sum, in double: what the back ends are compared with.
// Same tensors and meaning, but weights are raw [out, in] matrices instead of packed ones, and there is no stream.
#pragma once

#include "kernels/ops.h"

namespace octet::reference {

struct Linear {
  Tensor weight;        // [out, in] BF16 or F8_E4M3
  Tensor weight_scale;  // [out] F32, or empty
};

// The dot product to the bit, as numerics define it: FP32, in pairs, the odd element first, denormals flushed.
// Everything else here is double. REQUIRES: n is even.
float dot_in_pairs(const float* x, const float* w, int64_t n);

void quantize(const Tensor& x, const ActivationScheme& scheme, std::span<const int64_t> group_ends,
              const Activations& out);
void linear(const Activations& x, const Linear& weight, const Tensor& out);
void linear_over_slices(const Activations& x, const Linear& weight, const SliceRun& run,
                        std::span<const int64_t> column_ends, const Tensor& partials);
// Sums all pieces, in any order.
void add_tree_sum(std::span<const Tensor> pieces, const Tensor& residual);
void rms_norm(const Tensor& x, const Tensor& weight, float eps, const Tensor& out);
void silu_mul(const Tensor& gate, const Tensor& up, const Tensor& out);
void rope_angles(const Tensor& positions, const Tensor& inv_freq, const Tensor& cos_sin);
void rope_and_cache(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin,
                    const AttentionBatch& batch, const Tensor& q_out, const KvLayer& cache);
void attention(const Tensor& q, const KvLayer& cache, const AttentionBatch& batch, const Tensor& out);
void softmax_parts(const Tensor& logits, std::span<const int64_t> group_ends, const Tensor& parts);

}  // namespace octet::reference
