// SlotTable: what a worker keeps of the sequences that it runs, and a plan laid out as a batch. It holds every plan
// against the contract of step_plan.h, so that nothing it passes on can index beyond what is there. Knows no model and
// no device.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "worker/batch.h"
#include "worker/step_plan.h"
#include "worker/token_history.h"

namespace octet {

// One sequence.
struct Slot {
  bool open = false;
  bool has_sample = false;
  SlotSampling sampling;
  std::vector<int32_t> blocks;
  int32_t prompt_tokens = 0;
  int32_t next_position = 0;
  int32_t last_token = 0;
  TokenHistory history;     // up to next_position; empty unless sampling.reads_history()
  int32_t sampled_in = -1;  // the use of a row, in the step at hand, that samples its next token; -1: none
};

// What a row of logits is wanted for.
struct RowUse {
  int32_t slot = 0;
  int32_t position = 0;            // of the token after the row's
  int32_t sampled = -1;            // the entry of StepResult::sampled; -1: none
  int32_t scored = -1;             // the entry of StepResult::scored; -1: none
  int32_t next_token = -1;         // what is scored
  int32_t score_top = 0;           // and with how many alternatives
  std::span<const uint32_t> mask;  // of what is sampled
};

// Only the worker thread calls these.
class SlotTable {
 public:
  explicit SlotTable(const WorkerLimits& limits) : limits_(limits), slots_(static_cast<size_t>(limits.slots)) {}

  // Applies close, open and blocks, notes copies, then lays the tokens out. The first broken rule is the error; the
  // plan may then be applied in part. What it lays out views `plan`.
  absl::Status take(const StepPlan& plan);

  // Of the plan last taken.
  const StepBatch& batch() const { return batch_; }
  std::span<const RowUse> uses() const { return uses_; }  // of batch().logit_rows
  int32_t sampled() const { return sampled_; }            // entries of the result
  int32_t scored() const { return scored_; }
  std::span<const int32_t> copies_from() const { return copies_from_; }
  std::span<const int32_t> copies_to() const { return copies_to_; }

  const WorkerLimits& limits() const { return limits_; }
  // REQUIRES: the number is one of RowUse::slot.
  Slot& slot(int32_t number) { return slots_[static_cast<size_t>(number)]; }

 private:
  absl::Status take_open(const SlotOpen& open);
  absl::Status take_copy(const BlockCopy& copy);
  absl::Status take_run(const SlotTokens& run);
  absl::Status take_mask(const SlotMask& mask);
  void want_logits(const SlotTokens& run);
  void lay_out_tables();
  absl::Status check_slot(int32_t slot, bool should_be_open) const;
  absl::Status check_block(int32_t block) const;
  absl::Status check_tokens(const char* what, int32_t slot, std::span<const int32_t> tokens) const;
  absl::Status check_sampling(const SlotOpen& open) const;

  const WorkerLimits limits_;
  std::vector<Slot> slots_;
  StepBatch batch_;
  std::vector<int32_t> batch_slots_;  // the slot of each sequence of the batch
  std::vector<RowUse> uses_;
  int32_t sampled_ = 0, scored_ = 0;
  std::vector<int32_t> copies_from_, copies_to_;
};

}  // namespace octet
