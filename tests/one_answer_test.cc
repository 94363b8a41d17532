// The one-answer contract: a request's tokens and logprobs are bit-identical whatever else is in the batch, however its
// prompt is chunked, and on however many threads, ranks and nodes it runs.
#include <gtest/gtest.h>

#include <array>
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
  DType kv_dtype = DType::kBF16;

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
  options.memory = {
      .kv_memory_bytes = 64 << 20, .max_sequences = 16, .max_step_tokens = 256, .kv_dtype = cell.kv_dtype};
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

// A sampling that reads all there is of a sequence's history.
SlotSampling with_everything(uint64_t seed, int64_t vocab_size) {
  std::mt19937_64 random(seed);
  auto token = [&] { return static_cast<int32_t>(random() % vocab_size); };
  SlotSampling sampling{.repetition_penalty = 1.3f,
                        .presence_penalty = 0.4f,
                        .frequency_penalty = 0.3f,
                        .min_tokens = 4,
                        .temperature = seed % 3 == 0 ? 0.0f : 0.9f,
                        .top_k = 50,
                        .top_p = 0.95f,
                        .min_p = 0.01f,
                        .seed = seed,
                        .output_index = static_cast<uint32_t>(seed % 5),
                        .top_logprobs = 3};
  for (int i = 0; i < 8; ++i) {
    sampling.logit_bias.push_back({.token = token(), .bias = static_cast<float>(i) / 2.0f});
    sampling.bad_words.push_back({token()});
    sampling.end_token_ids.push_back(token());
  }
  return sampling;
}

// Pairs: a prompt, and one that begins as it does, up to the middle of a block, the end of one, or all of it. Most end
// shortly before a block does, so that blocks hold completions too.
std::vector<DrivenRequest> requests_with_common_prefixes(int64_t vocab_size) {
  std::mt19937_64 random(13);
  std::vector<DrivenRequest> requests;
  const int lengths[][3] = {{45, 7, 60}, {61, 32, 43}, {108, 108, 108}, {302, 270, 505}, {513, 512, 523}};
  for (const auto& [length, common, other_length] : lengths) {
    DrivenRequest first{.prompt = random_prompt(length, random, vocab_size), .max_tokens = 12};
    DrivenRequest second{.prompt = random_prompt(other_length, random, vocab_size), .max_tokens = 12};
    std::copy_n(first.prompt.begin(), common, second.prompt.begin());
    first.sampling = with_everything(random(), vocab_size);
    second.sampling = with_everything(random(), vocab_size);
    if (common % 2 == 0) {
      second.mask = [vocab_size](int32_t i) {
        return i % 3 == 0 ? std::vector<uint32_t>() : std::vector<uint32_t>((vocab_size + 31) / 32, 0xf0f0f0f0u << i);
      };
    }
    requests.push_back(first);
    requests.push_back(second);
  }
  return requests;
}

TEST_P(OneAnswer, OverSharedCopiedAndPreemptedBlocks) {
  const auto requests = requests_with_common_prefixes(model_.vocab_size);
  const auto expected = run_alone(*start(*checkpoint_, {}, activations()), requests);
  std::mt19937_64 random(7);
  for (const Cell& cell : std::vector<Cell>{
           {}, {.threads = 3}, {.ranks = 2, .threads = 2}, {.ranks = 5}, {.ranks = 8, .pretend_nodes = {3, 5}}}) {
    auto group = start(*checkpoint_, cell, activations());
    for (int round = 0; round < 3; ++round) {
      auto mixed = requests;
      for (size_t i = 0; i < mixed.size(); ++i) {
        const int chunks[] = {16, 23, 64, 1 << 20};
        mixed[i].chunk = chunks[random() % 4];
        if (i % 2 == 1 && round != 1) mixed[i].shares_with = static_cast<int32_t>(i - 1);
        // The first of a pair keeps its blocks until the second has begun.
        if (round != 0) mixed[i].preempted_after = static_cast<int32_t>(6 + random() % 5);
      }
      expect_equal(expected, drive(*group, group->plan().limits, mixed, random()),
                   cell.name() + ", round " + std::to_string(round));
    }
  }
}

