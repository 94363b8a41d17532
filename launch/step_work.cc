#include "launch/step_work.h"

namespace octet {
namespace {

void add(const Linear& linear, int64_t tokens, PartWork* work) {
  work->weight_bytes += static_cast<double>(linear.weight.bytes());
  if (!linear.weight_scale.empty()) work->weight_bytes += static_cast<double>(linear.weight_scale.bytes());
  const double flops = 2.0 * static_cast<double>(linear.out_features * linear.in_features * tokens);
  (linear.activations.kind == ActivationScheme::Kind::kNone ? work->bf16_flops : work->fp8_flops) += flops;
}

}  // namespace

PartWork& PartWork::operator+=(const PartWork& other) {
  weight_bytes += other.weight_bytes;
  kv_bytes += other.kv_bytes;
  bf16_flops += other.bf16_flops;
  fp8_flops += other.fp8_flops;
  return *this;
}

PartWork StepWork::total() const {
  PartWork total;
  for (const PartWork& part : parts) total += part;
  return total;
}

StepWork count_work(const ModelConfig& config, const ShardSpec& shard, const ModelWeights& weights,
                    const StepLoad& load) {
  const int64_t tokens = load.sequences * load.new_tokens;
  StepWork work;
  for (const LayerWeights& layer : weights.layers) {
    const StepPart first_norm = &layer == &weights.layers.front() ? StepPart::kNorm : StepPart::kReduce;
    work[first_norm].weight_bytes += static_cast<double>(layer.input_layernorm.bytes());
    work[StepPart::kReduce].weight_bytes += static_cast<double>(layer.post_attention_layernorm.bytes());
    for (const Linear* linear : {&layer.q_proj, &layer.k_proj, &layer.v_proj}) {
      add(*linear, tokens, &work[StepPart::kQkv]);
    }
    add(layer.o_proj, tokens, &work[StepPart::kOutput]);
    for (const Linear* linear : {&layer.gate_proj, &layer.up_proj}) add(*linear, tokens, &work[StepPart::kGateUp]);
    add(layer.down_proj, tokens, &work[StepPart::kDown]);
  }
  work[StepPart::kLogits].weight_bytes += static_cast<double>(weights.norm.bytes());
  add(weights.lm_head, load.sequences, &work[StepPart::kLogits]);

  const int64_t keys_and_values = 2;
  const int64_t attended =
      load.sequences * (load.new_tokens * load.context - load.new_tokens * (load.new_tokens - 1) / 2);
  PartWork& attention = work[StepPart::kAttention];
  attention.kv_bytes = static_cast<double>(load.sequences * load.context * config.num_hidden_layers * keys_and_values *
                                           shard.kv_heads() * config.head_dim * load.kv_bytes_per_value);
  attention.bf16_flops =
      4.0 * static_cast<double>(config.num_hidden_layers * shard.heads() * config.head_dim * attended);
  return work;
}

}  // namespace octet
