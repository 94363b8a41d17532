// The communicator of ranks on the GPUs of one machine: sums are made by our own kernels, which read the other ranks'
// memory (kernels/cuda/peer_reduce.cu draws how), and what follows a sum may follow in the same kernel. In processes
// the memory is shared through CUDA IPC, between threads of one process by its address. Several ranks may share a GPU.
//
// Invariant: the bits of a sum are those of the tree over slices, whichever way a message takes.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/peer.h"
#include "kernels/memory.h"
#include "worker/collective/communicator.h"
#include "worker/collective/crossover.h"
#include "worker/collective/window_communicator.h"

namespace octet {

struct PeerCommunicatorOptions {
  RankMap map;  // the leaves of each rank; one node
  // Of each of a window's two areas on the device. Longer messages are cut.
  static constexpr int64_t kAreaBytes = int64_t{8} << 20;
  int64_t area_bytes = kAreaBytes;
  // Of a kernel that waits for another rank: far longer than any step, as ranks may reach a sum that far apart.
  std::chrono::milliseconds wait_deadline{60'000};
  // Whether the inner communicator can sum on the device too (NCCL): then it gets the messages for which it is faster.
  bool inner_sums_on_device = false;

  // Where the rank is, "step 12, 0.4 s old": part of what is said of a failure. Empty: nothing is known.
  std::function<std::string()> place = {};
  // A rank did not come. Ends the process; empty: with the cause on stderr, and abort().
  std::function<void(const absl::Status& cause)> end = {};

  // Of the messages that are timed where each rank has a GPU of its own, ascending; and the clock for it, in seconds
  // (empty: a steady one).
  std::vector<int64_t> timed_bytes = {16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20};
  std::function<double()> seconds = {};
};

class PeerCommunicator final : public Communicator {
 public:
  ~PeerCommunicator() override;

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  void all_gather(const void* mine, std::span<const int64_t> bytes_of_rank, void* all) override {
    inner_->all_gather(mine, bytes_of_rank, all);
  }
  void barrier() override { inner_->barrier(); }
  // These queue kernels, allocate nothing and do not wait, so that a graph can hold them. `stream` is the one of the
  // construction.
  void gather(Stream& stream, const Tensor& mine, std::span<const int64_t> bytes_of_rank, const Tensor& all) override;
  void reduce_over_slices(Stream& stream, const Tensor& partials, const Tensor& residual) override;
  void reduce_and_norm(Stream& stream, const Tensor& partials, const Tensor& residual,
                       const NormedInput& next) override;
  // Where the inner communicator has a part, if that is.
  bool on_device() const override { return !options_.inner_sums_on_device || inner_->on_device(); }

  const Crossover& crossover() const { return crossover_; }
  // How messages go and why, for the log: a sentence, and the times where there are any. The same on every rank.
  const std::string& report() const { return report_; }

 private:
  friend absl::StatusOr<std::unique_ptr<PeerCommunicator>> make_peer_communicator(
      Stream& stream, std::unique_ptr<Communicator>& inner, const PeerCommunicatorOptions& options);

  PeerCommunicator(Stream& stream, Communicator& inner, const PeerCommunicatorOptions& options);

  absl::Status join();
  absl::Status open_window();
  absl::Status agreed(const absl::Status& mine);
  void choose(int ranks_of_a_gpu);
  std::vector<AllReduceTimes> measure();
  AllReduceTimes slowest(const AllReduceTimes& mine);
  double seconds_of(const std::function<void()>& sum);
  cuda::Shots shots_for(int64_t bytes) const;
  bool goes_elsewhere(int64_t bytes) const { return bytes >= crossover_.other_bytes; }
  [[noreturn]] void lose(const cuda::PeerWait& wait) const;

  Stream& stream_;
  const cuda::PeerTable& peer_;
  const PeerCommunicatorOptions options_;
  const int64_t pieces_;                 // of this rank
  std::unique_ptr<Communicator> owned_;  // inner_, once all has gone well
  Communicator* inner_;
  cuda::PeerWindow* window_ = nullptr;
  Crossover crossover_;
  std::string report_;
};

// Collective over `inner`, which carries what ranks show one another, barriers, and what is gathered on the host; it is
// taken where this succeeds and left where not, so that the caller can do without peer memory. Every rank calls it with
// equal options, and all succeed or all get the same error. FAILED_PRECONDITION: the memory of one GPU cannot be read
// from another rank (containers and drivers may refuse CUDA IPC); RESOURCE_EXHAUSTED: no window can be had. The stream
// outlives the communicator.
//
// Ranks that are threads of one process and share a GPU wait for one another on the device: from the first sum on
// nobody may call what waits for the whole device (cudaMalloc, cudaFree, the first start of a kernel that CUDA loads
// lazily) while a rank is inside a sum; CUDA_MODULE_LOADING=EAGER in the environment sees to the last of these, and
// CUDA_DEVICE_MAX_CONNECTIONS=32 keeps one rank's kernels from queueing behind another's.
absl::StatusOr<std::unique_ptr<PeerCommunicator>> make_peer_communicator(Stream& stream,
                                                                         std::unique_ptr<Communicator>& inner,
                                                                         const PeerCommunicatorOptions& options);

}  // namespace octet
