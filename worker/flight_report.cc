#include "worker/flight_report.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "worker/standstill.h"

namespace octet {
namespace {

absl::Time last_time(const FlightEntry& entry) { return entry.ended() ? entry.end : entry.begin; }

// The youngest thing that a rank did.
absl::Time last_time(const Flight& flight) {
  absl::Time last = flight.start;
  for (const FlightEntry& entry : flight.entries) last = std::max(last, last_time(entry));
  return last;
}

// What the job's end is measured from.
absl::Time end_of(std::span<const Flight> flights) {
  absl::Time end = absl::InfinitePast();
  for (const Flight& flight : flights) {
    end = std::max(end, last_time(flight));
    if (flight.kind != LastWordsKind::kNone) end = std::max(end, flight.last_words_time);
  }
  return end;
}

std::string name_of(const Flight& flight) {
  return absl::StrFormat("rank %d (process %d on %s)", flight.rank, flight.pid, flight.host);
}

// Whoever spoke first of those whom `choose` takes; null: nobody.
template <typename Choose>
const Flight* first_to_speak(std::span<const Flight> flights, const Choose& choose) {
  const Flight* first = nullptr;
  for (const Flight& flight : flights) {
    if (choose(flight) && (first == nullptr || flight.last_words_time < first->last_words_time)) first = &flight;
  }
  return first;
}

std::vector<int> absent_ranks(std::span<const Flight> flights) {
  std::vector<int> absent;
  for (int rank = 0; rank < flights.front().ranks; ++rank) {
    if (std::ranges::find(flights, rank, &Flight::rank) == flights.end()) absent.push_back(rank);
  }
  return absent;
}

std::string describe(const FlightEntry& entry) {
  if (entry.collective != 0) {
    return absl::StrFormat("collective %d of step %d (%s, %d bytes)", entry.collective, entry.step,
                           octet::name_of(entry.event), entry.size);
  }
  if (entry.event == FlightEvent::kStep) return absl::StrFormat("step %d (%d tokens)", entry.step, entry.size);
  if (entry.event == FlightEvent::kPlan || entry.event == FlightEvent::kAnswer) {
    return absl::StrCat(octet::name_of(entry.event), " of step ", entry.step);
  }
  return octet::name_of(entry.event);
}

// The last thing that it did, or what it was in the middle of.
std::string last_deed(const Flight& flight, absl::Time end) {
  if (flight.entries.empty()) return "nothing is recorded";
  const FlightEntry* last = &flight.entries.back();
  for (const FlightEntry& entry : flight.entries) {
    const bool in_the_middle = entry.collective != 0 && !entry.ended();
    if (in_the_middle || (last_time(entry) >= last_time(*last) && last->ended())) last = &entry;
  }
  return absl::StrFormat("%s %s, %.3f s before the end", last->ended() ? "ended" : "was in", describe(*last),
                         absl::ToDoubleSeconds(end - last_time(*last)));
}

void append_rank(const Flight& flight, absl::Time end, std::string* report) {
  absl::StrAppend(report, name_of(flight), flight.running ? ", still running" : "", ": ", to_string(flight.place), "; ",
                  last_deed(flight, end), "\n");
  if (flight.kind == LastWordsKind::kNone) {
    absl::StrAppend(report, "  no last words\n");
  } else {
    absl::StrAppendFormat(report, "  last words (%s), %.3f s before the end: %s\n", octet::name_of(flight.kind),
                          absl::ToDoubleSeconds(end - flight.last_words_time), flight.last_words);
  }
}

}  // namespace

std::string flight_verdict(std::span<const Flight> flights) {
  const auto has_cause = [](const Flight& flight) {
    return flight.kind != LastWordsKind::kNone && flight.kind != LastWordsKind::kLost;
  };
  if (const Flight* first = first_to_speak(flights, has_cause); first != nullptr) {
    return absl::StrCat(name_of(*first), " ended by ", octet::name_of(first->kind), ": ", first->last_words);
  }
  std::vector<int> mute;
  for (const Flight& flight : flights) {
    if (flight.kind == LastWordsKind::kNone && !flight.running) mute.push_back(flight.rank);
  }
  if (!mute.empty()) {
    return absl::StrCat(rank_list(mute),
                        mute.size() == 1 ? " ended without a word: it was" : " ended without a word: were",
                        " killed (SIGKILL, by somebody or for want of memory)");
  }
  const std::vector<int> absent = absent_ranks(flights);
  const auto lost_somebody = [](const Flight& flight) { return flight.kind == LastWordsKind::kLost; };
  if (const Flight* first = first_to_speak(flights, lost_somebody); first != nullptr) {
    return absl::StrCat(name_of(*first), " was the first to end, because others had: ", first->last_words,
                        absent.empty() ? "" : absl::StrCat("; ", rank_list(absent), " left nothing here"));
  }
  return "the job still runs";
}

std::string flight_report(std::span<const Flight> flights) {
  const Flight& first = flights.front();
  const absl::Time end = end_of(flights);
  std::string report = absl::StrFormat("job %s of %d ranks, started %s, last seen %s\n%s\n\n", first.job, first.ranks,
                                       absl::FormatTime(first.start, absl::LocalTimeZone()),
                                       absl::FormatTime(end, absl::LocalTimeZone()), flight_verdict(flights));
  std::vector<RankPlace> place;
  for (const Flight& flight : flights) {
    append_rank(flight, end, &report);
    place.push_back({flight.rank, flight.place});
  }
  if (const std::vector<int> absent = absent_ranks(flights); !absent.empty()) {
    absl::StrAppend(
        &report, rank_list(absent),
        " left no file here: on another node, or ended cleanly. Files of several nodes in one directory are "
        "read together\n");
  }
  if (flights.size() > 1) absl::StrAppend(&report, "at the end: ", to_string(find_standstill(place)), "\n");
  return report;
}

}  // namespace octet
