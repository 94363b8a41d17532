// What makes rank 0 drain, and how long it then has.
#include "launch/drain.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <cstring>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace octet {
namespace {

TEST(Drain, TakesTheFirstRequestAsTheOrder) {
  Drain drain;
  drain.request("first");
  drain.request("second");
  EXPECT_EQ(drain.wait().reason, "first");
  EXPECT_TRUE(drain.wait().failure.ok());
}

TEST(Drain, SaysThatTheWorkersFailedEvenAfterAnOrder) {
  Drain drain;
  drain.request("first");
  drain.fail(absl::UnavailableError("rank 2 is lost"));
  drain.fail(absl::UnavailableError("rank 3 is lost"));
  EXPECT_EQ(drain.wait().failure.message(), "rank 2 is lost");
  EXPECT_EQ(drain.failure().message(), "rank 2 is lost");
}

TEST(Drain, WakesForARequestOfAnotherThread) {
  Drain drain;
  std::thread other([&] { drain.request("other"); });
  EXPECT_EQ(drain.wait().reason, "other");
  other.join();
}

TEST(Drain, GivesTheOrderItselfWhenTheTimeHasCome) {
  Drain drain;
  const absl::Time latest = absl::Now() + absl::Milliseconds(50);
  EXPECT_EQ(drain.wait(latest).reason, "the job's time ends");
  EXPECT_GE(absl::Now(), latest);
}

TEST(Drain, IsWhatSignalsMean) {
  for (int number : {SIGTERM, SIGUSR1, SIGINT}) {
    Drain drain;
    drain.catch_signals();
    kill(getpid(), number);
    const DrainOrder order = drain.wait();
    EXPECT_EQ(order.reason, absl::StrCat("SIG", sigabbrev_np(number)));
    EXPECT_FALSE(order.hasty) << "no mpirun is our parent";
  }
}

TEST(Drain, TakesAContinueForAResumeUnlessMpirunSentIt) {
  Drain drain;
  drain.catch_signals();
  kill(getpid(), SIGCONT);
  EXPECT_EQ(drain.wait(absl::Now() + absl::Milliseconds(50)).reason, "the job's time ends");
}

TEST(DrainOrder, HasASecondOfADyingMpirunAndAllPatienceOtherwise) {
  DrainOrder order;
  EXPECT_EQ(order.time_left(absl::Seconds(30)), absl::Seconds(30));
  order.hasty = true;
  EXPECT_EQ(order.time_left(absl::Seconds(30)), absl::Seconds(1));
  EXPECT_EQ(order.time_left(absl::Milliseconds(200)), absl::Milliseconds(200));
}

TEST(JobEnd, IsWhatSlurmSays) {
  EXPECT_EQ(job_end([](const char*) -> const char* { return "1790000000"; }), absl::FromUnixSeconds(1790000000));
  for (const char* text : {"", "soon", "0", "-5"}) {
    static const char* said;
    said = text;
    EXPECT_EQ(job_end([](const char*) { return said; }), absl::InfiniteFuture()) << text;
  }
  EXPECT_EQ(job_end([](const char*) -> const char* { return nullptr; }), absl::InfiniteFuture());
}

}  // namespace
}  // namespace octet