TEST_P(OneAnswer, ScoresThePromptAsItSamples) {
  std::mt19937_64 random(17);
  std::vector<DrivenRequest> requests;
  for (const int length : {1, 2, 17, 100, 257}) {
    requests.push_back({.prompt = random_prompt(length, random, model_.vocab_size),
                        .max_tokens = 4,
                        .sampling = {.temperature = 0.8f, .seed = random(), .top_logprobs = 5}});
  }
  auto one = start(*checkpoint_, {}, activations());
  const auto unscored = run_alone(*one, requests);
  auto scoring = requests;
  for (DrivenRequest& request : scoring) request.score_top = 5;
  const auto expected = run_alone(*one, scoring);
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(expected[i].tokens, unscored[i].tokens) << "scoring changes nothing";
    // Each scored token as a sample after the same prefix would report it.
    const std::vector<int32_t>& prompt = requests[i].prompt;
    std::vector<int32_t> prefixes;
    for (int32_t prefix = 1; prefix < static_cast<int32_t>(prompt.size()); ++prefix) prefixes.push_back(prefix);
    const auto sampled = teacher_forced(*one, one->plan().limits, prompt, prefixes, 5);
    ASSERT_EQ(expected[i].scored.size(), prefixes.size());
    ASSERT_EQ(sampled.size(), prefixes.size());
    for (size_t j = 0; j < prefixes.size(); ++j) {
      EXPECT_EQ(expected[i].scored[j].top, sampled[j].top) << "after " << prefixes[j] << " tokens";
      EXPECT_EQ(expected[i].scored[j].chosen.token, prompt[prefixes[j]]);
      for (const TokenLogprob& other : sampled[j].top) {
        if (other.token == prompt[prefixes[j]]) {
          EXPECT_EQ(expected[i].scored[j].chosen, other);
        }
      }
    }
  }
  for (const Cell& cell : std::vector<Cell>{{.threads = 3}, {.ranks = 3, .threads = 2}, {.ranks = 8}}) {
    auto group = start(*checkpoint_, cell, activations());
    auto mixed = scoring;
    for (DrivenRequest& request : mixed) {
      const int chunks[] = {1, 5, 16, 100};
      request.chunk = chunks[random() % 4];
    }
    expect_equal(expected, drive(*group, group->plan().limits, mixed, random()), cell.name());
  }
}

TEST(OneAnswerOfAnFp8Cache, OverRanksThreadsBatchesAndChunks) {
  const RandomModel model;
  const Checkpoint checkpoint = *Checkpoint::open(write_random_model(model));
  const auto requests = requests_of_all_lengths(model.vocab_size);
  const auto exact = run_alone(*start(checkpoint, {}), requests);
  const auto expected = run_alone(*start(checkpoint, {.kv_dtype = DType::kF8E4M3}), requests);
  EXPECT_NE(exact, expected) << "codes change bits";
  std::mt19937_64 random(6);
  for (const Cell& cell :
       {Cell{.ranks = 3, .kv_dtype = DType::kF8E4M3}, Cell{.ranks = 2, .threads = 2, .kv_dtype = DType::kF8E4M3},
        Cell{.isa = Isa::kAvx2, .kv_dtype = DType::kF8E4M3}}) {
    if (!runs_here(cell.isa)) continue;
    auto group = start(checkpoint, cell);
    auto mixed = requests;
    for (DrivenRequest& request : mixed) request.chunk = std::array{16, 100, 255}[random() % 3];
    expect_equal(expected, drive(*group, group->plan().limits, mixed, random()), cell.name());
  }
}

// Random scales differ from layer to layer; a cache in BF16 does not look at them.
TEST(OneAnswerOfAnFp8Cache, UsesTheCheckpointsScalesOnAnyNumberOfRanks) {
  RandomModel model;
  const Checkpoint plain = *Checkpoint::open(write_random_model(model));
  model.cache_scale = 0.02f;
  const Checkpoint scaled = *Checkpoint::open(write_random_model(model));
  const auto requests = requests_of_all_lengths(model.vocab_size);
  const auto expected = run_alone(*start(scaled, {.kv_dtype = DType::kF8E4M3}), requests);
  EXPECT_NE(expected, run_alone(*start(plain, {.kv_dtype = DType::kF8E4M3}), requests));
  expect_equal(expected, run_alone(*start(scaled, {.ranks = 3, .kv_dtype = DType::kF8E4M3}), requests), "3 ranks");
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
