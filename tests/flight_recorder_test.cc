// The flight recorder and the reading of what it left: by ranks that were killed, crashed, failed a check.
#include "worker/flight_recorder.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/check.h"
#include "worker/flight.h"

namespace octet {
namespace {

using Clock = FlightRecorder::Clock;

std::string fresh_directory() {
  static int counter = 0;
  return absl::StrCat(testing::TempDir(), "octet_flights_", getpid(), "_", counter++);
}

std::unique_ptr<FlightRecorder> recorder_of(const std::string& directory, int rank, int ranks = 4,
                                            const std::string& job = "job") {
  auto recorder = FlightRecorder::create(directory, rank, ranks, job);
  if (!recorder.ok()) ADD_FAILURE() << recorder.status();
  return *std::move(recorder);
}

// Plays `life` in a process of its own, to its end or in it.
pid_t play(const std::string& directory, int rank, const std::function<void(FlightRecorder&)>& life) {
  const pid_t pid = fork();
  if (pid == 0) {
    const auto recorder = recorder_of(directory, rank);
    life(*recorder);
    _exit(0);
  }
  waitpid(pid, nullptr, 0);
  return pid;
}

void touch_forbidden_memory() {
  void* page = mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  *static_cast<volatile char*>(page) = 1;
}

Flight only_flight(const std::string& directory) {
  const absl::StatusOr<std::vector<Flight>> flights = read_flights(directory);
  EXPECT_TRUE(flights.ok()) << flights.status();
  EXPECT_EQ(flights->size(), 1u);
  return flights->size() == 1 ? flights->front() : Flight();
}

TEST(FlightRecorder, TellsWhereAKilledRankWas) {
  const std::string directory = fresh_directory();
  const absl::Time before = absl::Now();
  const pid_t pid = play(directory, 2, [](FlightRecorder& recorder) {
    recorder.note(FlightEvent::kLoad);
    recorder.note(FlightEvent::kPlan, 57, 120);
    recorder.begin_step(57, 33, Clock::now());
    recorder.begin_collective(FlightEvent::kReduce, 4096, Clock::now());
    recorder.end_collective(Clock::now());
    recorder.begin_collective(FlightEvent::kAllGather, 64, Clock::now());
    raise(SIGKILL);
  });
  const Flight flight = only_flight(directory);
  EXPECT_EQ(flight.rank, 2);
  EXPECT_EQ(flight.ranks, 4);
  EXPECT_EQ(flight.pid, pid);
  EXPECT_EQ(flight.job, "job");
  EXPECT_TRUE(flight.here);
  EXPECT_FALSE(flight.running);
  EXPECT_EQ(flight.kind, LastWordsKind::kNone);
  EXPECT_EQ(flight.place, (Place{.step = 57, .in_step = true, .collective = 2, .in_collective = true}));
  ASSERT_EQ(flight.entries.size(), 5u);
  EXPECT_EQ(flight.entries[0].event, FlightEvent::kLoad);
  EXPECT_EQ(flight.entries[1].event, FlightEvent::kPlan);
  EXPECT_EQ(flight.entries[1].size, 120);
  EXPECT_FALSE(flight.entries[2].ended());
  EXPECT_EQ(flight.entries[2].size, 33);
  EXPECT_EQ(flight.entries[3].event, FlightEvent::kReduce);
  EXPECT_TRUE(flight.entries[3].ended());
  EXPECT_EQ(flight.entries[4].collective, 2u);
  EXPECT_EQ(flight.entries[4].step, 57u);
  EXPECT_FALSE(flight.entries[4].ended());
  for (const FlightEntry& entry : flight.entries) {
    EXPECT_GE(entry.begin, before - absl::Milliseconds(10));
    EXPECT_LE(entry.begin, absl::Now() + absl::Milliseconds(10));
  }
}

TEST(FlightRecorder, TakesCrashSignalsForLastWords) {
  struct Case {
    std::string name;
    std::function<void()> crash;
  };
  const Case cases[] = {{"SIGSEGV", touch_forbidden_memory},
                        {"SIGBUS", [] { raise(SIGBUS); }},
                        {"SIGILL", [] { raise(SIGILL); }},
                        {"SIGFPE", [] { raise(SIGFPE); }},
                        {"SIGABRT", [] { std::abort(); }}};
  for (const Case& c : cases) {
    const std::string directory = fresh_directory();
    int status = 0;
    const pid_t pid = fork();
    if (pid == 0) {
      const auto recorder = recorder_of(directory, 0);
      recorder->catch_crashes();
      recorder->begin_step(7, 1, Clock::now());
      c.crash();
      _exit(0);
    }
    waitpid(pid, &status, 0);
    EXPECT_NE(status, 0) << c.name << ": what the signal did before must still happen";
    const Flight flight = only_flight(directory);
    EXPECT_EQ(flight.kind, LastWordsKind::kCrashSignal) << c.name;
    EXPECT_TRUE(absl::StartsWith(flight.last_words, c.name)) << flight.last_words;
    EXPECT_TRUE(absl::StrContains(flight.last_words, "in step 7")) << flight.last_words;
  }
}

TEST(FlightRecorder, LeavesASignalToWhoeverHadItBefore) {
  const std::string directory = fresh_directory();
  int status = 0;
  const pid_t pid = fork();
  if (pid == 0) {
    signal(SIGSEGV, [](int) { _exit(41); });
    const auto recorder = recorder_of(directory, 0);
    recorder->catch_crashes();
    touch_forbidden_memory();
    _exit(0);
  }
  waitpid(pid, &status, 0);
  EXPECT_EQ(WEXITSTATUS(status), 41);
  EXPECT_EQ(only_flight(directory).kind, LastWordsKind::kCrashSignal);
}

TEST(FlightRecorder, TakesAFailedCheckForLastWords) {
  const std::string directory = fresh_directory();
  play(directory, 1, [](FlightRecorder& recorder) {
    recorder.catch_crashes();
    OCTET_CHECK(1 + 1 == 3, "sums are broken");
  });
  const Flight flight = only_flight(directory);
  EXPECT_EQ(flight.kind, LastWordsKind::kFailedCheck);
  EXPECT_TRUE(absl::StrContains(flight.last_words, "sums are broken")) << flight.last_words;
}

TEST(FlightRecorder, KeepsTheFirstWords) {
  const std::string directory = fresh_directory();
  const auto recorder = recorder_of(directory, 0);
  recorder->last_words(LastWordsKind::kWatchdog, "rank 2 is stuck");
  recorder->last_words(LastWordsKind::kCrashSignal, "SIGABRT");
  const Flight flight = only_flight(directory);
  EXPECT_EQ(flight.kind, LastWordsKind::kWatchdog);
  EXPECT_EQ(flight.last_words, "rank 2 is stuck");
  EXPECT_TRUE(flight.running);
}

TEST(FlightRecorder, CutsWordsThatAreTooLong) {
  const std::string directory = fresh_directory();
  recorder_of(directory, 0)->last_words(LastWordsKind::kLost, std::string(100'000, 'x'));
  EXPECT_EQ(only_flight(directory).last_words, std::string(2048, 'x'));
}

TEST(FlightRecorder, KeepsTheLastEntriesOfMany) {
  const std::string directory = fresh_directory();
  const auto recorder = recorder_of(directory, 0);
  for (uint64_t step = 1; step <= 10'000; ++step) recorder->note(FlightEvent::kPlan, step, 1);
  const Flight flight = only_flight(directory);
  ASSERT_EQ(flight.entries.size(), 4096u);
  EXPECT_EQ(flight.entries.front().step, 10'000u - 4095);
  EXPECT_EQ(flight.entries.back().step, 10'000u);
}

TEST(FlightRecorder, EndsNothingThatTheRingHasForgotten) {
  const std::string directory = fresh_directory();
  const auto recorder = recorder_of(directory, 0);
  recorder->begin_step(1, 1, Clock::now());
  for (int i = 0; i < 4096; ++i) recorder->begin_collective(FlightEvent::kReduce, 1, Clock::now());
  recorder->end_step(Clock::now());
  for (const FlightEntry& entry : only_flight(directory).entries) EXPECT_FALSE(entry.ended());
}

TEST(FlightRecorder, LeavesNothingAfterACleanEnd) {
  const std::string directory = fresh_directory();
  const auto first = recorder_of(directory, 0), second = recorder_of(directory, 1);
  struct stat facts {};
  ASSERT_EQ(stat(directory.c_str(), &facts), 0);
  EXPECT_EQ(facts.st_mode & 0777, 0700u);
  first->remove();
  EXPECT_EQ(only_flight(directory).rank, 1);
  second->remove();
  EXPECT_FALSE(std::filesystem::exists(directory));
  EXPECT_TRUE(read_flights(directory)->empty());
}

TEST(FlightRecorder, SaysWhereItCannotWrite) {
  const auto recorder = FlightRecorder::create("/proc/nowhere/flights", 0, 1, "job");
  EXPECT_FALSE(recorder.ok());
  EXPECT_TRUE(absl::StrContains(recorder.status().message(), "/proc/nowhere/flights")) << recorder.status();
  EXPECT_TRUE(absl::StrContains(recorder.status().message(), "--flight-directory")) << recorder.status();
}

TEST(ReadFlights, GivesTheYoungestJobByRank) {
  const std::string directory = fresh_directory();
  recorder_of(directory, 3, 4, "older");
  recorder_of(directory, 0, 4, "older");
  recorder_of(directory, 1, 2, "younger");
  recorder_of(directory, 0, 2, "younger");
  const auto flights = read_flights(directory);
  ASSERT_TRUE(flights.ok()) << flights.status();
  ASSERT_EQ(flights->size(), 2u);
  EXPECT_EQ((*flights)[0].rank, 0);
  EXPECT_EQ((*flights)[1].rank, 1);
  EXPECT_EQ((*flights)[0].job, "younger");
}

TEST(ReadFlights, RefusesWhatIsNoFlight) {
  const std::string directory = fresh_directory();
  recorder_of(directory, 0);
  const std::string path = flight_path(directory, 0);
  std::fstream(path, std::ios::in | std::ios::out) << "something";
  EXPECT_EQ(read_flights(directory).status().code(), absl::StatusCode::kFailedPrecondition);
  std::filesystem::resize_file(path, 100);
  EXPECT_EQ(read_flights(directory).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(read_flight(directory + "/none").status().code(), absl::StatusCode::kNotFound);
}

TEST(ReadFlights, KnowsAProcessByItsStartToo) {
  EXPECT_NE(process_start(getpid()), 0u);
  EXPECT_EQ(process_start(-1), 0u);
  EXPECT_EQ(process_state(-1), "");
  const pid_t child = fork();
  if (child == 0) {
    while (true) pause();
  }
  kill(child, SIGSTOP);
  waitpid(child, nullptr, WUNTRACED);
  EXPECT_EQ(process_state(child), "stopped by a signal");
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_EQ(process_state(child), "");
}

TEST(LastWords, BlameTheWorkForCrashesButNotForKillsAndLosses) {
  for (LastWordsKind kind : {LastWordsKind::kCrashSignal, LastWordsKind::kFailedCheck, LastWordsKind::kDeviceError,
                             LastWordsKind::kWatchdog}) {
    EXPECT_TRUE(blames_the_work(kind)) << name_of(kind);
  }
  for (LastWordsKind kind : {LastWordsKind::kNone, LastWordsKind::kLost, LastWordsKind::kSilent}) {
    EXPECT_FALSE(blames_the_work(kind)) << name_of(kind);
  }
}

TEST(FlightRecorder, PrintsWhatAnEntryCosts) {
  const auto recorder = recorder_of(fresh_directory(), 0);
  constexpr int kCollectives = 1'000'000;
  const Clock::time_point begin = Clock::now();
  for (int i = 0; i < kCollectives; ++i) {
    recorder->begin_collective(FlightEvent::kReduce, 4096, begin);
    recorder->end_collective(begin);
  }
  const std::chrono::duration<double, std::nano> spent = Clock::now() - begin;
  std::printf("recording a collective costs %.1f ns\n", spent.count() / kCollectives);
}

}  // namespace
}  // namespace octet
