// StepBatch: a plan's tokens as the flat arrays that every layer reads, on the host. Filled by the worker from its
// slots; reused from step to step so that a steady state allocates nothing. PlacedBatch: the same where the rank
// computes.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/ops.h"
#include "worker/step_arrays.h"

namespace octet {

struct StepBatch {
  std::vector<int32_t> tokens;         // [tokens] ids
  std::vector<int32_t> positions;      // [tokens]
  std::vector<int32_t> sequence_of;    // [tokens]
  std::vector<int32_t> sequence_ends;  // [sequences]
  std::vector<int32_t> block_tables;   // [sequences, max_blocks]
  int64_t max_blocks = 0;
  int32_t context = 0;              // every position is below it
  std::vector<int32_t> logit_rows;  // tokens after which logits are wanted, ascending

  void clear() {
    tokens.clear();
    positions.clear();
    sequence_of.clear();
    sequence_ends.clear();
    block_tables.clear();
    logit_rows.clear();
    max_blocks = 0;
    context = 0;
  }
  int64_t token_count() const { return static_cast<int64_t>(tokens.size()); }
  int64_t sequence_count() const { return static_cast<int64_t>(sequence_ends.size()); }
};

// I32 on the stream's device, valid until the next batch is placed.
struct PlacedBatch {
  // What the arrays of a step within these limits take at most.
  static int64_t bytes(int64_t max_tokens, int64_t max_sequences, int64_t max_context) {
    const int64_t max_blocks = (max_context + kKvBlockTokens - 1) / kKvBlockTokens;
    const int64_t arrays_of_tokens = 5;
    return arrays_of_tokens * StepArrays::bytes_of(max_tokens) + StepArrays::bytes_of(max_sequences) +
           StepArrays::bytes_of(max_sequences * max_blocks);
  }

  AttentionBatch attention;
  Tensor logit_rows;
  // Where token i's row of the embedding lies: row embedding_rows[i] of what arrives, once the ranks have met. Of one
  // rank's whole table that is the token itself.
  Tensor embedding_rows;
  Tensor own_rows;  // of this rank's part of the table, those that it gives to the others
};

}  // namespace octet
