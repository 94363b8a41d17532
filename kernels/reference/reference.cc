// The obvious way. Slow on purpose: nothing here is blocked, packed, threaded or vectorised by hand.
#include "kernels/reference/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/fp8.h"

namespace octet::reference {
namespace {

// Element i of a tensor of any of the float types.
float element(const Tensor& tensor, int64_t i) {
  switch (tensor.dtype()) {
    case DType::kBF16:
      return bf16_to_float(tensor.as<uint16_t>()[i]);
    case DType::kF8E4M3:
      return e4m3_to_float(tensor.as<uint8_t>()[i]);
    default:
      return tensor.as<float>()[i];
  }
}

// As flush-to-zero and denormals-are-zero have it; zero keeps its sign.
float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// What column group g covers.
int64_t begin_of(std::span<const int64_t> ends, int64_t g) { return g == 0 ? 0 : ends[g - 1]; }

double dot(const Activations& x, int64_t token, const Linear& weight, int64_t row, int64_t begin, int64_t end) {
  const int64_t in = x.values.dim(1);
  double sum = 0;
  for (int64_t k = begin; k < end; ++k) {
    sum += static_cast<double>(element(x.values, token * in + k)) * element(weight.weight, row * in + k);
  }
  return sum;
}

// One slice's scaled partial result.
double leaf(const Activations& x, int64_t token, const Linear& weight, int64_t row, int64_t group, int64_t begin,
            int64_t end) {
  double sum = dot(x, token, weight, row, begin, end);
  if (!weight.weight_scale.empty()) sum *= element(weight.weight_scale, row);
  if (!x.scales.empty()) sum *= element(x.scales, token * x.scales.dim(1) + group);
  return sum;
}

struct CacheIndex {
  int64_t key(int64_t d) const { return (at * head_dim / 2 + d / 2) * kKvBlockTokens * 2 + slot * 2 + d % 2; }
  int64_t value(int64_t d) const { return (at * kKvBlockTokens + slot) * head_dim + d; }
  int64_t at;  // block and KV head
  int64_t slot;
  int64_t head_dim;
};

CacheIndex index(const KvLayer& cache, const AttentionBatch& batch, int64_t sequence, int64_t position, int64_t head) {
  const int64_t block = batch.block_tables.as<int32_t>()[sequence * batch.max_blocks() + position / kKvBlockTokens];
  return {block * cache.values.dim(1) + head, position % kKvBlockTokens, cache.values.dim(3)};
}

// Writes element `at` of a cache tensor: `bits` of BF16, or their code.
void store(const Tensor& cache, int64_t at, uint16_t bits, float scale) {
  if (cache.dtype() == DType::kBF16) {
    cache.as<uint16_t>()[at] = bits;
  } else {
    cache.as<uint8_t>()[at] = float_to_e4m3(bf16_to_float(bits) * (1.0f / scale));
  }
}

// Element d of a head of x [tokens, heads, head_dim] after rotation.
double rotated(const Tensor& x, const Tensor& cos_sin, int64_t token, int64_t head, int64_t d) {
  const int64_t half = x.dim(2) / 2;
  const int64_t at = (token * x.dim(1) + head) * x.dim(2);
  const int64_t j = d % half;
  const double cosine = element(cos_sin, (token * half + j) * 2);
  const double sine = element(cos_sin, (token * half + j) * 2 + 1);
  const double first = element(x, at + j);
  const double second = element(x, at + half + j);
  return d < half ? first * cosine - second * sine : second * cosine + first * sine;
}

uint16_t to_bf16(double x) { return float_to_bf16(static_cast<float>(x)); }

}  // namespace

float dot_in_pairs(const float* x, const float* w, int64_t n) {
  float sum = 0;
  for (int64_t k = 0; k < n; k += 2) {
    sum = flushed(std::fma(flushed(x[k + 1]), flushed(w[k + 1]), sum));
    sum = flushed(std::fma(flushed(x[k]), flushed(w[k]), sum));
  }
  return sum;
}

void quantize(const Tensor& x, const ActivationScheme& scheme, std::span<const int64_t> group_ends,
              const Activations& out) {
  const int64_t groups = static_cast<int64_t>(group_ends.size());
  for (int64_t token = 0; token < x.dim(0); ++token) {
    for (int64_t g = 0; g < groups; ++g) {
      float amax = 0;
      bool nan = false;
      for (int64_t k = begin_of(group_ends, g); k < group_ends[g]; ++k) {
        const float value = element(x, token * x.dim(1) + k);
        nan = nan || std::isnan(value);
        amax = std::max(amax, std::fabs(value));
      }
      float scale = scheme.scale;
      if (scheme.kind == ActivationScheme::Kind::kDynamicPerToken) {
        scale = std::max(std::min(amax, scheme.upper_bound) / 448.0f, 1.0f / (448.0f * 512.0f));
      }
      for (int64_t k = begin_of(group_ends, g); k < group_ends[g]; ++k) {
        const int64_t at = token * x.dim(1) + k;
        out.values.as<uint8_t>()[at] = float_to_e4m3(element(x, at) * (1.0f / scale));
      }
      out.scales.as<float>()[token * groups + g] = nan ? std::numeric_limits<float>::quiet_NaN() : scale;
    }
  }
}

void linear(const Activations& x, const Linear& weight, const Tensor& out) {
  for (int64_t token = 0; token < out.dim(0); ++token) {
    for (int64_t row = 0; row < out.dim(1); ++row) {
      out.as<float>()[token * out.dim(1) + row] =
          static_cast<float>(leaf(x, token, weight, row, 0, 0, x.values.dim(1)));
    }
  }
}

void linear_over_slices(const Activations& x, const Linear& weight, const SliceRun& run,
                        std::span<const int64_t> column_ends, const Tensor& partials) {
  const std::vector<SliceNode> nodes = maximal_subtrees(run);
  const int64_t tokens = partials.dim(1);
  const int64_t rows = partials.dim(2);
  for (size_t n = 0; n < nodes.size(); ++n) {
    const int64_t first = int64_t{nodes[n].index} << nodes[n].level;
    const int64_t end = (int64_t{nodes[n].index} + 1) << nodes[n].level;
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t row = 0; row < rows; ++row) {
        double sum = 0;
        for (int64_t i = 0; i < run.count; ++i) {
          if (run.first + i < first || run.first + i >= end) continue;
          sum += leaf(x, token, weight, row, i, begin_of(column_ends, i), column_ends[i]);
        }
        partials.as<float>()[(static_cast<int64_t>(n) * tokens + token) * rows + row] = static_cast<float>(sum);
      }
    }
  }
}

