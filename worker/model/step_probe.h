// StepProbe: is told which part of a step comes next, so that the parts can be measured. A step without a probe pays a
// branch for each.
#pragma once

#include <array>
#include <cstdint>

namespace octet {

enum class StepPart : uint8_t {
  kPlan,       // the plan becomes a batch, on its way to the device
  kEmbedding,  // with the ranks' exchange of rows, and the angles of RoPE
  kNorm,       // the first; those that follow a sum belong to it
  kQkv,
  kRope,  // and what it writes to the cache
  kAttention,
  kOutput,  // o_proj
  kReduce,  // both of a layer, with the norms after them
  kGateUp,
  kSilu,
  kDown,
  kLogits,  // the last norm, lm_head and the gathering
  kSampling,
};
inline constexpr std::array kStepParts = {
    StepPart::kPlan,      StepPart::kEmbedding, StepPart::kNorm,    StepPart::kQkv,    StepPart::kRope,
    StepPart::kAttention, StepPart::kOutput,    StepPart::kReduce,  StepPart::kGateUp, StepPart::kSilu,
    StepPart::kDown,      StepPart::kLogits,    StepPart::kSampling};

// "o_proj", "gate+up".
constexpr const char* name_of(StepPart part) {
  switch (part) {
    case StepPart::kPlan:
      return "plan";
    case StepPart::kEmbedding:
      return "embedding";
    case StepPart::kNorm:
      return "norm";
    case StepPart::kQkv:
      return "qkv";
    case StepPart::kRope:
      return "rope+cache";
    case StepPart::kAttention:
      return "attention";
    case StepPart::kOutput:
      return "o_proj";
    case StepPart::kReduce:
      return "reduce";
    case StepPart::kGateUp:
      return "gate+up";
    case StepPart::kSilu:
      return "silu";
    case StepPart::kDown:
      return "down";
    case StepPart::kLogits:
      return "logits";
    case StepPart::kSampling:
      return "sampling";
  }
  return "?";
}

class StepProbe {
 public:
  virtual ~StepProbe() = default;
  // The step's work belongs to `part` from here on, until the next call. A part may come many times in a step. On the
  // worker thread; the stream may be far behind.
  virtual void enter(StepPart part) = 0;
};

}  // namespace octet
