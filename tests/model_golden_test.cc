// The engine against references that we did not write: log-probabilities as far from float32 as transformers' own
// bfloat16 run or nearer, in every checkpoint format, and the same greedy tokens wherever the reference is sure of
// them. What the goldens mean: golden/README.md. On the CPU, or where OCTET_CUDA_MODULE names the module for it on a
// GPU.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "coordinator/thread_worker_group.h"
#include "kernels/cuda/open_module.h"
#include "tests/plan_driver.h"
#include "tests/surroundings.h"
#include "worker/checkpoint/converter.h"

namespace octet {
namespace {

using nlohmann::json;

// The pass mark: this many times transformers' own bfloat16 differences.
constexpr double kAllowed = 1.5;

json read_golden(const std::string& name) {
  std::ifstream file(golden_directory() + "/" + name);
  EXPECT_TRUE(file) << name;
  return json::parse(file);
}

struct Difference {
  double sum = 0, max = 0;
  int64_t count = 0;
  void add(double difference) {
    sum += std::abs(difference);
    max = std::max(max, std::abs(difference));
    ++count;
  }
  double mean() const { return sum / static_cast<double>(std::max<int64_t>(count, 1)); }
};

struct Comparison {
  Difference from_reference, from_rounded;
  int sure = 0, sure_and_different = 0;  // greedy tokens
};

// NaN when it is not among our 64 best, which no token of the reference's 8 best may be.
double logprob_of(const SampledToken& token, int32_t id) {
  const auto found =
      std::find_if(token.top.begin(), token.top.end(), [id](const TokenLogprob& t) { return t.token == id; });
  return found == token.top.end() ? std::nan("") : found->logprob;
}

// Null without a GPU to be tested.
const cuda::ModuleTable* module_of_gpu() {
  const char* const path = std::getenv("OCTET_CUDA_MODULE");
  if (path == nullptr) return nullptr;
  const auto module = cuda::open_module(path);
  EXPECT_TRUE(module.ok()) << module.status();
  return module.ok() ? *module : nullptr;
}

// On a GPU also the arithmetic that it serves with by default.
std::vector<Arithmetic> arithmetics() {
  if (std::getenv("OCTET_CUDA_MODULE") == nullptr) return {Arithmetic::kReproducible};
  return {Arithmetic::kReproducible, Arithmetic::kFast};
}

Comparison compare(const std::string& model, const json& golden, Arithmetic arithmetic) {
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(model);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  ThreadGroupOptions options;
  options.ranks = 2;
  options.stream.spin = false;
  options.cuda = module_of_gpu();
  options.activations = golden["activations"] == "fp8" ? ActivationMode::kFP8 : ActivationMode::kBF16;
  options.memory = {.kv_memory_bytes = 64 << 20, .arithmetic = arithmetic};
  options.available_bytes = int64_t{2} << 30;
  auto group = ThreadWorkerGroup::start(*checkpoint, options);
  EXPECT_TRUE(group.ok()) << group.status();

  Comparison result;
  const double unsure = 2 * kAllowed * golden["bounds"]["transformers_bfloat16"]["points"]["max"].get<double>();
  for (const json& prompt : golden["prompts"]) {
    std::vector<int32_t> sequence = prompt["token_ids"], prefixes;
    for (int32_t token : prompt["continuation"]) sequence.push_back(token);
    for (const json& point : prompt["points"]) prefixes.push_back(point["prefix"]);
    const auto tokens = teacher_forced(**group, (*group)->plan().limits, sequence, prefixes, 64);
    EXPECT_EQ(tokens.size(), prefixes.size());
    for (size_t i = 0; i < tokens.size(); ++i) {
      const json& point = prompt["points"][i];
      for (size_t j = 0; j < point["top"].size(); ++j) {
        const double ours = logprob_of(tokens[i], point["top"][j][0]);
        result.from_reference.add(ours - point["top"][j][1].get<double>());
        if (point.contains("rounded")) result.from_rounded.add(ours - point["rounded"][j].get<double>());
      }
      if (point["margin"].get<double>() <= unsure) continue;
      ++result.sure;
      result.sure_and_different += tokens[i].chosen.token != point["top"][0][0].get<int32_t>();
    }
  }
  return result;
}

void expect_within_bounds(const Comparison& comparison, const json& golden) {
  const json& bound = golden["bounds"]["transformers_bfloat16"]["points"];
  std::printf(
      "%-34s %-5s |dlogprob| mean %.5f (bfloat16 %.5f) max %.4f (bfloat16 %.4f), %lld values; greedy %d/%d sure ones\n",
      golden["variant"].get<std::string>().c_str(), golden["activations"] == "fp8" ? "W8A8" : "W8A16",
      comparison.from_reference.mean(), bound["mean"].get<double>(), comparison.from_reference.max,
      bound["max"].get<double>(), static_cast<long long>(comparison.from_reference.count),
      comparison.sure - comparison.sure_and_different, comparison.sure);
  EXPECT_LE(comparison.from_reference.mean(), kAllowed * bound["mean"].get<double>());
  EXPECT_LE(comparison.from_reference.max, kAllowed * bound["max"].get<double>());
  EXPECT_EQ(comparison.sure_and_different, 0);
}

// The sharper reference has our rounding points: nearer to it than half of what any known mistake would move us.
void expect_near_same_rounding(const Comparison& comparison, const json& golden) {
  double nearest_mistake = golden["bounds"]["from_rounded"]["float32_reference"]["mean"];
  for (const auto& [name, bound] : golden["bounds"]["from_rounded"].items()) {
    if (name.starts_with("wrong")) nearest_mistake = std::min(nearest_mistake, bound["mean"].get<double>());
  }
  std::printf("%-34s       from the same rounding points: mean %.5f; the nearest known mistake is %.5f away\n", "",
              comparison.from_rounded.mean(), nearest_mistake);
  EXPECT_LE(comparison.from_rounded.mean(), nearest_mistake / 2);
}

class RandomCheckpoint : public testing::TestWithParam<std::string> {};

TEST_P(RandomCheckpoint, IsAsNearFloat32AsTransformersInBfloat16) {
  const json golden = read_golden("random_goldens/" + GetParam() + ".json");
  const std::string model = golden_directory() + "/random/" + golden["model"].get<std::string>();
  for (const Arithmetic arithmetic : arithmetics()) {
    const Comparison comparison = compare(model, golden, arithmetic);
    expect_within_bounds(comparison, golden);
    if (arithmetic == Arithmetic::kReproducible) expect_near_same_rounding(comparison, golden);
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, RandomCheckpoint,
                         testing::Values("bf16", "f16_head_dim_absent", "f32_rope_parameters", "fbgemm_fp8",
                                         "fbgemm_fp8_w8a8", "compressed_tensors_dynamic",
                                         "compressed_tensors_dynamic_w8a8", "compressed_tensors_static",
                                         "compressed_tensors_static_w8a8", "compressed_tensors_weight_only",
                                         "modelopt_fp8", "modelopt_fp8_w8a8"),
                         [](const auto& info) { return info.param; });

// A few layers of SmolLM2, where its numbers travel to other machines.
class SmallCheckpoint : public testing::TestWithParam<std::string> {};

TEST_P(SmallCheckpoint, IsAsNearFloat32AsTransformersInBfloat16) {
  const char* const model = std::getenv("OCTET_SMALL_CHECKPOINT");
  if (model == nullptr) GTEST_SKIP() << "SKIPPED: OCTET_SMALL_CHECKPOINT is not set, the model was not fetched";
  const json golden = read_golden("small/" + GetParam() + ".json");
  for (const Arithmetic arithmetic : arithmetics()) expect_within_bounds(compare(model, golden, arithmetic), golden);
}

INSTANTIATE_TEST_SUITE_P(Activations, SmallCheckpoint, testing::Values("small", "small_w8a8"),
                         [](const auto& info) { return info.param; });

// The goldens read the GGUF file by themselves; ours goes through our converter. Each must store the same weights.
class SmolLM2 : public testing::TestWithParam<std::string> {};

TEST_P(SmolLM2, IsAsNearFloat32AsTransformersInBfloat16) {
  const char* gguf = std::getenv("OCTET_SMOLLM2_GGUF");
  if (gguf == nullptr) GTEST_SKIP() << "SKIPPED: OCTET_SMOLLM2_GGUF is not set, the model was not fetched";
  const json golden = read_golden("smollm2/" + GetParam() + ".json");
  const std::string recipe = GetParam().substr(0, GetParam().find('_'));
  const std::string model = testing::TempDir() + "octet_golden_" + std::to_string(getpid()) + "_" + GetParam();
  const absl::Status status = convert({.source = gguf, .destination = model, .recipe = *fp8_recipe_named(recipe)});
  ASSERT_TRUE(status.ok()) << status;
  for (const Arithmetic arithmetic : arithmetics()) expect_within_bounds(compare(model, golden, arithmetic), golden);
  std::filesystem::remove_all(model);
}

INSTANTIATE_TEST_SUITE_P(Recipes, SmolLM2, testing::Values("none", "ffn", "all", "ffn_w8a8", "all_w8a8"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace octet
