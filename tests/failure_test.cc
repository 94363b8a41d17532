// What clients and whoever comes after see when a rank of a real job dies, is stopped or is stuck: every stream ends
// with UNAVAILABLE and the reason, every process is gone with a status that says so, and octet doctor --last names the
// rank. Times are printed, and held only to very generous bounds.
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "tests/octet_server.h"
#include "tests/open_streams.h"
#include "tests/random_model.h"
#include "worker/flight.h"

namespace octet {
namespace {

using std::chrono::seconds;
using Clock = std::chrono::steady_clock;

constexpr int kRanks = 3;
constexpr int kStreams = 200;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

std::string tiny_model() {
  static const std::string kModel = write_random_model({.format = RandomFormat::kBF16,
                                                        .hidden_size = 48,
                                                        .intermediate_size = 96,
                                                        .num_hidden_layers = 2,
                                                        .num_attention_heads = 3,
                                                        .num_key_value_heads = 3,
                                                        .head_dim = 16,
                                                        .vocab_size = 288});
  return kModel;
}

// A server whose flights are kept in a directory of its own.
struct Job {
  explicit Job(std::vector<std::string> more = {})
      : flights(fresh_path("flights")), server(tiny_model(), kRanks, with_defaults(std::move(more))) {
    EXPECT_TRUE(server.ready());
    const absl::StatusOr<std::vector<Flight>> found = read_flights(flights);
    if (found.ok()) {
      for (const Flight& flight : *found) ranks.push_back(flight.pid);
    }
    EXPECT_EQ(ranks.size(), static_cast<size_t>(kRanks)) << found.status();
  }
  ~Job() {
    std::error_code ignored;
    std::filesystem::remove_all(flights, ignored);
  }

  bool all_gone() const { return std::ranges::none_of(ranks, alive); }

  // Seconds until no process is left; the job must fail.
  double wait_for_the_end(Clock::time_point begin) {
    EXPECT_GT(server.process().wait(seconds(60)), 0) << server.process().err();
    while (!all_gone() && seconds_since(begin) < 60) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    EXPECT_TRUE(all_gone()) << server.process().err();
    return seconds_since(begin);
  }

  std::string doctor() const {
    const Finished run = run_command({OCTET_BINARY, "doctor", "--last", flights});
    EXPECT_EQ(run.status, 0) << run.err;
    return run.out;
  }

  std::vector<std::string> with_defaults(std::vector<std::string> more) const {
    more.insert(more.end(), {"--threads", "1", "--max-sequences", "256", "--flight-directory", flights});
    return more;
  }

