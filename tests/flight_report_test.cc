// What is made of the flights of a job's ranks: the rank that it failed by, whatever the others said of it.
#include "worker/flight_report.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/match.h"

namespace octet {
namespace {

const absl::Time kStart = absl::FromUnixSeconds(1'790'000'000);

absl::Time at(double seconds) { return kStart + absl::Seconds(seconds); }

// Three ranks of one host, ended in the middle of collective 812 of step 57.
std::vector<Flight> three_flights() {
  std::vector<Flight> flights;
  for (int rank = 0; rank < 3; ++rank) {
    Flight flight{
        .rank = rank, .ranks = 3, .pid = 100 + rank, .host = "node", .job = "job", .start = kStart, .here = true};
    flight.place = {.step = 57, .in_step = true, .collective = 812, .in_collective = true};
    flight.entries = {{.event = FlightEvent::kStep, .step = 57, .size = 4, .begin = at(10)},
                      {.event = FlightEvent::kReduce, .step = 57, .collective = 812, .size = 32768, .begin = at(10.1)}};
    flights.push_back(flight);
  }
  return flights;
}

void say(Flight* flight, LastWordsKind kind, const std::string& words, double seconds) {
  flight->kind = kind;
  flight->last_words = words;
  flight->last_words_time = at(seconds);
}

TEST(FlightReport, NamesTheRankThatWasKilledWithoutAWord) {
  std::vector<Flight> flights = three_flights();
  flights[2].place = {.step = 57, .in_step = true, .collective = 811};
  flights[2].entries.back() = {.event = FlightEvent::kReduce,
                               .step = 57,
                               .collective = 811,
                               .size = 32768,
                               .begin = at(10.05),
                               .end = at(10.06)};
  say(&flights[0], LastWordsKind::kLost, "rank 2 is lost", 15.26);
  say(&flights[1], LastWordsKind::kLost, "the plan stream ended", 15.26);
  EXPECT_TRUE(absl::StartsWith(flight_verdict(flights), "rank 2 ended without a word")) << flight_verdict(flights);
  const std::string report = flight_report(flights);
  for (const char* part :
       {"rank 0 (process 100 on node): in collective 812 of step 57; was in collective 812 of step 57 "
        "(sum over slices, 32768 bytes)",
        "rank 2 (process 102 on node): in step 57, after collective 811; ended collective 811",
        "5.200 s before the end", "no last words",
        "rank 2 has not entered collective 812 of step 57, in which ranks 0 and 1 wait"}) {
    EXPECT_TRUE(absl::StrContains(report, part)) << part << " is not in\n" << report;
  }
}

TEST(FlightReport, BelievesACrashMoreThanThoseWhoOnlyLostARank) {
  std::vector<Flight> flights = three_flights();
  say(&flights[0], LastWordsKind::kLost, "rank 1 is lost", 10.2);
  say(&flights[1], LastWordsKind::kCrashSignal, "SIGSEGV in step 57", 10.3);
  EXPECT_EQ(flight_verdict(flights), "rank 1 (process 101 on node) ended by crash signal: SIGSEGV in step 57");
}

TEST(FlightReport, BelievesTheFirstOfSeveralCauses) {
  std::vector<Flight> flights = three_flights();
  say(&flights[0], LastWordsKind::kWatchdog, "rank 2 is stuck", 15.0);
  say(&flights[2], LastWordsKind::kCrashSignal, "SIGABRT", 15.5);
  EXPECT_TRUE(absl::StrContains(flight_verdict(flights), "ended by watchdog: rank 2 is stuck"));
}

TEST(FlightReport, SaysWhichRanksLeftNothingHere) {
  std::vector<Flight> flights = three_flights();
  flights.erase(flights.begin() + 1);
  say(&flights[0], LastWordsKind::kLost, "rank 1 is lost", 10.2);
  say(&flights[1], LastWordsKind::kLost, "the plan stream ended", 10.3);
  EXPECT_EQ(flight_verdict(flights),
            "rank 0 (process 100 on node) was the first to end, because others had: rank 1 is lost; rank 1 left "
            "nothing here");
  EXPECT_TRUE(absl::StrContains(flight_report(flights), "rank 1 left no file here"));
}

TEST(FlightReport, SaysThatAJobStillRuns) {
  std::vector<Flight> flights = three_flights();
  for (Flight& flight : flights) flight.running = true;
  EXPECT_EQ(flight_verdict(flights), "the job still runs");
  EXPECT_TRUE(absl::StrContains(flight_report(flights), "still running"));
}

TEST(FlightReport, HasNothingToSayOfARankThatDidNothing) {
  std::vector<Flight> flights = {{.rank = 0, .ranks = 1, .host = "node", .job = "job", .start = kStart}};
  EXPECT_TRUE(absl::StrContains(flight_report(flights), "nothing is recorded"));
}

}  // namespace
}  // namespace octet
