#include "launch/plan.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/calibrate.h"
#include "launch/capacity_report.h"
#include "launch/machine.h"
#include "launch/options.h"
#include "worker/checkpoint/checkpoint.h"
#include "worker/collective/window_communicator.h"
#include "worker/model/known_models.h"

namespace octet {
namespace {

constexpr int kDoesNotFit = 1, kMistake = 2;

struct PlanOptions {
  std::string model;
  std::optional<std::string> recipe;
  std::string gpus;  // empty: CPU ranks
  std::optional<int64_t> gpu_memory;
  std::optional<double> gpu_bandwidth, gpu_flops, gpu_fp8_flops, gpu_link;
  double gpu_memory_share = kGpuMemoryShare;
  bool cpu = false;
  int ranks = 1;
  std::optional<int64_t> memory_bytes;
  std::optional<int> threads;
  MemoryOptions memory;
  bool json = false;
};

absl::StatusOr<WeightFormats> formats_of(const PlanOptions& options) {
  std::optional<ModelConfig> config = known_model_config(options.model);
  std::optional<WeightFormats> stored;
  if (!config) {
    const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(options.model);
    if (!checkpoint.ok()) {
      return absl::Status(checkpoint.status().code(),
                          absl::StrCat(checkpoint.status().message(),
                                       "; models known without files: ", absl::StrJoin(known_models(), ", ")));
    }
    stored = weight_formats(*checkpoint);
    config = checkpoint->config();
  }
  if (stored && !options.recipe) return *std::move(stored);
  return weight_formats(*config, *plan_recipe_named(options.recipe.value_or("bf16")));
}

// The GPU that --gpus names, with what the other options say about it.
absl::StatusOr<GpuSpec> complete(GpuSpec gpu, const PlanOptions& options) {
  gpu.memory_bytes = options.gpu_memory.value_or(gpu.memory_bytes);
  gpu.bytes_per_second = options.gpu_bandwidth.value_or(gpu.bytes_per_second);
  gpu.bf16_flops = options.gpu_flops.value_or(gpu.bf16_flops);
  gpu.fp8_flops = options.gpu_fp8_flops.value_or(gpu.fp8_flops);
  gpu.link_bytes_per_second = options.gpu_link.value_or(gpu.name.empty() ? 450e9 : gpu.link_bytes_per_second);
  if (gpu.memory_bytes > 0 && gpu.bytes_per_second > 0 && gpu.bf16_flops > 0 && gpu.link_bytes_per_second > 0)
    return gpu;
  return absl::InvalidArgumentError(
      "--gpus without a name needs --gpu-memory, --gpu-bandwidth and --gpu-flops, each more than 0");
}

absl::StatusOr<Scenario> scenario_of(const PlanOptions& options) {
  if (options.cpu == !options.gpus.empty()) {
    return absl::InvalidArgumentError("say where to plan for: --gpus 8xH100-80GB, or --cpu with --ranks N");
  }
  absl::StatusOr<WeightFormats> formats = formats_of(options);
  if (!formats.ok()) return formats.status();
  Scenario scenario{.formats = *std::move(formats), .memory = options.memory};
  if (options.cpu) {
    const absl::StatusOr<int64_t> available = available_memory();
    if (!available.ok()) return available.status();
    const int cores = cores_within_quota(static_cast<int>(allowed_cpus().size()));
    scenario.ranks = options.ranks;
    scenario.machine = {.memory_bytes = *available, .threads = cores};
    scenario.memory_bytes = options.memory_bytes;
    scenario.threads = options.threads;
    scenario.memory.window_bytes = 2 * kDefaultAreaBytes;
    return scenario;
  }
  const absl::StatusOr<GpuChoice> choice = parse_gpus(options.gpus);
  if (!choice.ok()) return choice.status();
  const absl::StatusOr<GpuSpec> gpu = complete(choice->gpu, options);
  if (!gpu.ok()) return gpu.status();
  scenario.ranks = choice->count;
  scenario.gpu = *gpu;
  scenario.memory = gpu_memory_options(scenario.memory, options.gpu_memory_share);
  return scenario;
}

// This machine's speed, shared by the ranks.
RankSpeed measure_cpu(int ranks, int threads) {
  constexpr int64_t kBytes = int64_t{256} << 20;
  Stream stream({.threads = threads, .spin = false});
  const Buffer buffer(kBytes);
  const Tensor bytes = buffer.tensor(DType::kU8, {kBytes});
  std::memset(bytes.data(), 1, kBytes);  // untouched pages would all be one page of zeros
  return {.bytes_per_second = read_bytes_per_second(stream, bytes) / ranks,
          .bf16_flops = dot_flops_per_second(stream) / ranks,
          .all_reduce = assumed_cpu_all_reduce()};
}

std::vector<std::string> assumptions_of(const Scenario& scenario, const RankSpeed& speed, const SpeedShares& shares) {
  std::vector<std::string> lines = {
      "step = max(weight bytes / bandwidth, 2 * weights * tokens / FLOPs), FP8 and BF16 linears apart,",
      "     + max(KV bytes / bandwidth, attention FLOPs / FLOPs) + 2 all-reduces a layer; nothing overlaps",
      absl::StrFormat("a rank reads %s; BF16 %s, FP8 %s; the limit is at all of it,",
                      human_rate(speed.bytes_per_second, "B/s"), human_rate(speed.bf16_flops, "FLOP/s"),
                      speed.fp8_flops > 0 ? absl::StrCat(human_rate(speed.fp8_flops, "FLOP/s"), " (W8A8)")
                                          : "weights only, widened to BF16 (W8A16)"),
      absl::StrFormat(
          "the prediction at %.0f %% of the bandwidth, %.0f %% of BF16, %.0f %% of FP8, %.0f %% in attention",
          100 * shares.bandwidth, 100 * shares.bf16, 100 * shares.fp8, 100 * shares.attention)};
  if (scenario.ranks > 1) {
    lines.push_back(absl::StrFormat("an all-reduce takes %.1f us for 32 KiB, %.1f us for 8 MiB: %s",
                                    1e6 * speed.all_reduce.seconds(32 << 10), 1e6 * speed.all_reduce.seconds(8 << 20),
                                    scenario.gpu ? "the best published for eight H100 on NVSwitch, scaled by the links"
                                                 : "assumed, within a node"));
  }
  if (!scenario.gpu)
    lines.push_back("bandwidth and FLOPs were measured on this machine just now, and are shared by its ranks");
  return lines;
}

std::string hardware_of(const Scenario& scenario) {
  if (!scenario.gpu) {
    return absl::StrFormat("%d CPU ranks of %d threads", scenario.ranks, resources_of_rank(scenario).threads);
  }
  return absl::StrCat(scenario.ranks, " x ", scenario.gpu->name.empty() ? "GPU" : scenario.gpu->name);
}

absl::StatusOr<CapacityReport> report_of(const PlanOptions& options) {
  const absl::StatusOr<Scenario> scenario = scenario_of(options);
  if (!scenario.ok()) return scenario.status();
  const RankSpeed speed =
      scenario->gpu ? speed_of(*scenario->gpu) : measure_cpu(scenario->ranks, scenario->machine.threads);
  absl::StatusOr<CapacityReport> report =
      make_report(*scenario, speed, kReachedShares, assumptions_of(*scenario, speed, kReachedShares));
  if (!report.ok()) return report.status();
  report->model = options.model;
  report->recipe = options.recipe.value_or(known_model_config(options.model) ? "bf16" : "as stored");
  report->hardware = hardware_of(*scenario);
  return report;
}

int run_plan(const PlanOptions& options) {
  const absl::StatusOr<CapacityReport> report = report_of(options);
  if (!report.ok()) {
    std::fprintf(stderr, "octet plan: %s\n", std::string(report.status().message()).c_str());
    return kMistake;
  }
  const std::string text = options.json ? to_json(*report).dump(2) + "\n" : to_text(*report);
  std::fputs(text.c_str(), stdout);
  return report->fit.ok() ? 0 : kDoesNotFit;
}

// "3.35TB/s", "989.5TFLOPS", "2e12": a number with a power of a thousand.
CLI::Validator thousands() {
  return CLI::Validator(
      [](std::string& text) {
        const size_t used = std::min(text.find_first_not_of("0123456789.eE+-"), text.size());
        double value = 0;
        if (!absl::SimpleAtod(text.substr(0, used), &value)) {
          return absl::StrCat("expected a number like 3.35TB/s or 989TFLOPS, found \"", text, "\"");
        }
        const std::string unit = text.substr(used);
        const size_t power = unit.empty() ? 0 : std::string(" kMGTP").find(unit[0]);
        if (power == std::string::npos) return absl::StrCat("unknown unit in \"", text, "\": k, M, G, T or P");
        for (size_t i = 0; i < power; ++i) value *= 1000;
        text = absl::StrFormat("%.17g", value);
        return std::string();
      },
      "RATE");
}

}  // namespace

void add_plan_command(CLI::App& app, int* exit_code) {
  auto options = std::make_shared<PlanOptions>();
  CLI::App* command =
      app.add_subcommand("plan", "Say whether a model fits, and how fast it is predicted to be, before loading it");
  command->footer(
      "octet plan --model llama-3.1-405b --recipe fbgemm --gpus 8xH100-80GB\n"
      "octet plan --model smollm2-fp8 --cpu --ranks 3\n"
      "Exit status: 0 fits, 1 does not fit (and what would is said), 2 a mistake.");
  command
      ->add_option("--model", options->model,
                   absl::StrCat("A Hugging Face directory, or one of ", absl::StrJoin(known_models(), ", ")))
      ->required();
  command
      ->add_option("--recipe", options->recipe,
                   "What is FP8: nothing (bf16), Meta's choice (fbgemm), every linear layer of every block "
                   "(all-linear) [a directory's own; bf16]")
      ->check(CLI::IsMember({"bf16", "fbgemm", "all-linear"}));
  command->add_option("--gpus", options->gpus,
                      "Number and kind, one rank each: 8xH100-80GB; 8x with the numbers below");
  command->add_option("--gpu-memory", options->gpu_memory, "Memory of each GPU, 80GiB")
      ->transform(CLI::AsSizeValue(false));
  command->add_option("--gpu-bandwidth", options->gpu_bandwidth, "Its memory bandwidth, 3.35TB/s")
      ->transform(thousands());
  command->add_option("--gpu-flops", options->gpu_flops, "Its dense BF16 peak, 989TFLOPS")->transform(thousands());
  command->add_option("--gpu-fp8-flops", options->gpu_fp8_flops, "Its dense FP8 peak [none: weights only]")
      ->transform(thousands());
  command->add_option("--gpu-link", options->gpu_link, "One way to the other GPUs [450GB/s]")->transform(thousands());
  command
      ->add_option("--gpu-memory-share", options->gpu_memory_share,
                   "Part of a GPU's memory that is used; the rest is left to the driver and to fragmentation")
      ->check(CLI::Range(0.1, 1.0))
      ->capture_default_str();
  command->add_flag("--cpu", options->cpu, "Plan for CPU ranks on this machine");
  command->add_option("--ranks", options->ranks, "CPU ranks")->check(CLI::Range(1, 1024))->capture_default_str();
  command->add_option("--memory", options->memory_bytes, "Memory of each CPU rank [an equal part of what is available]")
      ->transform(CLI::AsSizeValue(false));
  add_threads_option(*command, &options->threads);
  add_memory_options(*command, &options->memory);
  command->add_flag("--json", options->json, "One JSON object instead of tables");
  command->callback([options, exit_code] { *exit_code = run_plan(*options); });
}

}  // namespace octet
