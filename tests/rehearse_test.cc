// octet rehearse: shards of every recipe and cut run their steps, the figures add up to what the plan says, and what
// cannot be is refused with a remedy. How fast it is, is for people to look at.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/cuda/open_module.h"
#include "launch/capacity.h"
#include "launch/rehearsal_report.h"
#include "tests/process.h"
#include "worker/kv_cache.h"
#include "worker/model/known_models.h"

namespace octet {
namespace {

using nlohmann::json;

// Every range is a multiple of 64 bytes, so that sums of tensors and of their places agree.
ModelConfig tiny_config() {
  return {.vocab_size = 512,
          .hidden_size = 256,
          .intermediate_size = 512,
          .num_hidden_layers = 4,
          .num_attention_heads = 16,
          .num_key_value_heads = 8,
          .head_dim = 16,
          .max_position_embeddings = 256};
}

RehearsalOptions tiny_rehearsal(const char* recipe, int rank, int ranks) {
  return {.formats = weight_formats(tiny_config(), *plan_recipe_named(recipe)),
          .activations = activation_scheme(*plan_recipe_named(recipe)),
          .rank = rank,
          .ranks = ranks,
          .host = {.threads = 1, .isa = best_isa(), .spin = false},
          .batches = {1, 3},
          .context = 20,
          .prefills = {40},
          .rounds = 2};
}

void expect_whole(const StepMeasurement& step) {
  EXPECT_GT(step.least_seconds, 0);
  EXPECT_LE(step.least_seconds, step.seconds);
  EXPECT_LE(step.seconds, step.most_seconds);
  EXPECT_GT(step.read_bytes_per_second, 0);
  double sum = 0;
  for (const double seconds : step.part_seconds) {
    EXPECT_GT(seconds, 0) << "every part of a step is met";
    sum += seconds;
  }
  EXPECT_DOUBLE_EQ(sum, step.probed_seconds);
}

TEST(Rehearsal, RunsEveryRecipeOnAnyRankOfAnyNumber) {
  for (const char* recipe : {"bf16", "fbgemm", "all-linear"}) {
    for (const auto& [rank, ranks] : std::vector<std::pair<int, int>>{{0, 1}, {0, 3}, {2, 3}, {7, 8}}) {
      SCOPED_TRACE(absl::StrCat(recipe, ", rank ", rank, " of ", ranks));
      const RehearsalOptions options = tiny_rehearsal(recipe, rank, ranks);
      const auto bytes = Rehearsal::plan(options);
      ASSERT_TRUE(bytes.ok()) << bytes.status();
      Rehearsal rehearsal({}, options, {});
      int64_t done = 0, all = 0;
      const auto steps = rehearsal.run([&](int64_t steps_done, int64_t total) { done = steps_done, all = total; });
      ASSERT_TRUE(steps.ok()) << steps.status();
      EXPECT_EQ(done, all);
      ASSERT_EQ(steps->size(), 3u);
      for (const StepMeasurement& step : *steps) {
        expect_whole(step);
        EXPECT_EQ(step.work.total().weight_bytes, bytes->weights.total() - bytes->weights.embedding);
        EXPECT_GT(step.of_peak, 0);
      }
      EXPECT_TRUE(steps->back().prefill);
    }
  }
}

TEST(Rehearsal, CountsTheWorkOfAStep) {
  const RehearsalOptions options = tiny_rehearsal("fbgemm", 0, 8);
  Rehearsal rehearsal({}, options, {});
  const auto steps = rehearsal.run([](int64_t, int64_t) {});
  ASSERT_TRUE(steps.ok()) << steps.status();
  const StepWork& decode = (*steps)[1].work;  // 3 sequences
  EXPECT_EQ(decode[StepPart::kAttention].kv_bytes, 3 * 20 * 4 * 2 * 16 * 2) << "sequences, context, layers, K and V";
  EXPECT_EQ(decode[StepPart::kQkv].bf16_flops, 2.0 * 3 * 4 * 256 * (32 + 16 + 16));
  EXPECT_EQ(decode[StepPart::kGateUp].fp8_flops, 2.0 * 3 * 2 * 256 * (64 + 64)) << "of the two layers in the middle";
  EXPECT_EQ(decode[StepPart::kGateUp].bf16_flops, decode[StepPart::kGateUp].fp8_flops);
  EXPECT_EQ(decode[StepPart::kLogits].bf16_flops, 2.0 * 3 * 256 * 64);
  const StepWork& prefill = (*steps)[2].work;
  EXPECT_EQ(prefill[StepPart::kLogits].bf16_flops, 2.0 * 256 * 64) << "of the last token only";
  EXPECT_EQ(prefill[StepPart::kAttention].bf16_flops, 4.0 * 4 * 2 * 16 * (40 * 41 / 2));
}

#ifdef OCTET_EMULATED_CUDA
TEST(Rehearsal, RunsOnTheCudaModule) {
  const auto module = cuda::open_module(OCTET_EMULATED_CUDA);
  ASSERT_TRUE(module.ok()) << module.status();
  RehearsalOptions options = tiny_rehearsal("all-linear", 1, 3);
  options.formats.config.num_hidden_layers = 1;
  options.device = Device::kCuda;
  options.batches = {2};
  options.context = 6;
  options.prefills = {};
  options.rounds = 1;
  for (const Arithmetic arithmetic : {Arithmetic::kReproducible, Arithmetic::kFast}) {
    options.arithmetic = arithmetic;
    Rehearsal rehearsal({.module = *module, .gpu = (*module)->device_facts(0)}, options, {});
    const auto steps = rehearsal.run([](int64_t, int64_t) {});
    ASSERT_TRUE(steps.ok()) << steps.status();
    expect_whole(steps->front());
    EXPECT_EQ(steps->front().of_peak, 0) << "nobody knows the peak of this device";
  }
}
#endif

TEST(Rehearsal, PredictsByItsFormula) {
  StepMeasurement step{.load = {.sequences = 4, .new_tokens = 1, .context = 9}, .seconds = 0.5};
  RehearsalReport report{.ranks = 8,
                         .layers = 10,
                         .all_reduce = {.points = {{0, 1e-3}, {16384, 3e-3}}, .bytes_per_second = 1e9},
                         .hidden_size = 1024};
  EXPECT_DOUBLE_EQ(report.all_reduce_seconds(step), 2e-3) << "of 8 KiB";
  EXPECT_DOUBLE_EQ(report.predicted_seconds(step), 0.5 + 2 * 10 * 2e-3);
  report.ranks = 1;
  EXPECT_DOUBLE_EQ(report.predicted_seconds(step), 0.5);
}

TEST(Datasheet, IsFoundByTheDriversNameOfThatVeryCard) {
  const auto name = [](const std::string& device) {
    const GpuSpec* const gpu = datasheet_of(device);
    return gpu == nullptr ? "" : gpu->name;
  };
  EXPECT_EQ(name("NVIDIA H100 80GB HBM3"), "H100-80GB");
  EXPECT_EQ(name("NVIDIA H200"), "H200-141GB");
  EXPECT_EQ(name("NVIDIA A100-SXM4-40GB"), "A100-40GB");
  EXPECT_EQ(name("NVIDIA A100-SXM4-80GB"), "A100-80GB");
  EXPECT_EQ(name("NVIDIA L40S"), "L40S-48GB");
  for (const char* other : {"NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-PCIE-40GB", "NVIDIA GH200 480GB",
                            "NVIDIA H100 64GB HBM2", "NVIDIA L4", ""}) {
    EXPECT_EQ(name(other), "") << other;
  }
}

// ---- The command

std::string temporary(const std::string& name) { return testing::TempDir() + "/rehearse_" + name; }

std::string write_tiny_config() {
  const ModelConfig config = tiny_config();
  const std::string path = temporary("config.json");
  std::ofstream(path) << json{{"architectures", {"LlamaForCausalLM"}},
                              {"model_type", "llama"},
                              {"hidden_act", "silu"},
                              {"vocab_size", config.vocab_size},
                              {"hidden_size", config.hidden_size},
                              {"intermediate_size", config.intermediate_size},
                              {"num_hidden_layers", config.num_hidden_layers},
                              {"num_attention_heads", config.num_attention_heads},
                              {"num_key_value_heads", config.num_key_value_heads},
                              {"head_dim", config.head_dim},
                              {"max_position_embeddings", config.max_position_embeddings},
                              {"rms_norm_eps", 1e-5},
                              {"rope_theta", 10000.0}};
  return path;
}

Finished run_rehearse(const std::string& model, const std::vector<std::string>& more) {
  std::vector<std::string> argv = {OCTET_BINARY, "rehearse", "--model-config", model, "--threads", "1"};
  argv.insert(argv.end(), more.begin(), more.end());
  return run_command(argv);
}

json read_json(const std::string& path) {
  std::ifstream file(path);
  return json::parse(file, nullptr, false);
}

TEST(Rehearse, TellsPeopleAndMachinesTheSame) {
  const std::string out = temporary("report.json"), picture = temporary("report.svg");
  const Finished run = run_rehearse(
      write_tiny_config(), {"--recipe",       "fbgemm", "--activations", "fp8", "--ranks",   "3",    "--rank",   "1",
                            "--batch",        "1,2",    "--context",     "32",  "--prefill", "24",   "--rounds", "3",
                            "--allreduce-us", "100",    "--json",        out,   "--svg",     picture});
  ASSERT_EQ(run.status, 0) << run.err;
  const json report = read_json(out);
  ASSERT_TRUE(report.is_object());
  EXPECT_EQ(report.at("rank"), 1);
  ASSERT_EQ(report.at("steps").size(), 3u);
  for (const json& step : report.at("steps")) {
    double seconds = 0, weight_bytes = 0;
    for (const json& part : step.at("parts")) {
      seconds += part.at("seconds").get<double>();
      weight_bytes += part.at("weight_bytes").get<double>();
      EXPECT_TRUE(absl::StrContains(run.out, part.at("part").get<std::string>()));
    }
    EXPECT_NEAR(seconds, step.at("probed_seconds").get<double>(), 1e-9);
    EXPECT_EQ(weight_bytes, step.at("weight_bytes").get<double>());
    EXPECT_EQ(weight_bytes,
              report.at("bytes").at("weights").get<double>() - report.at("bytes").at("embedding").get<double>());
    EXPECT_NEAR(step.at("predicted").at("seconds").get<double>(), step.at("seconds").get<double>() + 2 * 4 * 100e-6,
                1e-9);
  }
  EXPECT_TRUE(absl::StrContains(run.out, "predicted: step on all ranks = step of this rank + 2 x layers x all-reduce"));
  EXPECT_TRUE(absl::StrContains(run.out, "--allreduce-us"));
  std::ifstream svg(picture);
  const std::string drawn{std::istreambuf_iterator<char>(svg), {}};
  EXPECT_TRUE(absl::StartsWith(drawn, "<svg")) << drawn.substr(0, 80);
  EXPECT_TRUE(absl::EndsWith(drawn, "</svg>\n"));
}

TEST(Rehearse, TakesThePresetsByLayers) {
  const std::string out = temporary("preset.json");
  const Finished run =
      run_rehearse("llama-3.1-8b", {"--recipe", "all-linear", "--layers", "1", "--batch", "1", "--context", "16",
                                    "--prefill", "0", "--rounds", "1", "--json", out});
  ASSERT_EQ(run.status, 0) << run.err;
  EXPECT_TRUE(absl::StrContains(run.out, "none is scaled up")) << run.out;
  const json report = read_json(out);
  EXPECT_EQ(report.at("layers"), 1);
  EXPECT_EQ(report.at("layers_of_model"), 32);
  ModelConfig config = *known_model_config("llama-3.1-8b");
  const WeightFormats formats = weight_formats(config, Fp8Recipe::kAll);
  WeightFormats first_layer = formats;
  first_layer.config.num_hidden_layers = 1;
  const ShardSpec shard = *ShardSpec::make(first_layer.config, 0, 8);
  EXPECT_EQ(report.at("bytes").at("weights"), ModelWeights::plan(first_layer, shard).total());
  EXPECT_EQ(report.at("steps")[0].at("kv_bytes"),
            16 * KvCache::block_bytes(first_layer.config, shard, DType::kBF16) / kKvBlockTokens);
}

struct Mistake {
  std::vector<std::string> arguments;
  int status;
  const char* words;
};

TEST(Rehearse, RefusesWithARemedy) {
  const std::string tiny = write_tiny_config();
  const auto with_tiny = [&](std::vector<std::string> more) {
    more.insert(more.begin(), tiny);
    return more;
  };
  const std::vector<Mistake> mistakes = {
      {{"llama-9"}, 2, "models known without: llama-3.1-8b, llama-3.1-70b, llama-3.1-405b"},
      {with_tiny({"--rank", "8"}), 2, "--rank 8 of --ranks 8: the ranks are 0 to 7"},
      {with_tiny({"--ranks", "9"}), 2, "8"},
      {with_tiny({"--layers", "5"}), 2, "--layers 5: "},
      {with_tiny({"--context", "2"}), 2, "need at least 5"},
      {with_tiny({"--context", "250"}), 2, "lower --context or --prefill"},
      {with_tiny({"--prefill", "300", "--context", "20"}), 2, "lower --context or --prefill"},
      {with_tiny({"--batch", "0", "--prefill", "0"}), 2, "give --batch, --prefill or both"},
      {with_tiny({"--recipe", "int4"}), 2, "all-linear"},
      {{"llama-3.1-405b", "--ranks", "1"}, 1, "more --ranks (up to 8)"},
      {with_tiny({"--ranks", "1", "--batch", "65536", "--context", "200", "--layers", "4", "--recipe", "fbgemm",
                  "--prefill", "0"}),
       1, "choose a smaller --batch"},
  };
  for (const Mistake& mistake : mistakes) {
    const Finished run = run_rehearse(mistake.arguments[0], {mistake.arguments.begin() + 1, mistake.arguments.end()});
    EXPECT_EQ(run.status, mistake.status) << mistake.words << "\n" << run.err;
    EXPECT_TRUE(absl::StrContains(run.err, mistake.words)) << run.err;
  }
}

}  // namespace
}  // namespace octet
