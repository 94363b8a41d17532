// WorkerGroup: all ranks seen as one worker. A plan goes in, the result that every rank agrees on comes out. Tests pass
// a fake; a single process passes its own Worker; serve passes the gRPC one. Only the engine thread calls these.
#pragma once

#include "absl/status/statusor.h"
#include "worker/step_plan.h"

namespace octet {

class WorkerGroup {
 public:
  virtual ~WorkerGroup() = default;

  // Sends a plan to every rank without waiting for it; the plan may be changed afterwards. The next plan may be
  // submitted while this one runs. A plan with `stop` is the last one: it has no result, and collect() is not called
  // for it.
  virtual void submit(const StepPlan& plan) = 0;

  // Waits for the oldest submitted plan. UNAVAILABLE when a rank is gone, DEADLINE_EXCEEDED when one is silent or
  // stuck, INTERNAL when one disagrees, naming the rank and the cause: the group is then dead (nothing more is
  // submitted to it, no stop plan either) and so must the process be.
  virtual absl::StatusOr<StepResult> collect() = 0;

  absl::StatusOr<StepResult> run(const StepPlan& plan) {
    submit(plan);
    return collect();
  }
};

}  // namespace octet
