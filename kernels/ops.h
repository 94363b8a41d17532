// The arithmetic of a step: free functions over contiguous tensors, the stream first. ops.cc checks shapes once and
// calls the back end; octet::reference has the same functions written the obvious way, which both back ends are tested
// against.
//
// Every function keeps the rules of bits: one row's result never depends on the other rows, on the number of threads or
// on the instruction family; dot products accumulate in FP32 over K in pairs, odd element first, with denormals
// flushed.
#pragma once

#include <cstdint>
#include <limits>
#include <span>

#include "kernels/memory.h"
#include "kernels/slice_tree.h"
#include "kernels/tensor.h"

namespace octet {

// Copies a tensor to memory of the same dtype and shape on the host or on the stream's device, neither way overlapping.
// Whatever lies on the host may be used again as soon as this returns.
void copy(Stream& stream, const Tensor& from, const Tensor& to);
// The same without waiting, between the device and page-locked memory of the host (Buffer::page_locked()): that may be
// used again when the stream was synchronised. `to` may have longer rows (the last dimension) than `from`, of which the
// first elements are then written.
void queue_copy(Stream& stream, const Tensor& from, const Tensor& to);

// How a linear layer quantises its input to e4m3 (W8A8). kNone: inputs stay BF16 (BF16 weights, and W8A16).
struct ActivationScheme {
  enum class Kind : uint8_t { kNone, kDynamicPerToken, kStatic };
  Kind kind = Kind::kNone;
  // kDynamicPerToken: amax is cut to this before the scale is made (fbgemm_fp8's activation_scale_ub).
  float upper_bound = std::numeric_limits<float>::infinity();
  // kStatic: the stored input_scale.
  float scale = 1.0f;
  bool operator==(const ActivationScheme&) const = default;
};

// One rank's part of a linear layer y = x W^T. It views memory that ModelWeights owns.
struct Linear {
  int64_t out_features = 0;  // rows here
  int64_t in_features = 0;   // columns here; even
  Tensor weight;             // BF16 or F8_E4M3 in the back end's packed layout, packed_bytes() long
  Tensor weight_scale;       // [out_features] F32, one per row; empty for BF16
  ActivationScheme activations;
};

// Bytes of a packed weight matrix.
int64_t packed_bytes(DType dtype, int64_t out_features, int64_t in_features);
// Rows are packed in whole panels of this many outputs (the last one is padded with zeros).
constexpr int64_t kPanelRows = 32;

// Packs rows [first_row, first_row + raw.dim(0)) of a weight matrix. raw is [rows, in_features] on the host,
// BF16 or F8_E4M3, the dtype of weight.weight. REQUIRES: first_row is a multiple of kPanelRows, and raw ends on one or
// at out_features; raw has no e4m3 NaN codes (reading a checkpoint refuses them: the families decode them differently).
void pack_rows(Stream& stream, const Tensor& raw, int64_t first_row, const Linear& weight);

// A linear layer's input: BF16 values, or e4m3 codes with one scale per token and column group.
struct Activations {
  Tensor values;  // [tokens, in] BF16 or F8_E4M3
  Tensor scales;  // [tokens, groups] F32; empty for BF16
};

// Quantises x [tokens, in] BF16 to e4m3. Column group g ends before column group_ends[g]; the last one ends at `in`.
// Column-parallel layers have one group (the row), row-parallel layers one per slice.
//   dynamic: amax = min(max|x|, upper_bound); scale = max(amax / 448, 1 / (448 * 512))
//   static:  scale as stored
//   either:  code = e4m3(clamp(x * (1 / scale)))
// A NaN in a group makes its scale NaN, so that it is seen in the result.
void quantize(Stream& stream, const Tensor& x, const ActivationScheme& scheme, std::span<const int64_t> group_ends,
              const Activations& out);

struct LinearOutput {
  const Linear* weight;
  Tensor out;  // [tokens, out_features] F32
};

// out = (x W^T) * weight_scale[row] * x.scales[token], for several matrices that read the same x in one pass.
// REQUIRES: x is BF16 or has one scale group.
void linear(Stream& stream, const Activations& x, std::span<const LinearOutput> outputs);

// The row-parallel form: columns of W and x are cut into this rank's slices (slice i of run ends before column_ends[i],
// an even number). A slice's partial result, scaled, is a leaf; partials [nodes, tokens, out_features] F32 gets the
// sums of the run's maximal_subtrees(). x has one scale group per slice of the run. Leaves are combined tile by tile.
void linear_over_slices(Stream& stream, const Activations& x, const Linear& weight, const SliceRun& run,
                        std::span<const int64_t> column_ends, const Tensor& partials);

// Finishes the tree and adds it to the residual stream: residual[t, j] = bf16(residual[t, j] + sum(pieces)[t, j]).
// Each piece is a [tokens, n] F32 tensor; `program` comes from sum_program() and indexes pieces. residual [tokens, n]
// BF16.
void add_tree_sum(Stream& stream, std::span<const Tensor> pieces, std::span<const int> program, const Tensor& residual);

// The sum itself, out[t, j] = sum(pieces)[t, j], out [tokens, n] F32: for finishing a part of the tree where the rest
// of it is elsewhere. out overlaps no piece.
void tree_sum(Stream& stream, std::span<const Tensor> pieces, std::span<const int> program, const Tensor& out);

// out[i] = table[row_ids[i]]. table [rows, n] BF16, row_ids [ids] I32 in range, out [ids, n] BF16.
void copy_rows(Stream& stream, const Tensor& table, const Tensor& row_ids, const Tensor& out);

// out = bf16(x / sqrt(mean(x^2) + eps) * weight), all of it in FP32. x, out [tokens, n] BF16; weight [n] F32.
void rms_norm(Stream& stream, const Tensor& x, const Tensor& weight, float eps, const Tensor& out);

// out = bf16(silu(gate) * up), silu(v) = v / (1 + exp(-v)). gate, up [tokens, n] F32, out [tokens, n] BF16.
void silu_mul(Stream& stream, const Tensor& gate, const Tensor& up, const Tensor& out);

// What the linear layers after the residual stream read.
struct NormedInput {
  Tensor weight;  // of the norm, [n] F32
  float eps = 0;
  ActivationScheme scheme;  // of those layers
  Tensor normed;            // [tokens, n] BF16: the result where nothing is quantised, else scratch
  Activations out;          // [tokens, n], one scale group: codes; where nothing is quantised a view of `normed`
};

// rms_norm(), then quantize() of the whole row where there is something to quantise to; in fast arithmetic one kernel,
// whose sum of squares has an order of its own. x [tokens, n] BF16.
void rms_norm_and_quantize(Stream& stream, const Tensor& x, const NormedInput& next);

// silu_mul(), then quantize() where there is something to quantise to, with the same bits. gated [tokens, n] BF16 is
// the result where nothing is quantised, else scratch; out as in NormedInput, with the groups of group_ends.
void silu_mul_and_quantize(Stream& stream, const Tensor& gate, const Tensor& up, const ActivationScheme& scheme,
                           std::span<const int64_t> group_ends, const Tensor& gated, const Activations& out);

// ---- Attention over the paged cache

constexpr int64_t kKvBlockTokens = 16;    // positions in a cache block
constexpr int64_t kAttentionChunk = 256;  // positions whose softmax partials are merged left to right

// One layer's cache on this rank. keys hold a block's positions side by side, two head elements each, so that a score
// is the same dot as a linear layer's.
//
// In F8_E4M3 a code stands for code * scale: code = e4m3(clamp(x * (1 / scale))) of the key or value x that BF16 would
// hold. Scores are then scaled by key_scale / sqrt(head_dim), one FP32 factor, and sums of values by value_scale.
struct KvLayer {
  Tensor keys;                                 // [blocks, kv_heads, head_dim / 2, kKvBlockTokens, 2] BF16 or F8_E4M3
  Tensor values;                               // [blocks, kv_heads, kKvBlockTokens, head_dim], the same dtype
  float key_scale = 1.0f, value_scale = 1.0f;  // 1 in BF16
};

// Which tokens a step runs, as flat arrays of I32 on the stream's device that every layer reads. Tokens of one sequence
// are neighbours. What a launch depends on is beside them: the host does not read device memory for it.
struct AttentionBatch {
  Tensor positions;      // [tokens] position of each token in its sequence
  Tensor sequence_of;    // [tokens] row of block_tables
  Tensor sequence_ends;  // [sequences] the last token of sequence i is sequence_ends[i] - 1
  Tensor block_tables;   // [sequences, max_blocks] blocks of the cache
  int64_t context = 0;   // every position is below it; at most max_blocks * kKvBlockTokens

