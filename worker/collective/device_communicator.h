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
#include "worker/collective/peer_communicator.h"

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
  AllReduce kind = AllReduce::kHost;     // never kAuto; kP2p: if that memory can be read, else fallback
  AllReduce fallback = AllReduce::kP2p;  // of kP2p: kNccl, which then also gets the messages for which it is faster, or
                                         // kHost; kP2p: none, as it was asked for by name
  std::string reason;                    // "each rank has a GPU of its own", for the log
};

// Pure, and so the same on every rank. FAILED_PRECONDITION: what was asked for by name cannot be; with the remedy.
absl::StatusOr<AllReduceChoice> choose_all_reduce(AllReduce wanted, std::span<const DeviceFactsOfRank> ranks,
                                                  int nodes);

struct DeviceCommunicatorOptions {
  AllReduce wanted = AllReduce::kAuto;
  std::string gpu;          // this rank's uuid
  Stream::CpuOptions host;  // what sums on the host, where that is the way
  NcclOptions nccl;
  PeerCommunicatorOptions peer;  // inner_sums_on_device is not looked at
};

// Device memory of a communicator at most: windows and scratch.
constexpr int64_t kDeviceCommunicatorBytes = 2 * PeerCommunicatorOptions::kAreaBytes + NcclOptions::kScratchBytes;

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
