#include "launch/rehearsal.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "kernels/calibrate.h"
#include "kernels/random_values.h"
#include "kernels/stopwatch.h"
#include "worker/collective/rehearsal_communicator.h"
#include "worker/kv_cache.h"
#include "worker/worker.h"

namespace octet {
namespace {

constexpr int kWarmUps = 2;  // decode steps before the first that is timed
constexpr int kProbed = 3;   // steps that are measured part by part; the median counts
constexpr uint64_t kSeed = 8;
constexpr int64_t kRandomElements = 1 << 20;
constexpr int64_t kCalibratedBytes = int64_t{8} << 30;  // of the weights: beyond every cache

// Timed decode steps have `context` in their middle.
int32_t least_context(int rounds) { return rounds / 2 + kWarmUps + 1; }
int32_t last_context(const RehearsalOptions& options) { return options.context + options.rounds / 2 + kProbed; }

int32_t blocks_of(int64_t positions) { return static_cast<int32_t>((positions + kKvBlockTokens - 1) / kKvBlockTokens); }

int32_t most(const std::vector<int32_t>& values) {
  return values.empty() ? 0 : *std::max_element(values.begin(), values.end());
}

WorkerLimits limits_of(const RehearsalOptions& options) {
  const int32_t decoded = options.batches.empty() ? 0 : last_context(options);
  return {.slots = std::max(most(options.batches), 1),
          .blocks = std::max(most(options.batches) * blocks_of(decoded), blocks_of(most(options.prefills))),
          .block_tokens = static_cast<int32_t>(kKvBlockTokens),
          .max_step_tokens = std::max(most(options.batches), most(options.prefills)),
          .max_context = std::max(decoded, most(options.prefills)),
          .vocab_size = static_cast<int32_t>(options.formats.config.vocab_size)};
}

// What each rank brings to a sum.
std::vector<SliceRun> leaves_of(const ShardSpec& shard, Arithmetic arithmetic) {
  std::vector<SliceRun> runs;
  for (int rank = 0; rank < shard.ranks(); ++rank) runs.push_back(shard.leaves_of(rank, arithmetic));
  return runs;
}

absl::StatusOr<ShardSpec> shard_of(const RehearsalOptions& options) {
  if (options.rank >= 0 && options.rank < options.ranks) {
    return ShardSpec::make(options.formats.config, options.rank, options.ranks);
  }
  return absl::InvalidArgumentError(absl::StrFormat("--rank %d of --ranks %d: the ranks are 0 to %d", options.rank,
                                                    options.ranks, options.ranks - 1));
}

absl::Status check_steps(const RehearsalOptions& options) {
  if (options.batches.empty() && options.prefills.empty()) {
    return absl::InvalidArgumentError("nothing to rehearse: give --batch, --prefill or both");
  }
  if (!options.batches.empty() && options.context < least_context(options.rounds)) {
    return absl::InvalidArgumentError(absl::StrFormat("--context %d: %d rounds of decode steps need at least %d",
                                                      options.context, options.rounds, least_context(options.rounds)));
  }
  const WorkerLimits limits = limits_of(options);
  const int64_t longest = options.formats.config.max_position_embeddings;
  if (limits.max_context > longest) {
    return absl::InvalidArgumentError(
        absl::StrFormat("sequences of up to %d positions: this model takes %d (max_position_embeddings): lower "
                        "--context or --prefill",
                        limits.max_context, longest));
  }
  return absl::OkStatus();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + std::ssize(values) / 2, values.end());
  return values[values.size() / 2];
}

// The seconds of a step by part.
class PartTimes final : public StepProbe {
 public:
  using Seconds = std::array<double, kStepParts.size()>;

  explicit PartTimes(Stream& stream) : stopwatch_(stream) {}

