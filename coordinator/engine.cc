// Engine: one thread that sleeps at the inbox while the scheduler is idle. The mutex guards the inbox and what others
// may read; scheduler, sinks and group belong to the engine thread alone, and no sink is called with the mutex held.
#include "coordinator/engine.h"

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/scheduler.h"
#include "kernels/check.h"

namespace octet {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

PrefixSecret random_secret() {
  std::random_device source;
  PrefixSecret secret;
  for (size_t i = 0; i < secret.size(); i += sizeof(uint32_t)) {
    const uint32_t word = source();
    std::memcpy(secret.data() + i, &word, sizeof word);
  }
  return secret;
}

}  // namespace

// Standard mutexes rather than Abseil's: the thread sanitizer sees through these when libraries are not instrumented.
struct Engine::Impl {
  struct Submission {
    Request request;
    std::shared_ptr<RequestSink> sink;
    Clock::time_point time;
  };
  struct Cancel {
    RequestId request = 0;
    std::optional<uint32_t> output_index;  // absent: all
  };
  struct Inbox {
    std::vector<Submission> submissions;
    std::vector<Cancel> cancels;
    int32_t outputs = 0;  // of the submissions
    bool empty() const { return submissions.empty() && cancels.empty(); }
  };
  // A request until its last output has ended.
  struct Live {
    struct Output {
      std::optional<Clock::time_point> admitted, first_token, last_token;
    };
    std::shared_ptr<RequestSink> sink;
    Clock::time_point submitted;
    size_t outputs_left = 0;
    std::vector<Output> outputs;
  };
  // A submitted plan, as far as reports need it.
  struct Flight {
    Clock::time_point submitted;
    double plan_seconds = 0;
    int32_t prompt_tokens = 0, sequences = 0;
  };

  Impl(const EngineOptions& options, WorkerGroup* group, std::function<void(const absl::Status&)> on_failure)
      : options(options),
        group(group),
        on_failure(std::move(on_failure)),
        scheduler({.limits = options.limits, .prefix_cache = options.prefix_cache, .prefix_secret = random_secret()}) {
    OCTET_CHECK(options.max_waiting > 0, "an engine's queue has room for a request");
    stats.blocks_total = stats.blocks_free = options.limits.blocks;
  }

  // ---- Engine thread
  void loop();
  bool take_inbox();
  void feed_scheduler();
  absl::Status turn();
  bool submit_next();
  absl::Status collect_oldest();
  void report_step(const StepResult* result, double apply_seconds);
  void publish();
  void deliver();
  void report(const TokenEvent& event, Live* live, Clock::time_point now) const;
  void shut_down();
  void fail(const absl::Status& cause);

  const EngineOptions options;
  WorkerGroup* const group;
  const std::function<void(const absl::Status&)> on_failure;
  Scheduler scheduler;
  std::unordered_map<RequestId, Live> live;
  Inbox taken;  // swapped with `inbox`, so that both keep their memory
  StepPlan plan;
  std::vector<TokenEvent> events;                 // not delivered yet
  std::array<Flight, kMaxStepsInFlight> flights;  // as many as the scheduler has in flight, oldest first
  Clock::time_point last_result;
  uint64_t steps = 0, prompt_tokens = 0, generated_tokens = 0;

  // ---- Any thread
  void cancel(const Cancel& cancel);

  // Under the mutex
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
    const absl::Status status = turn();
    if (!status.ok()) return fail(status);
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
  stats.waiting += taken.outputs;  // until publish() knows which of them run
  return true;
}

void Engine::Impl::feed_scheduler() {
  const int64_t now = now_ms();
  for (Submission& submission : taken.submissions) {
    const auto outputs = static_cast<size_t>(submission.request.outputs);
    live.emplace(submission.request.id, Live{.sink = std::move(submission.sink),
                                             .submitted = submission.time,
                                             .outputs_left = outputs,
                                             .outputs = std::vector<Live::Output>(outputs)});
    scheduler.add(std::move(submission.request), now);
  }
  for (const Cancel& cancel : taken.cancels) {
    if (cancel.output_index.has_value()) {
      scheduler.stop(cancel.request, *cancel.output_index);
    } else {
      scheduler.cancel(cancel.request);
    }
  }
  taken.submissions.clear();
  taken.cancels.clear();
  taken.outputs = 0;
}

