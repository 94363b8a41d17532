#include "coordinator/scheduler.h"

#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fake_worker.h"

namespace octet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

WorkerLimits small_limits() {
  return {.slots = 4, .blocks = 20, .block_tokens = 4, .max_step_tokens = 8, .max_context = 64, .vocab_size = 100};
}

Request make_request(RequestId id, int32_t prompt_tokens, std::optional<int32_t> max_tokens) {
  Request request;
  request.id = id;
  for (int32_t i = 0; i < prompt_tokens; ++i) request.prompt.push_back(static_cast<int32_t>((id * 31 + i * 7) % 100));
  request.sampling.seed = id;
  request.max_tokens = max_tokens;
  return request;
}

std::vector<int32_t> slots_of(const StepPlan& plan) {
  std::vector<int32_t> slots;
  for (const SlotTokens& run : plan.run) slots.push_back(run.slot);
  return slots;
}

std::vector<int32_t> counts_of(const StepPlan& plan) {
  std::vector<int32_t> counts;
  for (const SlotTokens& run : plan.run) counts.push_back(run.count());
  return counts;
}

// A scheduler and the worker that runs its plans.
struct House {
  explicit House(const WorkerLimits& limits) : scheduler(limits), worker(limits), limits(limits) {}

  void add(Request request) {
    ASSERT_TRUE(Scheduler::validate(request, limits).ok()) << Scheduler::validate(request, limits);
    scheduler.add(std::move(request));
  }

  // Plans, runs and applies one step; false when there was none.
  bool step() {
    if (!scheduler.plan(&plan)) return false;
    const StepResult result = worker.run(plan);
    EXPECT_EQ(result.error, "") << "step " << plan.step;
    scheduler.apply(result, &events);
    return true;
  }

  void run_to_end() {
    while (step()) {
    }
    EXPECT_TRUE(scheduler.idle());
    EXPECT_EQ(scheduler.blocks().free(), limits.blocks);
    EXPECT_EQ(worker.open_slots(), 0);
  }

  std::vector<int32_t> tokens_of(RequestId id) const {
    std::vector<int32_t> tokens;
    for (const TokenEvent& event : events) {
      if (event.request == id && event.token.has_value()) tokens.push_back(event.token->token);
    }
    return tokens;
  }
  // The one terminal event of a request.
  TokenEvent end_of(RequestId id) const {
    std::vector<TokenEvent> ends;
    for (const TokenEvent& event : events) {
      if (event.request == id && event.finish != FinishReason::kNone) ends.push_back(event);
    }
    EXPECT_EQ(ends.size(), 1u) << "terminal events of request " << id;
    return ends.empty() ? TokenEvent{} : ends.front();
  }

  Scheduler scheduler;
  FakeWorker worker;
  WorkerLimits limits;
  StepPlan plan;
  std::vector<TokenEvent> events;
};

// ---- Admission

struct Refusal {
  const char* name;
  std::function<void(Request*)> spoil;
  absl::StatusCode code;
  const char* message;  // part of it
};

