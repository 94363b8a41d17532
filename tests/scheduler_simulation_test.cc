// A random but repeatable life of a scheduler: requests of all sizes come and are cancelled at any moment, and after
// every plan and event the laws are checked against a model that knows only the contracts. A seed is a whole run.
#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/scheduler.h"
#include "gtest/gtest.h"
#include "tests/fake_worker.h"

namespace octet {
namespace {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  // From low to high, both included.
  int32_t between(int32_t low, int32_t high) {
    state_ = mix(state_, ++calls_);
    return low + static_cast<int32_t>(state_ % static_cast<uint64_t>(high - low + 1));
  }
  bool one_in(int32_t n) { return between(1, n) == 1; }

 private:
  uint64_t state_;
  uint64_t calls_ = 0;
};

WorkerLimits random_limits(Random* random) {
  WorkerLimits limits;
  limits.slots = random->between(1, 12);
  limits.block_tokens = random->between(1, 9);
  limits.blocks = random->between(1, 60);
  limits.max_step_tokens = random->between(1, 24);
  limits.max_context = random->between(2, 120);
  limits.vocab_size = random->between(2, 60);
  return limits;
}

class Simulation {
 public:
  explicit Simulation(uint64_t seed)
      : random_(seed),
        limits_(random_limits(&random_)),
        arrivals_(random_.between(1, 6)),
        scheduler_(limits_),
        worker_(limits_) {}

  void run(int steps) {
    for (int i = 0; i < steps && !::testing::Test::HasFailure(); ++i) {
      for (int n = random_.between(0, 2); n > 0 && random_.one_in(arrivals_); --n) arrive();
      cancel_somebody();
      step();
    }
    // Nobody comes any more: everybody ends, within as many steps as there are tokens to run and slots to close.
    int64_t steps_left = work_left();
    while (!::testing::Test::HasFailure() && step()) ASSERT_GE(--steps_left, 0) << "a request never ends";
    check_the_end();
  }

  // The group dies in the middle.
  void run_and_fail(int steps) {
    for (int i = 0; i < steps && !::testing::Test::HasFailure(); ++i) {
      arrive();
      step();
    }
    failed_ = true;
    scheduler_.end_all(FinishReason::kError, "lost", &events_);
    check_events();
    for (const auto& [id, life] : lives_) EXPECT_TRUE(life.ended) << "request " << id;
  }

  int requests() const { return static_cast<int>(lives_.size()); }
  int refused() const { return refused_; }
  int64_t steps() const { return steps_; }
  int cancelled() const { return cancelled_; }

 private:
  struct Life {
    Request request;
    Outcome outcome;       // what it would get if let alone
    int32_t blocks = 0;    // what it reserves
    int32_t computed = 0;  // positions run
    size_t tokens = 0;     // events so far
    bool cancelled = false;
    bool ended = false;
  };

  void arrive() {
    Request request;
    request.id = next_id_;
    request.prompt.resize(static_cast<size_t>(random_.one_in(8) ? random_.between(1, 130) : random_.between(1, 12)));
    for (int32_t& token : request.prompt) token = random_.between(0, limits_.vocab_size - 1);
    request.sampling.seed = next_id_;  // by which the model knows who was given a slot
    if (!random_.one_in(5)) request.max_tokens = random_.between(1, 40);
    if (random_.one_in(3)) request.sampling.min_tokens = random_.between(0, 6);
    for (int n = random_.between(0, 3); n > 0; --n) {
      request.sampling.end_token_ids.push_back(random_.between(0, limits_.vocab_size - 1));
    }
    if (!Scheduler::validate(request, limits_).ok()) {
      ++refused_;
      return;
    }
    Life life;
    life.request = request;
    life.outcome = expected_outcome(request, limits_);
    const auto prompt = static_cast<int32_t>(request.prompt.size());
    const int32_t last = std::min(limits_.max_context, prompt + request.max_tokens.value_or(limits_.max_context)) - 1;
    life.blocks = (last + limits_.block_tokens - 1) / limits_.block_tokens;
    lives_.emplace(next_id_, std::move(life));
    queue_.push_back(next_id_++);
    scheduler_.add(std::move(request));
  }

