#include "worker/worker.h"

#include <algorithm>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "worker/batch.h"
#include "worker/sampler.h"

namespace octet {
namespace {

// What a worker keeps of a sequence.
struct Slot {
  bool open = false;
  bool has_sample = false;
  SlotSampling sampling;
  std::vector<int32_t> blocks;
  int32_t next_position = 0;
  int32_t last_token = 0;
};

}  // namespace

struct Worker::Impl {
  Impl(Stream& stream, Communicator& communicator, const ModelConfig& config, const ShardSpec& shard,
       const ModelWeights& weights, KvCache cache, const WorkerLimits& limits)
      : limits(limits),
        cache(std::move(cache)),
        transformer(stream, communicator, config, shard, weights, limits.max_step_tokens),
        slots(limits.slots) {}

  // Applies close, open and blocks, then lays the tokens out. The first broken rule is the error.
  absl::Status take(const StepPlan& plan);
  absl::Status take_run(const SlotTokens& run);
  absl::Status check_slot(int32_t slot, bool should_be_open) const;
  absl::Status sample(const StepPlan& plan, StepResult* result);

  const WorkerLimits limits;
  KvCache cache;
  Transformer transformer;
  Sampler sampler;
  std::vector<Slot> slots;
  StepBatch batch;
  std::vector<int32_t> batch_slots;  // the slot of each sequence of the batch
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

absl::Status Worker::Impl::take(const StepPlan& plan) {
  for (int32_t slot : plan.close) {
    if (absl::Status status = check_slot(slot, true); !status.ok()) return status;
    slots[slot].open = false;
  }
  for (const SlotOpen& open : plan.open) {
    if (absl::Status status = check_slot(open.slot, false); !status.ok()) return status;
    Slot& slot = slots[open.slot];
    slot.open = true;
    slot.has_sample = false;
    slot.sampling = open.sampling;
    slot.blocks.clear();
    slot.next_position = 0;
  }
  for (const SlotBlock& more : plan.blocks) {
    if (absl::Status status = check_slot(more.slot, true); !status.ok()) return status;
    if (more.block < 0 || more.block >= limits.blocks) {
      return absl::InvalidArgumentError(absl::StrFormat("block %d of %d", more.block, limits.blocks));
    }
    slots[more.slot].blocks.push_back(more.block);
  }
  if (plan.token_count() > limits.max_step_tokens) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%d tokens in a step of at most %d", plan.token_count(), limits.max_step_tokens));
  }
  batch.clear();
  batch_slots.clear();
  for (const SlotTokens& run : plan.run) {
    if (absl::Status status = take_run(run); !status.ok()) return status;
  }
  // Every sequence's table, padded to the longest.
  for (int32_t slot : batch_slots) {
    batch.max_blocks = std::max(batch.max_blocks, static_cast<int64_t>(slots[slot].blocks.size()));
  }
  batch.block_tables.assign(batch_slots.size() * batch.max_blocks, 0);
  for (size_t i = 0; i < batch_slots.size(); ++i) {
    const std::vector<int32_t>& blocks = slots[batch_slots[i]].blocks;
    std::copy(blocks.begin(), blocks.end(), batch.block_tables.begin() + i * batch.max_blocks);
  }
  return absl::OkStatus();
}

absl::Status Worker::Impl::take_run(const SlotTokens& run) {
  if (absl::Status status = check_slot(run.slot, true); !status.ok()) return status;
  Slot& slot = slots[run.slot];
  const int32_t count = run.count(), end = run.position + count;
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
  if (!batch_slots.empty() && std::find(batch_slots.begin(), batch_slots.end(), run.slot) != batch_slots.end()) {
    return absl::InvalidArgumentError(absl::StrFormat("slot %d runs twice in one step", run.slot));
  }
  const int32_t sequence = static_cast<int32_t>(batch_slots.size());
  for (int32_t i = 0; i < count; ++i) {
    const int32_t token = run.from_last_sample ? slot.last_token : run.tokens[i];
    if (token < 0 || token >= limits.vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrFormat("slot %d: token %d of a vocabulary of %d", run.slot, token, limits.vocab_size));
    }
    batch.tokens.push_back(token);
    batch.positions.push_back(run.position + i);
    batch.sequence_of.push_back(sequence);
  }
  slot.next_position = end;
  batch_slots.push_back(run.slot);
  batch.sequence_ends.push_back(static_cast<int32_t>(batch.token_count()));
  if (run.sample) batch.sample_rows.push_back(static_cast<int32_t>(batch.token_count()) - 1);
  return absl::OkStatus();
}

absl::Status Worker::Impl::sample(const StepPlan& plan, StepResult* result) {
  result->sampled.resize(batch.sample_rows.size());
  auto run = plan.run.begin();
  for (size_t first = 0; first < batch.sample_rows.size(); first += kLogitRows) {
    const size_t count = std::min<size_t>(kLogitRows, batch.sample_rows.size() - first);
    const auto rows = transformer.logits(std::span(batch.sample_rows).subspan(first, count));
    for (size_t i = 0; i < count; ++i, ++run) {
      while (!run->sample) ++run;
      Slot& slot = slots[run->slot];
      if (!std::isfinite(rows[i].log_sum_exp)) {
        return absl::InternalError(
            absl::StrFormat("the logits after position %d of slot %d hold NaN or infinity: the checkpoint's weights or "
                            "scales are broken",
                            slot.next_position - 1, run->slot));
      }
      SampledToken& sampled = result->sampled[first + i];
      sampled.slot = run->slot;
      sampler.sample(rows[i], slot.sampling, slot.next_position, &sampled);
      slot.last_token = sampled.chosen.token;
      slot.has_sample = true;
    }
  }
  return absl::OkStatus();
}

Worker::Worker(Stream& stream, Communicator& communicator, const ModelConfig& config, const ShardSpec& shard,
               const ModelWeights& weights, KvCache cache, const WorkerLimits& limits)
    : impl_(std::make_unique<Impl>(stream, communicator, config, shard, weights, std::move(cache), limits)) {
  OCTET_CHECK(limits.blocks <= impl_->cache.blocks() && limits.block_tokens == kKvBlockTokens,
              "limits promise more cache than there is");
}

Worker::~Worker() = default;

StepResult Worker::run(const StepPlan& plan) {
  StepResult result;
  result.step = plan.step;
  absl::Status status = impl_->take(plan);
  if (status.ok() && impl_->batch.token_count() > 0) {
    impl_->transformer.forward(impl_->batch, impl_->cache);
    status = impl_->sample(plan, &result);
  }
  if (!status.ok()) result.error = std::string(status.message());
  return result;
}

const WorkerLimits& Worker::limits() const { return impl_->limits; }

}  // namespace octet
