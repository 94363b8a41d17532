// Which of its node's GPUs a rank computes on, and what a launcher may have done to that (pure).
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>

#include "absl/status/statusor.h"

namespace octet {

// The device that the rank with this place on its node takes of those that it sees: the one of its place, or the only
// one, where each rank has been given its own or all share one. FAILED_PRECONDITION, with the remedy: some would be
// left without. Where none is visible 0, for check_device() to say why.
absl::StatusOr<int> choose_gpu(int visible, int local_rank, int local_size);

// What a rank sees of its node's GPUs.
struct GpuView {
  int visible = 0;   // to CUDA
  int present = 0;   // to the driver's tools; 0: not known
  std::string uuid;  // of the first that is visible
};

struct HiddenPeers {
  std::string message;  // "each rank sees a single GPU (--gpus-per-task=1): it cannot reach its peers' memory"
  std::string remedy;
};

// Whether a launcher, or a user, has left this rank one GPU of several, so that its peers' memory is out of reach.
// `node` is all ranks of its node. `variable` is the rank's environment, empty where a variable is not set.
std::optional<HiddenPeers> find_hidden_peers(const GpuView& mine, std::span<const GpuView> node,
                                             const std::function<std::string(const char* name)>& variable);

}  // namespace octet
