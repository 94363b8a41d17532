// A random but repeatable life of a scheduler: requests of all kinds come, are cancelled and run out of time at any
// moment, the cache is too small, and one or two steps are in flight. After every plan and event the laws are checked
// against a model that knows only the contracts. A seed is a whole run.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
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

SchedulerOptions random_options(Random* random) {
  SchedulerOptions options;
  options.limits.slots = random->between(1, 12);
  options.limits.block_tokens = random->between(1, 9);
  options.limits.blocks = random->between(1, 60);
  options.limits.max_step_tokens = random->between(1, 24);
  options.limits.max_context = random->between(2, 120);
  options.limits.vocab_size = random->between(2, 60);
  options.prefix_cache = !random->one_in(4);
  options.prefix_secret.fill(static_cast<unsigned char>(random->between(0, 255)));
  return options;
}

// What all simulations together have seen, so that none of it goes blind.
struct Totals {
  int64_t steps = 0, requests = 0, outputs = 0, refused = 0, cancelled = 0, expired = 0, preempted = 0;
  int64_t cached_tokens = 0, copies = 0, checks = 0;
};

class Simulation {
 public:
  explicit Simulation(uint64_t seed)
      : random_(seed),
        options_(random_options(&random_)),
        limits_(options_.limits),
        arrivals_(random_.between(1, 6)),
        most_in_flight_(random_.between(1, kMaxStepsInFlight)),
        scheduler_(options_),
        worker_(limits_) {}