  void cancel_somebody() {
    if (next_id_ == 1 || !random_.one_in(6)) return;
    const RequestId id = static_cast<RequestId>(random_.between(std::max(1, static_cast<int32_t>(next_id_) - 30),
                                                                static_cast<int32_t>(next_id_)));  // or nobody yet
    const auto life = lives_.find(id);
    if (life != lives_.end() && !life->second.ended && !life->second.cancelled) {
      life->second.cancelled = true;
      std::erase(queue_, id);
      ++cancelled_;
    }
    scheduler_.cancel(id);
    if (random_.one_in(2)) scheduler_.take_events(&events_);
    check_events();
  }

  bool step() {
    if (!scheduler_.plan(&plan_)) return false;
    ++steps_;
    check_plan();
    if (random_.one_in(2)) cancel_somebody();  // while the step runs
    const StepResult result = worker_.run(plan_);
    EXPECT_EQ(result.error, "") << "step " << plan_.step;
    if (!result.error.empty()) return false;
    scheduler_.apply(result, &events_);
    check_events();
    return true;
  }

  // Follows the plan in the model, and holds it against the laws.
  void check_plan() {
    for (const int32_t slot : plan_.close) {
      ASSERT_TRUE(holder_.contains(slot)) << "a slot was closed that nobody held";
      const Life& life = lives_.at(holder_.at(slot));
      ASSERT_TRUE(life.ended || life.cancelled) << "a slot was closed under a running request";
      holder_.erase(slot);
    }
    for (const SlotOpen& open : plan_.open) {
      ASSERT_FALSE(queue_.empty());
      ASSERT_EQ(open.sampling.seed, queue_.front()) << "somebody overtook";
      holder_[open.slot] = queue_.front();
      queue_.pop_front();
    }
    std::map<int32_t, const SlotTokens*> runs;
    for (const SlotTokens& run : plan_.run) runs[run.slot] = &run;
    int32_t reserved = 0;
    for (const auto& [slot, id] : holder_) {
      Life& life = lives_.at(id);
      reserved += life.blocks;
      ASSERT_FALSE(life.ended) << "what ended is closed by the next plan";
      check_share(life, runs.contains(slot) ? runs.at(slot) : nullptr);
    }
    ASSERT_EQ(scheduler_.blocks().free() + reserved, limits_.blocks) << "blocks are conserved";
    check_nobody_waits_in_vain();
  }

  // Decodes run in every step; prompts too, unless the budget is used up.
  void check_share(Life& life, const SlotTokens* run) {
    const bool budget_used_up = plan_.token_count() == limits_.max_step_tokens;
    const auto prompt = static_cast<int32_t>(life.request.prompt.size());
    if (life.tokens > 0) {
      ASSERT_NE(run, nullptr) << "a decoding sequence was left out";
    }
    if (run == nullptr) {
      ASSERT_TRUE(budget_used_up);
      return;
    }
    ASSERT_EQ(run->from_last_sample, life.tokens > 0);
    life.computed += run->count();
    ASSERT_EQ(run->sample, life.computed >= prompt);
    ASSERT_TRUE(run->sample || budget_used_up) << "a prompt was cut although there was room";
  }

  void check_nobody_waits_in_vain() {
    ASSERT_EQ(scheduler_.waiting(), static_cast<int32_t>(queue_.size()));
    ASSERT_EQ(scheduler_.running(), static_cast<int32_t>(holder_.size()));
    if (queue_.empty()) return;
    const bool no_tokens = plan_.token_count() == limits_.max_step_tokens;
    const bool no_place = scheduler_.running() == limits_.slots;
    const bool no_blocks = lives_.at(queue_.front()).blocks > scheduler_.blocks().free();
    ASSERT_TRUE(no_tokens || no_place || no_blocks) << "the first in the queue could run";
  }

