#include "coordinator/engine.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <ctime>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/fake_worker.h"

namespace octet {
namespace {

using namespace std::chrono_literals;

constexpr auto kPatience = 60s;  // for what must come; only a broken engine makes a test wait so long

WorkerLimits small_limits() {
  return {.slots = 4, .blocks = 40, .block_tokens = 4, .max_step_tokens = 8, .max_context = 64, .vocab_size = 50};
}

Request make_request(uint64_t seed, int32_t prompt_tokens, std::optional<int32_t> max_tokens) {
  Request request;
  for (int32_t i = 0; i < prompt_tokens; ++i) request.prompt.push_back(static_cast<int32_t>((seed * 13 + i) % 50));
  request.sampling.seed = seed;
  request.max_tokens = max_tokens;
  return request;
}

// A group of one fake worker, whose steps a test can hold and spoil.
class FakeGroup : public WorkerGroup {
 public:
  explicit FakeGroup(const WorkerLimits& limits) : worker_(limits) {}

  void submit(const StepPlan& plan) override {
    EXPECT_FALSE(stopped_) << "a plan came after the stop plan";
    EXPECT_FALSE(dead_) << "a plan came to a dead group";
    if (plan.stop) {
      EXPECT_EQ(plan.step, steps_ + 1);
      stopped_ = true;
      return;
    }
    plans_.push_back(plan);
  }

  absl::StatusOr<StepResult> collect() override {
    EXPECT_FALSE(plans_.empty()) << "a result was collected that no plan asked for";
    std::unique_lock lock(mutex_);
    most_ahead_ = std::max(most_ahead_, plans_.size() - 1);
    const StepPlan plan = plans_.front();
    plans_.pop_front();
    ++steps_;
    in_step_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] { return allowed_ > 0; });
    --allowed_;
    in_step_ = false;
    if (!failure_.ok()) {
      dead_ = true;
      return failure_;
    }
    StepResult result = worker_.run(plan);
    EXPECT_EQ(result.error, "");
    if (!step_error_.empty()) {
      dead_ = true;
      result.error = step_error_;
    }
    return result;
  }

  // From now on steps do not end, until allow() lets some or release() all of them.
  void hold() { allow(0); }
  void release() { allow(kAll); }
  void allow(int64_t steps) {
    const std::lock_guard lock(mutex_);
    allowed_ = steps;
    changed_.notify_all();
  }
  // REQUIRES: held.
  void wait_for_a_step() {
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, kPatience, [this] { return in_step_; }));
  }
  void fail_next(absl::Status failure) {
    const std::lock_guard lock(mutex_);
    failure_ = std::move(failure);
  }
  void spoil_next(std::string error) {
    const std::lock_guard lock(mutex_);
    step_error_ = std::move(error);
  }
  // How many plans were there beside the one that ran.
  size_t most_ahead() {
    const std::lock_guard lock(mutex_);
    return most_ahead_;
  }
  // REQUIRES: the engine is gone.
  bool stopped() const { return stopped_; }

 private:
  static constexpr int64_t kAll = int64_t{1} << 60;

  FakeWorker worker_;
  std::deque<StepPlan> plans_;
  uint64_t steps_ = 0;
  bool stopped_ = false;
  bool dead_ = false;

  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t allowed_ = kAll;
  bool in_step_ = false;
  size_t most_ahead_ = 0;
  absl::Status failure_;
  std::string step_error_;
};

// Keeps what came, and waits for the end.
class Recorder : public RequestSink {
 public:
  void on_event(const TokenEvent& event) override {
    const std::lock_guard lock(mutex_);
    EXPECT_FALSE(end_.has_value()) << "an event came after the terminal one";
    if (event.token.has_value()) tokens_.push_back(event.token->token);
    if (event.finish != FinishReason::kNone) end_ = event;
    changed_.notify_all();
  }
  TokenEvent wait() {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, kPatience, [this] { return end_.has_value(); })) << "no terminal event came";
    return end_.value_or(TokenEvent{});
  }
  void wait_for_tokens(size_t count) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, kPatience, [this, count] { return tokens_.size() >= count; }));
  }
  bool ended() {
    const std::lock_guard lock(mutex_);
    return end_.has_value();
  }
  std::vector<int32_t> tokens() {
    const std::lock_guard lock(mutex_);
    return tokens_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int32_t> tokens_;
  std::optional<TokenEvent> end_;
};

// An engine over a fake group, and what became of it.
struct House {
  explicit House(const EngineOptions& options = {.limits = small_limits()})
      : group(options.limits), engine(std::make_unique<Engine>(options, &group, [this](const absl::Status& cause) {
          ++failures;
          failure = cause;
        })) {}

