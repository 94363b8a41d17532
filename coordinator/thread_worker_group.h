// ThreadWorkerGroup: all ranks of a model as threads of this process, each with its own shard, stream and communicator.
// For tests, benchmarks and tools; serve's ranks are processes. Only one thread at a time calls it.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/worker_group.h"
#include "worker/checkpoint/checkpoint.h"
#include "worker/collective/communicator.h"
#include "worker/memory_plan.h"
#include "worker/model/weights.h"

namespace octet {

struct ThreadGroupOptions {
  int ranks = 1;
  std::vector<int> pretend_nodes;           // sizes that add up to `ranks`; empty: one node
  Stream::CpuOptions stream;                // of each rank
  const cuda::ModuleTable* cuda = nullptr;  // all ranks compute on its first device; null: on the CPU
  bool record_steps = true;                 // on that device, where its ranks can
  ActivationMode activations = ActivationMode::kBF16;
  MemoryOptions memory;         // its arithmetic is the ranks' own: kFast only with `cuda`
  int64_t available_bytes = 0;  // of each rank
  // Lets a test put something of its own between a rank and its peers. Empty: nothing.
  std::function<std::unique_ptr<Communicator>(std::unique_ptr<Communicator>)> wrap_communicator;
};

class ThreadWorkerGroup : public WorkerGroup {
 public:
  // Loads every rank's shard. Errors as plan_memory() and ModelWeights::load().
  static absl::StatusOr<std::unique_ptr<ThreadWorkerGroup>> start(const Checkpoint& checkpoint,
                                                                  const ThreadGroupOptions& options);
  ~ThreadWorkerGroup() override;

  void submit(const StepPlan& plan) override;
  // UNAVAILABLE when two ranks disagree about a step.
  absl::StatusOr<StepResult> collect() override;

  const MemoryPlan& plan() const;
  // The weights of a rank, for calibrations over the very bytes that a step streams.
  std::span<const std::byte> weights(int rank) const;
  // Seconds that loading took, all ranks at once.
  double load_seconds() const;

 private:
  struct Impl;
  explicit ThreadWorkerGroup(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
