#include "worker/worker.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "kernels/cpu/thread_pool.h"
#include "worker/batch.h"
#include "worker/collective/timed_communicator.h"
#include "worker/sampler.h"
#include "worker/token_history.h"

namespace octet {
namespace {

constexpr int32_t kNone = -1;

// What a worker keeps of a sequence.
struct Slot {
  bool open = false;
  bool has_sample = false;
  SlotSampling sampling;
  std::vector<int32_t> blocks;
  int32_t prompt_tokens = 0;
  int32_t next_position = 0;
  int32_t last_token = 0;
  TokenHistory history;        // up to next_position; empty unless sampling.reads_history()
  int32_t sampled_in = kNone;  // the use of a row, in the step at hand, that samples its next token
};

// What a row of logits is wanted for.
struct RowUse {
  int32_t slot = 0;
  int32_t position = 0;            // of the token after the row's
  int32_t sampled = kNone;         // the entry of StepResult::sampled
  int32_t scored = kNone;          // the entry of StepResult::scored
  int32_t next_token = kNone;      // what is scored
  int32_t score_top = 0;           // and with how many alternatives
  std::span<const uint32_t> mask;  // of what is sampled
};

}  // namespace

struct Worker::Impl {
  Impl(Stream& stream, Communicator& communicator, const ModelConfig& config, const ShardSpec& shard,
       const ModelWeights& weights, KvCache cache, const WorkerLimits& limits)
      : limits(limits),
        layers(config.num_hidden_layers),
        stream(stream),
        communicator(communicator),
        cache(std::move(cache)),
        transformer(stream, this->communicator, config, shard, weights, limits.max_step_tokens),
        samplers(stream.threads(), Sampler(stream)),
        slots(limits.slots) {}

  // Applies close, open and blocks, notes copies, then lays the tokens out. The first broken rule is the error.
  absl::Status take(const StepPlan& plan);
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

  void copy_blocks();
  absl::Status read_logits(StepResult* result);
  void read_row(const LogitsRow& row, const RowUse& use, Sampler& sampler, StepResult* result);

  const WorkerLimits limits;
  const int64_t layers;
  Stream& stream;
  TimedCommunicator communicator;
  KvCache cache;
  Transformer transformer;
  std::vector<Sampler> samplers;  // one for each thread of the stream
  std::vector<Slot> slots;
  // Of the step at hand.
  StepBatch batch;
  std::vector<int32_t> batch_slots;  // the slot of each sequence of the batch
  std::vector<RowUse> uses;          // of batch.logit_rows
  int32_t sampled = 0, scored = 0;   // entries of the result
  std::vector<int32_t> copies_from, copies_to;
};

absl::Status Worker::Impl::check_slot(int32_t slot, bool should_be_open) const {
  if (slot < 0 || slot >= limits.slots) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d of %d", slot, limits.slots));
  }
  if (slots[slot].open != should_be_open) {
    return absl::InvalidArgumentError(
        absl::StrFormat("slot %d is %s", slot, should_be_open ? "not open" : "open already"));
  }
  return absl::OkStatus();
}

absl::Status Worker::Impl::check_block(int32_t block) const {
  if (block >= 0 && block < limits.blocks) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrFormat("block %d of %d", block, limits.blocks));
}

absl::Status Worker::Impl::check_tokens(const char* what, int32_t slot, std::span<const int32_t> tokens) const {
  for (const int32_t token : tokens) {
    if (token >= 0 && token < limits.vocab_size) continue;
    return absl::InvalidArgumentError(
        absl::StrFormat("slot %d: %s %d of a vocabulary of %d", slot, what, token, limits.vocab_size));
  }
  return absl::OkStatus();
}

// Only what indexes: every number gives some answer.
absl::Status Worker::Impl::check_sampling(const SlotOpen& open) const {
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

absl::Status Worker::Impl::take(const StepPlan& plan) {
  batch.clear();
  for (const int32_t slot : batch_slots) slots[slot].sampled_in = kNone;
  batch_slots.clear();
  uses.clear();
  copies_from.clear();
  copies_to.clear();
  sampled = scored = 0;

  for (const int32_t slot : plan.close) {
    if (absl::Status status = check_slot(slot, true); !status.ok()) return status;
    slots[slot].open = false;
  }
  for (const SlotOpen& open : plan.open) {
    if (absl::Status status = take_open(open); !status.ok()) return status;
  }
  for (const SlotBlock& more : plan.blocks) {
    if (absl::Status status = check_slot(more.slot, true); !status.ok()) return status;
    if (absl::Status status = check_block(more.block); !status.ok()) return status;
    slots[more.slot].blocks.push_back(more.block);
  }
  for (const BlockCopy& copy : plan.copies) {
    if (absl::Status status = take_copy(copy); !status.ok()) return status;
  }
  if (plan.token_count() > limits.max_step_tokens) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%d tokens in a step of at most %d", plan.token_count(), limits.max_step_tokens));
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

absl::Status Worker::Impl::take_open(const SlotOpen& open) {
  if (absl::Status status = check_slot(open.slot, false); !status.ok()) return status;
  if (open.position < 0 || open.position >= limits.max_context || open.prompt_tokens < 0) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d: opened at position %d of %d with %d prompt tokens",
                                                      open.slot, open.position, limits.max_context,
                                                      open.prompt_tokens));
  }
  const size_t history = open.sampling.reads_history() ? static_cast<size_t>(open.position) : 0;
  if (open.history.size() != history) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d: a history of %d tokens, where its sampling reads %d",
                                                      open.slot, open.history.size(), history));
  }
  if (absl::Status status = check_tokens("history token", open.slot, open.history); !status.ok()) return status;
  if (absl::Status status = check_sampling(open); !status.ok()) return status;
  Slot& slot = slots[open.slot];
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

