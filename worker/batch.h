// StepBatch: a plan's tokens as the flat arrays that every layer reads. Filled by the worker from its slots; reused
// from step to step so that a steady state allocates nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/ops.h"

namespace octet {

struct StepBatch {
  std::vector<int32_t> tokens;         // [tokens] ids
  std::vector<int32_t> positions;      // [tokens]
  std::vector<int32_t> sequence_of;    // [tokens]
  std::vector<int32_t> sequence_ends;  // [sequences]
  std::vector<int32_t> block_tables;   // [sequences, max_blocks]
  int64_t max_blocks = 0;
  std::vector<int32_t> logit_rows;  // tokens after which logits are wanted, ascending

  void clear() {
    tokens.clear();
    positions.clear();
    sequence_of.clear();
    sequence_ends.clear();
    block_tables.clear();
    logit_rows.clear();
    max_blocks = 0;
  }
  int64_t token_count() const { return static_cast<int64_t>(tokens.size()); }
  AttentionBatch attention() const {
    return {.positions = positions,
            .sequence_of = sequence_of,
            .sequence_ends = sequence_ends,
            .block_tables = block_tables,
            .max_blocks = max_blocks};
  }
};

}  // namespace octet
