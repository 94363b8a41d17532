#include "coordinator/scheduler.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fake_worker.h"

// Counts what the tests' own thread asks of the heap.
namespace {
std::atomic<int64_t> allocations = 0;
}  // namespace

// Not inlined, or GCC takes the pair apart and warns that it does not match.
[[gnu::noinline]] void* operator new(size_t bytes) {
  ++allocations;
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

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
  explicit House(const WorkerLimits& limits) : House(SchedulerOptions{.limits = limits}) {}
  explicit House(const SchedulerOptions& options)
      : scheduler(options), worker(options.limits), limits(options.limits) {}

  void add(Request request) {
    ASSERT_TRUE(validate_request(request, limits).ok()) << validate_request(request, limits);
    scheduler.add(std::move(request), now_ms);
  }

  // Plans, runs and applies one step; false when there was none.
  bool step() {
    if (!scheduler.plan(now_ms, &plan)) {
      scheduler.take_events(&events);
      return false;
    }
    finish(plan);
    return true;
  }
  void finish(const StepPlan& oldest) {
    const StepResult result = worker.run(oldest);
    EXPECT_EQ(result.error, "") << "step " << oldest.step;
    scheduler.apply(result, &events);
    scheduler.check();
  }

  void run_to_end() {
    while (step()) {
    }
    EXPECT_TRUE(scheduler.idle());
    EXPECT_EQ(scheduler.blocks().free(), limits.blocks);
    EXPECT_EQ(worker.open_slots(), 0);
  }

  std::vector<int32_t> tokens_of(RequestId id, uint32_t output_index = 0) const {
    std::vector<int32_t> tokens;
    for (const TokenEvent& event : events) {
      if (event.request == id && event.output_index == output_index && event.token.has_value()) {
        tokens.push_back(event.token->token);
      }
    }
    return tokens;
  }
  // The one terminal event of an output.
  TokenEvent end_of(RequestId id, uint32_t output_index = 0) const {
    std::vector<TokenEvent> ends;
    for (const TokenEvent& event : events) {
      const bool its_own = event.request == id && event.output_index == output_index;
      if (its_own && event.finish != FinishReason::kNone) ends.push_back(event);
    }
    EXPECT_EQ(ends.size(), 1u) << "terminal events of request " << id;
    return ends.empty() ? TokenEvent{} : ends.front();
  }

  Scheduler scheduler;
  FakeWorker worker;
  WorkerLimits limits;
  StepPlan plan;
  std::vector<TokenEvent> events;
  int64_t now_ms = 0;
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
      {"negative prompt_logprobs", [](Request* r) { r->prompt_logprobs = -1; }, kInvalid, "from 0 to 20"},
      {"zero repetition", [](Request* r) { r->sampling.repetition_penalty = 0; }, kInvalid, "repetition_penalty is 0"},
      {"NaN presence", [=](Request* r) { r->sampling.presence_penalty = nan; }, kInvalid, "presence_penalty"},
      {"infinite frequency", [=](Request* r) { r->sampling.frequency_penalty = infinity; }, kInvalid, "frequency"},
      {"bias of no token",
       [](Request* r) {
         r->sampling.logit_bias = {{100, 1.0f}};
       },
       kInvalid, "biased token 0 is 100"},
      {"infinite bias",
       [=](Request* r) {
         r->sampling.logit_bias = {{1, infinity}};
       },
       kInvalid, "a logit bias"},
      {"allowed that is none", [](Request* r) { r->sampling.allowed_token_ids = {-1}; }, kInvalid, "allowed token 0"},
      {"empty bad word", [](Request* r) { r->sampling.bad_words = {{}}; }, kInvalid, "a bad word is empty"},
      {"bad word of no token",
       [](Request* r) {
         r->sampling.bad_words = {{5, 100}};
       },
       kInvalid, "token 1 is 100"},
      {"no outputs", [](Request* r) { r->outputs = 0; }, kInvalid, "0 outputs"},
      {"too many outputs", [](Request* r) { r->outputs = 65; }, kInvalid, "from 1 to 64"},
      {"priority below 0", [](Request* r) { r->priority = -1; }, kInvalid, "priority is -1"},
      {"priority above 9", [](Request* r) { r->priority = 10; }, kInvalid, "priority is 10"},
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
    ASSERT_TRUE(validate_request(request, small_limits()).ok());
    refusal.spoil(&request);
    const absl::Status status = validate_request(request, small_limits());
    EXPECT_EQ(status.code(), refusal.code) << refusal.name << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(refusal.message)) << refusal.name;
  }
}

