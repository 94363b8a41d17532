// Watchdog: rank 0's judgement of whether its ranks live and its steps come to an end. Pure: it is told what happened
// and what time it is. Its owner's mutex guards it.
//
// Two ways to fail: a rank that gives no sign of life for `floor` (its process is stopped, or its node hangs), and a
// step that takes many times longer than such steps do (a rank is stuck in it, however lively its process is).
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "worker/awake_clock.h"
#include "worker/flight.h"

namespace octet {

struct WatchdogOptions {
  using Duration = AwakeClock::Duration;
  Duration floor{};                           // the least that counts as too long; zero: no watchdog
  Duration cap = std::chrono::minutes(1);     // of the factor's effect
  Duration first = std::chrono::minutes(10);  // for a step when nothing is known of any
  double factor = 20;                         // so many times the 99th percentile of such steps is too long

  // How often ranks give signs of life, and how often somebody looks.
  Duration interval() const { return floor / 10; }
  // Then whoever looks for the last time before `floor` is over finds what is missing.
  Duration limit() const { return floor - interval(); }
};

// How long steps take, by their tokens: a prompt's step takes many times longer than a decode step.
class StepTimes {
 public:
  using Duration = AwakeClock::Duration;
  void add(int64_t tokens, Duration took);
  // The 99th percentile of recent steps of about so many tokens; of fewer, scaled up, or of more when there are none.
  std::optional<Duration> usual(int64_t tokens) const;

 private:
  static constexpr size_t kRemembered = 128;
  static constexpr size_t kClasses = 40;
  // Class c: steps of 2^(c-1) to 2^c - 1 tokens.
  std::array<std::deque<Duration>, kClasses> classes_;
};

class Watchdog {
 public:
  using TimePoint = AwakeClock::TimePoint;
  using Duration = AwakeClock::Duration;

  struct Verdict {
    std::vector<int> culprits;
    std::string text;     // a sentence that names them and what they did not do
    bool silent = false;  // they give no sign of life: the machine's doing, and not the work's
  };

  Watchdog(const WatchdogOptions& options, int32_t ranks, TimePoint now);

  // Rank r is here, and owes signs of life until it may go. Rank 0, which is us, owes none.
  void expect(int32_t rank, TimePoint now);
  void heard(int32_t rank, const Place& place, TimePoint now);
  void excuse(int32_t rank);

  // Steps end in the order in which they were submitted, and run one after the other.
  void step_submitted(uint64_t step, int64_t tokens, TimePoint now);
  void step_ended(TimePoint now);

  // To be called every interval(). own: rank 0's place. unanswered: the ranks that have not answered the oldest
  // step.
  std::optional<Verdict> check(const Place& own, std::span<const int> unanswered, TimePoint now);

 private:
  struct Rank {
    bool expected = false;
    TimePoint heard;
    Place place;
  };
  struct Step {
    uint64_t step = 0;
    int64_t tokens = 0;
    TimePoint begin;  // of the oldest: when it was submitted or the one before ended
  };

  std::optional<Verdict> find_silent(TimePoint now) const;
  std::optional<Verdict> find_stuck(const Place& own, std::span<const int> unanswered, TimePoint now) const;
  Duration longest(int64_t tokens) const;
  double seconds_since_heard(int rank, TimePoint now) const;

  const WatchdogOptions options_;
  AwakeClock clock_;
  std::vector<Rank> ranks_;
  std::deque<Step> steps_;
  StepTimes times_;
};

}  // namespace octet
