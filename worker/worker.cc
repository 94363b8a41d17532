#include "worker/worker.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "kernels/cpu/thread_pool.h"
#include "worker/collective/timed_communicator.h"
#include "worker/sampler.h"
#include "worker/slot_table.h"

namespace octet {

struct Worker::Impl {
  Impl(Stream& stream, Communicator& communicator, const ModelConfig& config, const ShardSpec& shard,
       const ModelWeights& weights, KvCache cache, const WorkerLimits& limits, FlightRecorder* recorder)
      : layers(config.num_hidden_layers),
        stream(stream),
        communicator(communicator, recorder),
        recorder(recorder),
        cache(std::move(cache)),
        transformer(stream, this->communicator, config, shard, weights, limits),
        samplers(stream.threads(), Sampler(stream)),
        slots(limits) {
    for (Sampler& sampler : samplers) sampler.reserve(limits.vocab_size);
  }

  void copy_blocks();
  absl::Status read_logits(StepResult* result);
  void read_row(const LogitsRow& row, const RowUse& use, Sampler& sampler, StepResult* result);

  void enter(StepPart part) const {
    if (probe != nullptr) probe->enter(part);
  }

  const int64_t layers;
  Stream& stream;
  TimedCommunicator communicator;
  FlightRecorder* const recorder;
  StepProbe* probe = nullptr;
  KvCache cache;
  Transformer transformer;
  std::vector<Sampler> samplers;  // one for each thread of the stream
  SlotTable slots;
};

void Worker::Impl::copy_blocks() {
  if (slots.copies_from().empty()) return;
  for (int64_t layer = 0; layer < layers; ++layer) {
    octet::copy_blocks(stream, slots.copies_from(), slots.copies_to(), cache.layer(layer));
  }
}

// A few rows at a time, shared out over the stream's threads: a row's answer depends on no other's.
absl::Status Worker::Impl::read_logits(StepResult* result) {
  result->sampled.resize(static_cast<size_t>(slots.sampled()));
  result->scored.resize(static_cast<size_t>(slots.scored()));
  const std::span<const RowUse> uses = slots.uses();
  for (size_t first = 0; first < uses.size(); first += kLogitRows) {
    const size_t count = std::min<size_t>(kLogitRows, uses.size() - first);
    const auto rows = transformer.logits(static_cast<int64_t>(first), static_cast<int64_t>(count));
    enter(StepPart::kSampling);
    for (size_t i = 0; i < count; ++i) {
      if (std::isfinite(rows[i].log_sum_exp)) continue;
      const RowUse& use = uses[first + i];
      return absl::InternalError(absl::StrFormat(
          "the logits after position %d of slot %d hold NaN or infinity: the checkpoint's weights or scales are broken",
          use.position - 1, use.slot));
    }
    const auto nanoseconds = static_cast<int64_t>(count) * slots.limits().vocab_size;
    stream.pool().parallel_for(static_cast<int64_t>(count), nanoseconds, [&](int64_t i, int thread) {
      read_row(rows[i], uses[first + i], samplers[thread], result);
    });
  }
  return absl::OkStatus();
}

void Worker::Impl::read_row(const LogitsRow& row, const RowUse& use, Sampler& sampler, StepResult* result) {
  if (use.scored >= 0) {
    SampledToken& scored = result->scored[use.scored];
    scored.slot = use.slot;
    sampler.score(row, use.next_token, use.score_top, &scored);
  }
  if (use.sampled < 0) return;
  Slot& slot = slots.slot(use.slot);
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
               const ModelWeights& weights, KvCache cache, const WorkerLimits& limits, FlightRecorder* recorder)
    : impl_(std::make_unique<Impl>(stream, communicator, config, shard, weights, std::move(cache), limits, recorder)) {
  OCTET_CHECK(limits.blocks <= impl_->cache.blocks() && limits.block_tokens == kKvBlockTokens,
              "limits promise more cache than there is");
}

Worker::~Worker() = default;

absl::Status Worker::record_steps(const std::function<void(int64_t, int64_t)>& progress) {
  if (impl_->stream.device() != Device::kCuda) return absl::FailedPreconditionError("the CPU runs steps op by op");
  if (!impl_->communicator.on_device()) {
    return absl::FailedPreconditionError(
        "steps run without CUDA graphs: the ranks meet in the host's memory, which a graph cannot wait for");
  }
  impl_->transformer.record_decode(impl_->cache, progress);
  return absl::OkStatus();
}

StepResult Worker::run(const StepPlan& plan) {
  const auto begin = std::chrono::steady_clock::now();
  if (impl_->recorder != nullptr) impl_->recorder->begin_step(plan.step, plan.token_count(), begin);
  const double collective_seconds = impl_->communicator.seconds();
  StepResult result;
  result.step = plan.step;
  impl_->enter(StepPart::kPlan);
  absl::Status status = impl_->slots.take(plan);
  if (status.ok()) {
    impl_->copy_blocks();
    if (impl_->slots.batch().token_count() > 0) {
      impl_->transformer.forward(impl_->slots.batch(), impl_->cache);
      status = impl_->read_logits(&result);
    }
  }
  if (!status.ok()) result.error = std::string(status.message());
  const auto end = std::chrono::steady_clock::now();
  if (impl_->recorder != nullptr) impl_->recorder->end_step(end);
  const std::chrono::duration<double> elapsed = end - begin;
  result.timings = {
      {.run_seconds = elapsed.count(), .collective_seconds = impl_->communicator.seconds() - collective_seconds}};
  return result;
}

void Worker::set_probe(StepProbe* probe) {
  impl_->probe = probe;
  impl_->transformer.set_probe(probe);
}

const WorkerLimits& Worker::limits() const { return impl_->slots.limits(); }

}  // namespace octet
