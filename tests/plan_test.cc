// octet plan: byte counts against published sizes, predictions against their formula worked out by hand, remedies that
// hold what they promise, and the command itself beside what serve plans.
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "launch/capacity_report.h"
#include "tests/octet_server.h"
#include "tests/process.h"
#include "tests/random_model.h"
#include "worker/model/known_models.h"

namespace octet {
namespace {

using nlohmann::json;

constexpr double kGiB = static_cast<double>(int64_t{1} << 30);

Scenario scenario_on(const std::string& gpus, const std::string& model, const std::string& recipe) {
  const GpuChoice choice = *parse_gpus(gpus);
  return {.formats = weight_formats(*known_model_config(model), *plan_recipe_named(recipe)),
          .ranks = choice.count,
          .gpu = choice.gpu,
          .memory = gpu_memory_options({}, kGpuMemoryShare)};
}

CapacityReport report_on(const Scenario& scenario) {
  absl::StatusOr<CapacityReport> report = make_report(scenario, speed_of(*scenario.gpu), kReachedShares, {});
  EXPECT_TRUE(report.ok()) << report.status();
  return *std::move(report);
}

void expect_within(double value, double expected, double share) { EXPECT_NEAR(value, expected, share * expected); }

// ---- Bytes

struct Size {
  const char* model;
  const char* recipe;
  double gigabytes;  // of all ranks together, as the checkpoint's files have them
};

// From the tensors' shapes and, for 405B, from the files on the hub.
constexpr Size kSizes[] = {
    {"llama-3.1-8b", "bf16", 16.06},          {"llama-3.1-8b", "all-linear", 9.08},
    {"llama-3.1-70b", "bf16", 141.1},         {"llama-3.1-70b", "all-linear", 72.67},
    {"llama-3.1-405b", "bf16", 811.71},       {"llama-3.1-405b", "fbgemm", 487.23},
    {"llama-3.1-405b", "all-linear", 410.14},
};

TEST(Plan, CountsTheBytesOfTheLlamas) {
  for (const Size& size : kSizes) {
    for (const char* gpus : {"8xH100-80GB", "8xA100-80GB"}) {
      SCOPED_TRACE(absl::StrCat(size.model, " ", size.recipe, " on ", gpus));
      const CapacityReport report = report_on(scenario_on(gpus, size.model, size.recipe));
      double bytes = 0;
      for (const RankBytes& rank : report.ranks) bytes += static_cast<double>(rank.weights.total());
      expect_within(bytes, size.gigabytes * 1e9, 0.01);
    }
  }
}

TEST(Plan, CountsWhatEachOfEightRanksHoldsOf405B) {
  const CapacityReport fbgemm = report_on(scenario_on("8xH100-80GB", "llama-3.1-405b", "fbgemm"));
  expect_within(static_cast<double>(fbgemm.ranks[0].weights.total()), 56.7 * kGiB, 0.01);
  EXPECT_EQ(fbgemm.kv_bytes_per_token, 64512);
  expect_within(static_cast<double>(fbgemm.kv_tokens), 199e3, 0.01);
  EXPECT_EQ(fbgemm.batches.back().bf16_kv, 1) << "a whole context of 128k";
  EXPECT_EQ(fbgemm.batches.back().fp8_kv, 3);

  const CapacityReport all = report_on(scenario_on("8xH100-80GB", "llama-3.1-405b", "all-linear"));
  expect_within(static_cast<double>(all.ranks[0].weights.total()), 47.7 * kGiB, 0.01);
  expect_within(static_cast<double>(all.kv_tokens), 348e3, 0.01);

  Scenario fuller = scenario_on("8xH100-80GB", "llama-3.1-405b", "fbgemm");
  fuller.memory.usable_share = 0.95;
  expect_within(static_cast<double>(report_on(fuller).kv_tokens), 265e3, 0.01);
}

TEST(Plan, SaysWhatFitsOnEightGpus) {
  const auto fits = [](const char* gpus, const char* model, const char* recipe) {
    return fit(scenario_on(gpus, model, recipe)).ok();
  };
  for (const char* gpus : {"8xH100-80GB", "8xA100-80GB"}) {
    for (const char* recipe : {"bf16", "fbgemm", "all-linear"}) {
      EXPECT_TRUE(fits(gpus, "llama-3.1-8b", recipe));
      EXPECT_TRUE(fits(gpus, "llama-3.1-70b", recipe));
      EXPECT_EQ(fits(gpus, "llama-3.1-405b", recipe), std::string(recipe) != "bf16");
    }
  }
  EXPECT_TRUE(fits("8xH200-141GB", "llama-3.1-405b", "bf16"));
  EXPECT_FALSE(fits("8xA100-40GB", "llama-3.1-405b", "all-linear"));
}

// ---- Predictions

StepSeconds limit_of(const char* gpus, const char* recipe, const StepLoad& load) {
  const Scenario scenario = scenario_on(gpus, "llama-3.1-405b", recipe);
  return predict_step(scenario.formats, scenario.ranks, speed_of(*scenario.gpu), {}, load);
}

TEST(Plan, PredictsTheLimitOfDecoding) {
  const StepLoad one{.sequences = 1, .new_tokens = 1, .context = 1};
  const auto linears = [](const StepSeconds& step) { return step.fp8_linears + step.bf16_linears; };
  // Bytes that a step reads by bandwidth, and 252 all-reduces of 32 KiB in 6.5 us.
  expect_within(linears(limit_of("8xH100-80GB", "fbgemm", one)), 18.03e-3, 0.01);
  expect_within(linears(limit_of("8xH100-80GB", "all-linear", one)), 15.15e-3, 0.01);
  expect_within(linears(limit_of("8xH200-141GB", "fbgemm", one)), 12.58e-3, 0.01);
  expect_within(linears(limit_of("8xA100-80GB", "fbgemm", one)), 29.6e-3, 0.01);
  expect_within(1 / limit_of("8xH100-80GB", "fbgemm", one).total(), 50.9, 0.01);
  expect_within(1 / limit_of("8xH200-141GB", "all-linear", one).total(), 81.9, 0.01);

  const auto step = [](const char* recipe, int64_t batch, int kv_bytes) {
    return limit_of("8xH100-80GB", recipe,
                    {.sequences = batch, .new_tokens = 1, .context = 1024, .kv_bytes_per_value = kv_bytes})
        .total();
  };
  expect_within(step("fbgemm", 64, 2), 23.82e-3, 0.01);
  expect_within(step("fbgemm", 256, 1), 32.14e-3, 0.01);
  expect_within(step("fbgemm", 512, 1), 58.21e-3, 0.01);
  expect_within(step("all-linear", 256, 2), 31.79e-3, 0.01);
}

TEST(Plan, PredictsPrefill) {
  const auto arithmetic = [](const char* recipe, int64_t tokens) {
    const StepSeconds step = limit_of("8xH100-80GB", recipe, {.sequences = 1, .new_tokens = tokens, .context = tokens});
    return step.total() - step.all_reduce;
  };
  expect_within(arithmetic("fbgemm", 2048), 0.126, 0.01);
  expect_within(arithmetic("fbgemm", 32768), 2.54, 0.01);
  expect_within(arithmetic("all-linear", 131072), 15.6, 0.01);
}

TEST(Plan, WidensFp8OnGpusWithoutItsUnits) {
  const StepLoad prompt{.sequences = 1, .new_tokens = 4096, .context = 4096};
  const StepSeconds fp8 = limit_of("8xA100-80GB", "all-linear", prompt);
  const StepSeconds bf16 = limit_of("8xA100-80GB", "bf16", prompt);
  expect_within(fp8.fp8_linears + fp8.bf16_linears, bf16.fp8_linears + bf16.bf16_linears, 0.01);
}

// ---- The command

// An option and its value.
using Arguments = std::map<std::string, std::string>;

Finished run_plan(const Arguments& arguments, const std::vector<std::string>& more = {}) {
  std::vector<std::string> argv = {OCTET_BINARY, "plan"};
  for (const auto& [option, value] : arguments) argv.insert(argv.end(), {option, value});
  argv.insert(argv.end(), more.begin(), more.end());
  return run_command(argv);
}

// Changes the options as each remedy says and plans again.
void expect_remedies_that_work(const Arguments& arguments, const std::vector<std::string>& more) {
  SCOPED_TRACE(testing::PrintToString(arguments));
  const Finished run = run_plan(arguments, more);
  if (run.status == 0) return;
  ASSERT_EQ(run.status, 1) << run.err;
  const json report = json::parse(run.out);
  EXPECT_FALSE(report.at("fits"));
  EXPECT_FALSE(report.at("remedies").empty());
  for (const json& remedy : report.at("remedies")) {
    Arguments changed = arguments;
    for (const json& change : remedy) changed[change.at("option")] = change.at("value");
    const Finished again = run_plan(changed, more);
    EXPECT_EQ(again.status, 0) << remedy << "\n" << again.out << again.err;
  }
}

TEST(Plan, NamesRemediesThatMakeItFitOnGpus) {
  for (const char* gpus : {"1xL40S-48GB", "2xA100-40GB", "4xH100-80GB", "8xH100-80GB"}) {
    for (const std::string& model : known_models()) {
      for (const char* recipe : {"bf16", "all-linear"}) {
        const Arguments arguments = {{"--model", model}, {"--recipe", recipe}, {"--gpus", gpus}};
        expect_remedies_that_work(arguments, {"--json"});
        expect_remedies_that_work(arguments, {"--json", "--max-context", "131072"});
      }
    }
  }
  expect_remedies_that_work({{"--model", "llama-3.1-405b"},
                             {"--gpus", "2x"},
                             {"--gpu-memory", "24GiB"},
                             {"--gpu-bandwidth", "1TB/s"},
                             {"--gpu-flops", "150TFLOPS"}},
                            {"--json"});
}

TEST(Plan, NamesRemediesThatMakeItFitOnCpus) {
  const Arguments cpu = {{"--model", "llama-3.1-8b"}, {"--ranks", "2"}, {"--memory", "4GiB"}};
  expect_remedies_that_work(cpu, {"--cpu", "--json"});
  Arguments context = cpu;
  context["--memory"] = "12GiB";
  context["--max-context"] = "131072";
  expect_remedies_that_work(context, {"--cpu", "--json"});
  context["--kv-memory"] = "64MiB";
  expect_remedies_that_work(context, {"--cpu", "--json"});
  context["--kv-memory"] = "64GiB";
  expect_remedies_that_work(context, {"--cpu", "--json"});
}

TEST(Plan, TellsPeopleAndMachinesTheSame) {
  const Arguments arguments = {{"--model", "llama-3.1-405b"}, {"--recipe", "fbgemm"}, {"--gpus", "8xH100-80GB"}};
  const Finished text = run_plan(arguments), machine = run_plan(arguments, {"--json"});
  ASSERT_EQ(text.status, 0) << text.err;
  const json report = json::parse(machine.out);
  EXPECT_EQ(report.at("ranks").size(), 8u);
  for (const json& rank : report.at("ranks")) {
    EXPECT_TRUE(absl::StrContains(text.out, human_bytes(rank.at("kv_cache"))));
    EXPECT_TRUE(absl::StrContains(text.out, human_bytes(rank.at("feed_forward"))));
  }
  for (const json& row : report.at("predicted").at("decode")) {
    const std::string line =
        absl::StrFormat("batch %d %9.2f ms %9.2f ms", row.at("sequences").get<int>(),
                        1e3 * row.at("limit_seconds").get<double>(), 1e3 * row.at("predicted_seconds").get<double>());
    const auto squeezed = [](absl::string_view words) {
      return absl::StrJoin(absl::StrSplit(words, absl::ByAnyChar(" \n"), absl::SkipEmpty()), " ");
    };
    EXPECT_TRUE(absl::StrContains(squeezed(text.out), squeezed(line))) << line << "\n" << text.out;
  }
  for (const char* words : {"Predicted, not measured", "reserve", "CUDA context", "nothing overlaps", "(W8A8)"}) {
    EXPECT_TRUE(absl::StrContains(text.out, words)) << words;
  }
  Arguments a100 = arguments;
  a100["--gpus"] = "8xA100-80GB";
  EXPECT_TRUE(absl::StrContains(run_plan(a100).out, "W8A16"));
}

TEST(Plan, RefusesMistakesWithASentence) {
  struct Mistake {
    std::vector<std::string> arguments;
    std::string words;
  };
  const std::vector<Mistake> mistakes = {
      {{"--model", "llama-3.1-8b"}, "say where to plan for"},
      {{"--model", "llama-3.1-8b", "--gpus", "8xH100"}, "known GPUs: A100-40GB"},
      {{"--model", "llama-3.1-8b", "--gpus", "8x"}, "--gpu-memory"},
      {{"--model", "llama-3.1-8b", "--gpus", "16xH100-80GB"}, "sharing a KV head between ranks is not supported yet"},
      {{"--model", "llama-9", "--cpu"}, "llama-3.1-405b"},
      {{"--model", "llama-3.1-8b", "--cpu", "--max-context", "1"}, "--max-context"},
      {{"--model", "llama-3.1-8b", "--recipe", "int4", "--cpu"}, "--recipe"},
      {{"--gpus", "8xH100-80GB"}, "--model"},
  };
  for (const Mistake& mistake : mistakes) {
    const Finished run = run_plan({}, mistake.arguments);
    EXPECT_EQ(run.status, 2) << mistake.words;
    EXPECT_TRUE(absl::StrContains(run.err, mistake.words)) << run.err;
  }
}

// The rows of serve's table: rank, then amounts as printed.
std::vector<std::vector<std::string>> rows_of(const std::string& log) {
  std::vector<std::vector<std::string>> rows;
  for (absl::string_view line : absl::StrSplit(log, '\n')) {
    const std::vector<std::string> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
    if (words.size() > 16 && words[0].find_first_not_of("0123456789") == std::string::npos) rows.push_back(words);
  }
  return rows;
}

TEST(Plan, PlansForCpuRanksWhatServeAllocates) {
  for (const RandomFormat format : {RandomFormat::kBF16, RandomFormat::kFbgemm, RandomFormat::kDynamicTokens}) {
    const std::string model = write_random_model({.format = format});
    const std::vector<std::string> options = {"--threads", "2", "--max-step-tokens", "96", "--kv-memory", "8MiB"};
    Server server(model, 3, options);
    ASSERT_TRUE(server.ready());
    const auto served = rows_of(server.process().err());
    ASSERT_EQ(served.size(), 3u) << server.process().err();

    std::vector<std::string> more = {"--cpu", "--ranks", "3", "--json"};
    more.insert(more.end(), options.begin(), options.end());
    const Finished run = run_plan({{"--model", model}}, more);
    ASSERT_EQ(run.status, 0) << run.err;
    const json ranks = json::parse(run.out).at("ranks");
    for (size_t r = 0; r < 3; ++r) {
      const auto bytes = [&](const char* part) { return ranks[r].at(part).get<int64_t>(); };
      std::string expected = absl::StrCat(r);
      for (const int64_t amount :
           {bytes("embedding"), bytes("attention"), bytes("feed_forward"), bytes("lm_head"),
            bytes("norms") + bytes("scales"), bytes("scratch"), bytes("kv_cache"), bytes("total")}) {
        absl::StrAppend(&expected, " ", human_bytes(amount));
      }
      EXPECT_TRUE(absl::StartsWith(absl::StrJoin(served[r], " "), expected + " "))
          << absl::StrJoin(served[r], " ") << "\n"
          << expected;
    }
  }
}

}  // namespace
}  // namespace octet
