// Rehearsal: one rank of several, alone on this machine: the very shard it would hold, of random numbers, running real
// steps, the sums over ranks replaced by their local part. It measures; rehearsal_report tells.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "launch/device.h"
#include "launch/step_work.h"
#include "worker/memory_plan.h"
#include "worker/model/weight_formats.h"

namespace octet {

struct RehearsalOptions {
  WeightFormats formats;  // of as many layers as are rehearsed
  ActivationScheme activations;
  Device device = Device::kCpu;
  Arithmetic arithmetic = Arithmetic::kReproducible;
  DType kv_dtype = DType::kBF16;
  int rank = 0, ranks = 1;
  Stream::CpuOptions host;
  std::vector<int32_t> batches;   // decode steps of so many sequences
  int32_t context = 1024;         // positions of each of them
  std::vector<int32_t> prefills;  // steps of one sequence's first so many tokens
  int rounds = 5;
};

// One kind of step. Times are of whole steps as the coordinator would see them, from the plan to the sampled tokens.
struct StepMeasurement {
  bool prefill = false;
  StepLoad load;
  StepWork work;
  double seconds = 0, least_seconds = 0, most_seconds = 0;  // median and extremes over the rounds
  double read_bytes_per_second = 0;  // of the weights with nothing done to them, measured before each step: the median
  PeakFlops peak;
  // Medians of the share of each round's calibration; of_peak is 0 where no peak is known.
  double of_read = 0, of_peak = 0;
  // Of one more step that was measured part by part.
  std::array<double, kStepParts.size()> part_seconds{};
  double probed_seconds = 0;

  // What `work` takes at full speed, without anything else.
  double seconds_to_read(const PartWork& part) const { return part.bytes() / read_bytes_per_second; }
  double seconds_to_compute(const PartWork& part) const;
};

class Rehearsal {
 public:
  // What the rank will hold. INVALID_ARGUMENT for options that make no sense.
  static absl::StatusOr<RankBytes> plan(const RehearsalOptions& options);

  // Fills the shard. REQUIRES: plan() is OK and its bytes are there.
  Rehearsal(const OpenDevice& device, const RehearsalOptions& options, const ShardProgress& progress);
  ~Rehearsal();

  // Runs the steps of the options, decodes before prefills, as graphs where the device has such; `progress` hears of
  // steps done and in all.
  absl::StatusOr<std::vector<StepMeasurement>> run(const std::function<void(int64_t, int64_t)>& progress);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
