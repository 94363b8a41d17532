// The flags that more than one command takes, each with its default and its reason. Everyone else receives the value.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <CLI/CLI.hpp>

#include "kernels/memory.h"
#include "worker/collective/device_communicator.h"
#include "worker/memory_plan.h"
#include "worker/model/weights.h"

namespace octet {

// What a rank computes with and how much it may hold.
struct RuntimeOptions {
  std::string model;
  std::optional<int> threads;  // of each rank; default: the cores available, divided among the ranks on this machine
  Isa isa = best_isa();
  ActivationMode activations = ActivationMode::kBF16;
  MemoryOptions memory;
};

void add_threads_option(CLI::App& command, std::optional<int>* threads);
// How ranks on GPUs sum.
void add_all_reduce_option(CLI::App& command, AllReduce* all_reduce);
// --device, --reproducible and --fast; *arithmetic is the default.
void add_device_options(CLI::App& command, Device* device, Arithmetic* arithmetic);
void add_memory_options(CLI::App& command, MemoryOptions* options);
// --threads, --isa, --activations and --kv-dtype.
void add_compute_options(CLI::App& command, RuntimeOptions* options);
// --model, and both groups above.
void add_runtime_options(CLI::App& command, RuntimeOptions* options);

}  // namespace octet
