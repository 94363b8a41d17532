// The watchdog's judgement, with a clock of the test's own: who is silent, which step is stuck and because of whom.
#include "coordinator/watchdog.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <vector>

#include "absl/strings/match.h"
#include "worker/standstill.h"

namespace octet {
namespace {

using namespace std::chrono_literals;
using TimePoint = Watchdog::TimePoint;

const WatchdogOptions kOptions{.floor = 5s};

Place in_collective(uint64_t step, uint64_t number) {
  return {.step = step, .in_step = true, .collective = number, .in_collective = true};
}
Place after_collective(uint64_t step, uint64_t number) { return {.step = step, .in_step = true, .collective = number}; }
Place idle_after(uint64_t step, uint64_t number) { return {.step = step, .collective = number}; }

// A group of ranks whose watchdog looks as often as it should; `silent` and `where` say what the ranks do meanwhile.
struct Watched {
  explicit Watched(int ranks, const WatchdogOptions& options = kOptions)
      : interval(options.interval()), where(ranks), silent(ranks), watchdog(options, ranks, now) {
    for (int rank = 1; rank < ranks; ++rank) watchdog.expect(rank, now);
  }

  // The first verdict within the time, and when: `now`.
  std::optional<Watchdog::Verdict> watch(Watchdog::Duration time) {
    for (const TimePoint end = now + time; now < end;) {
      now += std::min(interval, end - now);
      for (int rank = 1; rank < static_cast<int>(where.size()); ++rank) {
        if (!silent[rank]) watchdog.heard(rank, where[rank], now);
      }
      if (auto verdict = watchdog.check(where[0], unanswered, now)) return verdict;
    }
    return std::nullopt;
  }

  void run_step(int64_t tokens, Watchdog::Duration took) {
    watchdog.step_submitted(++step, tokens, now);
    EXPECT_FALSE(watch(took)) << "step " << step;
    watchdog.step_ended(now);
  }

