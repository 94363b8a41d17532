// Engine: one thread that sleeps at the inbox while the scheduler is idle. The mutex guards the inbox and what others
// may read; scheduler, sinks and group belong to the engine thread alone, and no sink is called with the mutex held.
#include "coordinator/engine.h"

#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/scheduler.h"
#include "kernels/check.h"

namespace octet {

// Standard mutexes rather than Abseil's: the thread sanitizer sees through these when libraries are not instrumented.
struct Engine::Impl {
  struct Submission {
    Request request;
    std::shared_ptr<RequestSink> sink;
  };
  struct Inbox {
    std::vector<Submission> submissions;
    std::vector<RequestId> cancels;
    bool empty() const { return submissions.empty() && cancels.empty(); }
  };

  Impl(const EngineOptions& options, WorkerGroup* group, std::function<void(const absl::Status&)> on_failure)
      : options(options), group(group), on_failure(std::move(on_failure)), scheduler(options.limits) {
    OCTET_CHECK(options.max_waiting > 0, "an engine's queue has room for a request");
    stats.blocks_total = stats.blocks_free = options.limits.blocks;
  }

  // ---- Engine thread
  void loop();
  bool take_inbox();
  void feed_scheduler();
  absl::Status run_step();
  void publish();
  void deliver();
  void shut_down();
  void fail(const absl::Status& cause);

  const EngineOptions options;
  WorkerGroup* const group;
  const std::function<void(const absl::Status&)> on_failure;
  Scheduler scheduler;
  std::unordered_map<RequestId, std::shared_ptr<RequestSink>> sinks;
  Inbox taken;  // swapped with `inbox`, so that both keep their memory
  StepPlan plan;
  std::vector<TokenEvent> events;  // not delivered yet
  uint64_t steps = 0, prompt_tokens = 0, generated_tokens = 0;

  // ---- Any thread, under the mutex
  mutable std::mutex mutex;
  std::condition_variable work;   // the inbox is not empty any more, or `stopping`
  std::condition_variable quiet;  // `idle` became true
  Inbox inbox;
  EngineStats stats;
  absl::Status failure;
  RequestId next_id = 1;
  bool draining = false;
  bool stopping = false;
  bool idle = false;  // the engine thread found nothing to do, or ended

