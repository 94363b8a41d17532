#include "coordinator/watchdog.h"

#include <algorithm>
#include <bit>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/check.h"
#include "worker/standstill.h"

namespace octet {
namespace {

double seconds(AwakeClock::Duration duration) { return std::chrono::duration<double>(duration).count(); }

AwakeClock::Duration times(double factor, AwakeClock::Duration duration) {
  return std::chrono::duration_cast<AwakeClock::Duration>(factor * duration);
}

AwakeClock::Duration percentile_99(std::deque<AwakeClock::Duration> values) {
  const auto place = values.begin() + static_cast<int64_t>(0.99 * static_cast<double>(values.size()));
  std::nth_element(values.begin(), place, values.end());
  return *place;
}

}  // namespace

void StepTimes::add(int64_t tokens, Duration took) {
  const size_t c = std::bit_width(static_cast<uint64_t>(tokens));
  OCTET_CHECK(tokens >= 0 && c < kClasses, "a step has a number of tokens");
  classes_[c].push_back(took);
  if (classes_[c].size() > kRemembered) classes_[c].pop_front();
}

std::optional<StepTimes::Duration> StepTimes::usual(int64_t tokens) const {
  const size_t own = std::bit_width(static_cast<uint64_t>(tokens));
  for (size_t c = std::min(own, kClasses - 1) + 1; c-- > 0;) {
    if (!classes_[c].empty()) return percentile_99(classes_[c]) * (int64_t{1} << (own - c));
  }
  for (size_t c = own + 1; c < kClasses; ++c) {
    if (!classes_[c].empty()) return percentile_99(classes_[c]);
  }
  return std::nullopt;
}

// Half the floor: checks come far more often, and an absence shorter than that cannot make anybody seem silent.
Watchdog::Watchdog(const WatchdogOptions& options, int32_t ranks, TimePoint now)
    : options_(options), clock_(options.floor / 2, now), ranks_(ranks) {}

void Watchdog::expect(int32_t rank, TimePoint now) {
  ranks_[rank].expected = true;
  ranks_[rank].heard = clock_.at(now);
}

void Watchdog::heard(int32_t rank, const Place& place, TimePoint now) {
  ranks_[rank].heard = clock_.at(now);
  ranks_[rank].place = place;
}

void Watchdog::excuse(int32_t rank) { ranks_[rank].expected = false; }

void Watchdog::step_submitted(uint64_t step, int64_t tokens, TimePoint now) {
  steps_.push_back({.step = step, .tokens = tokens, .begin = clock_.at(now)});
}

void Watchdog::step_ended(TimePoint now) {
  const TimePoint end = clock_.at(now);
  times_.add(steps_.front().tokens, end - steps_.front().begin);
  steps_.pop_front();
  if (!steps_.empty()) steps_.front().begin = end;
}

std::optional<Watchdog::Verdict> Watchdog::check(const Place& own, std::span<const int> unanswered, TimePoint now) {
  const TimePoint awake = clock_.at(now);
  // Silence first: it explains a stuck step, not the other way round.
  std::optional<Verdict> verdict = find_silent(awake);
  return verdict ? verdict : find_stuck(own, unanswered, awake);
}

std::optional<Watchdog::Verdict> Watchdog::find_silent(TimePoint now) const {
  std::vector<int> silent;
  for (int rank = 1; rank < std::ssize(ranks_); ++rank) {
    if (ranks_[rank].expected && now - ranks_[rank].heard > options_.limit()) silent.push_back(rank);
  }
  if (silent.empty()) return std::nullopt;
  double longest = 0;
  for (int rank : silent) longest = std::max(longest, seconds_since_heard(rank, now));
  return Verdict{
      .culprits = silent,
      .text = absl::StrFormat("%s gave no sign of life for %.1f s: its process is stopped or its node hangs; "
                              "last seen %s",
                              rank_list(silent), longest, to_string(ranks_[silent.front()].place)),
      .silent = true};
}

std::optional<Watchdog::Verdict> Watchdog::find_stuck(const Place& own, std::span<const int> unanswered,
                                                      TimePoint now) const {
  if (steps_.empty() || now - steps_.front().begin <= longest(steps_.front().tokens)) return std::nullopt;
  std::vector<RankPlace> place = {{0, own}};
  for (int rank = 1; rank < std::ssize(ranks_); ++rank) place.push_back({rank, ranks_[rank].place});
  const Standstill standstill = find_standstill(place);
  Verdict verdict;
  verdict.culprits = standstill.behind.empty() ? std::vector(unanswered.begin(), unanswered.end()) : standstill.behind;
  const std::string who = verdict.culprits.empty() ? "the group" : rank_list(verdict.culprits);
  verdict.text = absl::StrFormat(
      "%s %s stuck: step %d runs for %.1f s, longer than the %.1f s that such a step may take, and %s", who,
      verdict.culprits.size() > 1 ? "are" : "is", steps_.front().step, seconds(now - steps_.front().begin),
      seconds(longest(steps_.front().tokens)), to_string(standstill));
  if (verdict.culprits.size() == 1 && verdict.culprits.front() != 0) {
    absl::StrAppendFormat(&verdict.text, "; its last sign of life came %.1f s ago",
                          seconds_since_heard(verdict.culprits.front(), now));
  }
  return verdict;
}

Watchdog::Duration Watchdog::longest(int64_t tokens) const {
  const std::optional<Duration> usual = times_.usual(tokens);
  if (!usual.has_value()) return std::max(options_.first, options_.limit());
  // Where a step itself takes minutes, the cap yields to it.
  return std::max({options_.limit(), std::min(options_.cap, times(options_.factor, *usual)), 3 * *usual});
}

double Watchdog::seconds_since_heard(int rank, TimePoint now) const {
  return std::max(0.0, seconds(now - ranks_[rank].heard));
}

}  // namespace octet
