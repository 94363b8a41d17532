// A worker's door: plans that break their contract come back as errors, the same on every rank, and hurt nobody.
#include "worker/worker.h"

#include <gtest/gtest.h>

#include "coordinator/thread_worker_group.h"
#include "tests/plan_driver.h"
#include "tests/random_model.h"

namespace octet {
namespace {

class WorkerTest : public testing::Test {
 protected:
  WorkerTest() : checkpoint_(*Checkpoint::open(write_random_model({}))) {
    ThreadGroupOptions options;
    options.ranks = 2;
    options.stream = {.threads = 1, .isa = best_isa(), .spin = false};
    options.memory = {.kv_memory_bytes = 4 << 20, .max_context = 64, .max_sequences = 4, .max_step_tokens = 32};
    options.available_bytes = int64_t{1} << 30;
    auto group = ThreadWorkerGroup::start(checkpoint_, options);
    EXPECT_TRUE(group.ok()) << group.status();
    group_ = std::move(*group);
  }

  const WorkerLimits& limits() const { return group_->plan().limits; }

  std::string error_of(StepPlan plan) {
    plan.step = ++step_;
    const absl::StatusOr<StepResult> result = group_->run(plan);
    EXPECT_TRUE(result.ok()) << result.status();
    return result.ok() ? result->error : "";
  }

  Checkpoint checkpoint_;
  std::unique_ptr<ThreadWorkerGroup> group_;
  uint64_t step_ = 0;
};

StepPlan opened(int32_t slot, const std::vector<int32_t>& blocks, SlotTokens run) {
  StepPlan plan;
  plan.open = {{.slot = slot, .sampling = {}}};
  for (const int32_t block : blocks) plan.blocks.push_back({.slot = slot, .block = block});
  plan.run = {std::move(run)};
  return plan;
}

TEST_F(WorkerTest, RunsAGoodPlan) {
  EXPECT_EQ(error_of(opened(0, {0}, {.slot = 0, .position = 0, .tokens = {1, 2, 3}, .sample = true})), "");
}

TEST_F(WorkerTest, RefusesWhatWouldIndexOutsideItsMemory) {
  EXPECT_NE(error_of(opened(99, {0}, {.slot = 99, .tokens = {1}})), "");
  EXPECT_NE(error_of(opened(-1, {0}, {.slot = -1, .tokens = {1}})), "");
  EXPECT_NE(error_of(opened(0, {limits().blocks}, {.slot = 0, .tokens = {1}})), "");
  EXPECT_NE(error_of(opened(1, {-1}, {.slot = 1, .tokens = {1}})), "");
  EXPECT_NE(error_of(opened(2, {0}, {.slot = 2, .tokens = {limits().vocab_size}})), "");
  EXPECT_NE(error_of(opened(3, {0}, {.slot = 3, .tokens = {-1}})), "");
}

TEST_F(WorkerTest, RefusesRunsThatDoNotContinueTheirSequence) {
  EXPECT_NE(error_of(opened(0, {0}, {.slot = 0, .position = 1, .tokens = {1}})), "") << "a gap";
  EXPECT_NE(error_of(opened(1, {}, {.slot = 1, .tokens = {1}})), "") << "no block";
  EXPECT_NE(error_of(opened(2, {0}, {.slot = 2, .from_last_sample = true})), "") << "nothing sampled yet";
  EXPECT_NE(error_of(opened(3, {0}, {.slot = 3, .tokens = {}})), "") << "no token";
}

TEST_F(WorkerTest, RefusesOpenSlotsTwiceAndClosedOnesAtAll) {
  EXPECT_EQ(error_of(opened(0, {0}, {.slot = 0, .tokens = {1}})), "");
  EXPECT_NE(error_of(opened(0, {1}, {.slot = 0, .tokens = {1}})), "") << "open already";
  StepPlan close;
  close.close = {2};
  EXPECT_NE(error_of(close), "") << "never opened";
}

TEST_F(WorkerTest, RefusesMoreTokensThanAStepHolds) {
  EXPECT_NE(error_of(opened(0, {0, 1, 2}, {.slot = 0, .tokens = std::vector<int32_t>(33, 1)})), "");
}

TEST_F(WorkerTest, ServesOnAfterARefusedPlan) {
  const std::vector<DrivenRequest> request = {{.prompt = {5, 6, 7}, .max_tokens = 4}};
  const auto before = drive(*group_, limits(), request);
  StepPlan bad;
  bad.close = {3};
  EXPECT_NE(error_of(bad), "");
  EXPECT_EQ(difference(before[0], drive(*group_, limits(), request)[0]), "");
}

}  // namespace
}  // namespace octet
