#include "worker/slot_table.h"

#include <algorithm>

#include "absl/strings/str_format.h"

namespace octet {
namespace {

constexpr int32_t kNone = -1;

}  // namespace

absl::Status SlotTable::check_slot(int32_t slot, bool should_be_open) const {
  if (slot < 0 || slot >= limits_.slots) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d of %d", slot, limits_.slots));
  }
  if (slots_[slot].open != should_be_open) {
    return absl::InvalidArgumentError(
        absl::StrFormat("slot %d is %s", slot, should_be_open ? "not open" : "open already"));
  }
  return absl::OkStatus();
}

absl::Status SlotTable::check_block(int32_t block) const {
  if (block >= 0 && block < limits_.blocks) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrFormat("block %d of %d", block, limits_.blocks));
}

absl::Status SlotTable::check_tokens(const char* what, int32_t slot, std::span<const int32_t> tokens) const {
  for (const int32_t token : tokens) {
    if (token >= 0 && token < limits_.vocab_size) continue;
    return absl::InvalidArgumentError(
        absl::StrFormat("slot %d: %s %d of a vocabulary of %d", slot, what, token, limits_.vocab_size));
  }
  return absl::OkStatus();
}

// Only what indexes: every number gives some answer.
absl::Status SlotTable::check_sampling(const SlotOpen& open) const {
  const SlotSampling& sampling = open.sampling;
  absl::Status status = check_tokens("allowed token", open.slot, sampling.allowed_token_ids);
  status.Update(check_tokens("end token", open.slot, sampling.end_token_ids));
  for (const TokenBias& bias : sampling.logit_bias) {
    status.Update(check_tokens("bias of token", open.slot, {&bias.token, 1}));
  }
  for (const std::vector<int32_t>& word : sampling.bad_words) {
    if (word.empty()) status.Update(absl::InvalidArgumentError(absl::StrFormat("slot %d: an empty word", open.slot)));
    status.Update(check_tokens("bad word's token", open.slot, word));
  }
  return status;
}

absl::Status SlotTable::take(const StepPlan& plan) {
  batch_.clear();
  for (const int32_t slot : batch_slots_) slots_[slot].sampled_in = kNone;
  batch_slots_.clear();
  uses_.clear();
  copies_from_.clear();
  copies_to_.clear();
  sampled_ = scored_ = 0;

  for (const int32_t slot : plan.close) {
    if (absl::Status status = check_slot(slot, true); !status.ok()) return status;
    slots_[slot].open = false;
  }
  for (const SlotOpen& open : plan.open) {
    if (absl::Status status = take_open(open); !status.ok()) return status;
  }
  for (const SlotBlock& more : plan.blocks) {
    if (absl::Status status = check_slot(more.slot, true); !status.ok()) return status;
    if (absl::Status status = check_block(more.block); !status.ok()) return status;
    slots_[more.slot].blocks.push_back(more.block);
  }
  for (const BlockCopy& copy : plan.copies) {
    if (absl::Status status = take_copy(copy); !status.ok()) return status;
  }
  if (plan.token_count() > limits_.max_step_tokens) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%d tokens in a step of at most %d", plan.token_count(), limits_.max_step_tokens));
  }
  for (const SlotTokens& run : plan.run) {
    if (absl::Status status = take_run(run); !status.ok()) return status;
  }
  for (const SlotMask& mask : plan.masks) {
    if (absl::Status status = take_mask(mask); !status.ok()) return status;
  }
  lay_out_tables();
  return absl::OkStatus();
}

absl::Status SlotTable::take_open(const SlotOpen& open) {
  if (absl::Status status = check_slot(open.slot, false); !status.ok()) return status;
  if (open.position < 0 || open.position >= limits_.max_context || open.prompt_tokens < 0) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d: opened at position %d of %d with %d prompt tokens",
                                                      open.slot, open.position, limits_.max_context,
                                                      open.prompt_tokens));
  }
  const size_t history = open.sampling.reads_history() ? static_cast<size_t>(open.position) : 0;
  if (open.history.size() != history) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d: a history of %d tokens, where its sampling reads %d",
                                                      open.slot, open.history.size(), history));
  }
  if (absl::Status status = check_tokens("history token", open.slot, open.history); !status.ok()) return status;
  if (absl::Status status = check_sampling(open); !status.ok()) return status;
  Slot& slot = slots_[open.slot];
  slot.open = true;
  slot.has_sample = false;
  slot.sampling = open.sampling;
  slot.blocks.clear();
  slot.prompt_tokens = open.prompt_tokens;
  slot.next_position = open.position;
  slot.history.clear();
  for (int32_t i = 0; i < static_cast<int32_t>(history); ++i) {
    slot.history.append(open.history[i], i >= open.prompt_tokens);
  }
  return absl::OkStatus();
}

absl::Status SlotTable::take_copy(const BlockCopy& copy) {
  if (absl::Status status = check_block(copy.from); !status.ok()) return status;
  if (absl::Status status = check_block(copy.to); !status.ok()) return status;
  if (copy.from == copy.to) {
    return absl::InvalidArgumentError(absl::StrFormat("block %d is copied onto itself", copy.from));
  }
  copies_from_.push_back(copy.from);
  copies_to_.push_back(copy.to);
  return absl::OkStatus();
}