  void check_events() {
    for (const TokenEvent& event : events_) check_event(event);
    events_.clear();
  }

  void check_event(const TokenEvent& event) {
    ASSERT_TRUE(lives_.contains(event.request));
    Life& life = lives_.at(event.request);
    ASSERT_FALSE(life.ended) << "something came after the end of request " << event.request;
    if (event.token.has_value()) {
      ASSERT_FALSE(life.cancelled);
      ASSERT_LT(life.tokens, life.outcome.tokens.size());
      ASSERT_EQ(event.token->token, life.outcome.tokens[life.tokens++])
          << "token " << life.tokens << " of " << event.request;
    }
    const bool complete = life.tokens == life.outcome.tokens.size();
    if (event.finish == FinishReason::kNone) {
      ASSERT_TRUE(event.token.has_value());
      ASSERT_FALSE(complete) << "the end was missed";
      return;
    }
    life.ended = true;
    if (life.cancelled) {
      ASSERT_EQ(event.finish, FinishReason::kCancelled);
    } else if (failed_) {
      ASSERT_EQ(event.finish, FinishReason::kError);
    } else {
      ASSERT_TRUE(complete);
      ASSERT_EQ(event.finish, life.outcome.finish);
    }
    ASSERT_EQ(event.prompt_tokens, static_cast<int32_t>(life.request.prompt.size()));
    ASSERT_EQ(event.completion_tokens, static_cast<int32_t>(life.tokens));
  }

  int64_t work_left() const {
    int64_t work = 1;
    for (const auto& [id, life] : lives_) {
      if (!life.ended) work += static_cast<int64_t>(life.request.prompt.size() + life.outcome.tokens.size()) + 1;
    }
    return work;
  }

  void check_the_end() {
    scheduler_.take_events(&events_);
    check_events();
    for (const auto& [id, life] : lives_) EXPECT_TRUE(life.ended) << "request " << id;
    EXPECT_TRUE(scheduler_.idle());
    EXPECT_EQ(scheduler_.blocks().free(), limits_.blocks);
    EXPECT_EQ(worker_.open_slots(), 0);
    EXPECT_EQ(worker_.blocks_held(), 0);
  }

  Random random_;
  const WorkerLimits limits_;
  const int32_t arrivals_;  // the more, the rarer
  Scheduler scheduler_;
  FakeWorker worker_;
  StepPlan plan_;
  std::vector<TokenEvent> events_;
  std::map<RequestId, Life> lives_;
  std::deque<RequestId> queue_;          // who waits, in order
  std::map<int32_t, RequestId> holder_;  // who has which slot
  RequestId next_id_ = 1;
  bool failed_ = false;
  int64_t steps_ = 0;
  int refused_ = 0;
  int cancelled_ = 0;
};

TEST(SchedulerSimulation, EveryRequestEndsOnceWithItsOwnTokens) {
  int64_t steps = 0, requests = 0, cancelled = 0, refused = 0;
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Simulation simulation(seed);
    simulation.run(300);
    if (HasFailure()) return;
    steps += simulation.steps();
    requests += simulation.requests();
    cancelled += simulation.cancelled();
    refused += simulation.refused();
  }
  std::printf("%lld steps, %lld requests, %lld of them cancelled, %lld more refused\n", static_cast<long long>(steps),
              static_cast<long long>(requests), static_cast<long long>(cancelled), static_cast<long long>(refused));
  // The simulation must not go blind: seeds that refuse or cancel everything would prove nothing.
  EXPECT_GT(requests, 10000);
  EXPECT_GT(cancelled, 500);
  EXPECT_LT(cancelled, requests / 2);
}

TEST(SchedulerSimulation, EveryRequestEndsOnceWhenTheGroupDies) {
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Simulation(seed).run_and_fail(static_cast<int>(seed));
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace octet
