// The communicator of ranks that mpirun or srun started: a POSIX shared-memory window inside a node, MPI between the
// nodes' first ranks. MPI only moves bytes: its own sums choose an order that we do not control.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/collective/window_communicator.h"

namespace octet {

struct MpiCommunicatorOptions {
  RankMap map;  // of MPI_COMM_WORLD. Ranks of a node must share its memory
  int64_t area_bytes = kDefaultAreaBytes;
  WaitPolicy wait = {};
};

// Collective over MPI_COMM_WORLD: every rank calls it, with equal options, after MPI has been initialised; all succeed
// or all get the same error. RESOURCE_EXHAUSTED: /dev/shm has no room for the window; the message says how much it
// needs. The communicator calls MPI in the thread that uses it, and must be destroyed by every rank before MPI is
// finalised.
absl::StatusOr<std::unique_ptr<Communicator>> make_mpi_communicator(const MpiCommunicatorOptions& options);

// Collective over MPI_COMM_WORLD: OK when every rank brings OK; else every rank gets the code and message of the lowest
// failing one, its number before it and how many others failed behind; what all of them say alike is left as it is, so
// that agreeing twice changes nothing. A failing rank so never leaves others waiting. Ranks that wait here sleep.
absl::Status agree_over_mpi(const absl::Status& mine);

// Collective over MPI_COMM_WORLD: every rank's bytes, in rank order; less than 2 GiB in all. Ranks that wait here
// sleep.
std::vector<std::string> all_gather_over_mpi(std::string_view mine);

}  // namespace octet
