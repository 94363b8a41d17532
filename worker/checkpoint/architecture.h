// The tensors that a Llama checkpoint is made of, by name and shape, derived from its config (pure).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/tensor.h"
#include "worker/model/model_config.h"

namespace octet {

enum class Part : uint8_t { kEmbedding, kNorm, kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kHead };

// "q_proj", "embed_tokens", ...
const char* name_of(Part part);
// The seven projections of a layer: what FP8 recipes quantise.
bool is_block_linear(Part part);
bool is_feed_forward(Part part);

struct ModelTensor {
  std::string module;  // "model.layers.3.mlp.gate_proj"
  Part part;
  int64_t layer = -1;  // -1: outside the layers
  Shape shape;         // [out, in], or [n] for norms
  std::string name() const { return module + ".weight"; }
};

// In the order in which a forward pass meets them. A tied model has no lm_head.
std::vector<ModelTensor> model_tensors(const ModelConfig& config);

}  // namespace octet
