#include "launch/step_prediction.h"

#include <algorithm>

#include "worker/checkpoint/architecture.h"

namespace octet {
namespace {

// Sums over linear layers of one format, of one rank.
struct Linears {
  double weights = 0;  // read once
  double flops = 0;
};

}  // namespace

double AllReduceCost::seconds(double bytes) const {
  if (points.empty()) return 0;
  if (bytes <= points.front().first) return points.front().second;
  for (size_t i = 1; i < points.size(); ++i) {
    const auto [x0, y0] = points[i - 1];
    const auto [x1, y1] = points[i];
    if (bytes <= x1) return y0 + (y1 - y0) * (bytes - x0) / (x1 - x0);
  }
  return points.back().second + (bytes - points.back().first) / bytes_per_second;
}

StepSeconds predict_step(const WeightFormats& formats, int ranks, const RankSpeed& speed, const SpeedShares& shares,
                         const StepLoad& load) {
  const ModelConfig& config = formats.config;
  const double slices = static_cast<double>(config.num_key_value_heads);
  const double here = static_cast<double>((config.num_key_value_heads + ranks - 1) / ranks) / slices;
  const double tokens = static_cast<double>(load.sequences * load.new_tokens);

  Linears fp8, bf16;
  const auto add = [&](Linears* linears, double weights, double rows) {
    linears->weights += weights * here;
    linears->flops += 2 * weights * here * rows;
  };
  for (const ModelTensor& tensor : model_tensors(config)) {
    if (!is_block_linear(tensor.part)) continue;
    const bool is_fp8 = formats.resident_dtype(tensor.module) == DType::kF8E4M3;
    add(is_fp8 ? &fp8 : &bf16, static_cast<double>(tensor.shape.elements()), tokens);
  }
  // Only a sequence's last token asks for logits.
  add(formats.resident_dtype("lm_head") == DType::kF8E4M3 ? &fp8 : &bf16,
      static_cast<double>(config.vocab_size * config.hidden_size), static_cast<double>(load.sequences));

  const double n = static_cast<double>(load.new_tokens), context = static_cast<double>(load.context);
  const double attended = static_cast<double>(load.sequences) * (n * context - n * (n - 1) / 2);
  const double heads_here = static_cast<double>(config.num_attention_heads) * here;
  const double kv_values = 2 * slices * here * static_cast<double>(config.head_dim * config.num_hidden_layers);
  const double kv_bytes = static_cast<double>(load.sequences) * context * kv_values * load.kv_bytes_per_value;
  const double attention_flops =
      4 * static_cast<double>(config.head_dim * config.num_hidden_layers) * heads_here * attended;

  const double bandwidth = speed.bytes_per_second * shares.bandwidth;
  const double bf16_flops = speed.bf16_flops * shares.bf16;
  const double fp8_flops = speed.fp8_flops > 0 ? speed.fp8_flops * shares.fp8 : bf16_flops;
  StepSeconds seconds;
  seconds.fp8_linears = std::max(fp8.weights / bandwidth, fp8.flops / fp8_flops);
  seconds.bf16_linears = std::max(2 * bf16.weights / bandwidth, bf16.flops / bf16_flops);
  seconds.attention = std::max(kv_bytes / bandwidth, attention_flops / (speed.bf16_flops * shares.attention));
  if (ranks > 1) {
    const double bytes = tokens * static_cast<double>(config.hidden_size) * 2;
    seconds.all_reduce = 2 * static_cast<double>(config.num_hidden_layers) * speed.all_reduce.seconds(bytes);
  }
  return seconds;
}

}  // namespace octet
