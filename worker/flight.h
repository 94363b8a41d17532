// Flight: what is known of a rank from the file that it left (flight_recorder.h), be it running, ended or killed.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace octet {

// Why a rank said that it ends.
enum class LastWordsKind : uint8_t {
  kNone,         // it said nothing: it runs, or was killed (SIGKILL, no memory left, the node is gone)
  kLost,         // another rank is gone or told it to end, or what it needs of the machine is
  kCrashSignal,  // SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT
  kFailedCheck,  // OCTET_CHECK
  kDeviceError,  // a step failed or its numbers are broken: an error in it, or ranks that disagree about it
  kWatchdog,     // a rank is stuck in a step
  kSilent,       // the watchdog again: a rank gives no sign of life, its process is stopped or its node hangs
};
const char* name_of(LastWordsKind kind);

// Whether what was computed may be to blame, and not only the machines: a batch counts such an end against the lines
// that were in flight.
bool blames_the_work(LastWordsKind kind);

enum class FlightEvent : uint8_t { kStart, kLoad, kReady, kPlan, kStep, kAnswer, kAllGather, kReduce, kBarrier };
const char* name_of(FlightEvent event);

struct FlightEntry {
  FlightEvent event = FlightEvent::kStart;
  uint64_t step = 0;        // the step's number
  uint64_t collective = 0;  // counted on each rank from 1; 0: this is none
  int64_t size = 0;         // of a collective or a plan in bytes, of a step in tokens
  absl::Time begin = absl::InfinitePast();
  absl::Time end = absl::InfiniteFuture();  // infinite: it had not ended
  bool ended() const { return end != absl::InfiniteFuture(); }
};

// How far a rank is. Every rank goes through the same collectives, so that their count is a place on one common way.
struct Place {
  uint64_t step = 0;  // the last one begun
  bool in_step = false;
  uint64_t collective = 0;  // the last one entered, counted from 1
  bool in_collective = false;
  bool operator==(const Place&) const = default;
};

struct Flight {
  int rank = 0, ranks = 0;
  pid_t pid = 0;
  std::string host, job;
  absl::Time start;
  bool running = false;  // on this host, at the time of reading; false for ranks of other hosts
  bool here = false;     // it ran on this host
  LastWordsKind kind = LastWordsKind::kNone;
  std::string last_words;
  absl::Time last_words_time = absl::InfiniteFuture();
  Place place;
  std::vector<FlightEntry> entries;  // the last ones, oldest first
};

// The file of a rank in a directory of flights.
std::string flight_path(const std::string& directory, int rank);

// NOT_FOUND; FAILED_PRECONDITION for a file that is no flight, or another version's.
absl::StatusOr<Flight> read_flight(const std::string& path);

// The ranks' flights of the youngest job in the directory, by rank. A directory without any is no error: a clean end
// removes them. Files that cannot be read are an error.
absl::StatusOr<std::vector<Flight>> read_flights(const std::string& directory);

// What the kernel says about a process of this host: "stopped by a signal", "running", ...; empty when there is none.
std::string process_state(pid_t pid);

// When a process was started, in the kernel's ticks since boot; 0: there is none.
uint64_t process_start(pid_t pid);

}  // namespace octet
