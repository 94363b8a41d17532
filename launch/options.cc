#include "launch/options.h"

#include <map>

#include "absl/strings/str_cat.h"

namespace octet {

void add_threads_option(CLI::App& command, std::optional<int>* threads) {
  command.add_option("--threads", *threads, "Threads of each rank [its share of the available cores]")
      ->check(CLI::Range(1, 1024));
}

void add_all_reduce_option(CLI::App& command, AllReduce* all_reduce) {
  std::map<std::string, AllReduce> kinds;
  for (const AllReduce kind : {AllReduce::kAuto, AllReduce::kNccl, AllReduce::kP2p, AllReduce::kHost}) {
    kinds[name_of(kind)] = kind;
  }
  command
      .add_option_function<std::string>(
          "--allreduce", [all_reduce, kinds](const std::string& name) { *all_reduce = kinds.at(name); },
          "How ranks on GPUs sum: nccl, p2p (GPUs that read one another), host (through its memory, slow, works "
          "everywhere), or auto, which says what it chose and why [auto]")
      ->check(CLI::IsMember(kinds));
}

void add_device_options(CLI::App& command, Device* device, Arithmetic* arithmetic) {
  command
      .add_option_function<std::string>(
          "--device", [device](const std::string& name) { *device = name == "cuda" ? Device::kCuda : Device::kCpu; },
          "What ranks compute on: cpu, or cuda, for each a GPU of its own [cpu: it starts everywhere]")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  const auto set = [arithmetic](Arithmetic value) { return [arithmetic, value](int64_t) { *arithmetic = value; }; };
  const bool fast = *arithmetic == Arithmetic::kFast;
  CLI::Option* const reproducible = command.add_flag_function(
      "--reproducible", set(Arithmetic::kReproducible),
      absl::StrCat("On GPUs: the same bits whatever runs beside and on any number of ranks, as on CPUs always, at the ",
                   "price of speed", fast ? "" : " [so it is]"));
  command
      .add_flag_function("--fast", set(Arithmetic::kFast),
                         absl::StrCat("On GPUs: the fastest kernels and libraries; bits may depend on what runs beside",
                                      fast ? " [so it is]" : ""))
      ->excludes(reproducible);
}

void add_memory_options(CLI::App& command, MemoryOptions* options) {
  command
      .add_option("--kv-memory", options->kv_memory_bytes,
                  "KV cache of each rank in bytes, or 512MiB, 20GiB [room for " + std::to_string(kDefaultContexts) +
                      " whole contexts where memory allows]")
      ->transform(CLI::AsSizeValue(false));
  command.add_option("--max-context", options->max_context,
                     "Longest sequence in tokens, prompt and answer [the model's, or what the cache holds]");
  command.add_option("--max-sequences", options->max_sequences, "Sequences that run at once")->capture_default_str();
  command
      .add_option("--max-step-tokens", options->max_step_tokens,
                  "Tokens of one step: more fill the kernels better, fewer keep the gap between streamed tokens short")
      ->capture_default_str();
}

void add_compute_options(CLI::App& command, RuntimeOptions* options) {
  add_threads_option(command, &options->threads);
  command
      .add_option_function<std::string>(
          "--isa",
          [options](const std::string& name) {
            const std::map<std::string, Isa> names = {
                {"auto", best_isa()}, {"portable", Isa::kPortable}, {"avx2", Isa::kAvx2}, {"avx512", Isa::kAvx512}};
            options->isa = names.at(name);
            if (!runs_here(options->isa)) throw CLI::ValidationError("--isa", name + " does not run on this machine");
          },
          "Instruction family of the CPU kernels; avx2 and avx512 give equal bits [auto]")
      ->check(CLI::IsMember({"auto", "portable", "avx2", "avx512"}));
  command
      .add_option_function<std::string>(
          "--activations",
          [options](const std::string& name) {
            options->activations = name == "fp8" ? ActivationMode::kFP8 : ActivationMode::kBF16;
          },
          "Inputs of FP8 layers: bf16 (W8A16), or fp8 as the checkpoint's recipe says (W8A8) [bf16: exacter, and as "
          "fast on a CPU]")
      ->check(CLI::IsMember({"bf16", "fp8"}));
  command
      .add_option_function<std::string>(
          "--kv-dtype",
          [options](const std::string& name) {
            options->memory.kv_dtype = name == "fp8" ? DType::kF8E4M3 : DType::kBF16;
          },
          "KV cache in bf16, or in fp8: half the bytes, so twice the tokens, with the checkpoint's scales [bf16: "
          "exacter]")
      ->check(CLI::IsMember({"bf16", "fp8"}));
}

void add_runtime_options(CLI::App& command, RuntimeOptions* options) {
  command
      .add_option("--model", options->model,
                  "Checkpoint: a Hugging Face directory with safetensors (see octet inspect)")
      ->required();
  add_compute_options(command, options);
  add_memory_options(command, &options->memory);
}

}  // namespace octet