  struct Submitted {
    RequestId id = 0;
    std::shared_ptr<Recorder> sink;
  };
  Submitted submit(Request request) {
    Submitted submitted;
    submitted.sink = std::make_shared<Recorder>();
    const absl::StatusOr<RequestId> id = engine->submit(std::move(request), submitted.sink);
    EXPECT_TRUE(id.ok()) << id.status();
    submitted.id = id.value_or(0);
    return submitted;
  }
  absl::Status refusal(Request request) {
    return engine->submit(std::move(request), std::make_shared<Recorder>()).status();
  }
  bool wait_idle() { return engine->wait_idle(std::chrono::steady_clock::now() + kPatience); }

  FakeGroup group;
  int failures = 0;  // read when the engine is gone or idle
  absl::Status failure;
  std::unique_ptr<Engine> engine;
};

TEST(Engine, AnswersARequestWithItsTokensInOrder) {
  House house;
  const Request request = make_request(1, 10, 12);
  const House::Submitted submitted = house.submit(request);
  const TokenEvent end = submitted.sink->wait();
  const Outcome outcome = expected_outcome(request, small_limits());
  EXPECT_EQ(end.request, submitted.id);
  EXPECT_EQ(end.finish, outcome.finish);
  EXPECT_EQ(end.prompt_tokens, 10);
  EXPECT_EQ(end.completion_tokens, 12);
  EXPECT_EQ(submitted.sink->tokens(), outcome.tokens);
}

