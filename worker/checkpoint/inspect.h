// What a checkpoint is, for people: its size, and how each projection is stored. Plain data first, then a table of
// text.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "worker/checkpoint/architecture.h"
#include "worker/checkpoint/checkpoint.h"

namespace octet {

// All tensors of one part that are stored alike.
struct PartSummary {
  Part part;
  std::vector<std::pair<int64_t, int64_t>> layers;  // first and last of each run; empty outside the layers
  std::string weights;                              // "BF16", "F8_E4M3"
  std::string scales;                               // "F32 per row", "BF16 per tensor"; empty for unquantised weights
  std::string inputs;  // "e4m3 per token, amax up to 1200", "e4m3, stored scale", "BF16"; empty for what is no linear
  int64_t parameters = 0;
  int64_t bytes = 0;  // weights and scales
};

struct CheckpointSummary {
  std::string model;  // ModelConfig::to_string()
  std::string quant_method;
  int64_t parameters = 0;
  int64_t bytes = 0;
  std::vector<PartSummary> parts;
  std::vector<std::string> warnings;
};

CheckpointSummary summarize(const Checkpoint& checkpoint);

// Lines of text, each ended by a newline.
std::string to_text(const CheckpointSummary& summary);

// "134,515,008". REQUIRES: number >= 0.
std::string with_commas(int64_t number);

}  // namespace octet