TEST(Scheduler, SaysHowManyBlocksAreMissingAndWhatToDo) {
  WorkerLimits limits = small_limits();
  limits.blocks = 5;  // 20 positions
  Request request = make_request(1, 10, 30);
  EXPECT_EQ(
      validate_request(request, limits).message(),
      "10 blocks of 4 tokens needed for a prompt of 10 and max_tokens 30, 5 exist: lower max_tokens to 11 or raise "
      "--kv-memory");
  request.max_tokens = 11;
  EXPECT_TRUE(validate_request(request, limits).ok()) << "the remedy must work";
  request.max_tokens = 12;
  EXPECT_EQ(validate_request(request, limits).code(), absl::StatusCode::kOutOfRange);
  request.max_tokens.reset();
  EXPECT_THAT(std::string(validate_request(request, limits).message()),
              HasSubstr("give max_tokens, up to 11 or raise"));
  request = make_request(1, 21, 1);
  EXPECT_THAT(std::string(validate_request(request, limits).message()), HasSubstr("shorten the prompt or raise"));
}

TEST(Scheduler, AcceptsTheLongestThatFits) {
  WorkerLimits limits = small_limits();
  EXPECT_TRUE(validate_request(make_request(1, 63, 1), limits).ok());
  EXPECT_TRUE(validate_request(make_request(1, 1, std::numeric_limits<int32_t>::max()), limits).ok());
  limits.blocks = 1;
  EXPECT_TRUE(validate_request(make_request(1, 4, 1), limits).ok()) << "the last token is not run and needs no block";
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
  EXPECT_THAT(house.plan.open, ElementsAre(SlotOpen{.slot = 0, .sampling = request.sampling, .prompt_tokens = 3}));
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

TEST(Scheduler, WaitsForTheBlocksOfTheWholePrompt) {
  WorkerLimits limits = small_limits();
  limits.blocks = 6;
  limits.max_step_tokens = 32;
  House house(limits);
  house.add(make_request(1, 14, 3));  // 4 blocks
  house.add(make_request(2, 9, 3));   // 3 blocks
  ASSERT_TRUE(house.step());
  EXPECT_EQ(house.scheduler.blocks().free(), 2) << "all of the first, none of the second";
  EXPECT_EQ(house.scheduler.running(), 1);
  EXPECT_EQ(house.scheduler.waiting(), 1);
  house.run_to_end();
  EXPECT_EQ(house.tokens_of(1).size(), 3u);
  EXPECT_EQ(house.tokens_of(2).size(), 3u);
}

TEST(Scheduler, NobodyOvertakesTheFirstInTheQueue) {
  WorkerLimits limits = small_limits();
  limits.blocks = 6;
  limits.max_step_tokens = 32;
  House house(limits);
  house.add(make_request(1, 14, 3));
  house.add(make_request(2, 9, 3));
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
  Scheduler scheduler({.limits = small_limits()});
  StepPlan plan;
  plan.close = {1};
  EXPECT_FALSE(scheduler.plan(0, &plan));
  EXPECT_THAT(plan.close, IsEmpty()) << "an old plan is overwritten";
  EXPECT_TRUE(scheduler.idle());
}

// ---- Preemption

TEST(Scheduler, PreemptsTheYoungestAndStillFinishes) {
  WorkerLimits limits = small_limits();
  limits.blocks = 8;
  House house({.limits = limits, .prefix_cache = false});
  for (RequestId id = 1; id <= 3; ++id) house.add(make_request(id, 5, 20));  // 6 blocks each in the end
  std::vector<RequestId> preempted;
  std::map<int32_t, RequestId> holder;
  while (house.step()) {
    for (const int32_t slot : house.plan.close) {
      const RequestId id = holder.at(slot);
      const bool ended = std::ranges::any_of(house.events, [id](const TokenEvent& event) {
        return event.request == id && event.finish != FinishReason::kNone;
      });
      if (!ended) preempted.push_back(id);
    }
    for (const SlotOpen& open : house.plan.open) holder[open.slot] = open.sampling.seed;
  }
  ASSERT_FALSE(preempted.empty());
  EXPECT_EQ(preempted.front(), 3u);
  EXPECT_EQ(std::ranges::count(preempted, 1u), 0) << "the oldest runs through";
  EXPECT_EQ(house.scheduler.counts().preemptions, preempted.size());
  for (RequestId id = 1; id <= 3; ++id) {
    EXPECT_EQ(house.tokens_of(id), expected_outcome(make_request(id, 5, 20), limits).tokens);
  }
}

TEST(Scheduler, APreemptedSequenceTakesFromTheCacheWhatIsLeftOfIt) {
  WorkerLimits limits = small_limits();
  limits.blocks = 9;
  int64_t tokens_run[2];
  for (const bool cache : {false, true}) {
    House house({.limits = limits, .prefix_cache = cache});
    for (RequestId id = 1; id <= 2; ++id) house.add(make_request(id, 6, 20));
    house.run_to_end();
    EXPECT_GT(house.scheduler.counts().preemptions, 0u);
    for (RequestId id = 1; id <= 2; ++id) {
      EXPECT_EQ(house.tokens_of(id), expected_outcome(make_request(id, 6, 20), limits).tokens);
      EXPECT_EQ(house.end_of(id).cached_tokens, 0) << "usage is of the prompt's first admission";
    }
    tokens_run[cache] = house.worker.tokens_run();
  }
  EXPECT_LT(tokens_run[true], tokens_run[false]);
}

// ---- Priority

TEST(Scheduler, AdmitsTheMoreUrgentClassFirst) {
  WorkerLimits limits = small_limits();
  limits.slots = 1;
  House house(limits);
  for (RequestId id = 1; id <= 3; ++id) {
    Request request = make_request(id, 3, 2);
    request.priority = static_cast<int32_t>(9 - id);
    house.add(request);
  }
  std::vector<RequestId> order;
  while (house.step()) {
    for (const SlotOpen& open : house.plan.open) order.push_back(open.sampling.seed);
  }
  EXPECT_THAT(order, ElementsAre(3, 2, 1));
}

TEST(Scheduler, AClassAgesSoThatNobodyStarves) {
  WorkerLimits limits = small_limits();
  limits.slots = 1;
  House house(limits);
  Request patient = make_request(1, 3, 1);
  patient.priority = 2;
  house.add(make_request(2, 3, 1));
  house.add(patient);
  std::vector<RequestId> order;
  for (RequestId id = 3; id < 200; ++id) {  // urgent ones keep coming, one a second
    house.now_ms += 1'000;
    Request urgent = make_request(id, 3, 1);
    urgent.priority = 0;
    house.add(urgent);
    house.step();
    for (const SlotOpen& open : house.plan.open) order.push_back(open.sampling.seed);
  }
  const auto place = std::ranges::find(order, RequestId{1}) - order.begin();
  EXPECT_GE(place, 59);
  EXPECT_LE(place, 62) << "two classes are sixty seconds";
}

// ---- Prefix cache

Request request_of(RequestId id, std::vector<int32_t> prompt, std::optional<int32_t> max_tokens) {
  Request request = make_request(id, 1, max_tokens);
  request.prompt = std::move(prompt);
  return request;
}

std::vector<int32_t> counting(int32_t count, int32_t first = 0) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) tokens[static_cast<size_t>(i)] = (first + i) % 100;
  return tokens;
}

