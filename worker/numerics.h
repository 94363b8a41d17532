// The numerics id: equal ids promise equal bits for equal requests. Ranks compare it at start and refuse to mix;
// servers report it.
#pragma once

#include <string>

#include "kernels/memory.h"
#include "worker/model/model_config.h"
#include "worker/model/weights.h"

namespace octet {

// Raised by every change that changes the bits of a step.
constexpr int kArithmeticVersion = 1;

std::string numerics_id(const ModelConfig& config, Isa isa, ActivationMode activations);

}  // namespace octet
