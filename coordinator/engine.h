// Engine: the loop of rank 0. inbox -> scheduler -> plan -> worker group -> apply -> events to each request's sink.
// One engine thread is the only one that touches the scheduler and the group; everybody else meets it at the inbox.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/request.h"
#include "coordinator/scheduler.h"
#include "coordinator/worker_group.h"

namespace octet {

// Where a request's events go. Called on the engine thread: must return at once and may call the engine back only through
// submit() and cancel(), which never block.
class RequestSink {
 public:
  virtual ~RequestSink() = default;
  virtual void on_event(const TokenEvent& event) = 0;
};

struct EngineStats {
  int32_t waiting = 0, running = 0;
  int32_t blocks_total = 0, blocks_free = 0;
  uint64_t steps = 0, prompt_tokens = 0, generated_tokens = 0;
};

class Engine {
 public:
  // Starts the engine thread. `group` outlives the engine. on_failure is called once, on the engine thread, when the group
  // fails, after every sink got its terminal event.
  Engine(const SchedulerOptions& options, WorkerGroup* group, std::function<void(const absl::Status&)> on_failure);
  ~Engine();  // drain() with no wait for requests: they end with kCancelled; workers get the stop plan

  // Any thread. Queues the request; the sink gets its events until the terminal one and is then dropped.
  // Refusals of the scheduler (see Scheduler::add) come back here: the call waits for the engine's answer, which it
  // gives between two steps at the latest. UNAVAILABLE when draining or failed.
  absl::StatusOr<RequestId> submit(Request request, std::shared_ptr<RequestSink> sink);

  // Any thread; never blocks. Unknown ids are ignored.
  void cancel(RequestId id);

  // Any thread. Stops admitting; existing requests go on.
  void drain();
  // Waits until nothing is waiting or running, or the deadline; true when idle.
  bool wait_idle(std::chrono::steady_clock::time_point deadline);

  EngineStats stats() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
