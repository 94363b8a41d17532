// Capacity: whether a model fits on ranks that need not exist, how much context is left beside its weights, and what
// would have to change (pure). Bytes are plan_memory()'s, as serve allocates them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "launch/gpu_spec.h"
#include "launch/step_prediction.h"
#include "worker/checkpoint/converter.h"
#include "worker/memory_plan.h"
#include "worker/model/weight_formats.h"

namespace octet {

// On a GPU, for what is neither weights nor KV cache: CUDA context, NCCL, activations and workspace, CUDA graphs.
constexpr int64_t kGpuReserveBytes = int64_t{3} << 30;
constexpr double kGpuMemoryShare = 0.90;

// A model on ranks, GPUs or CPUs.
struct Scenario {
  WeightFormats formats;
  int ranks = 1;
  std::optional<GpuSpec> gpu;  // of each rank; none: CPU ranks
  RankResources machine;       // of CPU ranks: what they divide equally, unless the next two say what each has
  std::optional<int64_t> memory_bytes;
  std::optional<int> threads;
  MemoryOptions memory;
};

// `options` for ranks that are GPUs: a reserve instead of counted scratch, and all that is left for the cache.
MemoryOptions gpu_memory_options(MemoryOptions options, double share);

// "bf16", "fbgemm" or "all-linear"; nothing for other names.
std::optional<Fp8Recipe> plan_recipe_named(std::string_view name);

RankResources resources_of_rank(const Scenario& scenario);

// Errors as plan_memory().
absl::StatusOr<MemoryPlan> fit(const Scenario& scenario);

// One option of octet plan and its new value.
struct Change {
  std::string option, value;  // "--gpus", "4xH100-80GB"
  std::string note;           // "2 more"; mostly empty
};
// Changes that, made together, make the scenario fit.
using Remedy = std::vector<Change>;

// Remedies of one change, one of each kind, and those of two where one is not enough; each was tried and fits.
// REQUIRES: fit() says RESOURCE_EXHAUSTED.
std::vector<Remedy> find_remedies(const Scenario& scenario);

// A GPU as predictions see it. Its all-reduces are those published for eight H100 on NVSwitch, what grows with the
// message scaled by the links.
RankSpeed speed_of(const GpuSpec& gpu);

// "3.35 TB/s", "35 GB/s"
std::string human_rate(double value, const char* unit);

// An all-reduce between CPU ranks of one node, which nobody has measured: an assumption, to be called one.
AllReduceCost assumed_cpu_all_reduce();

// What kernels are known to reach of a datasheet; the limit itself is SpeedShares{}.
constexpr SpeedShares kReachedShares{.bandwidth = 0.90, .bf16 = 0.75, .fp8 = 0.70, .attention = 0.65};

}  // namespace octet
