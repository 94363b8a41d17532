// The one-answer contract: a request's tokens and logprobs are bit-identical whatever else is in the batch, however its
// prompt is chunked, and on however many threads, ranks and nodes it runs.
#include <gtest/gtest.h>

#include <memory>
#include <random>

#include "absl/strings/str_join.h"
#include "coordinator/thread_worker_group.h"
#include "tests/plan_driver.h"
#include "tests/random_model.h"
#include "tests/sum_over_ranks.h"

namespace octet {
namespace {

// How a group runs.
struct Cell {
  int ranks = 1;
  std::vector<int> pretend_nodes;
  int threads = 1;
  Isa isa = best_isa();

  std::string name() const {
    return std::to_string(ranks) + " ranks, nodes " + absl::StrJoin(pretend_nodes, "+") + ", " +
           std::to_string(threads) + " threads, " + name_of(isa);
  }
};

std::unique_ptr<ThreadWorkerGroup> start(const Checkpoint& checkpoint, const Cell& cell,
                                         ActivationMode activations = ActivationMode::kBF16,
                                         decltype(ThreadGroupOptions::wrap_communicator) wrap = {}) {
  ThreadGroupOptions options;
  options.ranks = cell.ranks;
  options.pretend_nodes = cell.pretend_nodes;
  options.stream = {.threads = cell.threads, .isa = cell.isa, .spin = false};
  options.activations = activations;
  options.wrap_communicator = std::move(wrap);
  options.memory = {.kv_memory_bytes = 64 << 20, .max_sequences = 16, .max_step_tokens = 256};
  options.available_bytes = int64_t{4} << 30;
  auto group = ThreadWorkerGroup::start(checkpoint, options);
  EXPECT_TRUE(group.ok()) << group.status();
  return std::move(*group);
}

std::vector<int32_t> random_prompt(int length, std::mt19937_64& random, int64_t vocab_size) {
  std::vector<int32_t> prompt(length);
  for (int32_t& token : prompt) token = static_cast<int32_t>(random() % vocab_size);
  return prompt;
}

// Prompts of 1 to 2,000 tokens; greedy and sampled.
std::vector<DrivenRequest> requests_of_all_lengths(int64_t vocab_size) {
  std::mt19937_64 random(11);
  std::vector<DrivenRequest> requests;
  for (int length : {1, 2, 15, 16, 17, 100, 255, 256, 257, 600, 2000}) {
    DrivenRequest request{.prompt = random_prompt(length, random, vocab_size), .max_tokens = 6};
    request.sampling.top_logprobs = 3;
    if (length % 2 == 0) {
      request.sampling.temperature = 0.8f;
      request.sampling.top_p = 0.95f;
      request.sampling.seed = random();
    }
    requests.push_back(request);
  }
  return requests;
}

// Each request alone, whole prompt at once where the step takes it.
std::vector<DrivenOutput> run_alone(ThreadWorkerGroup& group, const std::vector<DrivenRequest>& requests) {
  std::vector<DrivenOutput> outputs;
  for (const DrivenRequest& request : requests) outputs.push_back(drive(group, group.plan().limits, {request})[0]);
  return outputs;
}

void expect_equal(const std::vector<DrivenOutput>& expected, const std::vector<DrivenOutput>& got,
                  const std::string& what) {
  ASSERT_EQ(expected.size(), got.size());
  for (size_t i = 0; i < expected.size(); ++i)
    EXPECT_EQ(difference(expected[i], got[i]), "") << what << ", request " << i;
}

class OneAnswer : public testing::TestWithParam<RandomFormat> {
 protected:
  OneAnswer() : model_{.format = GetParam()}, checkpoint_(Checkpoint::open(write_random_model(model_))) {
    EXPECT_TRUE(checkpoint_.ok()) << checkpoint_.status();
  }
  ActivationMode activations() const {
    return GetParam() == RandomFormat::kBF16 ? ActivationMode::kBF16 : ActivationMode::kFP8;
  }
  RandomModel model_;
  absl::StatusOr<Checkpoint> checkpoint_;
};

TEST_P(OneAnswer, OverRanksNodesAndThreads) {
  const auto requests = requests_of_all_lengths(model_.vocab_size);
  const auto expected = run_alone(*start(*checkpoint_, {}, activations()), requests);
  for (const Cell& cell : std::vector<Cell>{{.ranks = 2},
                                            {.ranks = 3},
                                            {.ranks = 5},
                                            {.ranks = 8},
                                            {.ranks = 8, .pretend_nodes = {3, 5}},
                                            {.ranks = 8, .pretend_nodes = {3, 3, 2}},
                                            {.ranks = 3, .pretend_nodes = {2, 1}},
                                            {.threads = 3},
                                            {.ranks = 2, .threads = 2}}) {
    expect_equal(expected, run_alone(*start(*checkpoint_, cell, activations()), requests), cell.name());
  }
}

TEST_P(OneAnswer, OverInstructionFamilies) {
  const auto requests = requests_of_all_lengths(model_.vocab_size);
  const auto expected = run_alone(*start(*checkpoint_, {}, activations()), requests);
  for (Isa isa : {Isa::kAvx2, Isa::kAvx512}) {
    if (!runs_here(isa)) continue;
    const Cell cell{.ranks = 2, .isa = isa};
    expect_equal(expected, run_alone(*start(*checkpoint_, cell, activations()), requests), cell.name());
  }
}

TEST_P(OneAnswer, OverBatchesChunksAndBlocks) {
  const auto requests = requests_of_all_lengths(model_.vocab_size);
  auto group = start(*checkpoint_, {.ranks = 2}, activations());
  const auto expected = run_alone(*group, requests);
  std::mt19937_64 random(5);
  for (int round = 0; round < 20; ++round) {
    auto mixed = requests;
    const int chunks[] = {1, 7, 16, 64, 255, 1 << 20};
    for (DrivenRequest& request : mixed) {
      // One token at a time is slow for the long ones.
      do request.chunk = chunks[random() % 6];
      while (request.chunk * 100 < static_cast<int>(request.prompt.size()));
      request.arrival_step = static_cast<int>(random() % 12);
    }
    expect_equal(expected, drive(*group, group->plan().limits, mixed, random()), "round " + std::to_string(round));
  }
}

TEST(OneAnswerNegativeControl, SumsInRankOrderAreCaught) {
  const RandomModel model;
  const Checkpoint checkpoint = *Checkpoint::open(write_random_model(model));
  const auto requests = requests_of_all_lengths(model.vocab_size);
  const auto expected = run_alone(*start(checkpoint, {}), requests);
  auto wrong = start(checkpoint, {.ranks = 3}, ActivationMode::kBF16, [](std::unique_ptr<Communicator> inner) {
    return std::make_unique<SumOverRanks>(std::move(inner));
  });
  const auto got = run_alone(*wrong, requests);
  int differing = 0;
  for (size_t i = 0; i < expected.size(); ++i) differing += expected[i] != got[i];
  EXPECT_GT(differing, 0) << "the contract's test is blind";
}

std::string format_name(const testing::TestParamInfo<RandomFormat>& info) {
  const char* names[] = {"BF16", "Fbgemm", "DynamicTokens", "StaticTensor"};
  return names[static_cast<int>(info.param)];
}

INSTANTIATE_TEST_SUITE_P(Formats, OneAnswer,
                         testing::Values(RandomFormat::kBF16, RandomFormat::kFbgemm, RandomFormat::kDynamicTokens,
                                         RandomFormat::kStaticTensor),
                         format_name);

}  // namespace
}  // namespace octet
