// Operations on rows: parallel over rows, or over pieces of them where the operation is element by element. All of them
// are bound by memory, most by a cache.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/thread_pool.h"

namespace octet::cpu {
namespace {

// Elements of one item where an operation may be cut anywhere: large enough to be worth a claim, and whole cache lines.
constexpr int64_t kSpan = 4096;

// Splits n elements of each of `rows` rows into spans: body(row, begin, end).
template <typename Body>
void for_spans(Stream& stream, int64_t rows, int64_t n, int64_t elements_per_ns, const Body& body) {
  const int64_t spans = (n + kSpan - 1) / kSpan;
  stream.pool().parallel_for(rows * spans, rows * n / elements_per_ns, [&](int64_t item, int) {
    const int64_t begin = item % spans * kSpan;
    body(item / spans, begin, std::min(begin + kSpan, n));
  });
}

}  // namespace

void copy(Stream&, const Tensor& from, const Tensor& to) {
  std::memcpy(to.data(), from.data(), static_cast<size_t>(from.bytes()));
}

void queue_copy(Stream& stream, const Tensor& from, const Tensor& to) {
  const int64_t columns = from.dim(from.shape().rank() - 1) * size_of(from.dtype());
  const int64_t stride = to.dim(to.shape().rank() - 1) * size_of(to.dtype());
  if (columns == stride) return cpu::copy(stream, from, to);
  for (int64_t row = 0; row < from.bytes() / columns; ++row) {
    std::memcpy(static_cast<char*>(to.data()) + row * stride, static_cast<char*>(from.data()) + row * columns,
                static_cast<size_t>(columns));
  }
}

void quantize(Stream& stream, const Tensor& x, const ActivationScheme& scheme, std::span<const int64_t> group_ends,
              const Activations& out) {
  const int64_t n = x.dim(1);
  const int64_t groups = static_cast<int64_t>(group_ends.size());
  const uint16_t* const from = x.as<uint16_t>();
  uint8_t* const codes = out.values.as<uint8_t>();
  float* const scales = out.scales.as<float>();
  const bool dynamic = scheme.kind == ActivationScheme::Kind::kDynamicPerToken;
  stream.pool().parallel_for(x.dim(0) * groups, x.elements() / 2, [&](int64_t item, int) {
    const int64_t group = item % groups;
    const int64_t begin = group == 0 ? 0 : group_ends[group - 1];
    const int64_t at = item / groups * n + begin;
    stream.kernels().quantize_group(from + at, group_ends[group] - begin, dynamic, scheme.upper_bound, scheme.scale,
                                    codes + at, scales + item);
  });
}

void add_tree_sum(Stream& stream, std::span<const Tensor> pieces, std::span<const int> program,
                  const Tensor& residual) {
  const int64_t n = residual.elements();
  uint16_t* const to = residual.as<uint16_t>();
  const int64_t cost = static_cast<int64_t>(pieces.size()) + 1;
  for_spans(stream, 1, n, std::max<int64_t>(8 / cost, 1), [&](int64_t, int64_t begin, int64_t end) {
    const float* at[kMaxPieces];
    for (size_t i = 0; i < pieces.size(); ++i) at[i] = pieces[i].as<float>() + begin;
    stream.kernels().add_tree_sum(at, program.data(), static_cast<int>(program.size()), end - begin, to + begin);
  });
}

// Only what crosses nodes comes here, and the wire is slower than any of these additions: one form serves every family,
// for an addition's bits do not depend on how many are made at once.
void tree_sum(Stream& stream, std::span<const Tensor> pieces, std::span<const int> program, const Tensor& out) {
  float* const to = out.as<float>();
  for_spans(stream, 1, out.elements(), 1, [&](int64_t, int64_t begin, int64_t end) {
    constexpr int kColumns = 64;
    float stack[kMaxTreeDepth][kColumns];
    for (int64_t at = begin; at < end; at += kColumns) {
      const int64_t count = std::min<int64_t>(kColumns, end - at);
      int depth = 0;
      for (const int step : program) {
        if (step >= 0) {
          std::copy_n(pieces[step].as<float>() + at, count, stack[depth++]);
          continue;
        }
        --depth;
        for (int64_t i = 0; i < count; ++i) stack[depth - 1][i] += stack[depth][i];
      }
      std::copy_n(stack[0], count, to + at);
    }
  });
}

void copy_rows(Stream& stream, const Tensor& table, const Tensor& row_ids, const Tensor& out) {
  const int64_t n = table.dim(1);
  const int32_t* const ids = row_ids.as<int32_t>();
  const uint16_t* const from = table.as<uint16_t>();
  uint16_t* const to = out.as<uint16_t>();
  stream.pool().parallel_for(row_ids.dim(0), out.elements() / 4, [&](int64_t row, int) {
    std::memcpy(to + row * n, from + ids[row] * n, n * sizeof(uint16_t));
  });
}

void rms_norm(Stream& stream, const Tensor& x, const Tensor& weight, float eps, const Tensor& out) {
  const int64_t n = x.dim(1);
  const uint16_t* const from = x.as<uint16_t>();
  uint16_t* const to = out.as<uint16_t>();
  stream.pool().parallel_for(x.dim(0), x.elements() / 4, [&](int64_t row, int) {
    stream.kernels().rms_norm_row(from + row * n, weight.as<float>(), n, eps, to + row * n);
  });
}

void silu_mul(Stream& stream, const Tensor& gate, const Tensor& up, const Tensor& out) {
  const float* const gates = gate.as<float>();
  const float* const ups = up.as<float>();
  uint16_t* const to = out.as<uint16_t>();
  for_spans(stream, 1, out.elements(), 1, [&](int64_t, int64_t begin, int64_t end) {
    stream.kernels().silu_mul(gates + begin, ups + begin, end - begin, to + begin);
  });
}

// A row that was just written is still in the cache when it is read: nothing to gain from one pass.
void rms_norm_and_quantize(Stream& stream, const Tensor& x, const NormedInput& next) {
  cpu::rms_norm(stream, x, next.weight, next.eps, next.normed);
  const int64_t whole[] = {x.dim(1)};
  if (next.scheme.kind != ActivationScheme::Kind::kNone)
    cpu::quantize(stream, next.normed, next.scheme, whole, next.out);
}

void silu_mul_and_quantize(Stream& stream, const Tensor& gate, const Tensor& up, const ActivationScheme& scheme,
                           std::span<const int64_t> group_ends, const Tensor& gated, const Activations& out) {
  cpu::silu_mul(stream, gate, up, gated);
  cpu::quantize(stream, gated, scheme, group_ends, out);
}

void rope_angles(Stream& stream, const Tensor& positions, const Tensor& inv_freq, const Tensor& cos_sin) {
  const int64_t half = inv_freq.dim(0);
  const int32_t* const at = positions.as<int32_t>();
  const float* const frequencies = inv_freq.as<float>();
  float* const to = cos_sin.as<float>();
  stream.pool().parallel_for(positions.dim(0), cos_sin.elements() * 20, [&](int64_t token, int) {
    for (int64_t j = 0; j < half; ++j) {
      // The angle is an FP32 product, as references have it; its sine and cosine are then exact to FP32.
      const double angle = static_cast<float>(at[token]) * frequencies[j];
      to[(token * half + j) * 2] = static_cast<float>(std::cos(angle));
      to[(token * half + j) * 2 + 1] = static_cast<float>(std::sin(angle));
    }
  });
}

// Keys and values side by side; a copy may read what the one before it wrote.
void copy_blocks(Stream& stream, std::span<const int32_t> from, std::span<const int32_t> to, const KvLayer& cache) {
  const int64_t blocks = static_cast<int64_t>(from.size());
  const int64_t bytes = cache.keys.bytes() / cache.keys.dim(0);  // of a block, and as many of its values
  char* const tensors[] = {static_cast<char*>(cache.keys.data()), static_cast<char*>(cache.values.data())};
  stream.pool().parallel_for(2, blocks * bytes / 8, [&](int64_t tensor, int) {
    for (int64_t i = 0; i < blocks; ++i) {
      std::memcpy(tensors[tensor] + to[i] * bytes, tensors[tensor] + from[i] * bytes, static_cast<size_t>(bytes));
    }
  });
}

void softmax_parts(Stream& stream, const Tensor& logits, std::span<const int64_t> group_ends, const Tensor& parts) {
  const int64_t n = logits.dim(1);
  const int64_t groups = static_cast<int64_t>(group_ends.size());
  const float* const from = logits.as<float>();
  float* const to = parts.as<float>();
  stream.pool().parallel_for(logits.dim(0) * groups, logits.elements(), [&](int64_t item, int) {
    const int64_t group = item % groups;
    const int64_t begin = group == 0 ? 0 : group_ends[group - 1];
    stream.kernels().softmax_part(from + item / groups * n + begin, group_ends[group] - begin, &to[2 * item],
                                  &to[2 * item + 1]);
  });
}

void join_columns(Stream& stream, const Tensor& parts, std::span<const int64_t> column_ends, const Tensor& out) {
  const int64_t rows = out.dim(0), n = out.dim(1);
  const int64_t groups = static_cast<int64_t>(column_ends.size());
  stream.pool().parallel_for(rows * groups, out.elements() / 4, [&](int64_t item, int) {
    const int64_t row = item / groups, group = item % groups;
    const int64_t begin = group == 0 ? 0 : column_ends[group - 1], count = column_ends[group] - begin;
    std::memcpy(out.as<float>() + row * n + begin, parts.as<float>() + rows * begin + row * count,
                static_cast<size_t>(count) * sizeof(float));
  });
}

// Bound by arithmetic, where the logits are in a cache; taken in pieces that stay in the nearest one.
void softmax_weights(const Stream& stream, std::span<const float> logits, float max, float scale,
                     std::span<float> weights) {
  for (size_t begin = 0; begin < logits.size(); begin += kSpan) {
    const size_t end = std::min(begin + kSpan, logits.size());
    for (size_t i = begin; i < end; ++i) weights[i] = (logits[i] - max) * scale;
    stream.kernels().exp(&weights[begin], static_cast<int64_t>(end - begin), &weights[begin]);
  }
}

}  // namespace octet::cpu
