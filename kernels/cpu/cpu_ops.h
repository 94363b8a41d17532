// The CPU back end of ops.h: the same functions, called with checked shapes. They split work over outputs, rows and
// heads, never over the terms of a sum, so bits do not depend on the number of threads.
#pragma once

#include "kernels/backend.h"
#include "kernels/ops.h"

namespace octet::cpu {

// All of them but softmax_weights(), which samplers call on the host whatever the device.
const Backend& backend();

void copy(Stream& stream, const Tensor& from, const Tensor& to);
void queue_copy(Stream& stream, const Tensor& from, const Tensor& to);
void pack_rows(Stream& stream, const Tensor& raw, int64_t first_row, const Linear& weight);
void quantize(Stream& stream, const Tensor& x, const ActivationScheme& scheme, std::span<const int64_t> group_ends,
              const Activations& out);
void linear(Stream& stream, const Activations& x, std::span<const LinearOutput> outputs);
void linear_over_slices(Stream& stream, const Activations& x, const Linear& weight, const SliceRun& run,
                        std::span<const int64_t> column_ends, const Tensor& partials);
void add_tree_sum(Stream& stream, std::span<const Tensor> pieces, std::span<const int> program, const Tensor& residual);
void tree_sum(Stream& stream, std::span<const Tensor> pieces, std::span<const int> program, const Tensor& out);
void copy_rows(Stream& stream, const Tensor& table, const Tensor& row_ids, const Tensor& out);
void rms_norm(Stream& stream, const Tensor& x, const Tensor& weight, float eps, const Tensor& out);
void silu_mul(Stream& stream, const Tensor& gate, const Tensor& up, const Tensor& out);
void rms_norm_and_quantize(Stream& stream, const Tensor& x, const NormedInput& next);
void silu_mul_and_quantize(Stream& stream, const Tensor& gate, const Tensor& up, const ActivationScheme& scheme,
                           std::span<const int64_t> group_ends, const Tensor& gated, const Activations& out);
void rope_angles(Stream& stream, const Tensor& positions, const Tensor& inv_freq, const Tensor& cos_sin);
void rope_and_cache(Stream& stream, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin,
                    const AttentionBatch& batch, const Tensor& q_out, const KvLayer& cache);
void attention(Stream& stream, const Tensor& q, const KvLayer& cache, const AttentionBatch& batch, const Tensor& out);
void copy_blocks(Stream& stream, std::span<const int32_t> from, std::span<const int32_t> to, const KvLayer& cache);
void softmax_parts(Stream& stream, const Tensor& logits, std::span<const int64_t> group_ends, const Tensor& parts);
void join_columns(Stream& stream, const Tensor& parts, std::span<const int64_t> column_ends, const Tensor& out);
void softmax_weights(const Stream& stream, std::span<const float> logits, float max, float scale,
                     std::span<float> weights);

}  // namespace octet::cpu
