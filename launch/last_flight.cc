#include "launch/last_flight.h"

#include <cstdio>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "launch/flight_directory.h"
#include "worker/flight.h"
#include "worker/flight_report.h"

namespace octet {

namespace {

absl::Status tell(const std::string& directory) {
  const absl::StatusOr<std::vector<Flight>> flights = read_flights(directory);
  if (!flights.ok()) return flights.status();
  if (flights->empty()) {
    return absl::NotFoundError(directory + " holds no flights: a job that ends cleanly removes its own");
  }
  std::printf("flights in %s\n%s", directory.c_str(), flight_report(*flights).c_str());
  return absl::OkStatus();
}

}  // namespace

int tell_last_flight(const std::string& directory) {
  absl::StatusOr<std::string> where = directory;
  if (directory.empty()) where = last_ended_job(flight_home());
  const absl::Status status = where.ok() ? tell(*where) : where.status();
  if (!status.ok()) std::fprintf(stderr, "octet doctor: %s\n", std::string(status.message()).c_str());
  return status.ok() ? 0 : 1;
}

}  // namespace octet