absl::Status SlotTable::take_run(const SlotTokens& run) {
  if (absl::Status status = check_slot(run.slot, true); !status.ok()) return status;
  Slot& slot = slots_[run.slot];
  const int64_t count = run.count(), end = run.position + count;
  if (count == 0 || run.position != slot.next_position || end > limits_.max_context) {
    return absl::InvalidArgumentError(
        absl::StrFormat("slot %d: %d tokens from position %d, where position %d is next and %d the end", run.slot,
                        count, run.position, slot.next_position, limits_.max_context));
  }
  if (end > static_cast<int64_t>(slot.blocks.size()) * limits_.block_tokens) {
    return absl::InvalidArgumentError(
        absl::StrFormat("slot %d: %d blocks do not cover position %d", run.slot, slot.blocks.size(), end - 1));
  }
  if (run.from_last_sample && !slot.has_sample) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d has not sampled_ a token yet", run.slot));
  }
  if (run.from_last_sample && !run.tokens.empty()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("slot %d: %d tokens beside the one that it sampled_", run.slot, run.tokens.size()));
  }
  if (std::find(batch_slots_.begin(), batch_slots_.end(), run.slot) != batch_slots_.end()) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d runs twice in one step", run.slot));
  }
  if (run.score && (run.next_token < -1 || run.next_token >= limits_.vocab_size || run.score_top < 0)) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d: score token %d of a vocabulary of %d beside %d others",
                                                      run.slot, run.next_token, limits_.vocab_size, run.score_top));
  }
  const std::span<const int32_t> tokens = run.from_last_sample ? std::span(&slot.last_token, 1) : std::span(run.tokens);
  if (absl::Status status = check_tokens("token", run.slot, tokens); !status.ok()) return status;
  const bool keep_history = slot.sampling.reads_history();
  for (const int32_t token : tokens) {
    if (keep_history) slot.history.append(token, slot.next_position >= slot.prompt_tokens);
    batch_.tokens.push_back(token);
    batch_.positions.push_back(slot.next_position++);
    batch_.sequence_of.push_back(static_cast<int32_t>(batch_slots_.size()));
  }
  batch_.context = std::max(batch_.context, slot.next_position);
  batch_slots_.push_back(run.slot);
  batch_.sequence_ends.push_back(static_cast<int32_t>(batch_.token_count()));
  want_logits(run);
  return absl::OkStatus();
}

// Of the run's rows, which are the batch_'s last ones: those that score a token, and the last if it samples one.
void SlotTable::want_logits(const SlotTokens& run) {
  const int32_t count = run.count(), first = static_cast<int32_t>(batch_.token_count()) - count;
  const int32_t scores = run.scores();
  for (int32_t i = run.score ? 0 : count - 1; i < count; ++i) {
    const bool last = i + 1 == count, samples = run.sample && last;
    if (i >= scores && !samples) continue;
    RowUse use{.slot = run.slot, .position = run.position + i + 1};
    if (i < scores) {
      use.scored = scored_++;
      use.next_token = last ? run.next_token : run.tokens[i + 1];
      use.score_top = run.score_top;
    }
    if (samples) {
      use.sampled = sampled_++;
      slots_[run.slot].sampled_in = static_cast<int32_t>(uses_.size());
    }
    uses_.push_back(use);
    batch_.logit_rows.push_back(first + i);
  }
}

absl::Status SlotTable::take_mask(const SlotMask& mask) {
  if (absl::Status status = check_slot(mask.slot, true); !status.ok()) return status;
  const int32_t sampled_in = slots_[mask.slot].sampled_in;
  if (sampled_in == kNone || !uses_[sampled_in].mask.empty()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "slot %d: a mask %s", mask.slot, sampled_in == kNone ? "where nothing is sampled_" : "beside another"));
  }
  const size_t words = (static_cast<size_t>(limits_.vocab_size) + 31) / 32;
  if (mask.words.size() != words) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d: a mask of %d words, not %d for a vocabulary of %d",
                                                      mask.slot, mask.words.size(), words, limits_.vocab_size));
  }
  // Bits beyond the vocabulary say nothing.
  const uint32_t in_last_word = ~uint32_t{0} >> (32 * words - static_cast<size_t>(limits_.vocab_size));
  const bool any = (mask.words.back() & in_last_word) != 0 ||
                   std::any_of(mask.words.begin(), mask.words.end() - 1, [](uint32_t word) { return word != 0; });
  if (!any) return absl::InvalidArgumentError(absl::StrFormat("slot %d: a mask without a token", mask.slot));
  uses_[sampled_in].mask = mask.words;
  return absl::OkStatus();
}

// Every sequence's table, as far as the longest context goes.
void SlotTable::lay_out_tables() {
  batch_.max_blocks = (batch_.context + limits_.block_tokens - 1) / limits_.block_tokens;
  batch_.block_tables.assign(batch_slots_.size() * batch_.max_blocks, 0);
  for (size_t i = 0; i < batch_slots_.size(); ++i) {
    const std::vector<int32_t>& blocks = slots_[batch_slots_[i]].blocks;
    const auto count = std::min<int64_t>(batch_.max_blocks, static_cast<int64_t>(blocks.size()));
    std::copy_n(blocks.begin(), count, batch_.block_tables.begin() + i * batch_.max_blocks);
  }
}

}  // namespace octet
