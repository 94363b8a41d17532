#include "launch/flight_directory.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <system_error>
#include <vector>

#include "absl/strings/str_cat.h"
#include "worker/flight.h"

namespace octet {
namespace {

constexpr size_t kKeptJobs = 4;
constexpr char kShm[] = "/dev/shm";

// Youngest first.
std::vector<std::string> jobs_of(const std::string& home) {
  std::vector<std::string> jobs;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(home, error)) {
    if (entry.is_directory(error)) jobs.push_back(entry.path());
  }
  std::ranges::sort(jobs, std::greater());
  return jobs;
}

bool runs(const std::string& directory) {
  const absl::StatusOr<std::vector<Flight>> flights = read_flights(directory);
  return flights.ok() && std::ranges::any_of(*flights, &Flight::running);
}

void forget_old_jobs(const std::string& home) {
  const std::vector<std::string> jobs = jobs_of(home);
  for (size_t i = kKeptJobs; i < jobs.size(); ++i) {
    std::error_code ignored;
    if (!runs(jobs[i])) std::filesystem::remove_all(jobs[i], ignored);
  }
}

}  // namespace

std::string flight_home() {
  std::string base = kShm;
  if (access(kShm, W_OK | X_OK) != 0) {
    const char* chosen = std::getenv("TMPDIR");
    base = chosen != nullptr && *chosen == '/' ? chosen : "/tmp";
  }
  return absl::StrCat(base, "/octet-flights-", getuid());
}

std::string new_job_name(absl::Time now) {
  return absl::StrCat(absl::FormatTime("%Y%m%dT%H%M%E3S", now, absl::UTCTimeZone()), "-", getpid());
}

absl::StatusOr<std::string> job_directory(const std::string& home, const std::string& job) {
  if (mkdir(home.c_str(), 0700) != 0 && errno != EEXIST) {
    return absl::ErrnoToStatus(errno, absl::StrCat("the directory ", home, " for the flight recorder cannot be made: ",
                                                   "name another one with --flight-directory"));
  }
  struct stat facts {};
  // Where everybody may write, somebody else may have been first.
  if (lstat(home.c_str(), &facts) != 0 || !S_ISDIR(facts.st_mode) || facts.st_uid != geteuid()) {
    return absl::FailedPreconditionError(
        absl::StrCat(home, " is not a directory of this user: name another one with --flight-directory"));
  }
  forget_old_jobs(home);
  return absl::StrCat(home, "/", job);
}

absl::StatusOr<std::string> last_ended_job(const std::string& home) {
  for (const std::string& job : jobs_of(home)) {
    const absl::StatusOr<std::vector<Flight>> flights = read_flights(job);
    if (!flights.ok()) return flights.status();
    // A job that is about to start has a directory and nothing in it.
    if (!flights->empty() && std::ranges::none_of(*flights, &Flight::running)) return job;
  }
  return absl::NotFoundError(absl::StrCat("no job has left a flight in ", home,
                                          ": those that end cleanly remove theirs. For one that had another "
                                          "--flight-directory, name that directory"));
}

}  // namespace octet
