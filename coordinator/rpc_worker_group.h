// RpcWorkerGroup: the worker group of a job. Rank 0 listens, every other rank dials in and holds one plan stream; rank
// 0's own worker runs on a thread of the group. Invariant: a step's result is given only when every rank answered it
// alike.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "coordinator/watchdog.h"
#include "coordinator/worker_group.h"
#include "worker/flight_recorder.h"
#include "worker/worker_service.h"

namespace octet {

struct RpcWorkerGroupOptions {
  int32_t ranks = 1;
  std::string job_secret;     // printable ASCII; ranks must show it. REQUIRED with more than one rank
  bool remote_ranks = false;  // some ranks are on other nodes: listen on TCP too
  std::string host;           // with remote_ranks: the name under which the other nodes reach this one
  // Called once, the moment a rank is lost, silent or stuck or disagrees, idle or not, on a thread of gRPC's, of the
  // group or the collecting one. A rank that has answered the stop plan cannot be lost. Must not destroy the group.
  std::function<void(const absl::Status&)> on_failure;
  WatchdogOptions watchdog;            // the ranks' options have the same silence
  FlightRecorder* recorder = nullptr;  // rank 0's, with its place; null: nobody records
  std::string flight_directory;        // where ranks of this node leave their last words; empty: nowhere
};

class RpcWorkerGroup final : public WorkerGroup {
 public:
  // Listens (with one rank: on nothing) and starts the local worker's thread, the only one that calls `local`.
  static absl::StatusOr<std::unique_ptr<RpcWorkerGroup>> listen(const RpcWorkerGroupOptions& options,
                                                                WorkerFunction local);

  // Waits for the local step in flight. After a failure that step may never end: end the process instead.
  ~RpcWorkerGroup() override;

  // What ranks on this node dial, a Unix socket that only this user can open; and what ranks on other nodes dial, empty
  // without remote_ranks.
  const std::string& local_address() const;
  const std::string& remote_address() const;

  // Until every rank has dialled in. DEADLINE_EXCEEDED names those that have not.
  absl::Status wait_for_ranks(absl::Duration timeout);

  // REQUIRES: wait_for_ranks() was OK.
  void submit(const StepPlan& plan) override;
  absl::StatusOr<StepResult> collect() override;

 private:
  struct Impl;
  explicit RpcWorkerGroup(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
