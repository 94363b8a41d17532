#include "worker/memory_plan.h"

#include <algorithm>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/cuda/module.h"
#include "worker/decode_batch.h"
#include "worker/device_sampler.h"
#include "worker/kv_cache.h"
#include "worker/model/transformer.h"
#include "worker/sampler.h"

namespace octet {
namespace {

absl::Status check(const MemoryOptions& options, const ModelConfig& config) {
  if (options.max_sequences < 1) return absl::InvalidArgumentError("--max-sequences must be at least 1");
  if (options.max_step_tokens < options.max_sequences) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "--max-step-tokens %d is less than --max-sequences %d: every running sequence needs a token per step",
        options.max_step_tokens, options.max_sequences));
  }
  if (options.max_context && (*options.max_context < 2 || *options.max_context > config.max_position_embeddings)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--max-context %d: this model takes 2 to %d (max_position_embeddings)", *options.max_context,
                        config.max_position_embeddings));
  }
  if (options.kv_memory_bytes && *options.kv_memory_bytes < 1) {
    return absl::InvalidArgumentError("--kv-memory must be a positive number of bytes");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<RankBytes> bytes_without_cache(const WeightFormats& formats, const MemoryOptions& options, int rank,
                                              int ranks, int threads) {
  const ModelConfig& config = formats.config;
  const absl::StatusOr<ShardSpec> shard = ShardSpec::make(config, rank, ranks);
  if (!shard.ok()) return shard.status();
  const auto scratch = [&] {
    const int64_t max_context = options.max_context.value_or(config.max_position_embeddings);
    const StepBounds bounds{.device = options.device,
                            .arithmetic = options.arithmetic,
                            .max_tokens = options.max_step_tokens,
                            .max_sequences = options.max_sequences};
    const int64_t of_steps = StepScratch::bytes(config, *shard, bounds) +
                             PlacedBatch::bytes(options.max_step_tokens, options.max_sequences, max_context) +
                             options.window_bytes;
    if (options.device == Device::kCpu) return of_steps + threads * Sampler::bytes(config.vocab_size);
    const int64_t recorded =
        DecodeBatch::bytes(bounds.recorded_sequences(), max_context) +
        KvCache::padding_blocks(options.device) * KvCache::block_bytes(config, *shard, options.kv_dtype);
    const int64_t workspace = options.arithmetic == Arithmetic::kFast ? cuda::kWorkspaceBytes : 0;
    return of_steps + recorded + DeviceSampler::bytes(bounds.logit_rows(), config.vocab_size) + workspace;
  };
  return RankBytes{.weights = ModelWeights::plan(formats, *shard),
                   .scratch = options.reserve_bytes ? *options.reserve_bytes : scratch()};
}

std::string human_bytes(int64_t bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  for (; value >= 1024 && unit < 4; ++unit) value /= 1024;
  return absl::StrFormat(unit == 0 ? "%.0f %s" : "%.2f %s", value, units[unit]);
}

absl::StatusOr<MemoryPlan> plan_memory(const WeightFormats& formats, const MemoryOptions& options,
                                       const std::vector<RankResources>& ranks) {
  const ModelConfig& config = formats.config;
  if (absl::Status status = check(options, config); !status.ok()) return status;

  MemoryPlan plan;
  plan.resources = ranks;
  std::vector<int64_t> block_bytes;
  int64_t blocks = std::numeric_limits<int32_t>::max();
  const int64_t context_wanted = options.max_context.value_or(config.max_position_embeddings);
  const int64_t context_blocks = (context_wanted + kKvBlockTokens - 1) / kKvBlockTokens;
  for (int rank = 0; rank < static_cast<int>(ranks.size()); ++rank) {
    const int size = static_cast<int>(ranks.size());
    const absl::StatusOr<RankBytes> without_cache =
        bytes_without_cache(formats, options, rank, size, ranks[rank].threads);
    if (!without_cache.ok()) return without_cache.status();
    const RankBytes& bytes = *without_cache;
    block_bytes.push_back(KvCache::block_bytes(config, *ShardSpec::make(config, rank, size), options.kv_dtype));
    const int64_t usable = static_cast<int64_t>(options.usable_share * static_cast<double>(ranks[rank].memory_bytes));
    const int64_t left = usable - bytes.total();
    const int64_t kv_bytes = options.kv_memory_bytes.value_or(
        std::min(left, options.default_contexts * context_blocks * block_bytes.back()));
    if (left < kv_bytes || kv_bytes < block_bytes.back()) {
      const int64_t least = bytes.total() + std::max(options.kv_memory_bytes.value_or(0), block_bytes.back());
      return absl::ResourceExhaustedError(absl::StrFormat(
          "rank %d needs %s (weights %s, scratch %s, KV cache %s), and %s of its %s are usable: use "
          "more ranks (up to %d) or "
          "nodes, %sor give each rank at least %s",
          rank, human_bytes(least), human_bytes(bytes.weights.total()), human_bytes(bytes.scratch),
          human_bytes(least - bytes.total()), human_bytes(usable), human_bytes(ranks[rank].memory_bytes),
          config.num_key_value_heads, left > block_bytes.back() ? "lower --kv-memory, " : "",
          human_bytes(static_cast<int64_t>(static_cast<double>(least) / options.usable_share))));
    }
    blocks = std::min(blocks, kv_bytes / block_bytes.back());
    plan.ranks.push_back(bytes);
  }
  for (size_t rank = 0; rank < plan.ranks.size(); ++rank) plan.ranks[rank].kv_cache = blocks * block_bytes[rank];
  plan.kv_block_bytes_max = *std::max_element(block_bytes.begin(), block_bytes.end());

  if (options.max_context && blocks < context_blocks) {
    const std::string more =
        options.kv_memory_bytes
            ? absl::StrCat("raise --kv-memory to ", human_bytes(context_blocks * plan.kv_block_bytes_max), " per rank")
            : absl::StrCat("use more ranks (up to ", config.num_key_value_heads, ") or nodes");
    return absl::ResourceExhaustedError(
        absl::StrFormat("--max-context %d needs %d cache blocks of %d tokens, %d fit: lower it to %d or %s",
                        context_wanted, context_blocks, kKvBlockTokens, blocks, blocks * kKvBlockTokens, more));
  }
  plan.limits = {.slots = options.max_sequences,
                 .blocks = static_cast<int32_t>(blocks),
                 .block_tokens = static_cast<int32_t>(kKvBlockTokens),
                 .max_step_tokens = options.max_step_tokens,
                 .max_context = static_cast<int32_t>(std::min(context_wanted, blocks * kKvBlockTokens)),
                 .vocab_size = static_cast<int32_t>(config.vocab_size)};
  return plan;
}

std::string MemoryPlan::to_string() const {
  std::string text =
      absl::StrFormat("%-6s %12s %12s %12s %12s %12s %12s %12s %12s %12s\n", "rank", "embedding", "attention",
                      "feed forward", "lm_head", "norms+scales", "scratch", "KV cache", "total", "available");
  for (size_t r = 0; r < ranks.size(); ++r) {
    const RankBytes& b = ranks[r];
    absl::StrAppendFormat(&text, "%-6d %12s %12s %12s %12s %12s %12s %12s %12s %12s\n", r,
                          human_bytes(b.weights.embedding), human_bytes(b.weights.attention),
                          human_bytes(b.weights.feed_forward), human_bytes(b.weights.lm_head),
                          human_bytes(b.weights.norms + b.weights.scales), human_bytes(b.scratch),
                          human_bytes(b.kv_cache), human_bytes(b.total()), human_bytes(resources[r].memory_bytes));
  }
  absl::StrAppendFormat(&text,
                        "KV cache: %d tokens in %d blocks; maximum context %d tokens; up to %d sequences at once",
                        kv_tokens(), limits.blocks, limits.max_context, limits.slots);
  return text;
}

}  // namespace octet
