// Where flights are kept, which jobs are remembered, and which one octet doctor --last tells of.
#include "launch/flight_directory.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "worker/flight_recorder.h"

namespace octet {
namespace {

std::string fresh_home() {
  static int counter = 0;
  return absl::StrCat(testing::TempDir(), "octet_flight_home_", getpid(), "_", counter++);
}

// A job whose rank was killed.
void fail_a_job(const std::string& home, const std::string& job) {
  const pid_t pid = fork();
  if (pid == 0) {
    const auto directory = job_directory(home, job);
    const auto recorder = FlightRecorder::create(*directory, 0, 1, job);
    raise(SIGKILL);
  }
  waitpid(pid, nullptr, 0);
}

std::set<std::string> jobs_in(const std::string& home) {
  std::set<std::string> jobs;
  for (const auto& entry : std::filesystem::directory_iterator(home)) jobs.insert(entry.path().filename());
  return jobs;
}

TEST(FlightDirectory, RemembersTheLastJobs) {
  const std::string home = fresh_home();
  for (int job = 1; job <= 7; ++job) fail_a_job(home, absl::StrCat("job", job));
  EXPECT_EQ(jobs_in(home), (std::set<std::string>{"job3", "job4", "job5", "job6", "job7"}));
  EXPECT_EQ(*last_ended_job(home), home + "/job7");
}

TEST(FlightDirectory, ForgetsNoJobThatRuns) {
  const std::string home = fresh_home();
  const auto running = FlightRecorder::create(*job_directory(home, "job0"), 0, 1, "job0");
  for (int job = 1; job <= 7; ++job) fail_a_job(home, absl::StrCat("job", job));
  EXPECT_TRUE(jobs_in(home).contains("job0"));
}

TEST(FlightDirectory, TellsOfTheLastJobThatHasEnded) {
  const std::string home = fresh_home();
  EXPECT_EQ(last_ended_job(home).status().code(), absl::StatusCode::kNotFound);
  fail_a_job(home, "job1");
  const auto running = FlightRecorder::create(*job_directory(home, "job2"), 0, 1, "job2");
  EXPECT_EQ(*last_ended_job(home), home + "/job1");
}

TEST(FlightDirectory, RefusesAHomeThatIsNoDirectoryOfThisUser) {
  const std::string home = fresh_home();
  std::filesystem::create_symlink("/tmp", home);
  const auto directory = job_directory(home, "job");
  EXPECT_EQ(directory.status().code(), absl::StatusCode::kFailedPrecondition) << directory.status();
  std::filesystem::remove(home);
}

TEST(FlightDirectory, GivesYoungerJobsGreaterNames) {
  const absl::Time now = absl::Now();
  EXPECT_LT(new_job_name(now), new_job_name(now + absl::Milliseconds(1)));
  EXPECT_LT(new_job_name(now), new_job_name(now + absl::Hours(1000)));
}

}  // namespace
}  // namespace octet
