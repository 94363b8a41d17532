// Engine: the loop of rank 0. inbox -> scheduler -> plan -> worker group -> apply -> events to each request's sink.
// One engine thread is the only one that touches the scheduler and the group; everybody else meets it at the inbox.
//
// It is one step ahead: while the workers run a step, the next one's plan is made and sent, so that they go from step
// to step without waiting for rank 0's mind.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/request.h"
#include "coordinator/worker_group.h"

namespace octet {

// How an output went, for metrics and logs. Times are seconds since its request was submitted.
struct OutputReport {
  RequestId request = 0;
  uint32_t output_index = 0;
  FinishReason finish = FinishReason::kNone;
  int32_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
  double queue_seconds = 0;        // until it was first admitted; all of it if it never was
  double first_token_seconds = 0;  // 0: it has none
  double total_seconds = 0;
};

struct StepReport {
  double seconds = 0;           // from one step's result to the next one's, or from submit() when nothing ran before
  double gap_seconds = 0;       // of them, rank 0's worker did not run the step
  double schedule_seconds = 0;  // that the engine spent on planning the step and taking in its result
  int32_t prompt_tokens = 0, sampled_tokens = 0, sequences = 0;
  // Valid during the call; timings by rank. A failed step is reported too: it has an error, or no result at all.
  const StepResult* result = nullptr;
};

// Told what happens. Called on the engine thread: must return at once.
class EngineObserver {
 public:
  virtual ~EngineObserver() = default;
  virtual void on_step(const StepReport& report) = 0;
  virtual void on_first_token(double seconds_since_submitted) = 0;
  virtual void on_token(double seconds_since_previous) = 0;  // an output's second and later tokens
  virtual void on_output_end(const OutputReport& report) = 0;
};

struct EngineOptions {
  WorkerLimits limits;
  int32_t max_waiting = 1024;  // outputs queued beyond this are refused
  bool prefix_cache = true;
  EngineObserver* observer = nullptr;  // outlives the engine; null: nobody
};

// Where a request's events go. Called on the engine thread: must return at once and may call the engine back only
// through submit(), cancel(), stop() and stats(), which never wait for a step.
class RequestSink {
 public:
  virtual ~RequestSink() = default;
  virtual void on_event(const TokenEvent& event) = 0;
};

struct EngineStats {
  int32_t waiting = 0, running = 0;  // outputs
  int32_t blocks_total = 0, blocks_free = 0;
  int32_t blocks_cached = 0;  // of the free ones: they hold prefixes that may be needed again
  uint64_t steps = 0, prompt_tokens = 0, generated_tokens = 0;
  uint64_t queried_prompt_tokens = 0;  // that were looked up in the prefix cache
  uint64_t cached_prompt_tokens = 0;   // of them, that it saved
  uint64_t preemptions = 0;
  bool draining = false, failed = false;  // no new requests are taken
};

class Engine {
 public:
  // Starts the engine thread. `group` outlives the engine. on_failure is called once, on the engine thread, when the
  // group fails (collect() is not OK, or a step has an error), after every sink got its terminal event. It may not
  // destroy the engine.
  Engine(const EngineOptions& options, WorkerGroup* group, std::function<void(const absl::Status&)> on_failure);
  // Waits for the steps in flight, ends every request with kCancelled and sends the stop plan (not to a failed group).
  ~Engine();

  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Milliseconds of the clock of Request::deadline_ms: std::chrono::steady_clock's, since its epoch. Any thread.
  static int64_t now_ms();

  // Any thread; never waits for a step. Queues the request under the id that it returns (request.id is overwritten).
  // The sink gets the request's events, maybe before this returns, until the terminal one, and is then dropped.
  // Refusals: those of validate_request(); RESOURCE_EXHAUSTED when max_waiting are queued; UNAVAILABLE when draining
  // or failed, with the cause. A refused request's sink gets nothing.
  absl::StatusOr<RequestId> submit(Request request, std::shared_ptr<RequestSink> sink);

  // Any thread; never blocks. Ends the request (kCancelled), or one output of it (kStopped). Unknown ones are ignored.
  void cancel(RequestId id);
  void stop(RequestId id, uint32_t output_index);

  // Any thread. Stops admitting; existing requests go on.
  void drain();
  // Waits until every request submitted so far has had its terminal event and its blocks are free, or until the
  // deadline; true when idle. Not on the engine thread.
  bool wait_idle(std::chrono::steady_clock::time_point deadline);

  // Any thread. As of the last plan.
  EngineStats stats() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