TEST(Scheduler, SkipsThePartOfAPromptThatTheCacheHolds) {
  House house(small_limits());
  house.add(request_of(1, counting(14), 2));
  house.run_to_end();
  std::vector<int32_t> longer = counting(14);
  longer.push_back(77);
  const Request second = request_of(2, longer, 2);
  house.add(second);
  ASSERT_TRUE(house.step());
  ASSERT_EQ(house.plan.open.size(), 1u);
  EXPECT_EQ(house.plan.open[0].position, 12) << "three whole blocks of four";
  EXPECT_EQ(house.plan.run[0].position, 12);
  house.run_to_end();
  EXPECT_EQ(house.tokens_of(2), expected_outcome(second, house.limits).tokens);
  EXPECT_EQ(house.end_of(1).cached_tokens, 0);
  EXPECT_EQ(house.end_of(2).cached_tokens, 12);
  EXPECT_EQ(house.scheduler.counts().cached_prompt_tokens, 12u);
}

TEST(Scheduler, RunsAtLeastTheLastTokenOfAPrompt) {
  House house(small_limits());
  for (RequestId id = 1; id <= 2; ++id) {
    house.add(request_of(id, counting(12), 2));
    house.run_to_end();
  }
  EXPECT_EQ(house.end_of(2).cached_tokens, 8) << "not the block of the last token";
}

