// Rank: one rank of a job, from its files to workers that have run a step: what serve and batch have in common. What
// the workers are then for is rank 0's Leader's to say; the other ranks follow its plans.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include <CLI/CLI.hpp>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/served_model.h"
#include "coordinator/worker_group.h"
#include "kernels/tensor.h"
#include "launch/drain.h"
#include "launch/fault.h"
#include "launch/log.h"
#include "launch/options.h"
#include "worker/memory_plan.h"
#include "worker/model/model_config.h"

namespace octet {

struct RankOptions {
  RuntimeOptions runtime;
  Device device = Device::kCpu;
  AllReduce all_reduce = AllReduce::kAuto;    // of GPUs
  Arithmetic arithmetic = Arithmetic::kFast;  // of GPUs, CPUs are always reproducible
  std::string pretend_nodes;
  LogFormat log_format = LogFormat::kText;
  std::string flight_directory;         // where the ranks leave their flights; empty: one of the job's in flight_home
  std::string flight_home;              // empty: this machine's, flight_home()
  double watchdog_floor_seconds = 5.0;  // WatchdogOptions::floor
  std::optional<Fault> fault;           // for tests
  // Exit status of a job that cannot start as it was asked for, and of one that another try may bring further: ranks
  // were lost on the way.
  int refused = 1, lost = 1;
};

void add_rank_options(CLI::App& command, RankOptions* options);

// What a leader knows of its job. Outlives it.
struct Job {
  std::shared_ptr<const ServedModel> model;
  ServerFacts facts;
  MemoryPlan plan;
  ModelConfig config;
  uint64_t checkpoint_digest = 0;
  Drain* drain = nullptr;
};

// Rank 0's part, on its main thread.
class Leader {
 public:
  virtual ~Leader() = default;

  // The model is known and fits, but its weights are not loaded yet: the time to find out that a port is taken. An exit
  // status when there is nothing to lead. UNAVAILABLE: another try may help.
  virtual absl::StatusOr<std::optional<int>> prepare(const Job& job) = 0;

  // The workers have run a step. Leads them until the job's order to drain or its end, then sends the stop plan; the
  // result is the exit status of every rank. A status that is not OK means that the workers are lost (an order with a
  // failure): nobody waits for them any more, the process ends with it at once.
  virtual absl::StatusOr<int> lead(const Job& job, WorkerGroup* workers) = 0;
};

// This process's rank from start to end; its exit status. `leader` is used on rank 0 only.
int run_rank(const RankOptions& options, Leader* leader);

}  // namespace octet
