// MemoryPlan: what a rank will hold, before anything is loaded (pure). Its byte counts are what serve then allocates.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/model/weight_formats.h"
#include "worker/model/weights.h"
#include "worker/step_plan.h"

namespace octet {

// Sequences of full length that the cache holds by default when memory allows.
constexpr int64_t kDefaultContexts = 8;

struct MemoryOptions {
  std::optional<int64_t> kv_memory_bytes;  // per rank; default: room for default_contexts, if it is there
  std::optional<int64_t> max_context;  // default: max_position_embeddings, or what the cache holds when that is less
  int32_t max_sequences = 64;          // slots
  int32_t max_step_tokens = 512;
  int64_t default_contexts = kDefaultContexts;
  Device device = Device::kCpu;                       // that ranks compute on, whose memory is planned
  int64_t window_bytes = 0;                           // this rank's part of the collective window
  DType kv_dtype = DType::kBF16;                      // or kF8E4M3: half the bytes, so twice the tokens
  Arithmetic arithmetic = Arithmetic::kReproducible;  // how many partial results the sums over ranks take
  double usable_share = 0.92;  // of the memory that is available; the rest is for the operating system, MPI and gRPC
  // Stands for the scratch of a rank whose scratch is not counted byte by byte.
  std::optional<int64_t> reserve_bytes;
};

// What one rank has to live in.
struct RankResources {
  int64_t memory_bytes = 0;
  int threads = 1;  // each has a sampler of its own
};

// One rank's bytes.
struct RankBytes {
  WeightBytes weights;
  int64_t scratch = 0;  // activations, logits, samplers, batches, workspace, the collective window; or the reserve
  int64_t kv_cache = 0;
  int64_t total() const { return weights.total() + scratch + kv_cache; }
};

struct MemoryPlan {
  std::vector<RankBytes> ranks;
  std::vector<RankResources> resources;  // of each rank
  int64_t kv_block_bytes_max = 0;        // of the rank with the most slices
  WorkerLimits limits;                   // the same on every rank

  int64_t kv_tokens() const { return int64_t{limits.blocks} * limits.block_tokens; }
  std::string to_string() const;  // a table for the log
};

// What rank `rank` of `ranks` needs however small its cache is. INVALID_ARGUMENT when the model cannot be cut so.
absl::StatusOr<RankBytes> bytes_without_cache(const WeightFormats& formats, const MemoryOptions& options, int rank,
                                              int ranks, int threads);

// RESOURCE_EXHAUSTED when it cannot fit, saying what would; INVALID_ARGUMENT for options that make no sense.
absl::StatusOr<MemoryPlan> plan_memory(const WeightFormats& formats, const MemoryOptions& options,
                                       const std::vector<RankResources>& ranks);

// "1.5 GiB"; units of 1,024.
std::string human_bytes(int64_t bytes);

}  // namespace octet
