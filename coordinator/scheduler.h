// Scheduler: which sequences run in the next step, with which tokens and which cache blocks. Pure: no clock, thread,
// socket, device or MPI; the engine feeds it and a test can be its whole world. Only the engine thread calls these.
//
// Every step mixes decodes and prompt chunks under a token budget: running sequences first (someone is watching their
// tokens arrive), then waiting ones in order of arrival. Nobody overtakes the first in the queue, so nobody starves.
//
// A sequence takes at admission all blocks that it can ever need, so that whoever runs can finish. It waits until the
// pool has them. They come back, with its slot, in the plan that closes the slot: the plan after its last step.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/block_pool.h"
#include "coordinator/request.h"
#include "worker/step_plan.h"

namespace octet {

class Scheduler {
 public:
  // REQUIRES: every limit is positive and max_context is at least 2.
  explicit Scheduler(const WorkerLimits& limits);

  // Whether such a request can be served at all, however long it waits. INVALID_ARGUMENT (ids outside the vocabulary,
  // empty prompt, numbers out of range) or OUT_OF_RANGE (longer than the context, more blocks than exist), with the
  // numbers and the remedy. A function of its arguments: any thread may call it.
  static absl::Status validate(const Request& request, const WorkerLimits& limits);

  // Queues a request. REQUIRES: validate() accepts it, and its id is new.
  void add(Request request);

  // Ends a request; unknown or finished ids are ignored. Its terminal event (kCancelled) comes from the next
  // take_events() or apply(). May be called while a step is in flight: the token that it samples for the request is
  // then dropped.
  void cancel(RequestId id);

  // The next step, or false when there is nothing to run and nothing to close. REQUIRES: the previous plan was applied.
  // *plan is overwritten; giving the same one again saves allocations. `run` is empty when slots are only to be closed.
  bool plan(StepPlan* plan);

  // Takes in what the step gave; appends its events, in the order of the plan's `run`.
  // REQUIRES: result is that of the last plan, and without error.
  void apply(const StepResult& result, std::vector<TokenEvent>* events);

  // Appends the events that did not need a step (cancels).
  void take_events(std::vector<TokenEvent>* events);

  // Ends every request with this reason, for good: the scheduler is not used any more. `error` goes with kError.
  void end_all(FinishReason finish, const std::string& error, std::vector<TokenEvent>* events);

  bool idle() const;  // nothing waiting, running or to be closed, no event to be taken
  int32_t waiting() const { return static_cast<int32_t>(waiting_.size()); }
  int32_t running() const { return static_cast<int32_t>(running_.size()); }
  const BlockPool& blocks() const { return pool_; }

 private:
  // An admitted request. Of its positions [0, computed) the cache holds keys and values.
  struct Sequence {
    Request request;
    int32_t max_tokens = 0;       // as asked for, or what the context leaves
    std::vector<int32_t> blocks;  // all that it will ever need
    int32_t blocks_told = 0;      // the first of them, which its slot on the workers has
    int32_t computed = 0;
    int32_t completion_tokens = 0;
  };
  struct Chunk {
    int32_t slot = 0;
    int32_t tokens = 0;
    bool sample = false;
  };
  struct Finished {
    int32_t slot = 0;
    std::vector<int32_t> blocks;
  };

  void close_finished(StepPlan* plan);
  bool admit_next(StepPlan* plan);
  void run_chunk(int32_t slot, int32_t* budget, StepPlan* plan);
  TokenEvent take_token(int32_t slot, const SampledToken& sampled);
  void finish(int32_t slot);

  const WorkerLimits limits_;
  BlockPool pool_;
  std::deque<Request> waiting_;
  std::vector<std::unique_ptr<Sequence>> slots_;  // [limits_.slots]; empty where nothing runs
  std::vector<int32_t> running_;                  // slots, in order of admission
  std::vector<int32_t> free_slots_;
  std::vector<Finished> finished_;  // to be closed by the next plan
  std::vector<TokenEvent> events_;  // not taken yet
  std::vector<Chunk> in_flight_;    // what the last plan runs, in its order
  bool step_in_flight_ = false;
  uint64_t step_ = 0;
};

}  // namespace octet