TEST(Scheduler, FindsWhatAnotherOneGenerated) {
  House house(small_limits());
  const Request first = request_of(1, counting(3), 12);
  house.add(first);
  house.run_to_end();
  std::vector<int32_t> continued = counting(3);
  const std::vector<int32_t> answer = house.tokens_of(1);
  continued.insert(continued.end(), answer.begin(), answer.end());
  house.add(request_of(2, continued, 1));
  house.run_to_end();
  EXPECT_EQ(house.end_of(2).cached_tokens, 12) << "of 15 tokens: a conversation goes on where it was";
}

TEST(Scheduler, SharesOnlyWhereTheSaltIsEqual) {
  House house(small_limits());
  const auto cached = [&house](RequestId id, const std::string& salt) {
    Request request = request_of(id, counting(10), 1);
    request.cache_salt = salt;
    house.add(request);
    house.run_to_end();
    return house.end_of(id).cached_tokens;
  };
  EXPECT_EQ(cached(1, "alice"), 0);
  EXPECT_EQ(cached(2, "bob"), 0);
  EXPECT_EQ(cached(3, ""), 0);
  EXPECT_EQ(cached(4, "alice"), 8);
  EXPECT_EQ(cached(5, ""), 8);
}

TEST(Scheduler, ForgetsWhatWasIdleLongest) {
  WorkerLimits limits = small_limits();
  limits.blocks = 6;
  House house(limits);
  for (RequestId id = 1; id <= 3; ++id) {
    house.add(request_of(id, counting(8, static_cast<int32_t>(10 * id)), 1));  // two blocks each
    house.run_to_end();
  }
  EXPECT_EQ(house.scheduler.blocks().idle(), 6);
  house.add(request_of(4, counting(5, 50), 1));  // takes the last block of the first prompt, and then its first
  house.run_to_end();
  house.add(request_of(5, counting(8, 10), 1));
  house.run_to_end();
  EXPECT_EQ(house.end_of(5).cached_tokens, 0);
  house.add(request_of(6, counting(8, 30), 1));
  house.run_to_end();
  EXPECT_EQ(house.end_of(6).cached_tokens, 4);
}

TEST(Scheduler, TwoThatComeTogetherShareFromTheSecondStepOn) {
  WorkerLimits limits = small_limits();
  limits.max_step_tokens = 16;
  House house(limits);
  house.add(request_of(1, counting(16), 1));
  house.add(request_of(2, counting(16), 1));
  ASSERT_TRUE(house.step());
  EXPECT_EQ(house.scheduler.running() + house.scheduler.waiting(), 1) << "the budget was the first one's";
  house.run_to_end();
  EXPECT_EQ(house.end_of(2).cached_tokens, 12);
}

// ---- Several outputs

TEST(Scheduler, RunsThePromptOnceForAllOutputs) {
  for (const bool cache : {false, true}) {
    House house({.limits = small_limits(), .prefix_cache = cache});
    Request request = request_of(1, counting(15), 6);
    request.outputs = 4;
    house.add(request);
    int copies = 0;
    while (house.step()) copies += static_cast<int>(house.plan.copies.size());
    EXPECT_EQ(copies, 3) << "the block with the prompt's last tokens, once for each other output";
    for (uint32_t i = 0; i < 4; ++i) {
      EXPECT_EQ(house.tokens_of(1, i), expected_outcome(request, house.limits, i).tokens);
      EXPECT_EQ(house.end_of(1, i).prompt_tokens, 15);
    }
    EXPECT_NE(house.tokens_of(1, 0), house.tokens_of(1, 1));
    EXPECT_EQ(house.worker.tokens_run(), 15 + 3 * 1 + 4 * 5) << "the others run the last prompt token again";
    EXPECT_EQ(house.scheduler.blocks().free(), house.limits.blocks);
  }
}

