// The door to the arithmetic: shapes and dtypes are checked here, once, then the back end runs with denormals flushed.
// A mismatch is a bug of the caller, never of a user, so it ends the process with both shapes in the message.
#include "kernels/ops.h"

#include <algorithm>
#include <string>

#include "kernels/backend.h"
#include "kernels/check.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/packed.h"
#include "kernels/cpu/thread_pool.h"

namespace octet {
namespace {

static_assert(cpu::kPanel == kPanelRows);
static_assert(cpu::kMaxTreeDepth == kMaxSumDepth);

void check_tensor(Device device, const char* name, const Tensor& tensor, DType dtype, Shape shape) {
  OCTET_CHECK(tensor.dtype() == dtype && tensor.shape() == shape, std::string(name) + " is " + name_of(tensor.dtype()) +
                                                                      " " + tensor.shape().to_string() + ", expected " +
                                                                      name_of(dtype) + " " + shape.to_string());
  OCTET_CHECK(!tensor.empty() || shape.elements() == 0, std::string(name) + " has no memory");
  OCTET_CHECK(tensor.device() == device, std::string(name) + " lies on the " + name_of(tensor.device()) +
                                             ", the stream computes on the " + name_of(device));
}

void check_rank(const char* name, const Tensor& tensor, int rank) {
  OCTET_CHECK(tensor.shape().rank() == rank, std::string(name) + " is " + tensor.shape().to_string() + ", expected " +
                                                 std::to_string(rank) + " dimensions");
}

int64_t rows_of(const Tensor& tensor) {
  const int64_t columns = tensor.dim(tensor.shape().rank() - 1);
  return columns == 0 ? 0 : tensor.elements() / columns;
}

void check_groups(std::span<const int64_t> group_ends, int64_t columns) {
  int64_t before = 0;
  for (const int64_t end : group_ends) {
    OCTET_CHECK(end > before, "column groups are empty or out of order at " + std::to_string(end));
    before = end;
  }
  OCTET_CHECK(before == columns,
              "column groups end at " + std::to_string(before) + " of " + std::to_string(columns) + " columns");
}

void check_weight(Device device, const Linear& weight) {
  const DType dtype = weight.weight.dtype();
  OCTET_CHECK(dtype == DType::kBF16 || dtype == DType::kF8E4M3,
              std::string("packed weights are BF16 or F8_E4M3, not ") + name_of(dtype));
  OCTET_CHECK(weight.in_features % 2 == 0, std::to_string(weight.in_features) + " columns are not a number of pairs");
  OCTET_CHECK(weight.weight.bytes() == packed_bytes(dtype, weight.out_features, weight.in_features),
              "packed weight of " + std::to_string(weight.weight.bytes()) + " bytes for [" +
                  std::to_string(weight.out_features) + ", " + std::to_string(weight.in_features) + "]");
  if (!weight.weight_scale.empty()) {
    check_tensor(device, "weight_scale", weight.weight_scale, DType::kF32, {weight.out_features});
  }
}

void check_activations(Device device, const Activations& x, int64_t groups, int64_t in_features) {
  check_rank("x", x.values, 2);
  const bool codes = x.values.dtype() == DType::kF8E4M3;
  check_tensor(device, "x", x.values, codes ? DType::kF8E4M3 : DType::kBF16, {x.values.dim(0), in_features});
  OCTET_CHECK(codes != x.scales.empty(), "e4m3 inputs have scales, BF16 inputs have none");
  if (codes) check_tensor(device, "x.scales", x.scales, DType::kF32, {x.values.dim(0), groups});
}

// `out` is what quantize() would make of x, a BF16 tensor, or x itself where `scheme` says so.
void check_quantized(Device device, const Tensor& x, const ActivationScheme& scheme, int64_t groups,
                     const Activations& out) {
  check_rank("x", x, 2);
  check_tensor(device, "x", x, DType::kBF16, x.shape());
  if (scheme.kind == ActivationScheme::Kind::kNone) {
    OCTET_CHECK(out.values.data() == x.data() && out.scales.empty(), "BF16 inputs are the tensor itself");
    return;
  }
  check_tensor(device, "out.values", out.values, DType::kF8E4M3, x.shape());
  check_tensor(device, "out.scales", out.scales, DType::kF32, {x.dim(0), groups});
}

int64_t kv_heads_of(Device device, const KvLayer& cache, int64_t head_dim) {
  check_rank("cache.values", cache.values, 4);
  const int64_t blocks = cache.values.dim(0);
  const int64_t kv_heads = cache.values.dim(1);
  const DType dtype = cache.values.dtype();
  OCTET_CHECK(dtype == DType::kBF16 || dtype == DType::kF8E4M3,
              std::string("a cache is BF16 or F8_E4M3, not ") + name_of(dtype));
  OCTET_CHECK(dtype == DType::kF8E4M3 || (cache.key_scale == 1.0f && cache.value_scale == 1.0f),
              "a cache in BF16 has no scales");
  check_tensor(device, "cache.values", cache.values, dtype, {blocks, kv_heads, kKvBlockTokens, head_dim});
  check_tensor(device, "cache.keys", cache.keys, dtype, {blocks, kv_heads, head_dim / 2, kKvBlockTokens, 2});
  OCTET_CHECK(head_dim % 2 == 0 && head_dim <= 256, "head_dim " + std::to_string(head_dim) + " is odd or above 256");
  return kv_heads;
}

// Every position that attention will read must lie in a block of the cache. Looked at only where the host can: the
// shapes are what every back end is held to.
void check_places(const AttentionBatch& batch, int64_t blocks) {
  const int32_t* const positions = batch.positions.as<int32_t>();
  const int32_t* const sequence_of = batch.sequence_of.as<int32_t>();
  const int32_t* const tables = batch.block_tables.as<int32_t>();
  const int64_t tokens = batch.tokens();
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t sequence = sequence_of[token];
    const int64_t position = positions[token];
    OCTET_CHECK(sequence >= 0 && sequence < batch.block_tables.dim(0),
                "token " + std::to_string(token) + " belongs to sequence " + std::to_string(sequence));
    OCTET_CHECK(position >= 0 && position < batch.context,
                "token " + std::to_string(token) + " has position " + std::to_string(position));
    const bool follows = token > 0 && sequence_of[token - 1] == sequence;
    OCTET_CHECK(!follows || positions[token - 1] < position, "positions of a sequence rise");
    const bool last = token + 1 == tokens || sequence_of[token + 1] != sequence;
    if (!last) continue;
    for (int64_t b = 0; b <= position / kKvBlockTokens; ++b) {
      const int64_t block = tables[sequence * batch.max_blocks() + b];
      OCTET_CHECK(block >= 0 && block < blocks, "sequence " + std::to_string(sequence) + " names block " +
                                                    std::to_string(block) + " of " + std::to_string(blocks));
    }
  }
}

void check_batch(Device device, const AttentionBatch& batch, int64_t tokens, int64_t blocks) {
  check_rank("sequence_ends", batch.sequence_ends, 1);
  check_rank("block_tables", batch.block_tables, 2);
  check_tensor(device, "positions", batch.positions, DType::kI32, {tokens});
  check_tensor(device, "sequence_of", batch.sequence_of, DType::kI32, {tokens});
  check_tensor(device, "sequence_ends", batch.sequence_ends, DType::kI32, batch.sequence_ends.shape());
  check_tensor(device, "block_tables", batch.block_tables, DType::kI32, batch.block_tables.shape());
  OCTET_CHECK((batch.context > 0 || tokens == 0) && batch.context <= batch.max_blocks() * kKvBlockTokens,
              "contexts of " + std::to_string(batch.context) + " positions in tables of " +
                  std::to_string(batch.max_blocks()) + " blocks");
  if (device == Device::kCpu) check_places(batch, blocks);
}

void check_program(std::span<const Tensor> pieces, std::span<const int> program) {
  OCTET_CHECK(pieces.size() <= kMaxPieces, std::to_string(pieces.size()) + " pieces");
  int depth = 0;
  for (const int entry : program) {
    OCTET_CHECK(entry == kAdd || (entry >= 0 && entry < static_cast<int>(pieces.size())),
                "the program names piece " + std::to_string(entry));
    depth += entry == kAdd ? -1 : 1;
    OCTET_CHECK(depth >= 1 && depth <= kMaxSumDepth, "the program needs a stack of " + std::to_string(depth));
  }
  OCTET_CHECK(depth == 1, "the program leaves " + std::to_string(depth) + " results");
}

}  // namespace