  void enter(StepPart part) override {
    parts_.push_back(part);
    stopwatch_.mark();
  }
  // The step is over.
  Seconds take() {
    stopwatch_.mark();
    const std::vector<double> intervals = stopwatch_.take();
    Seconds seconds{};
    for (size_t i = 0; i < parts_.size(); ++i) seconds[static_cast<size_t>(parts_[i])] += intervals[i];
    parts_.clear();
    return seconds;
  }

 private:
  Stopwatch stopwatch_;
  std::vector<StepPart> parts_;
};

double sum(const PartTimes::Seconds& seconds) {
  double sum = 0;
  for (const double part : seconds) sum += part;
  return sum;
}

}  // namespace

double StepMeasurement::seconds_to_compute(const PartWork& part) const {
  const auto at = [](double flops, double peak) { return peak > 0 ? flops / peak : 0; };
  return at(part.bf16_flops, peak.bf16) + at(part.fp8_flops, peak.fp8);
}

absl::StatusOr<RankBytes> Rehearsal::plan(const RehearsalOptions& options) {
  const ModelConfig& config = options.formats.config;
  const absl::StatusOr<ShardSpec> shard = shard_of(options);
  if (!shard.ok()) return shard.status();
  if (absl::Status status = check_steps(options); !status.ok()) return status;
  const WorkerLimits limits = limits_of(options);
  const int64_t window = RehearsalCommunicator::bytes(leaves_of(*shard, options.arithmetic), options.rank,
                                                      limits.max_step_tokens * config.hidden_size);
  const MemoryOptions memory{.max_context = limits.max_context,
                             .max_sequences = limits.slots,
                             .max_step_tokens = limits.max_step_tokens,
                             .device = options.device,
                             .window_bytes = window,
                             .kv_dtype = options.kv_dtype,
                             .arithmetic = options.arithmetic};
  absl::StatusOr<RankBytes> bytes =
      bytes_without_cache(options.formats, memory, options.rank, options.ranks, options.host.threads);
  if (bytes.ok()) bytes->kv_cache = limits.blocks * KvCache::block_bytes(config, *shard, options.kv_dtype);
  return bytes;
}

// Members are declared in the order in which they are made and outlive what uses them.
struct Rehearsal::Impl {
  Impl(const OpenDevice& device, const RehearsalOptions& options, const ShardProgress& progress)
      : device(device),
        options(options),
        shard(*shard_of(options)),
        limits(limits_of(options)),
        stream(open_stream(device, options.arithmetic, options.host)),
        weights(ModelWeights::random(*stream, options.formats, shard, options.activations, progress)),
        values(kSeed, kRandomElements),
        communicator(*stream, leaves_of(shard, options.arithmetic), options.rank,
                     limits.max_step_tokens * options.formats.config.hidden_size, values),
        worker(*stream, communicator, this->options.formats.config, shard, weights, random_cache(), limits),
        part_times(*stream) {}

  KvCache random_cache() {
    KvCache cache(*stream, options.formats.config, shard, options.kv_dtype, limits.blocks);
    for (int64_t layer = 0; layer < options.formats.config.num_hidden_layers; ++layer) {
      values.fill(*stream, cache.layer(layer).keys);
      values.fill(*stream, cache.layer(layer).values);
    }
    return cache;
  }

  // Seconds of one step.
  absl::StatusOr<double> timed(StepPlan plan) {
    plan.step = ++step;
    const auto begin = std::chrono::steady_clock::now();
    const StepResult result = worker.run(plan);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    if (!result.error.empty()) return absl::InternalError(result.error);
    return elapsed.count();
  }

  // Begins a plan with `sequences` new ones, the first `position` positions of which are in the cache, in blocks for
  // `positions`.
  StepPlan opening(int32_t sequences, int32_t position, int32_t positions) {
    StepPlan plan;
    for (int32_t slot = 0; slot < open; ++slot) plan.close.push_back(slot);
    for (int32_t slot = 0; slot < sequences; ++slot) plan.open.push_back({.slot = slot, .position = position});
    // Blocks of sequences that grow together lie between one another's.
    for (int32_t i = 0; i < blocks_of(positions); ++i) {
      for (int32_t slot = 0; slot < sequences; ++slot) {
        plan.blocks.push_back({.slot = slot, .block = i * sequences + slot});
      }
    }
    open = sequences;
    return plan;
  }