TEST(Scheduler, RefusesWhatCanNeverRun) {
  const float nan = std::nanf("");
  const float infinity = std::numeric_limits<float>::infinity();
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  constexpr auto kRange = absl::StatusCode::kOutOfRange;
  const std::vector<Refusal> refusals = {
      {"no prompt", [](Request* r) { r->prompt.clear(); }, kInvalid, "prompt is empty"},
      {"negative id", [](Request* r) { r->prompt[2] = -1; }, kInvalid, "prompt token 2 is -1"},
      {"id beyond the vocabulary", [](Request* r) { r->prompt[1] = 100; }, kInvalid, "prompt token 1 is 100"},
      {"end token beyond the vocabulary",
       [](Request* r) {
         r->sampling.end_token_ids = {5, 100};
       },
       kInvalid, "end token 1 is 100"},
      {"no tokens wanted", [](Request* r) { r->max_tokens = 0; }, kInvalid, "max_tokens is 0"},
      {"negative max_tokens", [](Request* r) { r->max_tokens = -5; }, kInvalid, "max_tokens is -5"},
      {"negative min_tokens", [](Request* r) { r->sampling.min_tokens = -1; }, kInvalid, "min_tokens is -1"},
      {"min over max", [](Request* r) { r->sampling.min_tokens = 6; }, kInvalid,
       "min_tokens is 6, more than max_tokens, which is 5"},
      {"NaN temperature", [=](Request* r) { r->sampling.temperature = nan; }, kInvalid, "temperature"},
      {"infinite temperature", [=](Request* r) { r->sampling.temperature = infinity; }, kInvalid, "temperature"},
      {"negative temperature", [](Request* r) { r->sampling.temperature = -0.1f; }, kInvalid, "temperature is -0.1"},
      {"negative top_k", [](Request* r) { r->sampling.top_k = -1; }, kInvalid, "top_k is -1"},
      {"zero top_p", [](Request* r) { r->sampling.top_p = 0.0f; }, kInvalid, "top_p is 0"},
      {"top_p over 1", [](Request* r) { r->sampling.top_p = 1.5f; }, kInvalid, "top_p is 1.5"},
      {"NaN top_p", [=](Request* r) { r->sampling.top_p = nan; }, kInvalid, "top_p"},
      {"negative min_p", [](Request* r) { r->sampling.min_p = -1.0f; }, kInvalid, "min_p is -1"},
      {"min_p over 1", [](Request* r) { r->sampling.min_p = 2.0f; }, kInvalid, "min_p is 2"},
      {"NaN min_p", [=](Request* r) { r->sampling.min_p = nan; }, kInvalid, "min_p"},
      {"negative top_logprobs", [](Request* r) { r->sampling.top_logprobs = -1; }, kInvalid, "from 0 to 20"},
      {"too many top_logprobs", [](Request* r) { r->sampling.top_logprobs = 21; }, kInvalid, "from 0 to 20"},
      {"prompt as long as the context", [](Request* r) { r->prompt.resize(64, 1); }, kRange,
       "the prompt has 64 tokens, but the context holds 64"},
      {"min_tokens beyond the context",
       [](Request* r) {
         r->max_tokens.reset();
         r->sampling.min_tokens = 62;
       },
       kRange, "room for 61 after the prompt"},
  };
  for (const Refusal& refusal : refusals) {
    Request request = make_request(1, 3, 5);
    ASSERT_TRUE(Scheduler::validate(request, small_limits()).ok());
    refusal.spoil(&request);
    const absl::Status status = Scheduler::validate(request, small_limits());
    EXPECT_EQ(status.code(), refusal.code) << refusal.name << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(refusal.message)) << refusal.name;
  }
}

TEST(Scheduler, SaysHowManyBlocksAreMissingAndWhatToDo) {
  WorkerLimits limits = small_limits();
  limits.blocks = 5;  // 20 positions
  Request request = make_request(1, 10, 30);
  EXPECT_EQ(
      Scheduler::validate(request, limits).message(),
      "10 blocks of 4 tokens needed for a prompt of 10 and max_tokens 30, 5 exist: lower max_tokens to 11 or raise "
      "--kv-memory");
  request.max_tokens = 11;
  EXPECT_TRUE(Scheduler::validate(request, limits).ok()) << "the remedy must work";
  request.max_tokens = 12;
  EXPECT_EQ(Scheduler::validate(request, limits).code(), absl::StatusCode::kOutOfRange);
  request.max_tokens.reset();
  EXPECT_THAT(std::string(Scheduler::validate(request, limits).message()),
              HasSubstr("give max_tokens, up to 11 or raise"));
  request = make_request(1, 21, 1);
  EXPECT_THAT(std::string(Scheduler::validate(request, limits).message()), HasSubstr("shorten the prompt or raise"));
}