  std::thread thread;  // last: it uses all of the above
};

void Engine::Impl::loop() {
  while (take_inbox()) {
    feed_scheduler();
    const absl::Status status = run_step();
    if (!status.ok()) return fail(status);
    publish();
    deliver();
  }
  shut_down();
}

// Sleeps while there is nothing to do. False when the engine is to stop.
bool Engine::Impl::take_inbox() {
  std::unique_lock lock(mutex);
  if (scheduler.idle() && inbox.empty() && !stopping) {
    idle = true;
    quiet.notify_all();
    work.wait(lock, [this] { return !inbox.empty() || stopping; });
    idle = false;
  }
  if (stopping) return false;
  std::swap(inbox, taken);
  stats.waiting += static_cast<int32_t>(taken.submissions.size());  // until publish() knows which of them run
  return true;
}

void Engine::Impl::feed_scheduler() {
  for (Submission& submission : taken.submissions) {
    sinks.emplace(submission.request.id, std::move(submission.sink));
    scheduler.add(std::move(submission.request));
  }
  for (const RequestId id : taken.cancels) scheduler.cancel(id);
  taken.submissions.clear();
  taken.cancels.clear();
  scheduler.take_events(&events);
}

absl::Status Engine::Impl::run_step() {
  if (!scheduler.plan(&plan)) return absl::OkStatus();
  publish();  // who is in the step waits no more, however long it takes
  group->submit(plan);
  deliver();  // cancels are answered while the step runs, not after it
  const absl::StatusOr<StepResult> result = group->collect();
  if (!result.ok()) return result.status();
  // The workers' state is unknown after a plan that broke its contract or numbers that are not numbers: nothing that
  // this group says later could be trusted.
  if (!result->error.empty()) return absl::InternalError(absl::StrCat("step ", plan.step, " failed: ", result->error));
  scheduler.apply(*result, &events);
  ++steps;
  generated_tokens += result->sampled.size();
  for (const SlotTokens& run : plan.run) prompt_tokens += run.tokens.size();
  return absl::OkStatus();
}

void Engine::Impl::publish() {
  const std::lock_guard lock(mutex);
  stats.waiting = scheduler.waiting();
  stats.running = scheduler.running();
  stats.blocks_free = scheduler.blocks().free();
  stats.steps = steps;
  stats.prompt_tokens = prompt_tokens;
  stats.generated_tokens = generated_tokens;
}

void Engine::Impl::deliver() {
  for (const TokenEvent& event : events) {
    const auto sink = sinks.find(event.request);
    OCTET_CHECK(sink != sinks.end(), "an event came for a request that has ended");
    sink->second->on_event(event);
    if (event.finish != FinishReason::kNone) sinks.erase(sink);
  }
  events.clear();
}

void Engine::Impl::shut_down() {
  // `stopping` is set, so the inbox grows no more.
  std::swap(inbox, taken);
  feed_scheduler();
  scheduler.end_all(FinishReason::kCancelled, "", &events);
  deliver();
  StepPlan stop;
  stop.step = plan.step + 1;
  stop.stop = true;
  group->submit(stop);
}

void Engine::Impl::fail(const absl::Status& cause) {
  {
    const std::lock_guard lock(mutex);
    failure = absl::UnavailableError(absl::StrCat("the workers failed: ", cause.message()));
    std::swap(inbox, taken);  // grows no more: submit() and cancel() see `failure`
  }
  feed_scheduler();
  scheduler.end_all(FinishReason::kError, std::string(failure.message()), &events);
  publish();
  deliver();
  if (on_failure) on_failure(cause);
  const std::lock_guard lock(mutex);
  idle = true;
  quiet.notify_all();
}

Engine::Engine(const EngineOptions& options, WorkerGroup* group, std::function<void(const absl::Status&)> on_failure)
    : impl_(std::make_unique<Impl>(options, group, std::move(on_failure))) {
  impl_->thread = std::thread([impl = impl_.get()] { impl->loop(); });
}

Engine::~Engine() {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->stopping = true;
    impl_->work.notify_one();
  }
  impl_->thread.join();
}

absl::StatusOr<RequestId> Engine::submit(Request request, std::shared_ptr<RequestSink> sink) {
  // On the caller's thread: a long prompt costs the engine nothing, and a step need not end first.
  if (absl::Status status = Scheduler::validate(request, impl_->options.limits); !status.ok()) return status;
  const std::lock_guard lock(impl_->mutex);
  if (!impl_->failure.ok()) return impl_->failure;
  if (impl_->draining || impl_->stopping) {
    return absl::UnavailableError("the server is shutting down and takes no new requests: ask another one");
  }
  const int32_t waiting = impl_->stats.waiting + static_cast<int32_t>(impl_->inbox.submissions.size());
  if (waiting >= impl_->options.max_waiting) {
    return absl::ResourceExhaustedError(
        absl::StrCat(waiting, " requests are waiting, as many as the queue holds: try again later"));
  }
  const RequestId id = impl_->next_id++;
  request.id = id;
  impl_->inbox.submissions.push_back({std::move(request), std::move(sink)});
  impl_->work.notify_one();
  return id;
}

void Engine::cancel(RequestId id) {
  const std::lock_guard lock(impl_->mutex);
  if (!impl_->failure.ok() || impl_->stopping) return;
  impl_->inbox.cancels.push_back(id);
  impl_->work.notify_one();
}

void Engine::cancel(RequestId id, uint32_t) { cancel(id); }

void Engine::drain() {
  const std::lock_guard lock(impl_->mutex);
  impl_->draining = true;
}

bool Engine::wait_idle(std::chrono::steady_clock::time_point deadline) {
  std::unique_lock lock(impl_->mutex);
  return impl_->quiet.wait_until(lock, deadline, [this] { return impl_->idle && impl_->inbox.empty(); });
}

EngineStats Engine::stats() const {
  const std::lock_guard lock(impl_->mutex);
  EngineStats stats = impl_->stats;
  stats.waiting += static_cast<int32_t>(impl_->inbox.submissions.size());
  stats.draining = impl_->draining;
  stats.failed = !impl_->failure.ok();
  return stats;
}

}  // namespace octet
