// Faults on purpose: when they strike, and that nothing else changes.
#include "launch/fault.h"

#include <gtest/gtest.h>
#include <signal.h>

#include <string>

#include "absl/strings/match.h"

namespace octet {
namespace {

StepPlan plan_of(uint64_t step, std::vector<int32_t> tokens) {
  StepPlan plan;
  plan.step = step;
  plan.run = {{.slot = 0, .tokens = std::move(tokens)}};
  return plan;
}

WorkerFunction faulty(const std::string& fault, int rank) {
  const absl::StatusOr<Fault> parsed = parse_fault(fault);
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  return with_fault(*parsed, rank, [](const StepPlan& plan) { return StepResult{.step = plan.step}; });
}

TEST(Fault, StrikesOneRankFromAStepOn) {
  EXPECT_EQ(faulty("rank=1,step=20,kind=exit", 1)(plan_of(19, {5})).step, 19u);
  EXPECT_EQ(faulty("rank=1,step=20,kind=exit", 0)(plan_of(20, {5})).step, 20u);
  EXPECT_EXIT(faulty("rank=1,step=20,kind=exit", 1)(plan_of(21, {5})), testing::ExitedWithCode(7), "");
}

TEST(Fault, StrikesWhereATokenComes) {
  EXPECT_EQ(faulty("token=123,kind=segv", 0)(plan_of(1, {122, 124})).step, 1u);
  EXPECT_EXIT(faulty("token=123,kind=segv", 0)(plan_of(1, {122, 123})), testing::KilledBySignal(SIGSEGV), "");
  EXPECT_DEATH(faulty("token=123,kind=check", 0)(plan_of(1, {123})), "an injected fault");
}

TEST(Fault, LetsRanksStop) {
  StepPlan stop;
  stop.step = 30;
  stop.stop = true;
  EXPECT_EQ(faulty("step=20,kind=exit", 0)(stop).step, 30u);
}

TEST(Fault, SaysWhatIsWrongWithIt) {
  for (const char* text : {"", "rank=1,kind=segv", "step=1,token=2,kind=segv", "step=x,kind=segv", "step=1,kind=boom",
                           "step=1,node=2", "step"}) {
    const absl::StatusOr<Fault> fault = parse_fault(text);
    EXPECT_EQ(fault.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_TRUE(absl::StrContains(fault.status().message(), "found \"")) << fault.status();
  }
}

}  // namespace
}  // namespace octet
