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
    options.memory = {.kv_memory_bytes = 4 << 20, .max_context = 64, .max_sequences = 5, .max_step_tokens = 32};
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
  EXPECT_EQ(error_of(opened(4, {0}, {.slot = 4, .tokens = {1}, .sample = true})), "");
  StepPlan both;
  both.run = {{.slot = 4, .position = 1, .tokens = {1}, .from_last_sample = true}};
  EXPECT_NE(error_of(both), "") << "tokens beside a sample";
}

TEST_F(WorkerTest, RefusesOpenSlotsTwiceAndClosedOnesAtAll) {
  EXPECT_EQ(error_of(opened(0, {0}, {.slot = 0, .tokens = {1}})), "");
  EXPECT_NE(error_of(opened(0, {1}, {.slot = 0, .tokens = {1}})), "") << "open already";
  StepPlan close;
  close.close = {2};
  EXPECT_NE(error_of(close), "") << "never opened";
}

TEST_F(WorkerTest, RefusesSlotsWhoseSamplingNamesWhatIsNotThere) {
  const int32_t vocab = limits().vocab_size;
  int32_t slot = 0;
  auto error_of_open = [&](const SlotOpen& open) {
    StepPlan plan;
    plan.open = {open};
    plan.open[0].slot = slot;
    const std::string error = error_of(plan);
    if (error.empty()) {
      StepPlan close;
      close.close = {slot};
      EXPECT_EQ(error_of(close), "");
    }
    return error;
  };
  EXPECT_NE(error_of_open({.sampling = {.logit_bias = {{.token = vocab}}}}), "");
  EXPECT_NE(error_of_open({.sampling = {.logit_bias = {{.token = -1}}}}), "");
  EXPECT_NE(error_of_open({.sampling = {.allowed_token_ids = {0, vocab}}}), "");
  EXPECT_NE(error_of_open({.sampling = {.bad_words = {{1, -1}}}}), "");
  EXPECT_NE(error_of_open({.sampling = {.bad_words = {{}}}}), "");
  EXPECT_NE(error_of_open({.sampling = {.end_token_ids = {vocab}}}), "");
  EXPECT_NE(error_of_open({.position = -1}), "");
  EXPECT_NE(error_of_open({.position = limits().max_context}), "");
  EXPECT_NE(error_of_open({.prompt_tokens = -1}), "");
  const SlotSampling reads{.presence_penalty = 1.0f};
  EXPECT_NE(error_of_open({.sampling = reads, .position = 2, .history = {1}}), "") << "too short";
  EXPECT_NE(error_of_open({.sampling = reads, .position = 2, .history = {1, vocab}}), "");
  EXPECT_NE(error_of_open({.position = 2, .history = {1, 2}}), "") << "nobody reads it";
  EXPECT_EQ(error_of_open({.sampling = reads, .position = 2, .history = {1, 2}}), "");
  EXPECT_EQ(error_of_open({.position = 2}), "");
}

TEST_F(WorkerTest, RefusesRunsBehindPositionsThatNoBlockHolds) {
  StepPlan plan = opened(0, {3}, {.slot = 0, .position = 17, .tokens = {1}});
  plan.open[0].position = 17;
  EXPECT_NE(error_of(plan), "") << "one block of two";
}

TEST_F(WorkerTest, RefusesCopiesOfBlocksThatAreNotThereOrOntoThemselves) {
  for (const BlockCopy& copy : {BlockCopy{.from = -1, .to = 1},
                                {.from = 1, .to = -1},
                                {.from = limits().blocks, .to = 1},
                                {.from = 1, .to = limits().blocks},
                                {.from = 1, .to = 1}}) {
    StepPlan plan;
    plan.copies = {copy};
    EXPECT_NE(error_of(plan), "") << copy.from << " to " << copy.to;
  }
}

TEST_F(WorkerTest, RefusesMasksThatFitNoSample) {
  const size_t words = (limits().vocab_size + 31) / 32;
  StepPlan plan = opened(0, {0}, {.slot = 0, .tokens = {1}});
  EXPECT_EQ(error_of(plan), "");
  auto error_of_mask = [&](bool sample, const std::vector<SlotMask>& masks) {
    StepPlan close;
    close.close = {0};
    EXPECT_EQ(error_of(close), "");
    StepPlan plan = opened(0, {0}, {.slot = 0, .tokens = {1}, .sample = sample});
    plan.masks = masks;
    return error_of(plan);
  };
  const std::vector<uint32_t> good(words, 1), empty(words, 0), short_one(words - 1, 1);
  EXPECT_EQ(error_of_mask(true, {{.slot = 0, .words = good}}), "");
  EXPECT_NE(error_of_mask(false, {{.slot = 0, .words = good}}), "") << "nothing is sampled";
  EXPECT_NE(error_of_mask(true, {{.slot = 0, .words = empty}}), "");
  EXPECT_NE(error_of_mask(true, {{.slot = 0, .words = short_one}}), "");
  EXPECT_NE(error_of_mask(true, {{.slot = 0, .words = good}, {.slot = 0, .words = good}}), "") << "two masks";
  EXPECT_NE(error_of_mask(true, {{.slot = 99, .words = good}}), "");
  EXPECT_NE(error_of_mask(true, {{.slot = 1, .words = good}}), "") << "not open";
}