TEST(Scheduler, AcceptsTheLongestThatFits) {
  WorkerLimits limits = small_limits();
  EXPECT_TRUE(Scheduler::validate(make_request(1, 63, 1), limits).ok());
  EXPECT_TRUE(Scheduler::validate(make_request(1, 1, std::numeric_limits<int32_t>::max()), limits).ok());
  limits.blocks = 1;
  EXPECT_TRUE(Scheduler::validate(make_request(1, 4, 1), limits).ok())
      << "the last token is not run and needs no block";
  House house(limits);
  house.add(make_request(1, 4, 1));
  house.run_to_end();
  EXPECT_EQ(house.end_of(1).finish, FinishReason::kLength);
}

// ---- Plans

TEST(Scheduler, OpensASlotRunsThePromptThenDecodesThenCloses) {
  House house(small_limits());
  Request request = make_request(1, 3, 2);
  request.sampling.temperature = 0.5f;
  house.add(request);
  ASSERT_TRUE(house.step());
  EXPECT_THAT(house.plan.open, ElementsAre(SlotOpen{.slot = 0, .sampling = request.sampling}));
  EXPECT_THAT(house.plan.blocks, ElementsAre(SlotBlock{.slot = 0, .block = 0}));
  EXPECT_THAT(house.plan.run,
              ElementsAre(SlotTokens{.slot = 0, .position = 0, .tokens = request.prompt, .sample = true}));
  ASSERT_TRUE(house.step());
  EXPECT_THAT(house.plan.open, IsEmpty());
  EXPECT_THAT(house.plan.blocks, IsEmpty());
  EXPECT_THAT(house.plan.run, ElementsAre(SlotTokens{
                                  .slot = 0, .position = 3, .tokens = {}, .from_last_sample = true, .sample = true}));
  EXPECT_FALSE(house.scheduler.idle()) << "the slot is still to be closed";
  ASSERT_TRUE(house.step());
  EXPECT_THAT(house.plan.close, ElementsAre(0));
  EXPECT_THAT(house.plan.run, IsEmpty());
  EXPECT_FALSE(house.step());
  EXPECT_TRUE(house.scheduler.idle());
}

