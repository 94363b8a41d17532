// FlightRecorder: keeps a rank's last steps and collectives, and its last words, in a mapped file that outlives the
// process however it ends. flight.h reads it. An entry costs tens of nanoseconds and no system call.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/flight.h"

namespace octet {

struct FlightFile;

class FlightRecorder {
 public:
  using Clock = std::chrono::steady_clock;

  // Makes the directory, private to this user, and the rank's file in it, in place of an older one; takes its memory
  // now. Errors name the directory. `job` names the start of all ranks together, up to 255 bytes.
  static absl::StatusOr<std::unique_ptr<FlightRecorder>> create(const std::string& directory, int rank, int ranks,
                                                                const std::string& job);
  // The file stays.
  ~FlightRecorder();
  FlightRecorder(const FlightRecorder&) = delete;

  // The end was clean: removes the file, and the directory if it was the last one there.
  void remove();

  // ---- Only the worker thread calls these. Steps do not overlap, nor do collectives.
  void begin_step(uint64_t step, int64_t tokens, Clock::time_point now);
  void end_step(Clock::time_point now);
  void begin_collective(FlightEvent event, int64_t bytes, Clock::time_point now);
  void end_collective(Clock::time_point now);
  // How long ago the last step began.
  Clock::duration step_age(Clock::time_point now) const { return now - step_begin_; }

  // ---- Any thread
  // Something that takes no time: a phase of the start begins, a plan came, an answer went.
  void note(FlightEvent event, uint64_t step = 0, int64_t size = 0);
  Place place() const;
  // The first words count. Safe in a signal handler.
  void last_words(LastWordsKind kind, std::string_view words);

  // From now on signals that mean a crash and failed checks are this recorder's last words, before what they did
  // earlier happens. One recorder at a time in a process; until its end.
  void catch_crashes();

 private:
  struct Span {
    uint64_t sequence = 0;
  };
  FlightRecorder(std::string directory, FlightFile* file);
  Span begin(FlightEvent event, uint64_t collective, uint64_t step, int64_t size, int64_t begin_ns, int64_t end_ns);
  void end(Span span, Clock::time_point now);

  const std::string directory_;
  FlightFile* const file_;
  Span step_, collective_;
  Clock::time_point step_begin_;
  bool catching_ = false;
};

}  // namespace octet