TEST(Scheduler, StopsOneOutputOfARequest) {
  House house(small_limits());
  Request request = make_request(1, 6, 8);
  request.outputs = 3;
  house.add(request);
  ASSERT_TRUE(house.step());
  ASSERT_TRUE(house.step());
  house.scheduler.stop(1, 1);
  house.scheduler.stop(1, 7);
  house.run_to_end();
  EXPECT_EQ(house.end_of(1, 1).finish, FinishReason::kStopped);
  for (const uint32_t i : {0u, 2u}) EXPECT_EQ(house.tokens_of(1, i), expected_outcome(request, house.limits, i).tokens);
}

TEST(Scheduler, OthersRunThePromptWhenTheFirstOutputIsStopped) {
  House house(small_limits());
  Request request = make_request(1, 20, 4);
  request.outputs = 3;
  house.add(request);
  ASSERT_TRUE(house.step());  // 8 of 20
  house.scheduler.stop(1, 0);
  house.run_to_end();
  EXPECT_EQ(house.end_of(1, 0).finish, FinishReason::kStopped);
  for (const uint32_t i : {1u, 2u}) EXPECT_EQ(house.tokens_of(1, i), expected_outcome(request, house.limits, i).tokens);
}

// ---- One step ahead

TEST(Scheduler, PlansTheNextStepByNamingTokensThatAreNotKnownYet) {
  House house(small_limits());
  const Request request = make_request(1, 3, 4);
  house.add(request);
  StepPlan first, second;
  ASSERT_TRUE(house.scheduler.plan(0, &first));
  ASSERT_TRUE(house.scheduler.plan(0, &second));
  EXPECT_THAT(second.run, ElementsAre(SlotTokens{
                              .slot = 0, .position = 3, .tokens = {}, .from_last_sample = true, .sample = true}));
  house.finish(first);
  house.finish(second);
  house.run_to_end();
  EXPECT_EQ(house.tokens_of(1), expected_outcome(request, house.limits).tokens);
}

TEST(Scheduler, RunsNoStepTooManyWhenTheLengthIsKnown) {
  House house(small_limits());
  house.add(make_request(1, 3, 2));
  StepPlan first, second, third;
  ASSERT_TRUE(house.scheduler.plan(0, &first));
  ASSERT_TRUE(house.scheduler.plan(0, &second));
  house.finish(first);
  EXPECT_FALSE(house.scheduler.plan(0, &third)) << "the second token is the last, and is not run";
  house.finish(second);
  house.run_to_end();
  EXPECT_EQ(house.worker.tokens_run(), 4);
}

TEST(Scheduler, DropsWhatWasRunInVainAfterAnEnd) {
  House house(small_limits());
  Request request = make_request(1, 3, 10);
  request.sampling.end_token_ids = {expected_outcome(request, house.limits).tokens[0]};
  house.add(request);
  StepPlan first, second;
  ASSERT_TRUE(house.scheduler.plan(0, &first));
  ASSERT_TRUE(house.scheduler.plan(0, &second));
  house.finish(first);
  EXPECT_EQ(house.end_of(1).finish, FinishReason::kEndToken);
  EXPECT_EQ(house.scheduler.running(), 0);
  EXPECT_FALSE(house.scheduler.idle()) << "a step is in flight";
  house.finish(second);
  house.run_to_end();
  EXPECT_EQ(house.tokens_of(1).size(), 1u);
}

// ---- Constrained output

TEST(Scheduler, SendsAMaskWithEverySampleAndWaitsForTheTokenBefore) {
  House house(small_limits());
  Request request = make_request(1, 3, 6);
  request.outputs = 2;
  request.constraint = std::make_shared<AlternatingConstraint>(house.limits.vocab_size);
  house.add(request);
  StepPlan first, second;
  ASSERT_TRUE(house.scheduler.plan(0, &first));
  EXPECT_EQ(first.masks.size(), 1u);
  ASSERT_TRUE(house.scheduler.plan(0, &second));
  EXPECT_THAT(slots_of(second), ElementsAre(1)) << "the other output; the first one's next mask is not known";
  house.finish(first);
  house.finish(second);
  house.run_to_end();
  for (const uint32_t i : {0u, 1u}) {
    const std::vector<int32_t> tokens = house.tokens_of(1, i);
    EXPECT_EQ(tokens, expected_outcome(request, house.limits, i).tokens);
    for (size_t t = 1; t < tokens.size(); ++t) EXPECT_NE(tokens[t] % 2, tokens[t - 1] % 2);
  }
}

// ---- Prompt logprobs