TEST(Scheduler, MixesDecodesAndPromptChunksInOneStep) {
  House house(small_limits());
  house.add(make_request(1, 2, 10));
  house.add(make_request(2, 3, 10));
  ASSERT_TRUE(house.step());
  house.add(make_request(3, 4, 10));
  house.add(make_request(4, 20, 10));
  ASSERT_TRUE(house.step());
  EXPECT_THAT(slots_of(house.plan), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(counts_of(house.plan), ElementsAre(1, 1, 4, 2)) << "decodes, then prompts up to the budget of 8";
  ASSERT_TRUE(house.step());
  EXPECT_THAT(counts_of(house.plan), ElementsAre(1, 1, 1, 5));
  house.run_to_end();
  for (RequestId id = 1; id <= 3; ++id) {
    EXPECT_EQ(house.tokens_of(id),
              expected_outcome(make_request(id, static_cast<int32_t>(id) + 1, 10), house.limits).tokens);
  }
  EXPECT_EQ(house.tokens_of(4), expected_outcome(make_request(4, 20, 10), house.limits).tokens);
}

TEST(Scheduler, CutsALongPromptIntoChunksAndSamplesAfterTheLast) {
  House house(small_limits());
  house.add(make_request(1, 20, 1));
  std::vector<int32_t> counts;
  std::vector<bool> samples;
  while (house.step()) {
    for (const SlotTokens& run : house.plan.run) {
      counts.push_back(run.count());
      samples.push_back(run.sample);
    }
  }
  EXPECT_THAT(counts, ElementsAre(8, 8, 4));
  EXPECT_THAT(samples, ElementsAre(false, false, true));
}

TEST(Scheduler, ADecodingSequenceGetsATokenInEveryStepBesideALongPrompt) {
  House house(small_limits());
  house.add(make_request(1, 1, 12));
  ASSERT_TRUE(house.step());
  house.add(make_request(2, 60, 1));
  for (int step = 0; step < 8; ++step) {
    ASSERT_TRUE(house.step());
    ASSERT_EQ(house.plan.run.size(), 2u);
    EXPECT_TRUE(house.plan.run[0].from_last_sample);
    EXPECT_EQ(house.plan.token_count(), 8);
  }
}

TEST(Scheduler, AppendsBlocksAsPositionsNeedThem) {
  House house(small_limits());
  house.add(make_request(1, 9, 8));  // positions 0..15: 4 blocks of 4
  std::vector<size_t> blocks_told;
  while (house.step()) {
    blocks_told.push_back(house.plan.blocks.size());
  }
  // Chunks 8 and 1, decodes at 9..15, then the close.
  EXPECT_THAT(blocks_told, ElementsAre(2, 1, 0, 0, 0, 1, 0, 0, 0, 0));
}

TEST(Scheduler, WaitsForTheBlocksOfTheWholeOutput) {
  WorkerLimits limits = small_limits();
  limits.blocks = 6;
  House house(limits);
  house.add(make_request(1, 4, 13));  // 16 positions: 4 blocks
  house.add(make_request(2, 4, 9));   // 12 positions: 3 blocks
  ASSERT_TRUE(house.step());
  EXPECT_EQ(house.scheduler.blocks().free(), 2) << "all of the first, none of the second";
  EXPECT_EQ(house.scheduler.running(), 1);
  EXPECT_EQ(house.scheduler.waiting(), 1);
  house.run_to_end();
  EXPECT_EQ(house.tokens_of(1).size(), 13u);
  EXPECT_EQ(house.tokens_of(2).size(), 9u);
}

TEST(Scheduler, NobodyOvertakesTheFirstInTheQueue) {
  WorkerLimits limits = small_limits();
  limits.blocks = 6;
  House house(limits);
  house.add(make_request(1, 4, 13));
  house.add(make_request(2, 4, 9));
  house.add(make_request(3, 1, 1));  // would fit beside the first
  ASSERT_TRUE(house.step());
  EXPECT_EQ(house.scheduler.running(), 1);
  EXPECT_EQ(house.scheduler.waiting(), 2);
}

TEST(Scheduler, ClosesAndReopensASlotInOnePlan) {
  WorkerLimits limits = small_limits();
  limits.slots = 1;
  limits.blocks = 2;
  House house(limits);
  house.add(make_request(1, 5, 1));
  house.add(make_request(2, 5, 1));
  ASSERT_TRUE(house.step());
  EXPECT_EQ(house.end_of(1).finish, FinishReason::kLength);
  EXPECT_EQ(house.scheduler.blocks().free(), 0) << "the blocks come back in the plan that closes";
  ASSERT_TRUE(house.step());
  EXPECT_THAT(house.plan.close, ElementsAre(0));
  ASSERT_EQ(house.plan.open.size(), 1u);
  EXPECT_EQ(house.plan.open[0].slot, 0);
  EXPECT_EQ(house.tokens_of(2), expected_outcome(make_request(2, 5, 1), limits).tokens);
}

TEST(Scheduler, RunsNoMoreSequencesThanAStepHasTokens) {
  WorkerLimits limits = small_limits();
  limits.max_step_tokens = 2;
  House house(limits);
  for (RequestId id = 1; id <= 4; ++id) house.add(make_request(id, 1, 5));
  ASSERT_TRUE(house.step());
  EXPECT_EQ(house.scheduler.running(), 2);
  house.run_to_end();
  for (RequestId id = 1; id <= 4; ++id) EXPECT_EQ(house.end_of(id).completion_tokens, 5);
}

TEST(Scheduler, PlansNothingWhenThereIsNothing) {
  Scheduler scheduler(small_limits());
  StepPlan plan;
  plan.close = {1};
  EXPECT_FALSE(scheduler.plan(&plan));
  EXPECT_THAT(plan.close, IsEmpty()) << "an old plan is overwritten";
  EXPECT_TRUE(scheduler.idle());
}

// ---- Ends

TEST(Scheduler, EndsWithTheEndTokenAndReportsIt) {
  const WorkerLimits limits = small_limits();
  Request request = make_request(1, 3, 10);
  const std::vector<int32_t> free_running = expected_outcome(request, limits).tokens;
  request.sampling.end_token_ids = {99, free_running[4], 0};
  const Outcome outcome = expected_outcome(request, limits);
  House house(limits);
  house.add(request);
  house.run_to_end();
  EXPECT_EQ(house.tokens_of(1), outcome.tokens);
  const TokenEvent end = house.end_of(1);
  EXPECT_EQ(end.finish, FinishReason::kEndToken);
  EXPECT_EQ(end.token->token, outcome.tokens.back());
  EXPECT_EQ(end.prompt_tokens, 3);
  EXPECT_EQ(end.completion_tokens, static_cast<int32_t>(outcome.tokens.size()));
}

TEST(Scheduler, TheFirstMinTokensDoNotEndTheOutput) {
  const WorkerLimits limits = small_limits();
  Request request = make_request(1, 3, 10);
  const std::vector<int32_t> tokens = expected_outcome(request, limits).tokens;
  for (int32_t min_tokens = 0; min_tokens <= 10; ++min_tokens) {
    request.sampling.end_token_ids = tokens;  // every token is an end token
    request.sampling.min_tokens = min_tokens;
    House house(limits);
    house.add(request);
    house.run_to_end();
    const TokenEvent end = house.end_of(1);
    EXPECT_EQ(end.completion_tokens, std::min(min_tokens + 1, 10));
    EXPECT_EQ(end.finish, min_tokens < 10 ? FinishReason::kEndToken : FinishReason::kLength);
  }
}

TEST(Scheduler, EndsWhenTheContextIsFull) {
  for (const std::optional<int32_t> max_tokens : {std::optional<int32_t>(), std::optional<int32_t>(1000000)}) {
    House house(small_limits());
    house.add(make_request(1, 40, max_tokens));
    house.run_to_end();
    EXPECT_EQ(house.tokens_of(1).size(), 24u);
    EXPECT_EQ(house.end_of(1).finish, FinishReason::kLength);
  }
}

TEST(Scheduler, ReportsAlternativesAndTheOutputIndex) {
  House house(small_limits());
  Request request = make_request(1, 3, 2);
  request.sampling.top_logprobs = 3;
  request.sampling.output_index = 7;
  house.add(request);
  house.run_to_end();
  ASSERT_EQ(house.events.size(), 2u);
  for (const TokenEvent& event : house.events) {
    EXPECT_EQ(event.top.size(), 3u);
    EXPECT_EQ(event.output_index, 7u);
  }
}

TEST(Scheduler, CancelsARequestThatWaits) {
  WorkerLimits limits = small_limits();
  limits.slots = 1;
  House house(limits);
  house.add(make_request(1, 3, 4));
  house.add(make_request(2, 3, 4));
  ASSERT_TRUE(house.step());
  house.scheduler.cancel(2);
  EXPECT_FALSE(house.scheduler.idle());
  house.scheduler.take_events(&house.events);
  const TokenEvent end = house.end_of(2);
  EXPECT_EQ(end.finish, FinishReason::kCancelled);
  EXPECT_EQ(end.prompt_tokens, 3);
  EXPECT_EQ(end.completion_tokens, 0);
  EXPECT_FALSE(end.token.has_value());
  house.run_to_end();
  EXPECT_EQ(house.tokens_of(1).size(), 4u);
  EXPECT_THAT(house.tokens_of(2), IsEmpty());
}

TEST(Scheduler, IsNotIdleWhileAnEventIsToBeTaken) {
  House house(small_limits());
  house.add(make_request(1, 3, 4));
  house.scheduler.cancel(1);
  EXPECT_FALSE(house.step());
  EXPECT_FALSE(house.scheduler.idle());
  house.scheduler.take_events(&house.events);
  EXPECT_TRUE(house.scheduler.idle());
  EXPECT_EQ(house.end_of(1).finish, FinishReason::kCancelled);
}

TEST(Scheduler, CancelsARequestThatRunsAndClosesItsSlotNext) {
  House house(small_limits());
  house.add(make_request(1, 3, 50));
  ASSERT_TRUE(house.step());
  ASSERT_TRUE(house.step());
  house.scheduler.cancel(1);
  house.scheduler.cancel(1);
  house.scheduler.cancel(12345);
  ASSERT_TRUE(house.step());
  EXPECT_THAT(house.plan.close, ElementsAre(0));
  EXPECT_THAT(house.plan.run, IsEmpty());
  EXPECT_EQ(house.scheduler.blocks().free(), house.limits.blocks);
  EXPECT_EQ(house.end_of(1).finish, FinishReason::kCancelled);
  EXPECT_EQ(house.end_of(1).completion_tokens, 2);
}

TEST(Scheduler, DropsTheTokenOfAStepDuringWhichItsRequestWasCancelled) {
  House house(small_limits());
  house.add(make_request(1, 3, 50));
  house.add(make_request(2, 3, 3));
  ASSERT_TRUE(house.step());
  ASSERT_TRUE(house.scheduler.plan(&house.plan));
  house.scheduler.cancel(1);
  const StepResult result = house.worker.run(house.plan);
  EXPECT_EQ(result.sampled.size(), 2u);
  house.scheduler.apply(result, &house.events);
  EXPECT_EQ(house.end_of(1).completion_tokens, 1);
  house.run_to_end();
  EXPECT_EQ(house.tokens_of(1).size(), 1u);
  EXPECT_EQ(house.tokens_of(2).size(), 3u);
}

TEST(Scheduler, EndsEverythingWithTheCause) {
  WorkerLimits limits = small_limits();
  limits.slots = 2;
  House house(limits);
  for (RequestId id = 1; id <= 4; ++id) house.add(make_request(id, 3, 9));
  ASSERT_TRUE(house.step());
  house.scheduler.cancel(4);
  house.scheduler.end_all(FinishReason::kError, "rank 3 is gone", &house.events);
  for (RequestId id = 1; id <= 3; ++id) {
    EXPECT_EQ(house.end_of(id).finish, FinishReason::kError);
    EXPECT_EQ(house.end_of(id).error, "rank 3 is gone");
    EXPECT_EQ(house.end_of(id).completion_tokens, id <= 2 ? 1 : 0);
  }
  EXPECT_EQ(house.end_of(4).finish, FinishReason::kCancelled) << "it had ended before";
  EXPECT_EQ(house.end_of(4).error, "");
  EXPECT_EQ(house.scheduler.waiting(), 0);
  EXPECT_EQ(house.scheduler.running(), 0);
}

TEST(SchedulerDeathTest, RefusesResultsThatAreNotThePlans) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  House house(small_limits());
  house.add(make_request(1, 3, 9));
  ASSERT_TRUE(house.scheduler.plan(&house.plan));
  EXPECT_DEATH(house.scheduler.plan(&house.plan), "before the one in flight was applied");
  const StepResult good = house.worker.run(house.plan);
  StepResult bad = good;
  bad.step = 2;
  EXPECT_DEATH(house.scheduler.apply(bad, &house.events), "not the last plan's");
  bad = good;
  bad.sampled.clear();
  EXPECT_DEATH(house.scheduler.apply(bad, &house.events), "does not have the samples");
  bad = good;
  bad.sampled[0].slot = 1;
  EXPECT_DEATH(house.scheduler.apply(bad, &house.events), "does not have the samples");
  bad = good;
  bad.sampled.push_back(good.sampled[0]);
  EXPECT_DEATH(house.scheduler.apply(bad, &house.events), "did not ask for");
  bad = good;
  bad.error = "NaN";
  EXPECT_DEATH(house.scheduler.apply(bad, &house.events), "failed step");
}

}  // namespace
}  // namespace octet