  const std::string flights;
  Server server;
  std::vector<pid_t> ranks;  // by rank
};

// How the streams ended.
struct Ends {
  double p99 = 0, last = 0;  // seconds
  std::string message;       // of one of them
  int naming = 0;            // have `word` in their message
};

Ends ends_of(OpenStreams& streams, Clock::time_point begin, const std::string& word) {
  EXPECT_TRUE(streams.wait_for_ends(seconds(60))) << "streams are left without an end";
  Ends ends;
  std::vector<double> times;
  for (const OpenStreams::End& end : streams.ends()) {
    EXPECT_EQ(end.code, grpc::StatusCode::UNAVAILABLE) << end.message;
    times.push_back(std::chrono::duration<double>(end.time - begin).count());
    if (ends.naming == 0 || absl::StrContains(end.message, word)) ends.message = end.message;
    ends.naming += absl::StrContains(end.message, word);
  }
  std::ranges::sort(times);
  if (!times.empty()) {
    ends.p99 = times[times.size() * 99 / 100];
    ends.last = times.back();
  }
  return ends;
}

void print(const std::string& what, const Ends& ends, double gone) {
  std::printf("%s: streams end after %.0f ms (p99; last %.0f ms), all processes are gone after %.2f s\n    \"%s\"\n",
              what.c_str(), 1e3 * ends.p99, 1e3 * ends.last, gone, ends.message.c_str());
}

void kill_rank(int rank) {
  Job job;
  ASSERT_TRUE(job.server.ready());
  OpenStreams streams(job.server.address(), kStreams);
  ASSERT_TRUE(streams.wait_for_tokens(seconds(60)));
  const auto begin = Clock::now();
  kill(job.ranks[rank], SIGKILL);
  const Ends ends = ends_of(streams, begin, absl::StrFormat("rank %d is lost", rank));
  print(absl::StrFormat("SIGKILL of rank %d, %d streams", rank, kStreams), ends, job.wait_for_the_end(begin));
  // Nobody is left to say it when rank 0 itself is gone.
  EXPECT_EQ(ends.naming, rank == 0 ? 0 : kStreams) << ends.message;
  EXPECT_LT(ends.p99, 5.0);
  const std::string report = job.doctor();
  EXPECT_TRUE(absl::StrContains(report, absl::StrFormat("\nrank %d ended without a word", rank))) << report;
}

TEST(Failure, KillingRankZeroEndsEveryStream) { kill_rank(0); }
TEST(Failure, KillingRankOneEndsEveryStreamAndNamesIt) { kill_rank(1); }
TEST(Failure, KillingRankTwoEndsEveryStreamAndNamesIt) { kill_rank(2); }

void stop_rank(int rank, int streams_open, double floor_seconds) {
  Job job({"--watchdog-floor-seconds", absl::StrCat(floor_seconds)});
  ASSERT_TRUE(job.server.ready());
  OpenStreams streams(job.server.address(), streams_open);
  ASSERT_TRUE(streams.wait_for_tokens(seconds(60)));
  const auto begin = Clock::now();
  kill(job.ranks[rank], SIGSTOP);
  const std::string sentence = absl::StrFormat("rank %d gave no sign of life", rank);
  const Ends ends = ends_of(streams, begin, sentence);
  print(absl::StrFormat("SIGSTOP of rank %d, %d streams, watchdog of %.0f s", rank, streams_open, floor_seconds), ends,
        job.wait_for_the_end(begin));
  // A rank 0 that mpirun wakes up only to kill it may not find the time to say why.
  EXPECT_GE(ends.naming, rank == 0 ? 0 : streams_open) << ends.message;
  EXPECT_LT(ends.p99, floor_seconds + 10);
  const std::string report = job.doctor();
  EXPECT_TRUE(absl::StrContains(report, "ended by watchdog: " + sentence)) << report;
}

TEST(Failure, AStoppedRankIsNamedAndTheStreamsThatWaitForItEnd) { stop_rank(1, kStreams, 5); }
TEST(Failure, ARankThatIsStoppedWhileNothingRunsIsFoundToo) { stop_rank(2, 0, 2); }
TEST(Failure, TheOtherRanksFindARankZeroThatIsStopped) { stop_rank(0, kStreams, 2); }

void inject(const std::string& fault, const std::string& client_sees, const std::string& doctor_says,
            std::vector<std::string> more = {}) {
  more.insert(more.end(), {"--inject-fault", fault});
  Job job(more);
  ASSERT_TRUE(job.server.ready());
  OpenStreams streams(job.server.address(), kStreams);
  const auto begin = Clock::now();
  const Ends ends = ends_of(streams, begin, client_sees);
  print(fault, ends, job.wait_for_the_end(begin));
  EXPECT_GT(ends.naming, 0) << ends.message;
  const std::string report = job.doctor();
  EXPECT_TRUE(absl::StrContains(report, doctor_says)) << report;
}

TEST(Failure, ACrashIsToldWithItsSignal) {
  inject("rank=2,step=40,kind=segv", "rank 2 is lost: its plan stream broke; its last words: SIGSEGV",
         "ended by crash signal: SIGSEGV");
}

TEST(Failure, AFailedCheckIsToldWithItsSentence) {
  inject("rank=1,step=40,kind=check", "an injected fault", "ended by failed check: internal error");
}

TEST(Failure, ATokenMayBePoison) {
  inject(absl::StrCat("rank=1,token=", OpenStreams::kFirstToken, ",kind=segv"), "rank 1", "crash signal: SIGSEGV");
}

TEST(Failure, ARankThatIsStuckIsNamedAlthoughItsProcessIsLively) {
  inject("rank=1,step=400,kind=hang", "rank 1 is stuck", "ended by watchdog: rank 1 is stuck",
         {"--watchdog-floor-seconds", "2"});
}

TEST(Failure, ACleanEndLeavesNoFlights) {
  Job job;
  ASSERT_TRUE(job.server.ready());
  EXPECT_TRUE(std::filesystem::exists(job.flights));
  EXPECT_EQ(job.server.stop(SIGUSR1), 0) << job.server.process().err();
  EXPECT_FALSE(std::filesystem::exists(job.flights));
  EXPECT_EQ(run_command({OCTET_BINARY, "doctor", "--last", job.flights}).status, 1);
}

// Seconds of CPU that a process has used.
double cpu_seconds(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::istringstream fields(text.substr(text.rfind(')') + 1));
  std::string skipped;
  for (int field = 3; field < 14; ++field) fields >> skipped;
  double user = 0, system = 0;
  fields >> user >> system;
  return (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

TEST(Failure, AnIdleRankThatGivesSignsOfLifeUsesNextToNothing) {
  Job job;
  ASSERT_TRUE(job.server.ready());
  std::vector<double> before;
  for (pid_t rank : job.ranks) before.push_back(cpu_seconds(rank));
  constexpr int kSeconds = 4;
  std::this_thread::sleep_for(seconds(kSeconds));
  for (int rank = 0; rank < kRanks; ++rank) {
    const double share = (cpu_seconds(job.ranks[rank]) - before[rank]) / kSeconds;
    std::printf("idle rank %d uses %.2f %% of a core\n", rank, 100 * share);
    EXPECT_LT(share, 0.05);
  }
}

TEST(Failure, IsToldEachTimeOfMany) {
  if (std::getenv("OCTET_LONG_TESTS") == nullptr) GTEST_SKIP() << "SKIPPED: only with launch/test --long";
  for (int round = 0; round < 20; ++round) kill_rank(round % kRanks);
  for (int rank = 0; rank < kRanks; ++rank) stop_rank(rank, kStreams, 5);
  for (int rank = 0; rank < kRanks; ++rank) stop_rank(rank, 0, 5);
}

}  // namespace
}  // namespace octet