absl::Status Worker::Impl::take_copy(const BlockCopy& copy) {
  if (absl::Status status = check_block(copy.from); !status.ok()) return status;
  if (absl::Status status = check_block(copy.to); !status.ok()) return status;
  if (copy.from == copy.to) {
    return absl::InvalidArgumentError(absl::StrFormat("block %d is copied onto itself", copy.from));
  }
  copies_from.push_back(copy.from);
  copies_to.push_back(copy.to);
  return absl::OkStatus();
}

absl::Status Worker::Impl::take_run(const SlotTokens& run) {
  if (absl::Status status = check_slot(run.slot, true); !status.ok()) return status;
  Slot& slot = slots[run.slot];
  const int64_t count = run.count(), end = run.position + count;
  if (count == 0 || run.position != slot.next_position || end > limits.max_context) {
    return absl::InvalidArgumentError(
        absl::StrFormat("slot %d: %d tokens from position %d, where position %d is next and %d the end", run.slot,
                        count, run.position, slot.next_position, limits.max_context));
  }
  if (end > static_cast<int64_t>(slot.blocks.size()) * limits.block_tokens) {
    return absl::InvalidArgumentError(
        absl::StrFormat("slot %d: %d blocks do not cover position %d", run.slot, slot.blocks.size(), end - 1));
  }
  if (run.from_last_sample && !slot.has_sample) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d has not sampled a token yet", run.slot));
  }
  if (run.from_last_sample && !run.tokens.empty()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("slot %d: %d tokens beside the one that it sampled", run.slot, run.tokens.size()));
  }
  if (std::find(batch_slots.begin(), batch_slots.end(), run.slot) != batch_slots.end()) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d runs twice in one step", run.slot));
  }
  if (run.score && (run.next_token < -1 || run.next_token >= limits.vocab_size || run.score_top < 0)) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d: score token %d of a vocabulary of %d beside %d others",
                                                      run.slot, run.next_token, limits.vocab_size, run.score_top));
  }
  const std::span<const int32_t> tokens = run.from_last_sample ? std::span(&slot.last_token, 1) : std::span(run.tokens);
  if (absl::Status status = check_tokens("token", run.slot, tokens); !status.ok()) return status;
  const bool keep_history = slot.sampling.reads_history();
  for (const int32_t token : tokens) {
    if (keep_history) slot.history.append(token, slot.next_position >= slot.prompt_tokens);
    batch.tokens.push_back(token);
    batch.positions.push_back(slot.next_position++);
    batch.sequence_of.push_back(static_cast<int32_t>(batch_slots.size()));
  }
  batch_slots.push_back(run.slot);
  batch.sequence_ends.push_back(static_cast<int32_t>(batch.token_count()));
  want_logits(run);
  return absl::OkStatus();
}

// Of the run's rows, which are the batch's last ones: those that score a token, and the last if it samples one.
void Worker::Impl::want_logits(const SlotTokens& run) {
  const int32_t count = run.count(), first = static_cast<int32_t>(batch.token_count()) - count;
  const int32_t scores = run.scores();
  for (int32_t i = run.score ? 0 : count - 1; i < count; ++i) {
    const bool last = i + 1 == count, samples = run.sample && last;
    if (i >= scores && !samples) continue;
    RowUse use{.slot = run.slot, .position = run.position + i + 1};
    if (i < scores) {
      use.scored = scored++;
      use.next_token = last ? run.next_token : run.tokens[i + 1];
      use.score_top = run.score_top;
    }
    if (samples) {
      use.sampled = sampled++;
      slots[run.slot].sampled_in = static_cast<int32_t>(uses.size());
    }
    uses.push_back(use);
    batch.logit_rows.push_back(first + i);
  }
}