  // Any token, another one for each i.
  int32_t token(int64_t i) const { return static_cast<int32_t>((i * 7919 + 13) % limits.vocab_size); }

  StepPlan prefill(int32_t tokens) {
    StepPlan plan = opening(1, 0, tokens);
    SlotTokens run{.slot = 0, .sample = true};
    for (int32_t i = 0; i < tokens; ++i) run.tokens.push_back(token(i));
    plan.run = {run};
    return plan;
  }

  StepPlan first_decode(int32_t sequences, int32_t position) {
    StepPlan plan = opening(sequences, position, last_context(options));
    for (int32_t slot = 0; slot < sequences; ++slot) {
      plan.run.push_back({.slot = slot, .position = position, .tokens = {token(slot)}, .sample = true});
    }
    return plan;
  }

  static StepPlan decode(int32_t sequences, int32_t position) {
    StepPlan plan;
    for (int32_t slot = 0; slot < sequences; ++slot) {
      plan.run.push_back({.slot = slot, .position = position, .from_last_sample = true, .sample = true});
    }
    return plan;
  }

  // Measures steps that `next` makes the plans of.
  absl::StatusOr<StepMeasurement> measure(const StepLoad& load, const std::function<StepPlan()>& next,
                                          const std::function<void()>& step_done);
  // In turns with the calibrations.
  absl::Status time_rounds(const std::function<StepPlan()>& next, const std::function<void()>& step_done,
                           StepMeasurement* result);
  absl::Status time_parts(const std::function<StepPlan()>& next, const std::function<void()>& step_done,
                          StepMeasurement* result);
  absl::StatusOr<StepMeasurement> measure_decode(int32_t sequences, const std::function<void()>& step_done);
  absl::StatusOr<StepMeasurement> measure_prefill(int32_t tokens, const std::function<void()>& step_done);

  const OpenDevice device;
  const RehearsalOptions options;
  const ShardSpec shard;
  const WorkerLimits limits;
  const std::unique_ptr<Stream> stream;
  const ModelWeights weights;
  RandomValues values;
  RehearsalCommunicator communicator;
  Worker worker;
  PartTimes part_times;
  uint64_t step = 0;
  int32_t open = 0;  // slots
};

absl::StatusOr<StepMeasurement> Rehearsal::Impl::measure(const StepLoad& load, const std::function<StepPlan()>& next,
                                                         const std::function<void()>& step_done) {
  StepMeasurement result{.load = load, .work = count_work(options.formats.config, shard, weights, load)};
  absl::Status status = time_rounds(next, step_done, &result);
  if (status.ok()) status = time_parts(next, step_done, &result);
  if (!status.ok()) return status;
  return result;
}

absl::Status Rehearsal::Impl::time_rounds(const std::function<StepPlan()>& next, const std::function<void()>& step_done,
                                          StepMeasurement* result) {
  const PartWork work = result->work.total();
  const int64_t bytes = std::min(std::ssize(weights.memory()), kCalibratedBytes);
  const Tensor calibrated(const_cast<std::byte*>(weights.memory().data()), DType::kU8, {bytes}, stream->device());
  std::vector<double> seconds, reads, peaks, of_read, of_peak;
  for (int round = 0; round < options.rounds; ++round) {
    result->read_bytes_per_second = read_bytes_per_second(*stream, calibrated);
    result->peak = peak_flops(device, *stream);
    const absl::StatusOr<double> step = timed(next());
    if (!step.ok()) return step.status();
    step_done();
    seconds.push_back(*step);
    reads.push_back(result->read_bytes_per_second);
    peaks.push_back(result->peak.bf16);
    of_read.push_back(result->seconds_to_read(work) / *step);
    of_peak.push_back(result->seconds_to_compute(work) / *step);
  }
  result->seconds = median(seconds);
  result->least_seconds = std::ranges::min(seconds);
  result->most_seconds = std::ranges::max(seconds);
  result->read_bytes_per_second = median(reads);
  if (!device.gpu) result->peak.bf16 = result->peak.fp8 = median(peaks);
  result->of_read = median(of_read);
  result->of_peak = median(of_peak);
  return absl::OkStatus();
}

