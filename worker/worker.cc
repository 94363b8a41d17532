#include "worker/worker.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "kernels/cpu/thread_pool.h"
#include "worker/collective/timed_communicator.h"
#include "worker/device_sampler.h"
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
    if (stream.device() == Device::kCuda) {
      device_sampler.emplace(stream, transformer.logit_rows(), limits.vocab_size);
    }
  }

  void copy_blocks();
  // The batch of the plan last taken, and what is chosen after it.
  absl::Status run_batch(StepResult* result);
  // Of what `use` samples; its logits are to be filled in.
  Choice choice_of(const RowUse& use);
  // Whether the device chooses it.
  bool on_device(const RowUse& use);
  // Tells the device what it is to choose from the first rows of logits.
  void set_choices(std::span<const RowUse> uses);
  absl::Status read_rows(std::span<const RowUse> uses, StepResult* result);
  void read_row(const LogitsRow& row, const RowUse& use, Sampler& sampler, StepResult* result);
  // What was sampled is the slot's last token.
  void note_sample(const RowUse& use, StepResult* result);

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
  std::optional<DeviceSampler> device_sampler;
  SlotTable slots;
};

void Worker::Impl::copy_blocks() {
  if (slots.copies_from().empty()) return;
  for (int64_t layer = 0; layer < layers; ++layer) {
    octet::copy_blocks(stream, slots.copies_from(), slots.copies_to(), cache.layer(layer));
  }
}

Choice Worker::Impl::choice_of(const RowUse& use) {
  Slot& slot = slots.slot(use.slot);
  return {.row = {},
          .sampling = slot.sampling,
          .position = use.position,
          .completion_tokens = use.position - slot.prompt_tokens,
          .history = &slot.history,
          .mask = use.mask};
}

bool Worker::Impl::on_device(const RowUse& use) {
  return device_sampler && use.scored < 0 && use.sampled >= 0 && DeviceSampler::takes(choice_of(use));
}

void Worker::Impl::set_choices(std::span<const RowUse> uses) {
  if (!device_sampler) return;
  device_sampler->clear();
  for (size_t i = 0; i < uses.size(); ++i) {
    if (on_device(uses[i])) device_sampler->set(static_cast<int64_t>(i), choice_of(uses[i]));
  }
}

absl::Status Worker::Impl::run_batch(StepResult* result) {
  result->sampled.resize(static_cast<size_t>(slots.sampled()));
  result->scored.resize(static_cast<size_t>(slots.scored()));
  const std::span<const RowUse> uses = slots.uses();
  if (transformer.has_recorded(slots.batch())) {
    set_choices(uses);
    transformer.run_recorded(slots.batch());
    return read_rows(uses, result);
  }
  transformer.forward(slots.batch(), cache);
  // The next step writes its arrays over this one's, which the device may not have read yet.
  if (uses.empty()) stream.synchronize();
  const auto at_once = static_cast<size_t>(transformer.logit_rows());
  for (size_t first = 0; first < uses.size(); first += at_once) {
    const auto some = uses.subspan(first, std::min(at_once, uses.size() - first));
    set_choices(some);
    const Tensor logits = transformer.logits(static_cast<int64_t>(first), static_cast<int64_t>(some.size()));
    enter(StepPart::kSampling);
    if (device_sampler) device_sampler->run(logits);
    if (absl::Status status = read_rows(some, result); !status.ok()) return status;
  }
  return absl::OkStatus();
}

// Of the rows of logits last queued: what the device has chosen, then what is left to the host, a few rows at a time,
// shared out over the stream's threads: a row's answer depends on no other's.
absl::Status Worker::Impl::read_rows(std::span<const RowUse> uses, StepResult* result) {
  stream.synchronize();
  std::vector<int64_t> left;
  for (size_t i = 0; i < uses.size(); ++i) {
    const RowUse& use = uses[i];
    const auto row = static_cast<int64_t>(i);
    const float log_sum_exp = transformer.log_sum_exp(row);
    if (!std::isfinite(log_sum_exp)) {
      return absl::InternalError(absl::StrFormat(
          "the logits after position %d of slot %d hold NaN or infinity: the checkpoint's weights or scales are broken",
          use.position - 1, use.slot));
    }
    if (on_device(use)) {
      device_sampler->report(row, log_sum_exp, &result->sampled[use.sampled]);
      note_sample(use, result);
    } else {
      left.push_back(row);
    }
  }
  std::array<LogitsRow, kLogitRows> rows;
  for (size_t first = 0; first < left.size(); first += kLogitRows) {
    const auto count = static_cast<int64_t>(std::min<size_t>(kLogitRows, left.size() - first));
    for (int64_t i = 0; i < count; ++i) rows[i] = transformer.on_host(left[first + i], i);
    stream.pool().parallel_for(count, count * slots.limits().vocab_size, [&](int64_t i, int thread) {
      read_row(rows[i], uses[left[first + i]], samplers[thread], result);
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
  Choice choice = choice_of(use);
  choice.row = row;
  sampler.sample(choice, &result->sampled[use.sampled]);
  note_sample(use, result);
}

void Worker::Impl::note_sample(const RowUse& use, StepResult* result) {
  Slot& slot = slots.slot(use.slot);
  SampledToken& sampled = result->sampled[use.sampled];
  sampled.slot = use.slot;
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
  impl_->device_sampler->clear();
  impl_->transformer.record_decode(
      impl_->cache, [&](const Tensor& logits) { impl_->device_sampler->run(logits); }, progress);
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
      status = impl_->run_batch(&result);
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
