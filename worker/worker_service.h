// A rank's side of the plan stream: dials rank 0 (ranks above 0 listen on nothing), says who it is, and answers every
// plan with a digest of what it sampled. Invariant: one answer per plan, in the plans' order.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "worker/flight_recorder.h"
#include "worker/step_plan.h"

namespace octet {

// What computes a step: Worker::run, or a test's fake.
using WorkerFunction = std::function<StepResult(const StepPlan&)>;

struct WorkerServiceOptions {
  std::string coordinator;  // where rank 0 listens: "unix:/path/of/socket" or "host:port"
  int32_t rank = 0;         // 1 or more
  std::string job_secret;   // printable ASCII, the same on every rank
  absl::Duration connect_timeout = absl::Seconds(60);
  // Called once, on a gRPC thread, the moment the stream breaks. A rank inside a collective whose peers are gone never
  // comes back from `run`: this is where its process ends. Not called after the stop plan.
  std::function<void(const absl::Status&)> on_lost;
  // When rank 0 gives no sign of life for this long, it is lost too (DEADLINE_EXCEEDED). This rank gives ten signs in
  // that time, with its place. Zero: neither.
  absl::Duration silence = absl::ZeroDuration();
  FlightRecorder* recorder = nullptr;  // has this rank's place, and gets plans and answers; null: nobody records
};

// Runs plans on the calling thread, the worker thread, until the stop plan was answered (OK). UNAVAILABLE when rank 0
// cannot be reached or is gone; DEADLINE_EXCEEDED when it is silent; whatever rank 0 refused this rank with;
// INVALID_ARGUMENT for a plan that does not decode.
absl::Status serve_plans(const WorkerServiceOptions& options, const WorkerFunction& run);

}  // namespace octet