absl::Status Worker::Impl::take_mask(const SlotMask& mask) {
  if (absl::Status status = check_slot(mask.slot, true); !status.ok()) return status;
  const int32_t sampled_in = slots[mask.slot].sampled_in;
  if (sampled_in == kNone || !uses[sampled_in].mask.empty()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "slot %d: a mask %s", mask.slot, sampled_in == kNone ? "where nothing is sampled" : "beside another"));
  }
  const size_t words = (static_cast<size_t>(limits.vocab_size) + 31) / 32;
  if (mask.words.size() != words) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d: a mask of %d words, not %d for a vocabulary of %d",
                                                      mask.slot, mask.words.size(), words, limits.vocab_size));
  }
  // Bits beyond the vocabulary say nothing.
  const uint32_t in_last_word = ~uint32_t{0} >> (32 * words - static_cast<size_t>(limits.vocab_size));
  const bool any = (mask.words.back() & in_last_word) != 0 ||
                   std::any_of(mask.words.begin(), mask.words.end() - 1, [](uint32_t word) { return word != 0; });
  if (!any) return absl::InvalidArgumentError(absl::StrFormat("slot %d: a mask without a token", mask.slot));
  uses[sampled_in].mask = mask.words;
  return absl::OkStatus();
}

// Every sequence's table, padded to the longest.
void Worker::Impl::lay_out_tables() {
  for (const int32_t slot : batch_slots) {
    batch.max_blocks = std::max(batch.max_blocks, static_cast<int64_t>(slots[slot].blocks.size()));
  }
  batch.block_tables.assign(batch_slots.size() * batch.max_blocks, 0);
  for (size_t i = 0; i < batch_slots.size(); ++i) {
    const std::vector<int32_t>& blocks = slots[batch_slots[i]].blocks;
    std::copy(blocks.begin(), blocks.end(), batch.block_tables.begin() + i * batch.max_blocks);
  }
}

void Worker::Impl::copy_blocks() {
  if (copies_from.empty()) return;
  for (int64_t layer = 0; layer < layers; ++layer) {
    octet::copy_blocks(stream, copies_from, copies_to, cache.layer(layer));
  }
}

// A few rows at a time, shared out over the stream's threads: a row's answer depends on no other's.
absl::Status Worker::Impl::read_logits(StepResult* result) {
  result->sampled.resize(sampled);
  result->scored.resize(scored);
  for (size_t first = 0; first < uses.size(); first += kLogitRows) {
    const size_t count = std::min<size_t>(kLogitRows, uses.size() - first);
    const auto rows = transformer.logits(std::span(batch.logit_rows).subspan(first, count));
    for (size_t i = 0; i < count; ++i) {
      if (std::isfinite(rows[i].log_sum_exp)) continue;
      const RowUse& use = uses[first + i];
      return absl::InternalError(absl::StrFormat(
          "the logits after position %d of slot %d hold NaN or infinity: the checkpoint's weights or scales are broken",
          use.position - 1, use.slot));
    }
    const auto nanoseconds = static_cast<int64_t>(count) * limits.vocab_size;
    stream.pool().parallel_for(static_cast<int64_t>(count), nanoseconds, [&](int64_t i, int thread) {
      read_row(rows[i], uses[first + i], samplers[thread], result);
    });
  }
  return absl::OkStatus();
}

void Worker::Impl::read_row(const LogitsRow& row, const RowUse& use, Sampler& sampler, StepResult* result) {
  if (use.scored != kNone) {
    SampledToken& scored = result->scored[use.scored];
    scored.slot = use.slot;
    sampler.score(row, use.next_token, use.score_top, &scored);
  }
  if (use.sampled == kNone) return;
  Slot& slot = slots[use.slot];
  SampledToken& sampled = result->sampled[use.sampled];
  sampled.slot = use.slot;
  sampler.sample({.row = row,
                  .sampling = slot.sampling,
                  .position = use.position,
                  .completion_tokens = use.position - slot.prompt_tokens,
                  .history = &slot.history,
                  .mask = use.mask},
                 &sampled);
  slot.last_token = sampled.chosen.token;
  slot.has_sample = true;
}

Worker::Worker(Stream& stream, Communicator& communicator, const ModelConfig& config, const ShardSpec& shard,
               const ModelWeights& weights, KvCache cache, const WorkerLimits& limits)
    : impl_(std::make_unique<Impl>(stream, communicator, config, shard, weights, std::move(cache), limits)) {
  OCTET_CHECK(limits.blocks <= impl_->cache.blocks() && limits.block_tokens == kKvBlockTokens,
              "limits promise more cache than there is");
}

Worker::~Worker() = default;

StepResult Worker::run(const StepPlan& plan) {
  const auto begin = std::chrono::steady_clock::now();
  const double collective_seconds = impl_->communicator.seconds();
  StepResult result;
  result.step = plan.step;
  absl::Status status = impl_->take(plan);
  if (status.ok()) {
    impl_->copy_blocks();
    if (impl_->batch.token_count() > 0) {
      impl_->transformer.forward(impl_->batch, impl_->cache);
      status = impl_->read_logits(&result);
    }
  }
  if (!status.ok()) result.error = std::string(status.message());
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
  result.timings = {
      {.run_seconds = elapsed.count(), .collective_seconds = impl_->communicator.seconds() - collective_seconds}};
  return result;
}

const WorkerLimits& Worker::limits() const { return impl_->limits; }

}  // namespace octet