TEST_F(WorkerTest, RefusesScoresOfTokensOutsideTheVocabulary) {
  const int32_t vocab = limits().vocab_size;
  EXPECT_NE(error_of(opened(0, {0}, {.slot = 0, .tokens = {1}, .score = true, .next_token = vocab})), "");
  EXPECT_NE(error_of(opened(1, {0}, {.slot = 1, .tokens = {1}, .score = true, .next_token = -2})), "");
  EXPECT_NE(error_of(opened(2, {0}, {.slot = 2, .tokens = {1}, .score = true, .score_top = -1})), "");
}

TEST_F(WorkerTest, ScoresInTheOrderOfRunsAndPositionsAndSamplesBeside) {
  StepPlan plan = opened(0, {0}, {.slot = 0, .tokens = {1, 2, 3}, .score = true, .next_token = 9});
  const StepPlan other = opened(1, {1}, {.slot = 1, .tokens = {4, 5}, .sample = true, .score = true, .score_top = 2});
  plan.open.push_back(other.open[0]);
  plan.blocks.push_back(other.blocks[0]);
  plan.run.push_back(other.run[0]);
  plan.step = ++step_;
  const absl::StatusOr<StepResult> result = group_->run(plan);
  ASSERT_TRUE(result.ok() && result->error.empty());
  ASSERT_EQ(result->scored.size(), 4u);
  const int32_t slots[] = {0, 0, 0, 1}, tokens[] = {2, 3, 9, 5};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(result->scored[i].slot, slots[i]);
    EXPECT_EQ(result->scored[i].chosen.token, tokens[i]);
    EXPECT_EQ(result->scored[i].top.size(), i == 3 ? 2u : 0u);
  }
  ASSERT_EQ(result->sampled.size(), 1u);
  EXPECT_EQ(result->sampled[0].slot, 1);
}

TEST_F(WorkerTest, AMaskLastsOneStep) {
  const size_t words = (limits().vocab_size + 31) / 32;
  const auto unmasked = drive(*group_, limits(), {{.prompt = {5, 6, 7}, .max_tokens = 2}});
  const int32_t first = unmasked[0].tokens[0].chosen.token, allowed = first == 40 ? 41 : 40;
  DrivenRequest request{.prompt = {5, 6, 7}, .max_tokens = 2};
  request.mask = [&](int32_t i) {
    std::vector<uint32_t> mask(i == 0 ? words : 0);
    if (i == 0) mask[allowed / 32] = 1u << (allowed % 32);
    return mask;
  };
  const auto masked = drive(*group_, limits(), {request});
  EXPECT_EQ(masked[0].tokens[0].chosen.token, allowed);
  const auto forced = teacher_forced(*group_, limits(), {5, 6, 7, allowed}, {4}, 1);
  EXPECT_EQ(masked[0].tokens[1].chosen, forced[0].chosen) << "the next token is anybody's";
}

// Slot 1 continues behind slot 0's block: over the block itself, over a copy, and over another sequence's.
TEST_F(WorkerTest, ReadsTheBlocksThatItIsGivenAndCopies) {
  const std::vector<int32_t> tokens = {5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20};
  StepPlan plan = opened(0, {0}, {.slot = 0, .tokens = tokens});
  EXPECT_EQ(error_of(plan), "");
  plan = opened(1, {1}, {.slot = 1, .tokens = std::vector<int32_t>(16, 3)});
  EXPECT_EQ(error_of(plan), "");
  auto continued_over = [&](int32_t block, const std::vector<BlockCopy>& copies) {
    StepPlan plan = opened(2, {block, 5}, {.slot = 2, .position = 16, .tokens = {42}, .sample = true});
    plan.step = ++step_;
    plan.open[0].position = 16;
    plan.copies = copies;
    const absl::StatusOr<StepResult> result = group_->run(plan);
    EXPECT_TRUE(result.ok() && result->error.empty());
    StepPlan close;
    close.close = {2};
    EXPECT_EQ(error_of(close), "");
    return result->sampled.at(0).chosen;
  };
  std::vector<int32_t> whole = tokens;
  whole.push_back(42);
  const TokenLogprob shared = continued_over(0, {});
  EXPECT_EQ(continued_over(7, {{.from = 0, .to = 7}}), shared);
  EXPECT_NE(continued_over(1, {}), shared) << "the test is blind";
  EXPECT_EQ(continued_over(1, {{.from = 1, .to = 8}, {.from = 0, .to = 1}}), shared);
  EXPECT_NE(continued_over(8, {}), shared);
  StepPlan close;
  close.close = {0, 1};
  EXPECT_EQ(error_of(close), "");
  EXPECT_EQ(teacher_forced(*group_, limits(), whole, {17}, 0)[0].chosen, shared);
}

TEST_F(WorkerTest, SaysWhatAStepCostEachRank) {
  StepPlan plan = opened(0, {0}, {.slot = 0, .tokens = {1, 2, 3}, .sample = true});
  plan.step = ++step_;
  const absl::StatusOr<StepResult> result = group_->run(plan);
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->timings.size(), 2u);
  for (const StepTiming& timing : result->timings) {
    EXPECT_GT(timing.collective_seconds, 0.0);
    EXPECT_GT(timing.run_seconds, timing.collective_seconds);
  }
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
