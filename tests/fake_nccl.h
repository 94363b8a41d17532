// A NCCL for ranks that are threads of one process, on the emulated GPU: the functions of NcclApi, with what may go
// wrong on order. Like a non-blocking communicator of the real one its calls are in progress first, and done when
// ncclCommGetAsyncError says so; messages between two ranks must agree in order, type and length.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/memory.h"
#include "worker/collective/nccl_api.h"

namespace octet {

struct NcclFault {
  enum class Kind {
    kNone,
    kNoUniqueId,      // ncclGetUniqueId fails
    kJoinFails,       // so does ncclCommInitRankConfig, at once
    kJoinNeverEnds,   // it stays in progress
    kCallFails,       // the collective's own call returns an error
    kNeverStarts,     // the collective stays in progress
    kNeverCompletes,  // the collective is started, and the stream is never done
    kAsyncError,      // the same, and NCCL comes to know that another rank is gone
  };
  Kind kind = Kind::kNone;
  int rank = 0;
  int collective = 0;        // the n-th from when the fault was ordered, from 1; groups count as one
  bool abort_hangs = false;  // afterwards, on every rank
};

// One at a time in a process.
class FakeNccl {
 public:
  explicit FakeNccl(const cuda::ModuleTable& module);
  // Lets hanging aborts go, and waits for them.
  ~FakeNccl();

  NcclApi api() const;
  void order(const NcclFault& fault);
  int aborts() const { return aborts_; }

 private:
  friend struct FakeNcclCalls;
  struct Message {
    NcclDataType type;
    std::vector<std::byte> bytes;
  };
  struct AllReduce {
    std::vector<std::vector<float>> of_rank;
    int arrived = 0;
  };

  bool strikes(const NcclComm& comm, NcclFault::Kind kind) const;
  // Starts what comm has been asked for, as far as its peers have.
  NcclResult proceed(NcclComm& comm);
  void from_device(const void* data, size_t bytes, void* to);
  void to_device(const void* from, size_t bytes, void* data);

  std::mutex mutex_;
  Stream stream_;  // for copies
  NcclFault fault_;
  std::vector<std::unique_ptr<NcclComm>> comms_;
  int joined_ = 0;
  std::map<std::pair<int, int>, std::deque<Message>> messages_;  // by (from, to)
  std::map<int, AllReduce> all_reduces_;                         // by number
  std::atomic<int> aborts_ = 0, aborting_ = 0;
  std::atomic<bool> released_ = false;
};

}  // namespace octet
