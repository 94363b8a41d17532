// GPUs as their makers describe them: what octet plan predicts with on machines that have none.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace octet {

struct GpuSpec {
  std::string name;                  // "H100-80GB"; empty: given by numbers
  int64_t memory_bytes = 0;          // as nvidia-smi counts it
  double bytes_per_second = 0;       // memory bandwidth
  double bf16_flops = 0;             // dense tensor cores
  double fp8_flops = 0;              // 0: no FP8 units, FP8 weights meet BF16 activations
  double link_bytes_per_second = 0;  // one way, to the other GPUs of its node
};

// Smallest memory first.
const std::vector<GpuSpec>& known_gpus();

struct GpuChoice {
  int count = 0;
  GpuSpec gpu;  // without numbers when the text names none: "8x"
};
// The one that a driver calls `device_name`, "NVIDIA H100 80GB HBM3"; null where no entry is of that very card.
const GpuSpec* datasheet_of(const std::string& device_name);

// "8xH100-80GB", "H100-80GB" or "8x". INVALID_ARGUMENT, with the known names, for anything else.
absl::StatusOr<GpuChoice> parse_gpus(const std::string& text);

}  // namespace octet
