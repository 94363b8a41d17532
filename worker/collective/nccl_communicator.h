// The communicator of ranks that have a GPU each: sums travel from device to device through NCCL. In the reproducible
// order NCCL only moves bytes, and the tree is finished by add_tree_sum; in the fast one it sums as well.
//
// Failure: no wait is endless. NCCL's calls are non-blocking, and whoever waits for the stream asks NCCL for errors and
// looks at the clock. A rank whose peers are gone puts the cause on record, aborts the communicator, and ends. (A
// launch that blocks because the device's queue is full of work behind a lost peer's is for the job's watchdog to see.)
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/memory.h"
#include "worker/collective/communicator.h"
#include "worker/collective/nccl_api.h"
#include "worker/collective/window_communicator.h"

namespace octet {

struct NcclOptions {
  RankMap map;  // the leaves of each rank, as ShardSpec::leaves_of() has them
  // For what other ranks' pieces are received into, so that a long message is cut; on the device.
  static constexpr int64_t kScratchBytes = int64_t{16} << 20;
  int64_t scratch_bytes = kScratchBytes;

  // All ranks together, until a first sum has passed.
  std::chrono::milliseconds join_deadline{60'000};
  // Of a wait for the stream, which is a step's work: far longer than any step.
  std::chrono::milliseconds wait_deadline{60'000};
  std::chrono::milliseconds abort_deadline{2'000};

  // Where the rank is, "step 12, 0.4 s old": part of what is said of a failure. Empty: nothing is known.
  std::function<std::string()> place = {};
  // The ranks can meet no more. First the cause is put on record, as nothing after it is sure to come back; then, once
  // the communicator has been aborted or its deadline is over, `end` ends the process, or throws: then the stream and
  // the communicator cannot be used again.
  std::function<void(const absl::Status& cause)> record = {};
  std::function<void(const absl::Status& cause)> end = {};
};

// Collective over `host`, which carries NCCL's unique id, then barriers and what is gathered on the host. Several
// ranks, each with a stream on a GPU of its own. The stream is watched until the communicator's end, and outlives it.
// From then on collectives on the device allocate nothing and never wait for the stream: steps can be recorded as
// graphs, though not in the global capture mode, since NCCL puts its work on the stream from a thread of its own.
// UNAVAILABLE, DEADLINE_EXCEEDED, INTERNAL: the ranks cannot be joined; the message says why and what to do.
absl::StatusOr<std::unique_ptr<Communicator>> make_nccl_communicator(const NcclApi& api, Stream& stream,
                                                                     std::unique_ptr<Communicator> host,
                                                                     const NcclOptions& options);

}  // namespace octet