  void run(int steps) {
    for (int i = 0; i < steps && !failed(); ++i) {
      now_ms_ += random_.one_in(50) ? random_.between(0, 40'000) : random_.between(0, 20);
      for (int n = random_.between(0, 2); n > 0 && random_.one_in(arrivals_); --n) arrive();
      cancel_somebody();
      turn();
    }
    // Nobody comes any more: everybody ends, in a bounded number of steps.
    int64_t steps_left = 1000 + 20 * work_left();
    while (!failed() && turn()) ASSERT_GE(--steps_left, 0) << "a request never ends";
    if (!failed()) check_the_end();
  }

  // The group dies in the middle.
  void run_and_fail(int steps) {
    for (int i = 0; i < steps && !failed(); ++i) {
      arrive();
      turn();
    }
    group_failed_ = true;
    scheduler_.end_all(FinishReason::kError, "lost", &events_);
    check_events();
    for (const auto& [id, request] : requests_) {
      for (const Output& output : request.outputs) EXPECT_TRUE(output.ended) << "request " << id;
    }
  }

  void count(Totals* totals) const {
    totals->steps += steps_;
    totals->requests += static_cast<int64_t>(requests_.size());
    totals->outputs += outputs_;
    totals->refused += refused_;
    totals->cancelled += cancelled_;
    totals->expired += expired_;
    totals->preempted += preempted_;
    totals->cached_tokens += static_cast<int64_t>(scheduler_.counts().cached_prompt_tokens);
    totals->copies += copies_;
    totals->checks += checks_;
  }

 private:
  struct Output {
    Outcome outcome;         // what it would get if let alone
    size_t tokens = 0;       // events so far
    int32_t samples = 0;     // that plans asked for
    uint64_t admission = 0;  // order of first admission
    bool cancelled = false;
    FinishReason cancel = FinishReason::kNone;  // how
    bool ended = false;
  };
  struct Life {
    Request request;
    int64_t rank_ms = 0;
    int32_t max_tokens = 0;
    size_t prompt_logprobs = 0;  // reported
    std::vector<Output> outputs;
  };
  struct Holder {
    RequestId request = 0;
    uint32_t output_index = 0;
    int32_t next_position = 0;
  };

  static bool failed() { return ::testing::Test::HasFailure(); }

  // Prompts share beginnings, so that the cache has something to find.
  std::vector<int32_t> random_prompt() {
    std::vector<int32_t> prompt(
        static_cast<size_t>(random_.one_in(8) ? random_.between(1, 130) : random_.between(1, 30)));
    const int32_t stem = random_.between(0, 2);
    const int32_t shared = random_.between(0, static_cast<int32_t>(prompt.size()));
    for (size_t i = 0; i < prompt.size(); ++i) {
      prompt[i] = static_cast<int32_t>(i) < shared
                      ? static_cast<int32_t>(mix(stem, i) % static_cast<uint64_t>(limits_.vocab_size))
                      : random_.between(0, limits_.vocab_size - 1);
    }
    return prompt;
  }

  Request random_request() {
    Request request;
    request.id = next_id_;
    request.prompt = random_prompt();
    request.sampling.seed = next_id_;  // by which the model knows who was given a slot
    request.outputs = random_.one_in(4) ? random_.between(2, 5) : 1;
    if (!random_.one_in(5)) request.max_tokens = random_.between(1, 40);
    if (random_.one_in(3)) request.sampling.min_tokens = random_.between(0, 6);
    for (int n = random_.between(0, 3); n > 0; --n) {
      request.sampling.end_token_ids.push_back(random_.between(0, limits_.vocab_size - 1));
    }
    if (random_.one_in(4)) request.sampling.presence_penalty = 0.5f;
    if (random_.one_in(4)) request.priority = random_.between(0, kLowestPriority);
    if (random_.one_in(6)) request.deadline_ms = now_ms_ + random_.between(0, 2'000);
    if (random_.one_in(4)) request.cache_salt = "tenant " + std::to_string(random_.between(0, 1));
    if (random_.one_in(5)) request.prompt_logprobs = random_.between(0, std::min(3, limits_.vocab_size));
    if (random_.one_in(6)) request.constraint = std::make_shared<AlternatingConstraint>(limits_.vocab_size);
    return request;
  }

  void arrive() {
    const Request request = random_request();
    if (!validate_request(request, limits_).ok()) {
      ++refused_;
      return;
    }
    Life life{.request = request, .rank_ms = now_ms_ + request.priority * kAgingMs};
    life.max_tokens = std::min(request.max_tokens.value_or(limits_.max_context),
                               limits_.max_context - static_cast<int32_t>(request.prompt.size()));
    for (int32_t i = 0; i < request.outputs; ++i) {
      life.outputs.push_back({.outcome = expected_outcome(request, limits_, static_cast<uint32_t>(i))});
    }
    outputs_ += request.outputs;
    requests_.emplace(next_id_++, std::move(life));
    scheduler_.add(request, now_ms_);
    check_state();
  }

  void cancel_somebody() {
    if (next_id_ == 1 || !random_.one_in(6)) return;
    const RequestId id = static_cast<RequestId>(random_.between(std::max(1, static_cast<int32_t>(next_id_) - 30),
                                                                static_cast<int32_t>(next_id_)));  // or nobody yet
    const auto found = requests_.find(id);
    const auto one = static_cast<uint32_t>(random_.between(0, 5));  // or one that is not there
    const bool all = random_.one_in(2);
    if (found != requests_.end()) {
      for (size_t i = 0; i < found->second.outputs.size(); ++i) {
        Output& output = found->second.outputs[i];
        if (output.ended || output.cancelled || (!all && i != one)) continue;
        output.cancelled = true;
        output.cancel = all ? FinishReason::kCancelled : FinishReason::kStopped;
        ++cancelled_;
      }
    }
    if (all) {
      scheduler_.cancel(id);
    } else {
      scheduler_.stop(id, one);
    }
    if (random_.one_in(2)) scheduler_.take_events(&events_);
    check_events();
  }

  // A plan, a result, or both; false when there is nothing left to do.
  bool turn() {
    const bool planned = scheduler_.plan(now_ms_, &plan_);
    scheduler_.take_events(&events_);
    check_events();
    if (planned) {
      ++steps_;
      check_plan();
      in_flight_.push_back(plan_);
    }
    if (random_.one_in(3)) cancel_somebody();  // while steps run
    const auto in_flight = static_cast<int>(in_flight_.size());
    if (in_flight == 0) return !scheduler_.idle();
    if (planned && in_flight < most_in_flight_ && !random_.one_in(4)) return true;
    const StepResult result = worker_.run(in_flight_.front());
    EXPECT_EQ(result.error, "") << "step " << result.step;
    if (!result.error.empty()) return false;
    in_flight_.pop_front();
    scheduler_.apply(result, &events_);
    check_events();
    return true;
  }

  // Follows the plan in the model, and holds it against the laws.
  void check_plan() {
    copies_ += static_cast<int64_t>(plan_.copies.size());
    check_closes();
    check_opens();
    for (const SlotTokens& run : plan_.run) follow(run);
    std::map<int32_t, const SlotTokens*> runs;
    for (const SlotTokens& run : plan_.run) runs[run.slot] = &run;
    for (const auto& [slot, holder] : holders_) {
      ASSERT_FALSE(output_of(holder).ended) << "what ended is closed by the next plan";
      check_share(holder, runs.contains(slot));
    }
  }

  // Closed is what ended, or was preempted: never the oldest that was admitted.
  void check_closes() {
    for (const int32_t slot : plan_.close) {
      ASSERT_TRUE(holders_.contains(slot)) << "a slot was closed that nobody held";
      const Output& closed = output_of(holders_.at(slot));
      if (!closed.ended) {
        ++preempted_;
        const bool oldest = std::ranges::all_of(holders_, [&](const auto& other) {
          return output_of(other.second).ended || output_of(other.second).admission >= closed.admission;
        });
        ASSERT_FALSE(oldest) << "the oldest was preempted";
      }
      holders_.erase(slot);
    }
  }

  void check_opens() {
    for (const SlotOpen& open : plan_.open) {
      ASSERT_FALSE(holders_.contains(open.slot)) << "a slot was opened that somebody holds";
      Life& life = requests_.at(open.sampling.seed);
      ASSERT_LT(open.sampling.output_index, life.outputs.size());
      Output& output = life.outputs[open.sampling.output_index];
      ASSERT_FALSE(output.ended);
      ASSERT_EQ(open.prompt_tokens, static_cast<int32_t>(life.request.prompt.size()));
      ASSERT_TRUE(options_.prefix_cache || open.position == 0 || life.request.outputs > 1) << "a hit without a cache";
      if (output.admission == 0) {
        output.admission = ++admissions_;
        check_nobody_was_overtaken(life);
      }
      holders_[open.slot] = {
          .request = life.request.id, .output_index = open.sampling.output_index, .next_position = open.position};
    }
  }

  void check_nobody_was_overtaken(const Life& admitted) {
    for (const auto& [id, other] : requests_) {
      const bool waits =
          std::ranges::all_of(other.outputs, [](const Output& o) { return o.admission == 0 && !o.ended; });
      if (!waits) continue;
      ASSERT_LE(std::pair(admitted.rank_ms, admitted.request.id), std::pair(other.rank_ms, id)) << "overtaken";
    }
  }

  void follow(const SlotTokens& run) {
    ASSERT_TRUE(holders_.contains(run.slot)) << "a slot runs that is not open";
    Holder& holder = holders_.at(run.slot);
    ASSERT_EQ(run.position, holder.next_position);
    holder.next_position += run.count();
    if (run.sample) ++output_of(holder).samples;
    ASSERT_LE(output_of(holder).samples, requests_.at(holder.request).max_tokens) << "more samples than wanted";
  }

  // Decodes run in every step; prompts too, unless the budget is used up.
  void check_share(const Holder& holder, bool runs) {
    if (runs) return;
    const Life& life = requests_.at(holder.request);
    const Output& output = output_of(holder);
    if (output.samples == life.max_tokens) return;
    const bool waits_for_a_token =
        life.request.constraint != nullptr && output.samples > static_cast<int32_t>(output.tokens);
    if (waits_for_a_token) return;
    const int32_t left = static_cast<int32_t>(life.request.prompt.size()) + output.samples - holder.next_position;
    ASSERT_GT(left, 0);
    ASSERT_EQ(plan_.token_count(), limits_.max_step_tokens) << "a sequence was left out although there was room";
    ASSERT_TRUE(left > 1 || output.samples == 0) << "a decoding sequence was left out";
  }

  Output& output_of(const Holder& holder) { return requests_.at(holder.request).outputs[holder.output_index]; }

  void check_events() {
    for (const TokenEvent& event : events_) check_event(event);
    events_.clear();
    check_state();
  }

  void check_state() {
    ++checks_;
    scheduler_.check();
  }

  void check_event(const TokenEvent& event) {
    ASSERT_TRUE(requests_.contains(event.request));
    Life& life = requests_.at(event.request);
    ASSERT_LT(event.output_index, life.outputs.size());
    Output& output = life.outputs[event.output_index];
    ASSERT_FALSE(output.ended) << "something came after the end of request " << event.request;
    if (!event.prompt_logprobs.empty()) check_prompt_logprobs(event, &life);
    if (event.token.has_value()) {
      ASSERT_FALSE(output.cancelled);
      ASSERT_LT(output.tokens, output.outcome.tokens.size());
      ASSERT_EQ(event.token->token, output.outcome.tokens[output.tokens++])
          << "token " << output.tokens << " of " << event.request << " output " << event.output_index;
      const bool scores = life.request.prompt_logprobs.has_value() && event.output_index == 0;
      ASSERT_EQ(life.prompt_logprobs, scores ? life.request.prompt.size() - 1 : life.prompt_logprobs);
    }
    const bool complete = output.tokens == output.outcome.tokens.size();
    if (event.finish == FinishReason::kNone) {
      ASSERT_TRUE(event.token.has_value() || !event.prompt_logprobs.empty());
      ASSERT_FALSE(complete) << "the end was missed";
      return;
    }
    check_terminal(event, life, &output, complete);
  }

  void check_prompt_logprobs(const TokenEvent& event, Life* life) {
    ASSERT_TRUE(life->request.prompt_logprobs.has_value() && event.output_index == 0);
    ASSERT_FALSE(event.token.has_value());
    const std::vector<int32_t>& prompt = life->request.prompt;
    for (const SampledToken& scored : event.prompt_logprobs) {
      uint64_t history = 0;
      for (size_t i = 0; i <= life->prompt_logprobs; ++i) history = mix(history, prompt[i]);
      ASSERT_LT(++life->prompt_logprobs, prompt.size());
      ASSERT_EQ(scored.chosen, fake_logprob(history, prompt[life->prompt_logprobs]));
      ASSERT_EQ(static_cast<int32_t>(scored.top.size()), *life->request.prompt_logprobs);
    }
  }

  void check_terminal(const TokenEvent& event, const Life& life, Output* output, bool complete) {
    output->ended = true;
    if (event.finish == FinishReason::kDeadline) {
      ++expired_;
      ASSERT_LE(life.request.deadline_ms, now_ms_);
    } else if (output->cancelled) {
      ASSERT_EQ(event.finish, output->cancel);
    } else if (group_failed_) {
      ASSERT_EQ(event.finish, FinishReason::kError);
    } else {
      ASSERT_TRUE(complete);
      ASSERT_EQ(event.finish, output->outcome.finish);
    }
    ASSERT_EQ(event.prompt_tokens, static_cast<int32_t>(life.request.prompt.size()));
    ASSERT_EQ(event.completion_tokens, static_cast<int32_t>(output->tokens));
    ASSERT_LT(event.cached_tokens, event.prompt_tokens);
  }

  int64_t work_left() const {
    int64_t work = 1;
    for (const auto& [id, life] : requests_) {
      for (const Output& output : life.outputs) {
        if (!output.ended) work += static_cast<int64_t>(life.request.prompt.size() + output.outcome.tokens.size()) + 1;
      }
    }
    return work;
  }

  void check_the_end() {
    for (const auto& [id, life] : requests_) {
      for (const Output& output : life.outputs) EXPECT_TRUE(output.ended) << "request " << id;
    }
    EXPECT_TRUE(scheduler_.idle());
    EXPECT_EQ(scheduler_.waiting() + scheduler_.running(), 0);
    EXPECT_EQ(scheduler_.blocks().free(), limits_.blocks);
    EXPECT_EQ(worker_.open_slots(), 0);
    EXPECT_EQ(worker_.blocks_held(), 0);
    EXPECT_EQ(static_cast<int64_t>(scheduler_.counts().preemptions), preempted_);
  }

  Random random_;
  const SchedulerOptions options_;
  const WorkerLimits limits_;
  const int32_t arrivals_;  // the more, the rarer
  const int most_in_flight_;
  Scheduler scheduler_;
  FakeWorker worker_;
  StepPlan plan_;
  std::deque<StepPlan> in_flight_;
  std::vector<TokenEvent> events_;
  std::map<RequestId, Life> requests_;
  std::map<int32_t, Holder> holders_;  // who has which slot
  RequestId next_id_ = 1;
  int64_t now_ms_ = 1'000;
  uint64_t admissions_ = 0;
  bool group_failed_ = false;
  int64_t steps_ = 0, outputs_ = 0, refused_ = 0, cancelled_ = 0, expired_ = 0, preempted_ = 0, copies_ = 0,
          checks_ = 0;
};

// OCTET_SIMULATION_SEEDS of them if that is set.
uint64_t seed_count() {
  if (const char* asked = std::getenv("OCTET_SIMULATION_SEEDS")) return std::strtoull(asked, nullptr, 10);
  return std::getenv("OCTET_LONG_TESTS") != nullptr ? 100'000 : 2'000;
}

TEST(SchedulerSimulation, EveryOutputEndsOnceWithItsOwnTokens) {
  Totals totals;
  const auto seeds = static_cast<int64_t>(seed_count());
  for (int64_t seed = 1; seed <= seeds; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Simulation simulation(static_cast<uint64_t>(seed));
    simulation.run(120);
    simulation.count(&totals);
    if (HasFailure()) return;
  }
  std::printf(
      "%lld seeds: %lld steps, %lld requests with %lld outputs, %lld more refused; %lld cancelled, %lld out of "
      "time, %lld preemptions, %lld cached tokens, %lld copies; invariants checked %lld times, failures 0\n",
      static_cast<long long>(seeds), static_cast<long long>(totals.steps), static_cast<long long>(totals.requests),
      static_cast<long long>(totals.outputs), static_cast<long long>(totals.refused),
      static_cast<long long>(totals.cancelled), static_cast<long long>(totals.expired),
      static_cast<long long>(totals.preempted), static_cast<long long>(totals.cached_tokens),
      static_cast<long long>(totals.copies), static_cast<long long>(totals.checks));
  // The simulation must not go blind: seeds that refuse or cancel everything would prove nothing.
  EXPECT_GT(totals.outputs, 20 * seeds);
  EXPECT_GT(totals.cancelled, totals.outputs / 50);
  EXPECT_LT(totals.cancelled, totals.outputs / 2);
  EXPECT_GT(totals.expired, totals.outputs / 500);
  EXPECT_GT(totals.preempted, totals.outputs / 100);
  EXPECT_GT(totals.cached_tokens, totals.outputs);
  EXPECT_GT(totals.copies, totals.outputs / 100);
}

TEST(SchedulerSimulation, EveryOutputEndsOnceWhenTheGroupDies) {
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Simulation(seed).run_and_fail(static_cast<int>(seed));
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace octet
