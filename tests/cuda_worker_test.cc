// Whole steps of a model on the CUDA module, emulated or the one that OCTET_CUDA_MODULE names: the tokens and logprobs
// of the CPU back end, to the bit, on one rank and on ranks that meet in the host's memory.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "coordinator/thread_worker_group.h"
#include "kernels/cuda/open_module.h"
#include "tests/plan_driver.h"
#include "tests/random_model.h"
#include "tests/surroundings.h"

namespace octet {
namespace {

std::vector<DrivenOutput> outputs_of(const Checkpoint& checkpoint, int ranks, ActivationMode activations,
                                     const cuda::ModuleTable* module, Arithmetic arithmetic = Arithmetic::kReproducible,
                                     bool record_steps = false) {
  const auto group = ThreadWorkerGroup::start(checkpoint, {.ranks = ranks,
                                                           .stream = {.threads = 1, .isa = best_isa(), .spin = false},
                                                           .cuda = module,
                                                           .record_steps = record_steps,
                                                           .activations = activations,
                                                           .memory = {.kv_memory_bytes = 1 << 20,
                                                                      .max_context = 64,
                                                                      .max_sequences = 4,
                                                                      .max_step_tokens = 24,
                                                                      .arithmetic = arithmetic},
                                                           .available_bytes = int64_t{1} << 30});
  EXPECT_TRUE(group.ok()) << group.status();
  if (!group.ok()) return {};
  const std::vector<DrivenRequest> requests = {
      {.prompt = {1, 17, 9, 4, 4, 8, 30, 2, 5, 6, 7, 11, 12, 13, 14, 15, 16, 3, 2, 1, 9},
       .max_tokens = 3,
       .sampling = {.top_logprobs = 3},
       .chunk = 9},
      {.prompt = {5, 3}, .max_tokens = 4, .sampling = {.temperature = 0.8f, .seed = 7}, .score_top = 1},
      {.prompt = {2, 2, 2, 40},  // whose choices are the host's
       .max_tokens = 5,
       .sampling = {.presence_penalty = 0.5f, .temperature = 1.2f, .top_p = 0.9f, .seed = 9},
       .arrival_step = 2},
      {.prompt = {9}, .max_tokens = 7, .arrival_step = 1}};
  return drive(**group, (*group)->plan().limits, requests);
}

class CudaWorker : public testing::TestWithParam<ActivationMode> {};

TEST_P(CudaWorker, AnswersAsTheCpuDoesOnAnyNumberOfRanks) {
  const auto module = cuda::open_module(cuda_module_under_test());
  ASSERT_TRUE(module.ok()) << module.status();
  const std::string directory = write_random_model({.hidden_size = 48, .intermediate_size = 76});
  const auto checkpoint = Checkpoint::open(directory);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const std::vector<DrivenOutput> expected = outputs_of(*checkpoint, 1, GetParam(), nullptr);
  for (const int ranks : {1, 2, 3}) {
    const std::vector<DrivenOutput> actual = outputs_of(*checkpoint, ranks, GetParam(), *module);
    ASSERT_EQ(actual.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(difference(actual[i], expected[i]), "") << ranks << " ranks, request " << i;
    }
  }
}

// Other sums, so other bits, but the same model: the first token's distribution is near the reproducible one.
TEST_P(CudaWorker, AnswersNearlyTheSameInFastArithmetic) {
  const auto module = cuda::open_module(cuda_module_under_test());
  ASSERT_TRUE(module.ok()) << module.status();
  const std::string directory = write_random_model({.hidden_size = 48, .intermediate_size = 76});
  const auto checkpoint = Checkpoint::open(directory);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const std::vector<DrivenOutput> expected = outputs_of(*checkpoint, 1, GetParam(), nullptr);
  for (const int ranks : {1, 2, 3}) {
    const auto actual = outputs_of(*checkpoint, ranks, GetParam(), *module, Arithmetic::kFast);
    ASSERT_EQ(actual.size(), expected.size());
    const auto &here = actual[0].tokens[0].top, &there = expected[0].tokens[0].top;
    ASSERT_EQ(here.size(), there.size());
    // A tenth: FP8 inputs that are scaled by rank instead of by slice differ by up to 2^-4 of each value.
    for (size_t i = 0; i < here.size(); ++i) EXPECT_NEAR(here[i].logprob, there[i].logprob, 0.1) << ranks << " ranks";
  }
}

TEST_P(CudaWorker, RecordedStepsHaveTheBitsOfOthers) {
  const auto module = cuda::open_module(cuda_module_under_test());
  ASSERT_TRUE(module.ok()) << module.status();
  const auto checkpoint = Checkpoint::open(write_random_model({.hidden_size = 48, .intermediate_size = 76}));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const std::vector<DrivenOutput> expected = outputs_of(*checkpoint, 1, GetParam(), *module);
  const std::vector<DrivenOutput> actual =
      outputs_of(*checkpoint, 1, GetParam(), *module, Arithmetic::kReproducible, true);
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_EQ(difference(actual[i], expected[i]), "") << "request " << i;
}

INSTANTIATE_TEST_SUITE_P(BothActivations, CudaWorker, testing::Values(ActivationMode::kBF16, ActivationMode::kFP8),
                         [](const auto& parameter) {
                           return parameter.param == ActivationMode::kFP8 ? "W8A8" : "W8A16";
                         });

}  // namespace
}  // namespace octet