// Sends the next plan, if there is one, and waits for the oldest result unless another plan may go out before it.
absl::Status Engine::Impl::turn() {
  const bool submitted = submit_next();
  publish();  // who is in the step waits no more, however long it takes
  scheduler.take_events(&events);
  deliver();  // cancels are answered while the step runs, not after it
  const int in_flight = scheduler.steps_in_flight();
  OCTET_CHECK(in_flight > 0 || submitted || scheduler.waiting() + scheduler.running() == 0,
              "requests wait and nothing runs");
  if (in_flight == 0 || (submitted && in_flight < kMaxStepsInFlight)) return absl::OkStatus();
  return collect_oldest();
}

bool Engine::Impl::submit_next() {
  const Clock::time_point begin = Clock::now();
  if (!scheduler.plan(now_ms(), &plan)) return false;
  const Clock::time_point now = Clock::now();
  for (const Scheduler::Admission& admission : scheduler.admitted()) {
    live.at(admission.request).outputs[admission.output_index].admitted = now;
  }
  Flight& flight = flights[scheduler.steps_in_flight() - 1];
  flight = {.submitted = now, .plan_seconds = seconds_between(begin, now)};
  for (const SlotTokens& run : plan.run) flight.prompt_tokens += static_cast<int32_t>(run.tokens.size());
  flight.sequences = static_cast<int32_t>(plan.run.size());
  group->submit(plan);
  return true;
}

absl::Status Engine::Impl::collect_oldest() {
  const absl::StatusOr<StepResult> result = group->collect();
  if (!result.ok()) {
    report_step(nullptr, 0.0);
    return result.status();
  }
  // The workers' state is unknown after a plan that broke its contract or numbers that are not numbers: nothing that
  // this group says later could be trusted.
  if (!result->error.empty()) {
    report_step(&*result, 0.0);
    return absl::InternalError(absl::StrCat("step ", result->step, " failed: ", result->error));
  }
  const Clock::time_point begin = Clock::now();
  scheduler.apply(*result, &events);
  report_step(&*result, seconds_between(begin, Clock::now()));
  publish();
  deliver();
  return absl::OkStatus();
}

// Of the oldest step in flight; without a result when the group has failed.
void Engine::Impl::report_step(const StepResult* result, double apply_seconds) {
  const Flight& flight = flights.front();
  const Clock::time_point now = Clock::now();
  const size_t sampled = result != nullptr ? result->sampled.size() : 0;
  ++steps;
  generated_tokens += sampled;
  prompt_tokens += static_cast<uint64_t>(flight.prompt_tokens);
  if (options.observer != nullptr) {
    StepReport report{.seconds = seconds_between(std::max(last_result, flight.submitted), now),
                      .schedule_seconds = flight.plan_seconds + apply_seconds,
                      .prompt_tokens = flight.prompt_tokens,
                      .sampled_tokens = static_cast<int32_t>(sampled),
                      .sequences = flight.sequences,
                      .result = result};
    if (result != nullptr && !result->timings.empty()) {
      report.gap_seconds = std::max(0.0, report.seconds - result->timings[0].run_seconds);
    }
    options.observer->on_step(report);
  }
  last_result = now;
  std::rotate(flights.begin(), flights.begin() + 1, flights.end());
}

void Engine::Impl::publish() {
  const std::lock_guard lock(mutex);
  stats.waiting = scheduler.waiting();
  stats.running = scheduler.running();
  stats.blocks_free = scheduler.blocks().free();
  stats.blocks_cached = scheduler.blocks().idle();
  stats.steps = steps;
  stats.prompt_tokens = prompt_tokens;
  stats.generated_tokens = generated_tokens;
  stats.queried_prompt_tokens = options.prefix_cache ? scheduler.counts().prompt_tokens : 0;
  stats.cached_prompt_tokens = scheduler.counts().cached_prompt_tokens;
  stats.preemptions = scheduler.counts().preemptions;
}