  int64_t tokens() const { return positions.dim(0); }
  int64_t sequences() const { return sequence_ends.dim(0); }
  int64_t max_blocks() const { return block_tables.dim(1); }
};

// cos_sin[t, j] = (cos, sin) of float(positions[t]) * inv_freq[j] (an FP32 product, then full range reduction).
// positions [tokens] I32, inv_freq [head_dim / 2] F32, cos_sin [tokens, head_dim / 2, 2] F32. Once per step, shared by
// the layers.
void rope_angles(Stream& stream, const Tensor& positions, const Tensor& inv_freq, const Tensor& cos_sin);

// Rotates q and k (halves: element j pairs with j + head_dim / 2) in FP32, rounds q, k and v once to BF16, and writes k
// and v to the cache, in its dtype, at the tokens' positions. q [tokens, heads, head_dim] F32 to q_out, the same shape
// in BF16; k, v [tokens, kv_heads, head_dim] F32.
void rope_and_cache(Stream& stream, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin,
                    const AttentionBatch& batch, const Tensor& q_out, const KvLayer& cache);

// Causal attention of every token over positions 0..its own, scores scaled by 1 / sqrt(head_dim).
// q, out [tokens, heads, head_dim] BF16; query head h reads KV head h / (heads / kv_heads).
// Positions are taken in chunks of kAttentionChunk: (max, sum, accumulator) in FP32 each, merged left to right.
void attention(Stream& stream, const Tensor& q, const KvLayer& cache, const AttentionBatch& batch, const Tensor& out);

// Copies cache blocks, keys and values: block from[i] to block to[i], one after the other. Block numbers in range, no
// block to itself.
void copy_blocks(Stream& stream, std::span<const int32_t> from, std::span<const int32_t> to, const KvLayer& cache);

// ---- Logits

// parts[r, g] = (max, sum of exp(x - max)) over column group g of logits row r, FP32. Groups as in quantize();
// parts [rows, groups, 2] F32. The log-sum-exp of a row is finished over groups in slice-tree order.
void softmax_parts(Stream& stream, const Tensor& logits, std::span<const int64_t> group_ends, const Tensor& parts);

// From parts of rows, one part of all rows after the other, to whole rows: columns [column_ends[i - 1], column_ends[i])
// of out [rows, n] F32 are part i. parts [rows * n] F32; groups as in quantize(). parts and out do not overlap.
void join_columns(Stream& stream, const Tensor& parts, std::span<const int64_t> column_ends, const Tensor& out);

// weights[i] = exp((logits[i] - max) * scale), FP32; 0 where that is below the smallest normal number, and for
// -infinity. max: the greatest of logits, finite; scale a normal number above 0. weights may be logits. On the calling
// thread alone, and any number of threads may call it at once: samplers share out rows, not their terms.
void softmax_weights(const Stream& stream, std::span<const float> logits, float max, float scale,
                     std::span<float> weights);

}  // namespace octet
