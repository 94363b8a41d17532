#include "launch/inspect.h"

#include <cstdio>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "worker/checkpoint/checkpoint.h"
#include "worker/checkpoint/inspect.h"
#include "worker/kv_cache.h"
#include "worker/memory_plan.h"
#include "worker/model/shard_spec.h"
#include "worker/model/weights.h"

namespace octet {
namespace {

struct InspectOptions {
  std::string model;
  int ranks = 0;
};

absl::Status print_ranks(const Checkpoint& checkpoint, int ranks) {
  const WeightFormats formats = weight_formats(checkpoint);
  std::printf("\n%-5s %-8s %12s %12s %13s %12s %13s %12s %16s\n", "rank", "slices", "embedding", "attention",
              "feed forward", "lm_head", "norms+scales", "weights", "BF16 KV B/token");
  for (int rank = 0; rank < ranks; ++rank) {
    const absl::StatusOr<ShardSpec> shard = ShardSpec::make(checkpoint.config(), rank, ranks);
    if (!shard.ok()) return shard.status();
    const WeightBytes bytes = ModelWeights::plan(formats, *shard);
    const SliceRun run = shard->run();
    const std::string slices = std::to_string(run.first) + ".." + std::to_string(run.first + run.count - 1);
    std::printf(
        "%-5d %-8s %12s %12s %13s %12s %13s %12s %16lld\n", rank, slices.c_str(), human_bytes(bytes.embedding).c_str(),
        human_bytes(bytes.attention).c_str(), human_bytes(bytes.feed_forward).c_str(),
        human_bytes(bytes.lm_head).c_str(), human_bytes(bytes.norms + bytes.scales).c_str(),
        human_bytes(bytes.total()).c_str(),
        static_cast<long long>(KvCache::block_bytes(checkpoint.config(), *shard, DType::kBF16) / kKvBlockTokens));
  }
  return absl::OkStatus();
}

int run_inspect(const InspectOptions& options) {
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(options.model);
  absl::Status status = checkpoint.status();
  if (status.ok()) {
    std::fputs(to_text(summarize(*checkpoint)).c_str(), stdout);
    if (options.ranks > 0) status = print_ranks(*checkpoint, options.ranks);
  }
  if (!status.ok()) std::fprintf(stderr, "octet inspect: %s\n", std::string(status.message()).c_str());
  return status.ok() ? 0 : 1;
}

}  // namespace

void add_inspect_command(CLI::App& app, int* exit_code) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* command =
      app.add_subcommand("inspect", "Say what a checkpoint is: architecture, recipe, bytes, bytes per rank");
  command->add_option("DIR", options->model, "A Hugging Face directory with safetensors")->required();
  command->add_option("--ranks", options->ranks, "Also what each of this many ranks would hold")
      ->check(CLI::Range(1, 1024));
  command->callback([options, exit_code] { *exit_code = run_inspect(*options); });
}

}  // namespace octet
