// The one-answer contract through the scheduler: the same requests give bit-identical tokens and logprobs whatever it
// decides. A cell is a way to run them all: batch size, order, chunk size, cache cold, warm or off, memory enough or so
// small that sequences are preempted, one or two steps in flight, ranks and threads.
#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/scheduler.h"
#include "coordinator/thread_worker_group.h"
#include "tests/random_model.h"
#include "tests/sum_over_ranks.h"

namespace octet {
namespace {

constexpr int32_t kBlocks = 600;  // more than all requests together need

// What a request's client got, by output.
struct Answer {
  std::map<uint32_t, std::vector<SampledToken>> outputs;
  std::vector<SampledToken> prompt_logprobs;
  bool operator==(const Answer&) const = default;
};
using Answers = std::map<RequestId, Answer>;

struct Cell {
  SchedulerOptions options;
  int in_flight = 1;
  bool warm = false;   // everything was run before
  uint64_t order = 0;  // of arrival, and in which step
  std::string name() const {
    const WorkerLimits& l = options.limits;
    return absl::StrCat(l.slots, " slots, ", l.blocks, " blocks, ", l.max_step_tokens, " tokens a step, cache ",
                        !options.prefix_cache ? "off"
                        : warm                ? "warm"
                                              : "cold",
                        ", ", in_flight, " in flight, order ", order);
  }
};

std::unique_ptr<ThreadWorkerGroup> start(const Checkpoint& checkpoint, int ranks, int threads,
                                         decltype(ThreadGroupOptions::wrap_communicator) wrap = {}) {
  ThreadGroupOptions options;
  options.ranks = ranks;
  options.stream = {.threads = threads, .spin = false};
  options.activations = ActivationMode::kFP8;
  options.wrap_communicator = std::move(wrap);
  options.memory = {.kv_memory_bytes = 64 << 20, .max_context = 1024, .max_sequences = 32, .max_step_tokens = 256};
  options.available_bytes = int64_t{4} << 30;
  auto group = ThreadWorkerGroup::start(checkpoint, options);
  EXPECT_TRUE(group.ok()) << group.status();
  return std::move(*group);
}

// Requests of all kinds; many of their prompts begin alike.
std::vector<Request> all_kinds(int64_t vocab_size) {
  std::mt19937_64 random(3);
  std::vector<int32_t> stem(200);
  for (int32_t& token : stem) token = static_cast<int32_t>(random() % vocab_size);
  std::vector<Request> requests;
  for (const int length : {1, 2, 3, 5, 9, 15, 16, 17, 20, 33, 40, 64, 130, 257}) {
    Request request;
    request.id = requests.size() + 1;
    const int shared = static_cast<int>(random() % 3) * length / 3;
    for (int i = 0; i < length; ++i) {
      request.prompt.push_back(i < shared && i < 200 ? stem[i] : static_cast<int32_t>(random() % vocab_size));
    }
    request.max_tokens = 30 + static_cast<int32_t>(random() % 70);
    request.sampling.seed = random();
    request.sampling.top_logprobs = static_cast<int32_t>(random() % 3);
    if (request.id % 2 == 0) {
      request.sampling.temperature = 0.9f;
      request.sampling.top_p = 0.9f;
    }
    if (request.id % 3 == 0) {
      request.sampling.repetition_penalty = 1.2f;
      request.sampling.frequency_penalty = 0.3f;
      request.sampling.presence_penalty = 0.1f;
    }
    if (request.id % 4 == 0) request.outputs = 3;
    if (request.id % 5 == 0) request.prompt_logprobs = 1;
    if (request.id % 7 == 0) request.cache_salt = "tenant";
    if (request.id % 6 == 1) request.sampling.min_tokens = 5;
    if (request.id % 3 == 1) request.sampling.end_token_ids = {static_cast<int32_t>(random() % vocab_size)};
    requests.push_back(std::move(request));
  }
  return requests;
}

// What all cells together have met, so that the test does not go blind.
struct Totals {
  uint64_t preemptions = 0, cached_tokens = 0;
};

void run(WorkerGroup& group, Scheduler* scheduler, std::deque<Request> arriving, const Cell& cell, Answers* answers) {
  std::mt19937_64 random(cell.order);
  StepPlan plan;
  std::vector<TokenEvent> events;
  for (int64_t now_ms = 0;; ++now_ms) {
    for (int n = static_cast<int>(random() % 8); n > 0 && !arriving.empty(); --n) {
      scheduler->add(std::move(arriving.front()), now_ms);
      arriving.pop_front();
    }
    const bool planned = scheduler->plan(now_ms, &plan);
    if (planned) group.submit(plan);
    if (!planned && scheduler->steps_in_flight() == 0) {
      if (arriving.empty() && scheduler->idle()) return;
      continue;
    }
    if (planned && scheduler->steps_in_flight() < cell.in_flight) continue;
    const absl::StatusOr<StepResult> result = group.collect();
    ASSERT_TRUE(result.ok()) << result.status();
    ASSERT_EQ(result->error, "");
    events.clear();
    scheduler->apply(*result, &events);
    for (TokenEvent& event : events) {
      Answer& answer = (*answers)[event.request];
      for (SampledToken scored : event.prompt_logprobs) {
        scored.slot = 0;
        answer.prompt_logprobs.push_back(std::move(scored));
      }
      if (event.token.has_value()) {
        answer.outputs[event.output_index].push_back({.chosen = *event.token, .top = std::move(event.top)});
      }
    }
  }
}

Answers run_cell(WorkerGroup& group, const std::vector<Request>& requests, const Cell& cell, Totals* totals) {
  std::vector<Request> shuffled = requests;
  std::mt19937_64 random(cell.order);
  std::shuffle(shuffled.begin(), shuffled.end(), random);
  Scheduler scheduler(cell.options);
  Answers answers;
  if (cell.warm) {
    std::deque<Request> earlier(shuffled.begin(), shuffled.end());
    for (Request& request : earlier) request.id += 1000;
    Answers ignored;
    run(group, &scheduler, std::move(earlier), cell, &ignored);
  }
  run(group, &scheduler, {shuffled.begin(), shuffled.end()}, cell, &answers);
  totals->preemptions += scheduler.counts().preemptions;
  totals->cached_tokens += scheduler.counts().cached_prompt_tokens;
  return answers;
}

// Blocks that the largest request needs alone.
int32_t blocks_of_largest(const std::vector<Request>& requests, const WorkerLimits& limits) {
  int32_t largest = 0;
  for (const Request& request : requests) {
    const auto positions = static_cast<int32_t>(request.prompt.size()) + *request.max_tokens;
    largest = std::max(largest, (positions + limits.block_tokens - 1) / limits.block_tokens);
  }
  return largest;
}

int32_t blocks_of_all(const std::vector<Request>& requests, const WorkerLimits& limits) {
  int32_t all = 0;
  for (const Request& request : requests) all += request.outputs * blocks_of_largest({request}, limits);
  return all;
}

Cell random_cell(const WorkerLimits& limits, const std::vector<Request>& requests, std::mt19937_64* random) {
  const auto one_of = [random](std::vector<int32_t> values) { return values[(*random)() % values.size()]; };
  Cell cell{.options = {.limits = limits}};
  cell.options.limits.slots = one_of({1, 2, 5, 16, limits.slots});
  cell.options.limits.blocks = one_of({blocks_of_largest(requests, limits), blocks_of_largest(requests, limits) + 5,
                                       blocks_of_all(requests, limits) / 4, kBlocks});
  cell.options.limits.max_step_tokens = one_of({5, 16, 63, 64, limits.max_step_tokens});
  const int32_t cache = one_of({0, 1, 2});
  cell.options.prefix_cache = cache > 0;
  cell.warm = cache == 2;
  cell.in_flight = one_of({1, 2});
  cell.order = (*random)();
  return cell;
}

class OneAnswerScheduling : public testing::Test {
 protected:
  OneAnswerScheduling()
      : model_{.format = RandomFormat::kFbgemm, .num_hidden_layers = 3},
        checkpoint_(*Checkpoint::open(write_random_model(model_))),
        requests_(all_kinds(model_.vocab_size)) {}

