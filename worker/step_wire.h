// StepPlan and StepResult on the wire between rank 0 and the others. What arrives is hostile until decode says
// otherwise: a decoded plan holds only numbers that StepPlan allows (whether they fit this worker's limits is the
// worker's to check).
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "worker/step_plan.h"

namespace octet::internal::v1 {
class Plan;
}

namespace octet {

// Overwrites *wire; its memory is used again.
void encode(const StepPlan& plan, internal::v1::Plan* wire);

// INVALID_ARGUMENT names the field, what was expected and what was found.
absl::StatusOr<StepPlan> decode(const internal::v1::Plan& wire);

// 64 bits over everything that was sampled and scored: slots, tokens, the bits of logprobs, alternatives, in order.
// Ranks that agree have the same digest; it is a check against mistakes, not against an adversary.
uint64_t sampled_digest(const StepResult& result);

}  // namespace octet
