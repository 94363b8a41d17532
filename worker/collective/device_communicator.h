// Which way the sums of ranks on GPUs take: decided from what all ranks know of their GPUs and libraries, in one place.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/memory.h"
#include "worker/collective/communicator.h"
#include "worker/collective/nccl_communicator.h"

namespace octet {

// kHost: through the host's memory. kP2p: through memory that GPUs read from one another.
enum class AllReduce { kAuto, kNccl, kP2p, kHost };

const char* name_of(AllReduce kind);

// What one rank brings to the decision.
struct DeviceFactsOfRank {
  std::string gpu;           // its uuid: ranks that share a GPU have the same
  std::string nccl_version;  // empty: it has none,
  std::string nccl_error;    // for this reason
};

struct AllReduceChoice {
  AllReduce kind = AllReduce::kHost;  // never kAuto
  std::string reason;                 // "each rank has a GPU of its own", for the log
};

// Pure, and so the same on every rank. FAILED_PRECONDITION: what was asked for by name cannot be; with the remedy.
absl::StatusOr<AllReduceChoice> choose_all_reduce(AllReduce wanted, std::span<const DeviceFactsOfRank> ranks);

struct DeviceCommunicatorOptions {
  AllReduce wanted = AllReduce::kAuto;
  std::string gpu;          // this rank's uuid
  Stream::CpuOptions host;  // what sums on the host, where that is the way
  NcclOptions nccl;
};

struct DeviceCommunicator {
  std::unique_ptr<Communicator> communicator;
  AllReduceChoice choice;
};

// Collective over `host`, which the result wraps. open() is open_nccl(), called only where NCCL may be the way. The
// stream outlives the communicator.
absl::StatusOr<DeviceCommunicator> make_device_communicator(Stream& stream, std::unique_ptr<Communicator> host,
                                                            const std::function<absl::StatusOr<NcclApi>()>& open,
                                                            const DeviceCommunicatorOptions& options);

}  // namespace octet
