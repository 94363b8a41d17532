// StepWork: what a step has to read and to compute on one rank, part by part (pure): what its times are held against.
#pragma once

#include <array>

#include "launch/step_prediction.h"
#include "worker/model/shard_spec.h"
#include "worker/model/step_probe.h"
#include "worker/model/weights.h"

namespace octet {

// Everything is read once, and multiply-adds count twice. Activations and the rows of the embedding are left out.
struct PartWork {
  double weight_bytes = 0;  // as they lie in memory, scales and norms included
  double kv_bytes = 0;
  double bf16_flops = 0;
  double fp8_flops = 0;  // of layers whose inputs are FP8 too

  double bytes() const { return weight_bytes + kv_bytes; }
  double flops() const { return bf16_flops + fp8_flops; }
  PartWork& operator+=(const PartWork& other);
};

struct StepWork {
  std::array<PartWork, kStepParts.size()> parts;

  PartWork& operator[](StepPart part) { return parts[static_cast<size_t>(part)]; }
  const PartWork& operator[](StepPart part) const { return parts[static_cast<size_t>(part)]; }
  PartWork total() const;
};

// Only a sequence's last token asks for logits.
StepWork count_work(const ModelConfig& config, const ShardSpec& shard, const ModelWeights& weights,
                    const StepLoad& load);

}  // namespace octet
