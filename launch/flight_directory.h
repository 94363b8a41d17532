// Where the ranks of a job leave their flights (worker/flight.h) when nobody says where: in memory that outlives the
// processes, private to the user, one directory for each of the last jobs.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace octet {

// /dev/shm/octet-flights-UID, or below TMPDIR or /tmp where there is no /dev/shm. Not XDG_RUNTIME_DIR: the shell that
// looks for a flight need not have the variables of the job that left it, and that directory ends with the login.
std::string flight_home();

// The name of a job that starts now: younger jobs have greater names.
std::string new_job_name(absl::Time now);

// This job's directory below `home`; makes `home` if need be, and forgets all but the last few older jobs, never one
// that still runs. FAILED_PRECONDITION when `home` is not this user's own.
absl::StatusOr<std::string> job_directory(const std::string& home, const std::string& job);

// The directory of the youngest job below `home` that does not run any more. NOT_FOUND when there is none: jobs that
// end cleanly leave nothing.
absl::StatusOr<std::string> last_ended_job(const std::string& home);

}  // namespace octet