absl::Status Rehearsal::Impl::time_parts(const std::function<StepPlan()>& next, const std::function<void()>& step_done,
                                         StepMeasurement* result) {
  std::vector<PartTimes::Seconds> probed;
  worker.set_probe(&part_times);
  for (int i = 0; i < kProbed; ++i) {
    const absl::StatusOr<double> step = timed(next());
    probed.push_back(part_times.take());
    if (!step.ok()) return step.status();
    step_done();
  }
  worker.set_probe(nullptr);
  std::ranges::sort(probed, {}, sum);
  result->part_seconds = probed[kProbed / 2];
  result->probed_seconds = sum(result->part_seconds);
  return absl::OkStatus();
}

absl::StatusOr<StepMeasurement> Rehearsal::Impl::measure_decode(int32_t sequences,
                                                                const std::function<void()>& step_done) {
  int32_t position = options.context - 1 - options.rounds / 2 - kWarmUps;
  if (const auto first = timed(first_decode(sequences, position++)); !first.ok()) return first.status();
  const auto next = [&] { return decode(sequences, position++); };
  for (int i = 1; i < kWarmUps; ++i) {
    if (const auto warm_up = timed(next()); !warm_up.ok()) return warm_up.status();
  }
  return measure({.sequences = sequences,
                  .new_tokens = 1,
                  .context = options.context,
                  .kv_bytes_per_value = static_cast<int>(size_of(options.kv_dtype))},
                 next, step_done);
}

absl::StatusOr<StepMeasurement> Rehearsal::Impl::measure_prefill(int32_t tokens,
                                                                 const std::function<void()>& step_done) {
  const auto next = [&] { return prefill(tokens); };
  if (const auto warm_up = timed(next()); !warm_up.ok()) return warm_up.status();
  absl::StatusOr<StepMeasurement> result = measure({.sequences = 1,
                                                    .new_tokens = tokens,
                                                    .context = tokens,
                                                    .kv_bytes_per_value = static_cast<int>(size_of(options.kv_dtype))},
                                                   next, step_done);
  if (result.ok()) result->prefill = true;
  return result;
}

Rehearsal::Rehearsal(const OpenDevice& device, const RehearsalOptions& options, const ShardProgress& progress)
    : impl_(std::make_unique<Impl>(device, options, progress)) {}

Rehearsal::~Rehearsal() = default;

absl::StatusOr<std::vector<StepMeasurement>> Rehearsal::run(const std::function<void(int64_t, int64_t)>& progress) {
  const RehearsalOptions& options = impl_->options;
  if (options.device == Device::kCuda) {
    const absl::Status recorded = impl_->worker.record_steps([](int64_t, int64_t) {});
    if (!recorded.ok()) return recorded;
  }
  const int64_t total = std::ssize(options.batches) + std::ssize(options.prefills);
  int64_t done = 0;
  const auto step_done = [&] { progress(++done, total * (options.rounds + kProbed)); };
  std::vector<StepMeasurement> steps;
  for (const int32_t sequences : options.batches) {
    absl::StatusOr<StepMeasurement> step = impl_->measure_decode(sequences, step_done);
    if (!step.ok()) return step.status();
    steps.push_back(*std::move(step));
  }
  for (const int32_t tokens : options.prefills) {
    absl::StatusOr<StepMeasurement> step = impl_->measure_prefill(tokens, step_done);
    if (!step.ok()) return step.status();
    steps.push_back(*std::move(step));
  }
  return steps;
}

}  // namespace octet