int64_t packed_bytes(DType dtype, int64_t out_features, int64_t in_features) {
  return (out_features + kPanelRows - 1) / kPanelRows * kPanelRows * in_features * size_of(dtype);
}

void copy(Stream& stream, const Tensor& from, const Tensor& to) {
  check_tensor(from.device(), "from", from, from.dtype(), from.shape());
  check_tensor(to.device(), "to", to, from.dtype(), from.shape());
  if (from.elements() == 0) return;
  stream.backend().copy(stream, from, to);
}

void queue_copy(Stream& stream, const Tensor& from, const Tensor& to) {
  check_tensor(from.device(), "from", from, from.dtype(), from.shape());
  OCTET_CHECK(from.shape().rank() >= 1, "a copy of rows");
  const int64_t columns = from.dim(from.shape().rank() - 1), stride = to.dim(to.shape().rank() - 1);
  OCTET_CHECK(columns <= stride, "rows of " + from.shape().to_string() + " copied to " + to.shape().to_string());
  if (columns == stride) check_tensor(to.device(), "to", to, from.dtype(), from.shape());
  if (columns < stride) check_tensor(to.device(), "to", to, from.dtype(), {rows_of(from), stride});
  if (from.elements() == 0) return;
  stream.backend().queue_copy(stream, from, to);
}