void add_tree_sum(std::span<const Tensor> pieces, const Tensor& residual) {
  for (int64_t i = 0; i < residual.elements(); ++i) {
    double sum = element(residual, i);
    for (const Tensor& piece : pieces) sum += element(piece, i);
    residual.as<uint16_t>()[i] = to_bf16(sum);
  }
}

void rms_norm(const Tensor& x, const Tensor& weight, float eps, const Tensor& out) {
  const int64_t n = x.dim(1);
  for (int64_t token = 0; token < x.dim(0); ++token) {
    double squares = 0;
    for (int64_t i = 0; i < n; ++i) squares += std::pow(element(x, token * n + i), 2);
    const double norm = std::sqrt(squares / static_cast<double>(n) + eps);
    for (int64_t i = 0; i < n; ++i) {
      out.as<uint16_t>()[token * n + i] = to_bf16(element(x, token * n + i) / norm * element(weight, i));
    }
  }
}

void silu_mul(const Tensor& gate, const Tensor& up, const Tensor& out) {
  for (int64_t i = 0; i < out.elements(); ++i) {
    const double v = element(gate, i);
    out.as<uint16_t>()[i] = to_bf16(v / (1 + std::exp(-v)) * element(up, i));
  }
}

void rope_angles(const Tensor& positions, const Tensor& inv_freq, const Tensor& cos_sin) {
  const int64_t half = inv_freq.dim(0);
  for (int64_t token = 0; token < positions.dim(0); ++token) {
    for (int64_t j = 0; j < half; ++j) {
      const float angle = static_cast<float>(positions.as<int32_t>()[token]) * element(inv_freq, j);
      float* const to = cos_sin.as<float>() + (token * half + j) * 2;
      to[0] = static_cast<float>(std::cos(static_cast<double>(angle)));
      to[1] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
}

void rope_and_cache(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin,
                    const AttentionBatch& batch, const Tensor& q_out, const KvLayer& cache) {
  const int64_t head_dim = q.dim(2);
  for (int64_t token = 0; token < q.dim(0); ++token) {
    for (int64_t d = 0; d < head_dim; ++d) {
      for (int64_t head = 0; head < q.dim(1); ++head) {
        q_out.as<uint16_t>()[(token * q.dim(1) + head) * head_dim + d] = to_bf16(rotated(q, cos_sin, token, head, d));
      }
      for (int64_t head = 0; head < k.dim(1); ++head) {
        const CacheIndex at =
            index(cache, batch, batch.sequence_of.as<int32_t>()[token], batch.positions.as<int32_t>()[token], head);
        store(cache.keys, at.key(d), to_bf16(rotated(k, cos_sin, token, head, d)), cache.key_scale);
        store(cache.values, at.value(d), to_bf16(element(v, (token * k.dim(1) + head) * head_dim + d)),
              cache.value_scale);
      }
    }
  }
}

void attention(const Tensor& q, const KvLayer& cache, const AttentionBatch& batch, const Tensor& out) {
  const int64_t heads = q.dim(1);
  const int64_t head_dim = q.dim(2);
  const int64_t heads_per_kv = heads / cache.values.dim(1);
  for (int64_t token = 0; token < q.dim(0); ++token) {
    const int64_t sequence = batch.sequence_of.as<int32_t>()[token];
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t q_at = (token * heads + head) * head_dim;
      std::vector<double> scores;
      for (int64_t p = 0; p <= batch.positions.as<int32_t>()[token]; ++p) {
        const CacheIndex at = index(cache, batch, sequence, p, head / heads_per_kv);
        double score = 0;
        for (int64_t d = 0; d < head_dim; ++d) {
          score += static_cast<double>(element(q, q_at + d)) * element(cache.keys, at.key(d));
        }
        scores.push_back(score * cache.key_scale / std::sqrt(static_cast<double>(head_dim)));
      }
      const double max = *std::ranges::max_element(scores);
      double sum = 0;
      for (double& score : scores) sum += score = std::exp(score - max);
      for (int64_t d = 0; d < head_dim; ++d) {
        double weighed = 0;
        for (int64_t p = 0; p <= batch.positions.as<int32_t>()[token]; ++p) {
          weighed += scores[p] * element(cache.values, index(cache, batch, sequence, p, head / heads_per_kv).value(d));
        }
        out.as<uint16_t>()[q_at + d] = to_bf16(weighed * cache.value_scale / sum);
      }
    }
  }
}

void softmax_parts(const Tensor& logits, std::span<const int64_t> group_ends, const Tensor& parts) {
  const int64_t groups = static_cast<int64_t>(group_ends.size());
  for (int64_t row = 0; row < logits.dim(0); ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      double max = -std::numeric_limits<double>::infinity();
      double sum = 0;
      for (int64_t i = begin_of(group_ends, g); i < group_ends[g]; ++i) {
        max = std::max<double>(max, element(logits, row * logits.dim(1) + i));
      }
      for (int64_t i = begin_of(group_ends, g); i < group_ends[g]; ++i) {
        sum += std::exp(element(logits, row * logits.dim(1) + i) - max);
      }
      parts.as<float>()[(row * groups + g) * 2] = static_cast<float>(max);
      parts.as<float>()[(row * groups + g) * 2 + 1] = static_cast<float>(sum);
    }
  }
}

}  // namespace octet::reference
