// The numerics id: equal ids promise equal bits for equal requests. Ranks compare it at start and refuse to mix;
// servers report it.
#pragma once

#include <string>

#include "kernels/cuda/module.h"
#include "kernels/memory.h"
#include "worker/model/model_config.h"
#include "worker/model/weights.h"

namespace octet {

// Raised by every change that changes the bits of a step.
constexpr int kArithmeticVersion = 1;

// What computes: "cpu-fma", "cuda-9.0", "cuda-9.0-fast-ranks8". Where the names differ the bits may; fast arithmetic is
// another one on another number of ranks, and promises no bits at all.
std::string family_of(Isa isa);
std::string family_of(const cuda::DeviceFacts& gpu, Arithmetic arithmetic, int ranks);

std::string numerics_id(const ModelConfig& config, const std::string& family, ActivationMode activations,
                        DType kv_dtype);

}  // namespace octet