TEST(Engine, ServesManyThreadsAtOnceWithoutMixingThemUp) {
  House house;
  std::atomic<int> cancelled = 0, completed = 0;
  std::vector<std::thread> clients;
  for (int client = 0; client < 6; ++client) {
    clients.emplace_back([&house, &cancelled, &completed, client] {
      for (int i = 0; i < 40; ++i) {
        const Request request =
            make_request(static_cast<uint64_t>(client * 1000 + i), 1 + (i * 5) % 30, 1 + (i * 7) % 25);
        const Outcome outcome = expected_outcome(request, small_limits());
        const House::Submitted submitted = house.submit(request);
        if (i % 4 == 0) {
          submitted.sink->wait_for_tokens(1);
          house.engine->cancel(submitted.id);
        }
        const TokenEvent end = submitted.sink->wait();
        const std::vector<int32_t> tokens = submitted.sink->tokens();
        EXPECT_EQ(end.completion_tokens, static_cast<int32_t>(tokens.size()));
        if (end.finish == FinishReason::kCancelled) {
          EXPECT_TRUE(std::equal(tokens.begin(), tokens.end(), outcome.tokens.begin()));
          ++cancelled;
        } else {
          EXPECT_EQ(end.finish, outcome.finish);
          EXPECT_EQ(tokens, outcome.tokens);
          ++completed;
        }
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(cancelled + completed, 240);
  EXPECT_GE(completed, 180);
  EXPECT_TRUE(house.wait_idle());
  EXPECT_EQ(house.failures, 0);
  EXPECT_EQ(house.engine->stats().blocks_free, small_limits().blocks);
}

TEST(Engine, SubmitAndCancelDoNotWaitForAStep) {
  House house;
  house.group.hold();
  const House::Submitted first = house.submit(make_request(1, 3, 5));
  house.group.wait_for_a_step();
  const House::Submitted second = house.submit(make_request(2, 3, 5));  // would hang here if it waited
  house.engine->cancel(second.id);
  EXPECT_FALSE(house.refusal(make_request(3, 0, 5)).ok());
  EXPECT_EQ(house.engine->stats().waiting, 1);
  EXPECT_FALSE(first.sink->ended());
  house.group.release();
  EXPECT_EQ(first.sink->wait().finish, FinishReason::kLength);
  EXPECT_EQ(second.sink->wait().finish, FinishReason::kCancelled);
}

TEST(Engine, AnswersACancelWhileTheNextStepRuns) {
  House house;
  house.group.hold();
  const House::Submitted first = house.submit(make_request(1, 3, 5));
  house.group.wait_for_a_step();
  const House::Submitted second = house.submit(make_request(2, 3, 5));
  house.engine->cancel(second.id);
  house.group.allow(1);  // the first step ends, the second is held
  EXPECT_EQ(second.sink->wait().finish, FinishReason::kCancelled);
  EXPECT_FALSE(first.sink->ended());
  house.group.release();
}

TEST(Engine, DropsASinkAfterItsTerminalEvent) {
  House house;
  House::Submitted submitted = house.submit(make_request(1, 3, 5));
  const std::weak_ptr<Recorder> sink = submitted.sink;
  submitted.sink->wait();
  submitted.sink.reset();
  ASSERT_TRUE(house.wait_idle());
  EXPECT_TRUE(sink.expired());
}

TEST(Engine, IsIdleOnlyWhenWhatWasSubmittedHasEnded) {
  House house;
  for (uint64_t i = 0; i < 200; ++i) {
    const House::Submitted submitted = house.submit(make_request(i, 3, 3));
    ASSERT_TRUE(house.wait_idle());
    ASSERT_TRUE(submitted.sink->ended());
  }
}

TEST(Engine, RefusesWhatCanNeverRun) {
  House house;
  EXPECT_EQ(house.refusal(make_request(1, 0, 5)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(house.refusal(make_request(1, 64, 5)).code(), absl::StatusCode::kOutOfRange);
}

TEST(Engine, RefusesWhenTheQueueIsFullAndAcceptsWhenItIsNot) {
  House house({.limits = small_limits(), .max_waiting = 2});
  house.group.hold();
  std::vector<House::Submitted> all = {house.submit(make_request(1, 3, 5))};
  house.group.wait_for_a_step();  // the first runs, and does not count
  all.push_back(house.submit(make_request(2, 3, 5)));
  all.push_back(house.submit(make_request(3, 3, 5)));
  const absl::Status status = house.refusal(make_request(4, 3, 5));
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(), "2 outputs are waiting and 1 were asked for, but the queue holds 2: try again later");
  house.group.release();
  for (const House::Submitted& submitted : all) EXPECT_EQ(submitted.sink->wait().finish, FinishReason::kLength);
  EXPECT_EQ(house.submit(make_request(5, 3, 5)).sink->wait().finish, FinishReason::kLength);
}

TEST(Engine, CancelsARunningRequestAndFreesItsBlocks) {
  House house;
  house.group.hold();
  const House::Submitted submitted = house.submit(make_request(1, 3, std::nullopt));
  house.group.wait_for_a_step();
  house.engine->cancel(submitted.id);
  house.engine->cancel(submitted.id);
  house.engine->cancel(987654);
  house.group.release();
  const TokenEvent end = submitted.sink->wait();
  EXPECT_EQ(end.finish, FinishReason::kCancelled);
  EXPECT_LT(end.completion_tokens, 61);
  ASSERT_TRUE(house.wait_idle());
  EXPECT_EQ(house.engine->stats().blocks_free, small_limits().blocks);
}

// Calls a function with each event.
class FunctionSink : public RequestSink {
 public:
  explicit FunctionSink(std::function<void(const TokenEvent&)> function) : function_(std::move(function)) {}
  void on_event(const TokenEvent& event) override { function_(event); }

 private:
  const std::function<void(const TokenEvent&)> function_;
};

TEST(Engine, ASinkMayCallTheEngineBack) {
  House house;
  auto second = std::make_shared<Recorder>();
  auto first = std::make_shared<FunctionSink>([&](const TokenEvent& event) {
    if (event.finish == FinishReason::kCancelled) {
      EXPECT_TRUE(house.engine->submit(make_request(2, 3, 4), second).ok());
    } else {
      house.engine->cancel(event.request);
    }
  });
  ASSERT_TRUE(house.engine->submit(make_request(1, 3, std::nullopt), first).ok());
  EXPECT_EQ(second->wait().finish, FinishReason::kLength);
  ASSERT_TRUE(house.wait_idle());
  EXPECT_LE(house.engine->stats().generated_tokens, 3u + 4u) << "a cancel from an event comes before the next plan";
}

TEST(Engine, EndsEveryRequestWithTheCauseWhenTheGroupFails) {
  House house;
  house.group.hold();
  std::vector<House::Submitted> all;
  for (uint64_t i = 0; i < 6; ++i) all.push_back(house.submit(make_request(i, 3, 20)));  // more than there are slots
  house.group.wait_for_a_step();
  all.push_back(house.submit(make_request(7, 3, 20)));  // still in the inbox when the group fails
  house.group.fail_next(absl::UnavailableError("rank 2 on node7 is gone: connection reset"));
  house.group.release();
  for (const House::Submitted& submitted : all) {
    const TokenEvent end = submitted.sink->wait();
    EXPECT_EQ(end.finish, FinishReason::kError);
    EXPECT_EQ(end.error, "the workers failed: rank 2 on node7 is gone: connection reset");
  }
  ASSERT_TRUE(house.wait_idle());
  EXPECT_EQ(house.failures, 1);
  EXPECT_EQ(house.failure, absl::UnavailableError("rank 2 on node7 is gone: connection reset"));
  const absl::Status later = house.refusal(make_request(8, 3, 20));
  EXPECT_EQ(later, absl::UnavailableError("the workers failed: rank 2 on node7 is gone: connection reset"));
  house.engine->cancel(all[0].id);
  house.engine.reset();
  EXPECT_EQ(house.failures, 1);
  EXPECT_FALSE(house.group.stopped()) << "a dead group gets no stop plan";
}

TEST(Engine, AFaultOfAStepFailsTheGroup) {
  House house;
  house.group.hold();
  const House::Submitted submitted = house.submit(make_request(1, 3, 20));
  house.group.wait_for_a_step();
  house.group.spoil_next("NaN in the logits of slot 0");
  house.group.release();
  EXPECT_EQ(submitted.sink->wait().error, "the workers failed: step 1 failed: NaN in the logits of slot 0");
  ASSERT_TRUE(house.wait_idle());
  EXPECT_EQ(house.failures, 1);
  EXPECT_EQ(house.failure.code(), absl::StatusCode::kInternal);
}

TEST(Engine, DrainsByFinishingTheOldAndRefusingTheNew) {
  House house;
  ASSERT_TRUE(house.wait_idle());
  house.group.hold();
  const House::Submitted old = house.submit(make_request(1, 3, 20));
  house.group.wait_for_a_step();
  house.engine->drain();
  EXPECT_EQ(house.refusal(make_request(2, 3, 20)).code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(house.engine->wait_idle(std::chrono::steady_clock::now() + 10ms)) << "a request is still running";
  house.group.release();
  EXPECT_TRUE(house.wait_idle());
  EXPECT_TRUE(old.sink->ended()) << "idle means that the events were delivered";
  EXPECT_EQ(old.sink->wait().finish, FinishReason::kLength);
}

TEST(Engine, CancelsWhatIsLeftAndStopsTheWorkersWhenItGoes) {
  House house;
  house.group.hold();
  std::vector<House::Submitted> all;
  for (uint64_t i = 0; i < 6; ++i) all.push_back(house.submit(make_request(i, 3, std::nullopt)));
  house.group.wait_for_a_step();
  all.push_back(house.submit(make_request(7, 3, 20)));
  // The step ends only when the destructor has begun, which shows in refusals; until then the destructor waits for it.
  std::thread opener([&house, engine = house.engine.get()] {
    const auto refusal = [engine] {
      return engine->submit(make_request(8, 3, 1), std::make_shared<Recorder>()).status();
    };
    while (refusal().code() != absl::StatusCode::kUnavailable) std::this_thread::yield();
    house.group.release();
  });
  house.engine.reset();
  opener.join();
  for (const House::Submitted& submitted : all) {
    EXPECT_TRUE(submitted.sink->ended());
    EXPECT_EQ(submitted.sink->wait().finish, FinishReason::kCancelled);
  }
  EXPECT_TRUE(house.group.stopped());
  EXPECT_EQ(house.failures, 0);
}

TEST(Engine, StopsTheWorkersThoughNothingEverRan) {
  House house;
  house.engine.reset();
  EXPECT_TRUE(house.group.stopped());
}

TEST(Engine, CountsWhatItDid) {
  House house;
  house.submit(make_request(1, 10, 5)).sink->wait();
  ASSERT_TRUE(house.wait_idle());
  const EngineStats stats = house.engine->stats();
  EXPECT_EQ(stats.prompt_tokens, 10u);
  EXPECT_EQ(stats.generated_tokens, 5u);
  EXPECT_EQ(stats.steps, 7u) << "two chunks of the prompt, four decodes, one close";
  EXPECT_EQ(stats.waiting, 0);
  EXPECT_EQ(stats.running, 0);
  EXPECT_EQ(stats.blocks_total, 40);
  EXPECT_EQ(stats.blocks_free, 40);
}

TEST(Engine, SendsTheNextPlanWhileAStepRuns) {
  House house;
  house.submit(make_request(1, 3, 20)).sink->wait();
  EXPECT_EQ(house.group.most_ahead(), 1u);
}

// An output's tokens and ends, by output_index.
class OutputsRecorder : public RequestSink {
 public:
  void on_event(const TokenEvent& event) override {
    const std::lock_guard lock(mutex_);
    if (event.token.has_value()) tokens[event.output_index].push_back(event.token->token);
    if (event.finish != FinishReason::kNone) ends[event.output_index] = event.finish;
    changed_.notify_all();
  }
  void wait_for_tokens(uint32_t output_index) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, kPatience, [&] { return !tokens[output_index].empty(); }));
  }
  // Read when the engine is idle.
  std::map<uint32_t, std::vector<int32_t>> tokens;
  std::map<uint32_t, FinishReason> ends;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
};

TEST(Engine, RunsAllOutputsOfARequestAndStopsOne) {
  House house;
  Request request = make_request(1, 9, 30);
  request.outputs = 3;
  auto sink = std::make_shared<OutputsRecorder>();
  const absl::StatusOr<RequestId> id = house.engine->submit(request, sink);
  ASSERT_TRUE(id.ok());
  sink->wait_for_tokens(1);
  house.engine->stop(*id, 1);
  ASSERT_TRUE(house.wait_idle());
  for (const uint32_t i : {0u, 2u}) {
    EXPECT_EQ(sink->tokens[i], expected_outcome(request, small_limits(), i).tokens);
    EXPECT_EQ(sink->ends[i], FinishReason::kLength);
  }
  EXPECT_TRUE(sink->ends.contains(1));
}

TEST(Engine, CountsOutputsInItsQueue) {
  House house({.limits = small_limits(), .max_waiting = 4});
  Request request = make_request(1, 3, 5);
  request.outputs = 5;
  EXPECT_EQ(house.refusal(request).code(), absl::StatusCode::kResourceExhausted);
}

TEST(Engine, EndsARequestAtItsDeadline) {
  House house;
  house.group.hold();
  Request request = make_request(1, 3, std::nullopt);
  request.deadline_ms = Engine::now_ms() + 20;
  const House::Submitted submitted = house.submit(request);
  house.group.wait_for_a_step();
  while (Engine::now_ms() < request.deadline_ms) std::this_thread::sleep_for(1ms);
  house.group.release();
  EXPECT_EQ(submitted.sink->wait().finish, FinishReason::kDeadline);
  ASSERT_TRUE(house.wait_idle());
  EXPECT_EQ(house.engine->stats().blocks_free, small_limits().blocks);
}

// Adds up what it is told.
struct CountingObserver : EngineObserver {
  void on_step(const StepReport& report) override {
    ++steps;
    prompt_tokens += report.prompt_tokens;
    sampled_tokens += report.sampled_tokens;
    EXPECT_GE(report.seconds, 0.0);
    EXPECT_GT(report.schedule_seconds, 0.0);
    EXPECT_NE(report.result, nullptr);
  }
  void on_first_token(double seconds_since_submitted) override {
    ++first_tokens;
    EXPECT_GT(seconds_since_submitted, 0.0);
  }
  void on_token(double seconds_since_previous) override {
    ++later_tokens;
    EXPECT_GE(seconds_since_previous, 0.0);
  }
  void on_output_end(const OutputReport& report) override { ended.push_back(report); }

  int64_t steps = 0, prompt_tokens = 0, sampled_tokens = 0, first_tokens = 0, later_tokens = 0;
  std::vector<OutputReport> ended;
};

TEST(Engine, TellsItsObserverWhatHappens) {
  CountingObserver observer;
  House house({.limits = small_limits(), .observer = &observer});
  const House::Submitted submitted = house.submit(make_request(1, 10, 5));
  submitted.sink->wait();
  ASSERT_TRUE(house.wait_idle());
  EXPECT_EQ(observer.steps, 7) << "two chunks of the prompt, four decodes, one close";
  EXPECT_EQ(observer.prompt_tokens, 10);
  EXPECT_EQ(observer.sampled_tokens, 5);
  EXPECT_EQ(observer.first_tokens, 1);
  EXPECT_EQ(observer.later_tokens, 4);
  ASSERT_EQ(observer.ended.size(), 1u);
  const OutputReport& report = observer.ended[0];
  EXPECT_EQ(report.request, submitted.id);
  EXPECT_EQ(report.finish, FinishReason::kLength);
  EXPECT_EQ(report.completion_tokens, 5);
  EXPECT_LE(report.queue_seconds, report.first_token_seconds);
  EXPECT_LE(report.first_token_seconds, report.total_seconds);
}

TEST(Engine, SleepsWhileThereIsNothingToDo) {
  House house;
  house.submit(make_request(1, 10, 5)).sink->wait();
  ASSERT_TRUE(house.wait_idle());
  const std::clock_t cpu_before = std::clock();
  const auto before = std::chrono::steady_clock::now();
  std::this_thread::sleep_for(200ms);
  const double cpu = static_cast<double>(std::clock() - cpu_before) / CLOCKS_PER_SEC;
  const double wall = std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
  EXPECT_LT(cpu, wall / 4) << "an engine that polls would use a core";
}

}  // namespace
}  // namespace octet
