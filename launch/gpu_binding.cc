#include "launch/gpu_binding.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace octet {
namespace {

// The option that has done it, as far as the environment tells.
std::string who_hides(const std::function<std::string(const char* name)>& variable) {
  if (const std::string each = variable("SLURM_GPUS_PER_TASK"); !each.empty()) {
    return absl::StrCat("--gpus-per-task=", each);
  }
  if (const std::string bind = variable("SLURM_GPU_BIND"); !bind.empty() && !absl::StrContains(bind, "none")) {
    return absl::StrCat("--gpu-bind=", bind);
  }
  if (!variable("CUDA_VISIBLE_DEVICES").empty()) return "CUDA_VISIBLE_DEVICES names one";
  return "the job's cgroup shows no other";
}

}  // namespace

absl::StatusOr<int> choose_gpu(int visible, int local_rank, int local_size) {
  if (visible <= 1) return 0;
  if (visible >= local_size) return local_rank;
  return absl::FailedPreconditionError(
      absl::StrCat(visible, " GPUs are visible to the ", local_size,
                   " ranks of this node: start as many ranks as there are GPUs, or let them see more (",
                   "srun --gpus-per-node=", local_size, ", CUDA_VISIBLE_DEVICES)"));
}

std::optional<HiddenPeers> find_hidden_peers(const GpuView& mine, std::span<const GpuView> node,
                                             const std::function<std::string(const char* name)>& variable) {
  if (node.size() == 1 || mine.visible != 1) return std::nullopt;
  // The job's cgroup may hide them from the driver's tools as well; then the others see other ones.
  const bool others = std::any_of(node.begin(), node.end(),
                                  [&](const GpuView& other) { return other.visible > 0 && other.uuid != mine.uuid; });
  if (mine.present <= 1 && !others) return std::nullopt;
  return HiddenPeers{.message = absl::StrCat("each rank sees a single GPU (", who_hides(variable),
                                             "): it cannot reach its peers' memory"),
                     .remedy = absl::StrCat(
                         "srun --gpus-per-node=", node.size(), " or --gres=gpu:", node.size(),
                         " with --gpu-bind=none, instead of --gpus-per-task=1, and no CUDA_VISIBLE_DEVICES of one")};
}

}  // namespace octet
