// Plans before loading: refusals name what would fit, and a plan's bytes are what loading then takes.
#include "worker/memory_plan.h"

#include <gtest/gtest.h>

#include "absl/strings/match.h"
#include "coordinator/thread_worker_group.h"
#include "kernels/cuda/module.h"
#include "tests/random_model.h"
#include "worker/sampler.h"

namespace octet {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;

class MemoryPlanTest : public testing::Test {
 protected:
  MemoryPlanTest() : checkpoint_(*Checkpoint::open(write_random_model({}))) {}
  absl::StatusOr<MemoryPlan> plan(const MemoryOptions& options, int ranks = 2, int64_t bytes = kGiB) {
    return plan_memory(weight_formats(checkpoint_), options,
                       std::vector<RankResources>(ranks, {.memory_bytes = bytes}));
  }
  Checkpoint checkpoint_;
};

TEST_F(MemoryPlanTest, GivesEveryRankTheSameLimits) {
  const auto plan = this->plan({.kv_memory_bytes = 1 << 20}, 3);
  ASSERT_TRUE(plan.ok()) << plan.status();
  // The ranks with three slices set the number of blocks; the one with two needs less for as many.
  EXPECT_EQ(plan->limits.blocks, (1 << 20) / plan->kv_block_bytes_max);
  EXPECT_GT(plan->ranks[0].kv_cache, plan->ranks[2].kv_cache);
  EXPECT_EQ(plan->ranks[0].kv_cache / 3, plan->ranks[2].kv_cache / 2);
}

TEST_F(MemoryPlanTest, PlansTheBytesThatLoadingTakes) {
  for (int ranks : {1, 3, 8}) {
    ThreadGroupOptions options;
    options.ranks = ranks;
    options.stream.spin = false;
    options.memory.kv_memory_bytes = 1 << 20;
    options.available_bytes = kGiB;
    auto group = ThreadWorkerGroup::start(checkpoint_, options);
    ASSERT_TRUE(group.ok()) << group.status();
    for (int rank = 0; rank < ranks; ++rank) {
      EXPECT_EQ(static_cast<int64_t>((*group)->weights(rank).size()), (*group)->plan().ranks[rank].weights.total());
    }
  }
}

TEST_F(MemoryPlanTest, CountsASamplerForEachThread) {
  const auto scratch = [&](int threads) {
    return plan_memory(weight_formats(checkpoint_), {}, {{.memory_bytes = kGiB, .threads = threads}})->ranks[0].scratch;
  };
  EXPECT_EQ(scratch(3) - scratch(1), 2 * Sampler::bytes(checkpoint_.config().vocab_size));
}

TEST_F(MemoryPlanTest, CountsOnAGpuOnlyWhatLiesThere) {
  const auto scratch = [&](int threads, Arithmetic arithmetic) {
    return plan_memory(weight_formats(checkpoint_), {.device = Device::kCuda, .arithmetic = arithmetic},
                       {{.memory_bytes = kGiB, .threads = threads}})
        ->ranks[0]
        .scratch;
  };
  EXPECT_EQ(scratch(3, Arithmetic::kReproducible), scratch(1, Arithmetic::kReproducible)) << "samplers are the host's";
  EXPECT_GT(scratch(1, Arithmetic::kFast), cuda::kWorkspaceBytes);
}

TEST_F(MemoryPlanTest, ShortensTheContextToWhatTheCacheHolds) {
  const auto plan = this->plan({.kv_memory_bytes = 1 << 20});
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->limits.max_context, std::min<int64_t>(plan->kv_tokens(), 4096));
}

TEST_F(MemoryPlanTest, RefusesWhatCannotFitAndSaysWhatWould) {
  const auto too_small = plan({}, 2, 1 << 20);
  EXPECT_EQ(too_small.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(absl::StrContains(too_small.status().message(), "give each rank at least")) << too_small.status();

  const auto context = plan({.kv_memory_bytes = 1 << 18, .max_context = 4000});
  EXPECT_EQ(context.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(absl::StrContains(context.status().message(), "--kv-memory")) << context.status();
}

TEST_F(MemoryPlanTest, RefusesOptionsThatMakeNoSense) {
  EXPECT_EQ(plan({.max_context = 1}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(plan({.max_context = 5000}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(plan({.kv_memory_bytes = 0}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(plan({.max_sequences = 0}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(plan({.max_sequences = 64, .max_step_tokens = 63}).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace octet