TEST(Scheduler, ReportsThePromptsLogprobsBeforeItsFirstToken) {
  House house(small_limits());
  house.add(request_of(1, counting(20), 1));
  house.run_to_end();
  Request request = request_of(2, counting(20), 3);
  request.prompt_logprobs = 2;
  house.add(request);
  house.events.clear();
  house.run_to_end();
  EXPECT_EQ(house.end_of(2).cached_tokens, 0) << "they come from running the prompt";
  std::vector<int32_t> scored;
  for (const TokenEvent& event : house.events) {
    for (const SampledToken& token : event.prompt_logprobs) {
      EXPECT_TRUE(house.tokens_of(2).size() == 3u);
      EXPECT_EQ(token.top.size(), 2u);
      scored.push_back(token.chosen.token);
    }
  }
  EXPECT_EQ(scored, counting(19, 1));
  EXPECT_FALSE(house.events.front().prompt_logprobs.empty());
}

// ---- Memory

TEST(Scheduler, AllocatesNothingInASteadyState) {
  WorkerLimits limits{
      .slots = 32, .blocks = 500, .block_tokens = 16, .max_step_tokens = 64, .max_context = 300, .vocab_size = 1000};
  Scheduler scheduler({.limits = limits});
  for (RequestId id = 1; id <= 32; ++id) {
    Request request = make_request(id, 2, 200);
    scheduler.add(request, 0);
  }
  StepPlan plan;
  StepResult result;
  std::vector<TokenEvent> events;
  const auto step = [&] {
    ASSERT_TRUE(scheduler.plan(0, &plan));
    result.step = plan.step;
    result.sampled.clear();
    for (const SlotTokens& run : plan.run) {
      if (run.sample) result.sampled.push_back({.slot = run.slot, .chosen = {.token = 5}});
    }
    events.clear();
    scheduler.apply(result, &events);
  };
  for (int i = 0; i < 130; ++i) step();
  const int64_t before = allocations.load();
  for (int i = 0; i < 64; ++i) step();
  EXPECT_EQ(allocations.load() - before, 0) << "64 steps of 32 sequences, which take four new blocks each";
  EXPECT_EQ(events.size(), 32u);
}

// ---- Deadlines

TEST(Scheduler, EndsWhatIsLateWhetherItWaitsOrRuns) {
  WorkerLimits limits = small_limits();
  limits.slots = 1;
  House house(limits);
  Request running = make_request(1, 3, 50), waiting = make_request(2, 3, 50);
  running.deadline_ms = waiting.deadline_ms = 100;
  house.add(running);
  house.add(waiting);
  house.add(make_request(3, 3, 2));
  for (; house.now_ms < 99; house.now_ms += 33) ASSERT_TRUE(house.step());
  EXPECT_TRUE(house.scheduler.running() == 1 && house.scheduler.waiting() == 2);
  house.now_ms = 100;
  house.run_to_end();
  EXPECT_EQ(house.end_of(1).finish, FinishReason::kDeadline);
  EXPECT_EQ(house.end_of(1).completion_tokens, 3);
  EXPECT_EQ(house.end_of(2).finish, FinishReason::kDeadline);
  EXPECT_EQ(house.end_of(2).completion_tokens, 0);
  EXPECT_EQ(house.end_of(3).finish, FinishReason::kLength);
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
  request.outputs = 2;
  house.add(request);
  house.run_to_end();
  ASSERT_EQ(house.events.size(), 4u);
  int by_output[2] = {};
  for (const TokenEvent& event : house.events) {
    EXPECT_EQ(event.top.size(), 3u);
    ++by_output[event.output_index];
  }
  EXPECT_THAT(by_output, ElementsAre(2, 2));
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
  EXPECT_FALSE(house.scheduler.plan(0, &house.plan));
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
  ASSERT_TRUE(house.scheduler.plan(0, &house.plan));
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
  ASSERT_TRUE(house.scheduler.plan(0, &house.plan));
  StepPlan second;
  ASSERT_TRUE(house.scheduler.plan(0, &second));
  EXPECT_DEATH(house.scheduler.plan(0, &second), "before one of those in flight was applied");
  const StepResult good = house.worker.run(house.plan);
  StepResult bad = good;
  bad.step = 2;
  EXPECT_DEATH(house.scheduler.apply(bad, &house.events), "not the oldest plan's");
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