void pack_rows(Stream& stream, const Tensor& raw, int64_t first_row, const Linear& weight) {
  const Device device = stream.device();
  check_weight(device, weight);
  check_rank("raw", raw, 2);
  check_tensor(Device::kCpu, "raw", raw, weight.weight.dtype(), {raw.dim(0), weight.in_features});
  const int64_t end = first_row + raw.dim(0);
  OCTET_CHECK(first_row >= 0 && first_row % kPanelRows == 0 && end <= weight.out_features &&
                  (end % kPanelRows == 0 || end == weight.out_features),
              "rows " + std::to_string(first_row) + ".." + std::to_string(end) + " are not whole panels");
  stream.backend().pack_rows(stream, raw, first_row, weight);
}

void quantize(Stream& stream, const Tensor& x, const ActivationScheme& scheme, std::span<const int64_t> group_ends,
              const Activations& out) {
  const Device device = stream.device();
  OCTET_CHECK(scheme.kind != ActivationScheme::Kind::kNone, "nothing to quantise to");
  check_quantized(device, x, scheme, static_cast<int64_t>(group_ends.size()), out);
  check_groups(group_ends, x.dim(1));
  const cpu::FlushDenormals flush;
  stream.backend().quantize(stream, x, scheme, group_ends, out);
}

void linear(Stream& stream, const Activations& x, std::span<const LinearOutput> outputs) {
  const Device device = stream.device();
  for (const LinearOutput& output : outputs) {
    check_weight(device, *output.weight);
    check_activations(device, x, 1, output.weight->in_features);
    check_tensor(device, "out", output.out, DType::kF32, {x.values.dim(0), output.weight->out_features});
  }
  if (outputs.empty() || x.values.dim(0) == 0) return;
  const cpu::FlushDenormals flush;
  stream.backend().linear(stream, x, outputs);
}

void linear_over_slices(Stream& stream, const Activations& x, const Linear& weight, const SliceRun& run,
                        std::span<const int64_t> column_ends, const Tensor& partials) {
  const Device device = stream.device();
  check_weight(device, weight);
  check_activations(device, x, run.count, weight.in_features);
  check_groups(column_ends, weight.in_features);
  OCTET_CHECK(static_cast<int>(column_ends.size()) == run.count,
              std::to_string(column_ends.size()) + " column ends for " + std::to_string(run.count) + " slices");
  OCTET_CHECK(std::ranges::all_of(column_ends, [](int64_t end) { return end % 2 == 0; }), "slices end at even columns");
  const int64_t nodes = static_cast<int64_t>(maximal_subtrees(run).size());
  check_tensor(device, "partials", partials, DType::kF32, {nodes, x.values.dim(0), weight.out_features});
  if (x.values.dim(0) == 0) return;
  const cpu::FlushDenormals flush;
  stream.backend().linear_over_slices(stream, x, weight, run, column_ends, partials);
}

void add_tree_sum(Stream& stream, std::span<const Tensor> pieces, std::span<const int> program,
                  const Tensor& residual) {
  const Device device = stream.device();
  check_rank("residual", residual, 2);
  check_tensor(device, "residual", residual, DType::kBF16, residual.shape());
  for (const Tensor& piece : pieces) check_tensor(device, "piece", piece, DType::kF32, residual.shape());
  check_program(pieces, program);
  const cpu::FlushDenormals flush;
  stream.backend().add_tree_sum(stream, pieces, program, residual);
}

