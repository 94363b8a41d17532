#include "launch/rehearse.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "launch/capacity.h"
#include "launch/machine.h"
#include "launch/options.h"
#include "launch/progress.h"
#include "launch/rehearsal_report.h"
#include "worker/model/known_models.h"

namespace octet {
namespace {

constexpr int kFailed = 1, kMistake = 2;
// Of a GPU's free memory: all of it is asked for at the beginning, and the rest is for what kernels take besides.
constexpr double kGpuUsableShare = 0.96;

struct RehearseOptions {
  RuntimeOptions runtime;  // without a model or memory
  std::string model;
  std::string recipe = "bf16";
  Device device = Device::kCpu;
  Arithmetic arithmetic = Arithmetic::kFast;  // of a GPU
  int rank = 0, ranks = 8;
  std::optional<int64_t> layers;
  std::vector<int32_t> batches = {1, 16, 64, 256};
  int32_t context = 1024;
  std::vector<int32_t> prefills = {512};
  int rounds = 5;
  std::optional<double> all_reduce_us;
  std::string json, svg;
};

absl::StatusOr<ModelConfig> config_of(const std::string& model) {
  if (std::optional<ModelConfig> known = known_model_config(model)) return *known;
  const std::filesystem::path path = std::filesystem::is_directory(model) ? model + "/config.json" : model;
  std::ifstream file(path);
  if (!file) {
    return absl::NotFoundError(absl::StrCat("--model-config ", model, ": there is no such file; models known without: ",
                                            absl::StrJoin(known_models(), ", ")));
  }
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  absl::StatusOr<ModelConfig> config = parse_model_config(text);
  if (config.ok()) return config;
  return absl::Status(config.status().code(), absl::StrCat(path.string(), ": ", config.status().message()));
}

absl::StatusOr<RehearsalOptions> rehearsal_of(const RehearseOptions& options, const OpenDevice& device,
                                              const ModelConfig& config) {
  const Fp8Recipe recipe = *plan_recipe_named(options.recipe);
  const int cores = cores_within_quota(static_cast<int>(allowed_cpus().size()));
  const int threads = options.runtime.threads.value_or(cores);
  RehearsalOptions rehearsal{.formats = weight_formats(config, recipe),
                             .activations = options.runtime.activations == ActivationMode::kFP8
                                                ? activation_scheme(recipe)
                                                : ActivationScheme(),
                             .device = options.device,
                             .arithmetic = arithmetic_on(device, options.arithmetic),
                             .kv_dtype = options.runtime.memory.kv_dtype,
                             .rank = options.rank,
                             .ranks = options.ranks,
                             .host = {.threads = threads, .isa = options.runtime.isa, .spin = threads <= cores},
                             .batches = options.batches,
                             .context = options.context,
                             .prefills = options.prefills,
                             .rounds = options.rounds};
  const int64_t all = config.num_hidden_layers, layers = options.layers.value_or(all);
  if (layers > all) {
    return absl::InvalidArgumentError(absl::StrFormat("--layers %d: %s has %d", layers, options.model, all));
  }
  // The model's first ones, as they are in it.
  rehearsal.formats.config.num_hidden_layers = layers;
  return rehearsal;
}

std::string device_text(const OpenDevice& device, const RehearsalOptions& rehearsal) {
  const std::string text = describe(device, rehearsal.arithmetic, rehearsal.host.isa);
  return device.gpu ? text : absl::StrFormat("CPU, %s, %d threads", text, rehearsal.host.threads);
}

absl::StatusOr<int64_t> usable_bytes(const OpenDevice& device) {
  if (device.gpu) return static_cast<int64_t>(kGpuUsableShare * static_cast<double>(device.gpu->memory_bytes));
  const absl::StatusOr<int64_t> memory = available_memory();
  if (!memory.ok()) return memory.status();
  return static_cast<int64_t>(MemoryOptions().usable_share * static_cast<double>(*memory));
}

// The most layers that fit; 0: not even one.
int64_t layers_that_fit(RehearsalOptions rehearsal, int64_t usable) {
  int64_t& layers = rehearsal.formats.config.num_hidden_layers;
  for (--layers; layers > 0; --layers) {
    const absl::StatusOr<RankBytes> bytes = Rehearsal::plan(rehearsal);
    if (bytes.ok() && bytes->total() <= usable) break;
  }
  return layers;
}

absl::StatusOr<RankBytes> fitting(const RehearsalOptions& rehearsal, const std::string& device, int64_t usable) {
  absl::StatusOr<RankBytes> bytes = Rehearsal::plan(rehearsal);
  if (!bytes.ok() || bytes->total() <= usable) return bytes;
  const int64_t layers = layers_that_fit(rehearsal, usable);
  return absl::ResourceExhaustedError(absl::StrFormat(
      "rank %d of %d needs %s (weights %s, KV cache %s, scratch %s), and %s are usable on %s: %s%sor choose a smaller "
      "--batch, --context or --prefill",
      rehearsal.rank, rehearsal.ranks, human_bytes(bytes->total()), human_bytes(bytes->weights.total()),
      human_bytes(bytes->kv_cache), human_bytes(bytes->scratch), human_bytes(usable), device,
      layers > 0 ? absl::StrCat("use --layers ", layers, ", ") : "",
      rehearsal.ranks < rehearsal.formats.config.num_key_value_heads
          ? absl::StrCat("more --ranks (up to ", rehearsal.formats.config.num_key_value_heads, "), ")
          : ""));
}

// What the predictions take a sum over the ranks to cost, and where that is from.
std::pair<AllReduceCost, std::string> all_reduce_of(const RehearseOptions& options, const OpenDevice& device) {
  if (options.all_reduce_us) {
    return {{.points = {{0, *options.all_reduce_us * 1e-6}}, .bytes_per_second = 1e30}, "--allreduce-us"};
  }
  if (!device.gpu) return {assumed_cpu_all_reduce(), "assumed, within a node (--allreduce-us)"};
  const GpuSpec* const gpu = datasheet_of(device.gpu->name);
  const std::string source = "the best published for eight H100 on NVSwitch";
  if (gpu == nullptr) return {speed_of(*datasheet_of("H100")).all_reduce, source + " (--allreduce-us)"};
  return {speed_of(*gpu).all_reduce, source + ", scaled by the links (--allreduce-us)"};
}

absl::Status write(const std::string& path, const std::string& text) {
  if (path.empty()) return absl::OkStatus();
  std::ofstream file(path);
  file << text;
  file.close();
  return file ? absl::OkStatus() : absl::UnavailableError("cannot write " + path);
}

absl::Status run(const RehearseOptions& options) {
  const absl::StatusOr<OpenDevice> device = open_device(options.device, 0, 1);
  if (!device.ok()) return device.status();
  const absl::StatusOr<ModelConfig> config = config_of(options.model);
  if (!config.ok()) return config.status();
  const absl::StatusOr<RehearsalOptions> rehearsal = rehearsal_of(options, *device, *config);
  if (!rehearsal.ok()) return rehearsal.status();
  const absl::StatusOr<int64_t> usable = usable_bytes(*device);
  if (!usable.ok()) return usable.status();

  RehearsalReport report{.model = options.model,
                         .recipe = options.recipe,
                         .activations = options.runtime.activations == ActivationMode::kFP8 ? "fp8" : "bf16",
                         .kv_dtype = rehearsal->kv_dtype,
                         .device = device_text(*device, *rehearsal),
                         .rank = options.rank,
                         .ranks = options.ranks,
                         .layers = rehearsal->formats.config.num_hidden_layers,
                         .layers_of_model = config->num_hidden_layers,
                         .usable_bytes = *usable,
                         .hidden_size = config->hidden_size};
  std::tie(report.all_reduce, report.all_reduce_source) = all_reduce_of(options, *device);
  const absl::StatusOr<RankBytes> bytes = fitting(*rehearsal, device->gpu ? "the GPU" : "this machine", *usable);
  if (!bytes.ok()) return bytes.status();
  report.bytes = *bytes;

  Progress filling("Filling weights");
  Rehearsal rank(*device, *rehearsal, [&](int64_t done, int64_t total) {
    filling.update(done, total);
    report.fill_seconds = filling.seconds();
  });
  filling.clear();
  Progress running("Rehearsing", [](int64_t steps) { return absl::StrCat(steps, " steps"); });
  absl::StatusOr<std::vector<StepMeasurement>> steps =
      rank.run([&](int64_t done, int64_t total) { running.update(done, total); });
  running.clear();
  if (!steps.ok()) return steps.status();
  report.steps = *std::move(steps);

  std::fputs(to_text(report).c_str(), stdout);
  if (absl::Status status = write(options.json, to_json(report).dump(2) + "\n"); !status.ok()) return status;
  return options.svg.empty() ? absl::OkStatus() : write(options.svg, to_svg(report));
}

}  // namespace

void add_rehearse_command(CLI::App& app, int* exit_code) {
  auto options = std::make_shared<RehearseOptions>();
  CLI::App* command = app.add_subcommand(
      "rehearse", "Measure the steps of one rank of several, alone, before there is a machine for all");
  command->footer(
      "octet rehearse --model-config llama-3.1-405b --recipe fbgemm --activations fp8 --device cuda\n"
      "octet rehearse --model-config llama-3.1-405b --recipe fbgemm --layers 2 --batch 1,16\n"
      "The shard is the one that the rank would load, of random numbers. Memory of its own stands for the other "
      "ranks'.\n"
      "Exit status: 0 done, 1 it does not fit or a step failed, 2 a mistake.");
  command
      ->add_option("--model-config", options->model,
                   absl::StrCat("A config.json, or one of ", absl::StrJoin(known_models(), ", ")))
      ->required();
  command
      ->add_option(
          "--recipe", options->recipe,
          "What is FP8: nothing (bf16), Meta's choice (fbgemm), every linear layer of every block (all-linear)")
      ->check(CLI::IsMember({"bf16", "fbgemm", "all-linear"}))
      ->capture_default_str();
  command->add_option("--ranks", options->ranks, "Ranks that the model is cut for")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--rank", options->rank, "The one that is rehearsed")->capture_default_str();
  command->add_option("--layers", options->layers, "Only the model's first layers [all]")->check(CLI::PositiveNumber);
  add_device_options(*command, &options->device, &options->arithmetic);
  add_compute_options(*command, &options->runtime);
  command->add_option("--batch", options->batches, "Decode steps of so many sequences, 1,16,64,256; none: 0")
      ->delimiter(',')
      ->check(CLI::Range(0, 65536))
      ->capture_default_str();
  command->add_option("--context", options->context, "Positions of each sequence in decode steps")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--prefill", options->prefills, "Prefill steps of so many tokens, 512,2048; none: 0")
      ->delimiter(',')
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command->add_option("--rounds", options->rounds, "Times that each step is measured")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command
      ->add_option("--allreduce-us", options->all_reduce_us,
                   "What a sum over the ranks takes, for the predictions [GPUs: the best published for eight H100, by "
                   "its size; CPUs: assumed]")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--json", options->json, "Write all figures to this file");
  command->add_option("--svg", options->svg, "Draw the parts of the steps into this file");
  command->callback([options, exit_code] {
    std::erase(options->batches, 0);
    std::erase(options->prefills, 0);
    const absl::Status status = run(*options);
    if (!status.ok()) std::fprintf(stderr, "octet rehearse: %s\n", std::string(status.message()).c_str());
    const bool mistake = absl::IsInvalidArgument(status) || absl::IsNotFound(status);
    *exit_code = status.ok() ? 0 : mistake ? kMistake : kFailed;
  });
}

}  // namespace octet
