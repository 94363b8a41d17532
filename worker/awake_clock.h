// AwakeClock: time in which this process ran. A process that was stopped, or whose machine slept, has heard nothing of
// anybody meanwhile: watchdogs that count this time do not take its own absence for everybody else's.
#pragma once

#include <chrono>

namespace octet {

class AwakeClock {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  using Duration = std::chrono::steady_clock::duration;

  // Between two calls of at() as much as `longest_gap` may pass; more is absence. Call it several times as often.
  AwakeClock(Duration longest_gap, TimePoint now) : longest_gap_(longest_gap), last_(now) {}

  // What this clock shows when the steady clock shows `now`, which never runs back.
  TimePoint at(TimePoint now) {
    if (now - last_ > longest_gap_) absent_ += now - last_;
    last_ = now;
    return now - absent_;
  }

 private:
  const Duration longest_gap_;
  TimePoint last_;
  Duration absent_{};
};

}  // namespace octet