void tree_sum(Stream& stream, std::span<const Tensor> pieces, std::span<const int> program, const Tensor& out) {
  const Device device = stream.device();
  check_rank("out", out, 2);
  check_tensor(device, "out", out, DType::kF32, out.shape());
  for (const Tensor& piece : pieces) check_tensor(device, "piece", piece, DType::kF32, out.shape());
  check_program(pieces, program);
  const cpu::FlushDenormals flush;
  stream.backend().tree_sum(stream, pieces, program, out);
}

void copy_rows(Stream& stream, const Tensor& table, const Tensor& row_ids, const Tensor& out) {
  const Device device = stream.device();
  check_rank("table", table, 2);
  check_rank("row_ids", row_ids, 1);
  check_tensor(device, "table", table, DType::kBF16, table.shape());
  check_tensor(device, "row_ids", row_ids, DType::kI32, row_ids.shape());
  check_tensor(device, "out", out, DType::kBF16, {row_ids.dim(0), table.dim(1)});
  for (int64_t i = 0; device == Device::kCpu && i < row_ids.dim(0); ++i) {
    const int32_t id = row_ids.as<int32_t>()[i];
    OCTET_CHECK(id >= 0 && id < table.dim(0), "row " + std::to_string(id) + " of " + std::to_string(table.dim(0)));
  }
  stream.backend().copy_rows(stream, table, row_ids, out);
}

void rms_norm(Stream& stream, const Tensor& x, const Tensor& weight, float eps, const Tensor& out) {
  const Device device = stream.device();
  check_rank("x", x, 2);
  check_tensor(device, "x", x, DType::kBF16, x.shape());
  check_tensor(device, "weight", weight, DType::kF32, {x.dim(1)});
  check_tensor(device, "out", out, DType::kBF16, x.shape());
  const cpu::FlushDenormals flush;
  stream.backend().rms_norm(stream, x, weight, eps, out);
}

void silu_mul(Stream& stream, const Tensor& gate, const Tensor& up, const Tensor& out) {
  const Device device = stream.device();
  check_rank("gate", gate, 2);
  check_tensor(device, "gate", gate, DType::kF32, gate.shape());
  check_tensor(device, "up", up, DType::kF32, gate.shape());
  check_tensor(device, "out", out, DType::kBF16, gate.shape());
  const cpu::FlushDenormals flush;
  stream.backend().silu_mul(stream, gate, up, out);
}

void rms_norm_and_quantize(Stream& stream, const Tensor& x, const NormedInput& next) {
  const Device device = stream.device();
  check_rank("x", x, 2);
  check_tensor(device, "x", x, DType::kBF16, x.shape());
  check_tensor(device, "weight", next.weight, DType::kF32, {x.dim(1)});
  check_tensor(device, "normed", next.normed, DType::kBF16, x.shape());
  check_quantized(device, next.normed, next.scheme, 1, next.out);
  const cpu::FlushDenormals flush;
  stream.backend().rms_norm_and_quantize(stream, x, next);
}

void silu_mul_and_quantize(Stream& stream, const Tensor& gate, const Tensor& up, const ActivationScheme& scheme,
                           std::span<const int64_t> group_ends, const Tensor& gated, const Activations& out) {
  const Device device = stream.device();
  check_quantized(device, gated, scheme, static_cast<int64_t>(group_ends.size()), out);
  if (scheme.kind == ActivationScheme::Kind::kNone) return silu_mul(stream, gate, up, gated);
  check_tensor(device, "gate", gate, DType::kF32, gated.shape());
  check_tensor(device, "up", up, DType::kF32, gated.shape());
  check_groups(group_ends, gate.dim(1));
  const cpu::FlushDenormals flush;
  stream.backend().silu_mul_and_quantize(stream, gate, up, scheme, group_ends, gated, out);
}

void rope_angles(Stream& stream, const Tensor& positions, const Tensor& inv_freq, const Tensor& cos_sin) {
  const Device device = stream.device();
  check_rank("positions", positions, 1);
  check_tensor(device, "positions", positions, DType::kI32, positions.shape());
  check_rank("inv_freq", inv_freq, 1);
  check_tensor(device, "inv_freq", inv_freq, DType::kF32, inv_freq.shape());
  check_tensor(device, "cos_sin", cos_sin, DType::kF32, {positions.dim(0), inv_freq.dim(0), 2});
  const cpu::FlushDenormals flush;
  stream.backend().rope_angles(stream, positions, inv_freq, cos_sin);
}