  const Watchdog::Duration interval;
  TimePoint now = TimePoint(1000s);
  uint64_t step = 0;
  std::vector<Place> where;
  std::vector<bool> silent;
  std::vector<int> unanswered;
  Watchdog watchdog;
};

TEST(Watchdog, LetsAnIdleGroupBe) {
  Watched group(3);
  EXPECT_FALSE(group.watch(1h));
}

TEST(Watchdog, NamesARankThatGivesNoSignOfLifeAlthoughNothingRuns) {
  Watched group(3);
  EXPECT_FALSE(group.watch(60s));
  group.silent[2] = true;
  const TimePoint since = group.now;
  const auto verdict = group.watch(60s);
  ASSERT_TRUE(verdict);
  EXPECT_EQ(verdict->culprits, std::vector<int>{2});
  EXPECT_TRUE(absl::StrContains(verdict->text, "rank 2 gave no sign of life for 5.0 s")) << verdict->text;
  EXPECT_LE(group.now - since, kOptions.floor);
}

TEST(Watchdog, NamesEverySilentRank) {
  Watched group(4);
  group.silent[1] = group.silent[3] = true;
  const auto verdict = group.watch(60s);
  ASSERT_TRUE(verdict);
  EXPECT_EQ(verdict->culprits, (std::vector<int>{1, 3}));
}

TEST(Watchdog, ExpectsNothingOfRanksThatMayGo) {
  Watched group(3);
  group.silent[2] = true;
  group.watchdog.excuse(2);
  EXPECT_FALSE(group.watch(1h));
}

TEST(Watchdog, BlamesTheSilentRankAndNotThoseWhoWaitForIt) {
  Watched group(3);
  for (int i = 0; i < 100; ++i) group.run_step(1, 1ms);
  group.watchdog.step_submitted(101, 1, group.now);
  group.where = {in_collective(101, 812), in_collective(101, 812), after_collective(101, 811)};
  EXPECT_FALSE(group.watch(1s));
  group.silent[2] = true;
  const auto verdict = group.watch(60s);
  ASSERT_TRUE(verdict);
  EXPECT_EQ(verdict->culprits, std::vector<int>{2});
}

TEST(Watchdog, NamesTheRankThatIsBehindTheOthersInAStepThatDoesNotEnd) {
  Watched group(4);
  for (int i = 0; i < 100; ++i) group.run_step(1, 10ms);
  group.watchdog.step_submitted(57, 1, group.now);
  group.where = {in_collective(57, 812), in_collective(57, 812), after_collective(57, 811), in_collective(57, 812)};
  const TimePoint since = group.now;
  const auto verdict = group.watch(60s);
  ASSERT_TRUE(verdict);
  EXPECT_EQ(verdict->culprits, std::vector<int>{2});
  EXPECT_TRUE(absl::StrContains(verdict->text,
                                "rank 2 has not entered collective 812 of step 57, in which ranks 0, 1 and 3 wait: it "
                                "is in step 57, after collective 811"))
      << verdict->text;
  EXPECT_LE(group.now - since, kOptions.floor);
}

TEST(Watchdog, NamesRankZeroToo) {
  Watched group(3);
  group.run_step(1, 10ms);
  group.watchdog.step_submitted(57, 1, group.now);
  group.where = {after_collective(57, 811), in_collective(57, 812), in_collective(57, 812)};
  const auto verdict = group.watch(10min);
  ASSERT_TRUE(verdict);
  EXPECT_EQ(verdict->culprits, std::vector<int>{0});
}

TEST(Watchdog, NamesThoseWhoHaveNotAnsweredWhenNobodyIsBehind) {
  Watched group(2);
  group.run_step(1, 10ms);
  group.watchdog.step_submitted(57, 1, group.now);
  group.where = {idle_after(57, 900), idle_after(57, 900)};
  group.unanswered = {1};
  const auto verdict = group.watch(10min);
  ASSERT_TRUE(verdict);
  EXPECT_EQ(verdict->culprits, std::vector<int>{1});
}

TEST(Watchdog, IsPatientWithTheFirstStepAndWithStepsLargerThanAnyBefore) {
  Watched group(2);
  group.run_step(1, 9min);
  group.run_step(512, 59min);
}

TEST(Watchdog, DerivesTheDeadlineFromStepsOfTheSameSize) {
  // Decode steps of a second: twenty of them are too long.
  Watched group(2);
  for (int i = 0; i < 200; ++i) group.run_step(4, 1s);
  group.watchdog.step_submitted(201, 5, group.now);
  TimePoint since = group.now;
  ASSERT_TRUE(group.watch(10min));
  EXPECT_GE(group.now - since, 20s);
  EXPECT_LE(group.now - since, 22s);
  // Beyond the cap, unless the steps themselves take as long.
  Watched slow(2);
  for (int i = 0; i < 20; ++i) slow.run_step(4, 10s);
  slow.watchdog.step_submitted(21, 4, slow.now);
  since = slow.now;
  ASSERT_TRUE(slow.watch(10min));
  EXPECT_LE(slow.now - since, 62s);
  Watched slower(2);
  for (int i = 0; i < 20; ++i) slower.run_step(4, 100s);
  slower.watchdog.step_submitted(21, 4, slower.now);
  EXPECT_FALSE(slower.watch(200s));
}

TEST(Watchdog, CountsAStepFromTheEndOfTheOneBefore) {
  Watched group(2);
  for (int i = 0; i < 200; ++i) group.run_step(1, 1ms);
  group.watchdog.step_submitted(201, 1, group.now);
  group.watchdog.step_submitted(202, 1, group.now);  // ahead
  EXPECT_FALSE(group.watch(4s));
  group.watchdog.step_ended(group.now);
  EXPECT_FALSE(group.watch(4s));
}

TEST(Watchdog, DoesNotTakeItsOwnAbsenceForSilenceOrForASlowStep) {
  Watched group(3);
  for (int i = 0; i < 200; ++i) group.run_step(1, 1ms);
  group.watchdog.step_submitted(201, 1, group.now);
  group.now += 1h;  // stopped
  EXPECT_FALSE(group.watch(4s));
  group.silent[1] = true;  // and awake as before
  const auto verdict = group.watch(10s);
  ASSERT_TRUE(verdict);
}

TEST(StepTimes, ScaleUpFromSmallerStepsAndForgetOldOnes) {
  StepTimes times;
  EXPECT_FALSE(times.usual(1));
  times.add(1, 10ms);
  EXPECT_EQ(times.usual(1), 10ms);
  EXPECT_EQ(times.usual(256), 2560ms);
  times.add(300, 1s);
  EXPECT_EQ(times.usual(256), 1s);
  EXPECT_EQ(times.usual(0), 10ms);
  for (int i = 0; i < 200; ++i) times.add(1, 1ms);
  EXPECT_EQ(times.usual(1), 1ms);
}

TEST(Standstill, ComparesPlacesOnTheCommonWay) {
  const auto behind = [](const Place& a, const Place& b) {
    const std::vector<RankPlace> ranks = {{0, a}, {1, b}};
    return find_standstill(ranks).behind == std::vector<int>{0};
  };
  EXPECT_TRUE(behind(after_collective(5, 9), in_collective(5, 10)));
  EXPECT_TRUE(behind(in_collective(5, 9), after_collective(5, 9)));
  EXPECT_TRUE(behind(in_collective(5, 9), in_collective(5, 10)));
  EXPECT_TRUE(behind(after_collective(5, 9), idle_after(5, 9)));
  EXPECT_TRUE(behind(idle_after(5, 9), after_collective(6, 9)));
  EXPECT_FALSE(behind(idle_after(5, 9), idle_after(5, 9)));
}

TEST(Standstill, IsToldInASentence) {
  const std::vector<RankPlace> one_missing = {
      {0, in_collective(3, 7)}, {1, after_collective(3, 6)}, {2, in_collective(3, 7)}};
  EXPECT_EQ(to_string(find_standstill(one_missing)),
            "rank 1 has not entered collective 7 of step 3, in which ranks 0 and 2 wait: it is in step 3, after "
            "collective 6");
  const std::vector<RankPlace> all_wait = {{0, in_collective(3, 7)}, {1, in_collective(3, 7)}};
  EXPECT_EQ(to_string(find_standstill(all_wait)),
            "no rank is behind the others: ranks 0 and 1 are in collective 7 of step 3");
  const std::vector<RankPlace> late = {{0, idle_after(3, 7)}, {1, after_collective(3, 7)}};
  EXPECT_EQ(to_string(find_standstill(late)),
            "rank 1 is in step 3, after collective 7 while rank 0 is idle after step 3");
}

}  // namespace
}  // namespace octet
