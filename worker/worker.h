// Worker: one rank's shard of the model and its slots; run(plan) computes one step. Every rank, 0 included, runs the
// same plan and gets the same result, bit for bit. Only the worker thread calls run().
#pragma once

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "kernels/memory.h"
#include "worker/collective/communicator.h"
#include "worker/flight_recorder.h"
#include "worker/kv_cache.h"
#include "worker/model/step_probe.h"
#include "worker/model/transformer.h"
#include "worker/model/weights.h"
#include "worker/step_plan.h"

namespace octet {

class Worker {
 public:
  // All references outlive the worker. limits.blocks is the minimum over ranks, and what `cache` has at least. Steps
  // and collectives are noted in `recorder`, if there is one.
  Worker(Stream& stream, Communicator& communicator, const ModelConfig& config, const ShardSpec& shard,
         const ModelWeights& weights, KvCache cache, const WorkerLimits& limits, FlightRecorder* recorder = nullptr);
  ~Worker();

  // Lets steps of one token of each sequence run as recorded graphs, and says of each when it is recorded. Collective,
  // before the first run(). FAILED_PRECONDITION, with the reason, where they cannot: steps then run op by op.
  absl::Status record_steps(const std::function<void(int64_t done, int64_t total)>& progress);

  // A plan that breaks its contract (unknown slot, block or token out of range, gap in positions) and a NaN in the
  // logits come back as StepResult::error. The same on every rank, but for the timing.
  StepResult run(const StepPlan& plan);

  // Tells `probe` of each part of the steps that run from now on; null: nobody. It outlives the worker, or the next
  // call.
  void set_probe(StepProbe* probe);

  const WorkerLimits& limits() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