void rope_and_cache(Stream& stream, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin,
                    const AttentionBatch& batch, const Tensor& q_out, const KvLayer& cache) {
  const Device device = stream.device();
  check_rank("q", q, 3);
  const int64_t tokens = q.dim(0);
  const int64_t head_dim = q.dim(2);
  const int64_t kv_heads = kv_heads_of(device, cache, head_dim);
  check_tensor(device, "q", q, DType::kF32, q.shape());
  check_tensor(device, "k", k, DType::kF32, {tokens, kv_heads, head_dim});
  check_tensor(device, "v", v, DType::kF32, {tokens, kv_heads, head_dim});
  check_tensor(device, "cos_sin", cos_sin, DType::kF32, {tokens, head_dim / 2, 2});
  check_tensor(device, "q_out", q_out, DType::kBF16, q.shape());
  check_batch(device, batch, tokens, cache.values.dim(0));
  const cpu::FlushDenormals flush;
  stream.backend().rope_and_cache(stream, q, k, v, cos_sin, batch, q_out, cache);
}

void attention(Stream& stream, const Tensor& q, const KvLayer& cache, const AttentionBatch& batch, const Tensor& out) {
  const Device device = stream.device();
  check_rank("q", q, 3);
  const int64_t kv_heads = kv_heads_of(device, cache, q.dim(2));
  check_tensor(device, "q", q, DType::kBF16, q.shape());
  check_tensor(device, "out", out, DType::kBF16, q.shape());
  OCTET_CHECK(kv_heads > 0 && q.dim(1) % kv_heads == 0,
              std::to_string(q.dim(1)) + " query heads over " + std::to_string(kv_heads) + " KV heads");
  check_batch(device, batch, q.dim(0), cache.values.dim(0));
  const cpu::FlushDenormals flush;
  stream.backend().attention(stream, q, cache, batch, out);
}

void copy_blocks(Stream& stream, std::span<const int32_t> from, std::span<const int32_t> to, const KvLayer& cache) {
  const Device device = stream.device();
  check_rank("cache.values", cache.values, 4);
  kv_heads_of(device, cache, cache.values.dim(3));
  OCTET_CHECK(from.size() == to.size(),
              std::to_string(from.size()) + " blocks to copy to " + std::to_string(to.size()) + " blocks");
  const int64_t blocks = cache.values.dim(0);
  for (size_t i = 0; i < from.size(); ++i) {
    OCTET_CHECK(from[i] >= 0 && from[i] < blocks && to[i] >= 0 && to[i] < blocks && from[i] != to[i],
                "block " + std::to_string(from[i]) + " copied to block " + std::to_string(to[i]) + " of " +
                    std::to_string(blocks));
  }
  stream.backend().copy_blocks(stream, from, to, cache);
}

void softmax_parts(Stream& stream, const Tensor& logits, std::span<const int64_t> group_ends, const Tensor& parts) {
  const Device device = stream.device();
  check_rank("logits", logits, 2);
  check_tensor(device, "logits", logits, DType::kF32, logits.shape());
  check_groups(group_ends, logits.dim(1));
  check_tensor(device, "parts", parts, DType::kF32, {logits.dim(0), static_cast<int64_t>(group_ends.size()), 2});
  const cpu::FlushDenormals flush;
  stream.backend().softmax_parts(stream, logits, group_ends, parts);
}

void join_columns(Stream& stream, const Tensor& parts, std::span<const int64_t> column_ends, const Tensor& out) {
  const Device device = stream.device();
  check_rank("out", out, 2);
  check_tensor(device, "out", out, DType::kF32, out.shape());
  check_tensor(device, "parts", parts, DType::kF32, {out.elements()});
  check_groups(column_ends, out.dim(1));
  stream.backend().join_columns(stream, parts, column_ends, out);
}

void softmax_weights(const Stream& stream, std::span<const float> logits, float max, float scale,
                     std::span<float> weights) {
  OCTET_CHECK(logits.size() == weights.size(),
              std::to_string(weights.size()) + " weights of " + std::to_string(logits.size()) + " logits");
  const cpu::FlushDenormals flush;
  cpu::softmax_weights(stream, logits, max, scale, weights);
}

}  // namespace octet