  // Each request alone, with room for everything.
  Answers alone(ThreadWorkerGroup& group) {
    Answers answers;
    Totals totals;
    for (const Request& request : requests_) {
      const Cell cell{.options = {.limits = group.plan().limits, .prefix_cache = false}};
      answers.merge(run_cell(group, {request}, cell, &totals));
    }
    return answers;
  }

  void expect_equal(const Answers& expected, const Answers& got, const std::string& what) {
    ASSERT_EQ(expected.size(), got.size()) << what;
    for (const auto& [id, answer] : expected) {
      ASSERT_EQ(answer.outputs.size(), static_cast<size_t>(requests_[id - 1].outputs));
      EXPECT_TRUE(answer == got.at(id)) << what << ": request " << id;
    }
  }

  RandomModel model_;
  Checkpoint checkpoint_;
  std::vector<Request> requests_;
};

TEST_F(OneAnswerScheduling, OverRandomCells) {
  const Answers expected = alone(*start(checkpoint_, 1, 1));
  const std::vector<std::pair<int, int>> ranks_and_threads = {{1, 1}, {1, 2}, {2, 1}, {3, 1}, {5, 1}, {8, 1}, {2, 2}};
  std::mt19937_64 random(17);
  Totals totals;
  int cells = 0;
  for (const auto& [ranks, threads] : ranks_and_threads) {
    auto group = start(checkpoint_, ranks, threads);
    for (int i = 0; i < (ranks == 1 ? 60 : ranks < 5 ? 25 : 12) && !HasFailure(); ++i, ++cells) {
      const Cell cell = random_cell(group->plan().limits, requests_, &random);
      expect_equal(expected, run_cell(*group, requests_, cell, &totals),
                   absl::StrCat(ranks, " ranks of ", threads, " threads, ", cell.name()));
    }
  }
  std::printf("%d cells of %zu requests, %llu preemptions, %llu cached prompt tokens, 0 differing bits\n", cells,
              requests_.size(), static_cast<unsigned long long>(totals.preemptions),
              static_cast<unsigned long long>(totals.cached_tokens));
  EXPECT_GE(cells, 200);
  EXPECT_GT(totals.preemptions, 200u);
  EXPECT_GT(totals.cached_tokens, 10'000u);
}

TEST_F(OneAnswerScheduling, WithTheCacheFourTimesOversubscribed) {
  auto group = start(checkpoint_, 2, 1);
  const Answers expected = alone(*group);
  Cell cell{.options = {.limits = group->plan().limits}, .in_flight = 2, .order = 1};
  cell.options.limits.blocks = blocks_of_all(requests_, cell.options.limits) / 4;
  for (const bool cache : {false, true}) {
    cell.options.prefix_cache = cache;
    Totals totals;
    expect_equal(expected, run_cell(*group, requests_, cell, &totals), cell.name());
    std::printf("%d of %d blocks, cache %s: every request ended with its own answer, %llu preemptions\n",
                cell.options.limits.blocks, 4 * cell.options.limits.blocks, cache ? "on" : "off",
                static_cast<unsigned long long>(totals.preemptions));
    EXPECT_GT(totals.preemptions, 0u);
  }
}

TEST_F(OneAnswerScheduling, NegativeControlSumsInRankOrderAreCaught) {
  const Answers expected = alone(*start(checkpoint_, 1, 1));
  auto wrong = start(checkpoint_, 3, 1, [](std::unique_ptr<Communicator> inner) {
    return std::make_unique<SumOverRanks>(std::move(inner));
  });
  EXPECT_FALSE(expected == alone(*wrong)) << "the contract's test is blind";
}

}  // namespace
}  // namespace octet