void Engine::Impl::deliver() {
  if (events.empty()) return;
  const Clock::time_point now = Clock::now();
  for (const TokenEvent& event : events) {
    const auto found = live.find(event.request);
    OCTET_CHECK(found != live.end(), "an event came for a request that has ended");
    found->second.sink->on_event(event);
    report(event, &found->second, now);
    if (event.finish != FinishReason::kNone && --found->second.outputs_left == 0) live.erase(found);
  }
  events.clear();
}

void Engine::Impl::report(const TokenEvent& event, Live* request, Clock::time_point now) const {
  Live::Output& output = request->outputs[event.output_index];
  if (event.token.has_value()) {
    if (options.observer != nullptr) {
      if (output.last_token.has_value()) {
        options.observer->on_token(seconds_between(*output.last_token, now));
      } else {
        options.observer->on_first_token(seconds_between(request->submitted, now));
      }
    }
    if (!output.first_token.has_value()) output.first_token = now;
    output.last_token = now;
  }
  if (event.finish == FinishReason::kNone || options.observer == nullptr) return;
  OutputReport ended{.request = event.request,
                     .output_index = event.output_index,
                     .finish = event.finish,
                     .prompt_tokens = event.prompt_tokens,
                     .cached_tokens = event.cached_tokens,
                     .completion_tokens = event.completion_tokens,
                     .queue_seconds = seconds_between(request->submitted, output.admitted.value_or(now)),
                     .total_seconds = seconds_between(request->submitted, now)};
  if (output.first_token.has_value()) {
    ended.first_token_seconds = seconds_between(request->submitted, *output.first_token);
  }
  options.observer->on_output_end(ended);
}

void Engine::Impl::shut_down() {
  // `stopping` is set, so the inbox grows no more.
  std::swap(inbox, taken);
  feed_scheduler();
  while (scheduler.steps_in_flight() > 0) {
    const absl::Status status = collect_oldest();
    if (!status.ok()) return fail(status);
  }
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

void Engine::Impl::cancel(const Cancel& cancel) {
  const std::lock_guard lock(mutex);
  if (!failure.ok() || stopping) return;
  inbox.cancels.push_back(cancel);
  work.notify_one();
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

int64_t Engine::now_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now().time_since_epoch()).count();
}

absl::StatusOr<RequestId> Engine::submit(Request request, std::shared_ptr<RequestSink> sink) {
  // On the caller's thread: a long prompt costs the engine nothing, and a step need not end first.
  if (absl::Status status = validate_request(request, impl_->options.limits); !status.ok()) return status;
  const std::lock_guard lock(impl_->mutex);
  if (!impl_->failure.ok()) return impl_->failure;
  if (impl_->draining || impl_->stopping) {
    return absl::UnavailableError("the server is shutting down and takes no new requests: ask another one");
  }
  const int32_t waiting = impl_->stats.waiting + impl_->inbox.outputs;
  if (waiting + request.outputs > impl_->options.max_waiting) {
    return absl::ResourceExhaustedError(absl::StrCat(waiting, " outputs are waiting and ", request.outputs,
                                                     " were asked for, but the queue holds ",
                                                     impl_->options.max_waiting, ": try again later"));
  }
  const RequestId id = impl_->next_id++;
  request.id = id;
  impl_->inbox.outputs += request.outputs;
  impl_->inbox.submissions.push_back({std::move(request), std::move(sink), Clock::now()});
  impl_->work.notify_one();
  return id;
}

void Engine::cancel(RequestId id) { impl_->cancel({.request = id}); }

void Engine::stop(RequestId id, uint32_t output_index) {
  impl_->cancel({.request = id, .output_index = output_index});
}

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
  stats.waiting += impl_->inbox.outputs;
  stats.draining = impl_->draining;
  stats.failed = !impl_->failure.ok();
  return stats;
}

}  // namespace octet
