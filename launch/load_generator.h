// LoadGenerator: many concurrent Generate streams from few threads, over gRPC's callback API. One thread, run()'s own,
// starts and cancels streams and takes in their records; gRPC's threads do no more than note when messages come.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "launch/connection.h"
#include "launch/load_report.h"
#include "launch/load_shape.h"

namespace octet {

struct LoadSpec {
  LoadShape shape;
  int concurrency = 1;         // closed loop: so many requests at any time
  std::optional<double> rate;  // open loop instead: Poisson arrivals, requests/s
  int64_t requests = 0;        // 0: no limit
  double seconds = 0;          // new requests start for so long; 0: no limit. REQUIRES: one of the two limits
  // As in GenerateRequest.
  float temperature = 1.0f;
  bool ignore_eos = true;
  std::optional<int32_t> priority;
  std::optional<int32_t> logprobs;
  std::string cache_salt;  // no request finds prefixes of another load in the server's cache
};

// A part of a load that is done, of how much; in requests or seconds, whatever limits it.
using LoadProgress = std::function<void(double done, double total)>;

class LoadGenerator {
 public:
  // `server` is open and outlives this.
  explicit LoadGenerator(const Connection& server);
  ~LoadGenerator();

  // Runs requests like those of the load, `concurrency` at a time, that share no prefix and are not cancelled.
  absl::Status warm_up(const LoadSpec& options, int64_t requests);

  // Runs a load until its last stream has ended. UNAVAILABLE when the server cannot be reached by more connections;
  // CANCELLED after cancel(). What becomes of the requests themselves is the record's to say. One at a time.
  absl::StatusOr<LoadRecord> run(const LoadSpec& options, const LoadProgress& progress = nullptr);

  // Any thread: ends every stream, and run() and warm_up() return, now and whenever called again.
  void cancel();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct StalledOptions {
  int streams = 0;
  int32_t output_tokens =
      2048;         // or the rest of the context; with 20 logprobs each, more than flow control lets through
  LoadShape shape;  // for what the server is
  std::string cache_salt;
};

// Streams that stop reading after their first message, each on a small flow-control window. A gRPC connection of their
// own, as other people's clients have. What becomes of them shows only when they read on: gRPC tells a client of the
// end of its stream after all that came before.
class StalledStreams {
 public:
  // Starts them. `server` is open and outlives this.
  StalledStreams(const Connection& server, const StalledOptions& options);
  // Cancels what is left of them.
  ~StalledStreams();

  // Whether each of them has its first message or has ended.
  bool wait_stalled(absl::Time deadline);
  // They read on from now. Whether all have ended.
  bool read_on(absl::Time deadline);
  // As of now; those still open say OPEN.
  std::vector<StreamRecord> records() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
