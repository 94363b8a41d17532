// Scheduler: which sequences run in the next step, with which tokens and which cache blocks. Pure: no clock, thread,
// socket, device or MPI; the engine feeds it and a test can be its whole world. Only the engine thread calls these.
//
// Every step mixes decodes and prompt chunks under a token budget: running sequences first (someone is watching their
// tokens arrive), then waiting ones in order of arrival.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/block_pool.h"
#include "coordinator/request.h"
#include "worker/step_plan.h"

namespace octet {

struct SchedulerOptions {
  WorkerLimits limits;
  int32_t max_waiting = 1024;  // requests queued beyond this are refused
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);
  ~Scheduler();

  // Queues a request. INVALID_ARGUMENT (ids outside the vocabulary, empty prompt, numbers out of range), OUT_OF_RANGE
  // (longer than the context, or more blocks than exist: with the numbers), RESOURCE_EXHAUSTED (queue full).
  absl::Status add(Request request);

  // Ends a request; unknown or finished ids are ignored. Its terminal event (kCancelled) comes from the next apply() or
  // take_events(); its blocks are free after at most one more applied step.
  void cancel(RequestId id);

  // The next step, or nothing when no sequence can run. REQUIRES: the previous plan was applied.
  // A plan may have an empty `run` when only slots are to be closed.
  bool plan(StepPlan* plan);

  // Takes in what the step gave; appends the events in order. REQUIRES: result.step is the plan's.
  void apply(const StepResult& result, std::vector<TokenEvent>* events);

  // Events that did not need a step (cancelled while waiting).
  void take_events(std::vector<TokenEvent>* events);

  // Ends everything with kError and this message (the group failed).
  void fail_all(const std::string& message, std::vector<TokenEvent>* events);

  bool idle() const;  // nothing waiting, running or to be closed
  int32_t waiting() const;
  int32_t running() const;
  const BlockPool& blocks() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
