// The small checkpoint, a few layers of a real model (golden/make_small_checkpoint.py), gives to the bit what the CPU
// back end gave when the goldens were made: on the CPU, and on a GPU where OCTET_CUDA_MODULE names the module for it.
// It is looked for where OCTET_SMALL_CHECKPOINT says. With OCTET_REMAKE_GOLDENS the goldens are written instead.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "coordinator/batch/sha256.h"
#include "coordinator/thread_worker_group.h"
#include "kernels/cuda/open_module.h"
#include "tests/plan_driver.h"
#include "tests/surroundings.h"

namespace octet {
namespace {

using nlohmann::json;

const char* checkpoint_directory() { return std::getenv("OCTET_SMALL_CHECKPOINT"); }
const char* module_path() { return std::getenv("OCTET_CUDA_MODULE"); }
std::string golden_path() { return golden_directory() + "/small/cpu_answers.json"; }

std::string sha256_of_weights() {
  std::ifstream file(std::string(checkpoint_directory()) + "/model.safetensors", std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(file)), {});
  Sha256 sha;
  sha.add(bytes);
  return sha.hex();
}

// Greedy with prompt logprobs; seeded, and cut into pieces; penalised. The prompts are text in the checkpoint's
// tokenizer.
std::vector<DrivenRequest> requests() {
  std::ifstream file(golden_directory() + "/small/small.json");
  const json golden = json::parse(file);
  std::vector<std::vector<int32_t>> prompts;
  for (const json& prompt : golden["prompts"]) prompts.push_back(prompt["token_ids"]);
  const auto longest = *std::max_element(prompts.begin(), prompts.end(),
                                         [](const auto& a, const auto& b) { return a.size() < b.size(); });
  return {
      {.prompt = longest, .max_tokens = 24, .sampling = {.top_logprobs = 4}, .score_top = 2},
      {.prompt = prompts[3],
       .max_tokens = 48,
       .sampling = {.temperature = 0.9f, .top_p = 0.95f, .seed = 11, .top_logprobs = 1},
       .chunk = 3},
      {.prompt = prompts[4],
       .max_tokens = 32,
       .sampling = {.repetition_penalty = 1.2f, .frequency_penalty = 0.1f, .temperature = 0.7f, .top_k = 40, .seed = 5},
       .arrival_step = 2}};
}

// Pairs of token and logprob; a float survives JSON's doubles.
json pairs(const std::vector<SampledToken>& tokens) {
  json result = json::array();
  for (const SampledToken& token : tokens) {
    json entry = {{token.chosen.token, token.chosen.logprob}};
    for (const TokenLogprob& other : token.top) entry.push_back({other.token, other.logprob});
    result.push_back(entry);
  }
  return result;
}

json answers(int ranks, ActivationMode activations, const cuda::ModuleTable* module) {
  const auto checkpoint = Checkpoint::open(checkpoint_directory());
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  if (!checkpoint.ok()) return {};
  const auto group = ThreadWorkerGroup::start(
      *checkpoint, {.ranks = ranks,
                    .stream = {.threads = 1, .isa = best_isa(), .spin = false},
                    .cuda = module,
                    .activations = activations,
                    .memory = {.kv_memory_bytes = 16 << 20, .max_context = 512, .max_sequences = 4},
                    .available_bytes = int64_t{1} << 30});
  EXPECT_TRUE(group.ok()) << group.status();
  if (!group.ok()) return {};
  json result = json::array();
  for (const DrivenOutput& output : drive(**group, (*group)->plan().limits, requests())) {
    result.push_back({{"tokens", pairs(output.tokens)}, {"scored", pairs(output.scored)}});
  }
  return result;
}

class SmallCheckpoint : public testing::Test {
 protected:
  void SetUp() override {
    if (checkpoint_directory() == nullptr) {
      GTEST_SKIP() << "SKIPPED: OCTET_SMALL_CHECKPOINT is not set, the model was not fetched";
    }
    if (std::getenv("OCTET_REMAKE_GOLDENS") != nullptr) remake();
    std::ifstream file(golden_path());
    ASSERT_TRUE(file) << golden_path();
    golden_ = json::parse(file);
    ASSERT_EQ(sha256_of_weights(), golden_["weights_sha256"])
        << "the goldens are of another checkpoint: make both again (tests/golden/README.md)";
  }

  void expect_golden_answers(const cuda::ModuleTable* module) const {
    for (const int ranks : {1, 2, 3}) {
      for (const auto& [name, activations] : kModes) {
        const json actual = answers(ranks, activations, module);
        ASSERT_EQ(actual.size(), golden_[name].size());
        for (size_t i = 0; i < actual.size(); ++i) {
          EXPECT_EQ(actual[i], golden_[name][i]) << name << ", " << ranks << " ranks, request " << i;
        }
      }
    }
  }

 private:
  static void remake() {
    json golden = {{"weights_sha256", sha256_of_weights()}};
    for (const auto& [name, activations] : kModes) golden[name] = answers(1, activations, nullptr);
    std::ofstream(golden_path()) << golden.dump() << "\n";
  }

  static inline const std::vector<std::pair<std::string, ActivationMode>> kModes = {{"w8a16", ActivationMode::kBF16},
                                                                                    {"w8a8", ActivationMode::kFP8}};
  json golden_;
};

TEST_F(SmallCheckpoint, AnswersOnTheCpuAsItEverDid) {
  if (best_isa() == Isa::kPortable)
    GTEST_SKIP() << "SKIPPED: the goldens are the vector kernels', and this CPU has neither AVX2 nor AVX-512";
  expect_golden_answers(nullptr);
}

TEST_F(SmallCheckpoint, AnswersOnAGpuAsOnTheCpu) {
  if (module_path() == nullptr) GTEST_SKIP() << "SKIPPED: OCTET_CUDA_MODULE is not set";
  const auto module = cuda::open_module(module_path());
  ASSERT_TRUE(module.ok()) << module.status();
  ASSERT_TRUE(cuda::check_device(**module, 0).ok()) << cuda::check_device(**module, 0);
  expect_golden_answers(*module);
}

}  // namespace
}  // namespace octet
