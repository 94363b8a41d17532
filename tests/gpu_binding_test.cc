// Which GPU a rank takes, and how the launchers' ways of hiding the others are told.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "launch/gpu_binding.h"

namespace octet {
namespace {

using testing::AllOf;
using testing::HasSubstr;

using Environment = std::map<std::string, std::string>;

// What the first rank of a node finds, given what each sees.
std::optional<HiddenPeers> found(const std::vector<GpuView>& node, const Environment& environment = {}) {
  return find_hidden_peers(node.at(0), node, [&](const char* name) {
    const auto variable = environment.find(name);
    return variable == environment.end() ? std::string() : variable->second;
  });
}

TEST(GpuBinding, TakesTheGpuOfTheRanksPlaceOrTheOnlyOne) {
  EXPECT_EQ(*choose_gpu(8, 5, 8), 5);
  EXPECT_EQ(*choose_gpu(8, 1, 2), 1);
  EXPECT_EQ(*choose_gpu(1, 5, 8), 0);  // each its own, or all the same
  EXPECT_EQ(*choose_gpu(0, 5, 8), 0);  // check_device() says why
}

TEST(GpuBinding, RefusesToLeaveSomeRanksWithoutAGpu) {
  EXPECT_THAT(std::string(choose_gpu(4, 1, 8).status().message()),
              AllOf(HasSubstr("4 GPUs are visible to the 8 ranks"), HasSubstr("--gpus-per-node=8"),
                    HasSubstr("CUDA_VISIBLE_DEVICES")));
}

TEST(GpuBinding, TellsWhoHidesPeersAndWhatToDo) {
  const std::vector<GpuView> node = {{.visible = 1, .uuid = "GPU-a"}, {.visible = 1, .uuid = "GPU-b"}};
  const std::vector<std::pair<Environment, std::string>> cases = {
      {{{"SLURM_GPUS_PER_TASK", "1"}, {"CUDA_VISIBLE_DEVICES", "0"}}, "(--gpus-per-task=1)"},
      {{{"SLURM_GPU_BIND", "single:1"}}, "(--gpu-bind=single:1)"},
      {{{"SLURM_GPU_BIND", "none"}, {"CUDA_VISIBLE_DEVICES", "1"}}, "(CUDA_VISIBLE_DEVICES names one)"},
      {{}, "(the job's cgroup shows no other)"}};
  for (const auto& [environment, cause] : cases) {
    const std::optional<HiddenPeers> hidden = found(node, environment);
    ASSERT_TRUE(hidden) << cause;
    EXPECT_THAT(hidden->message, AllOf(HasSubstr("single GPU"), HasSubstr(cause)));
    EXPECT_THAT(hidden->remedy, AllOf(HasSubstr("--gpus-per-node=2"), HasSubstr("--gpu-bind=none")));
  }
}

TEST(GpuBinding, SeesWhatTheDriversToolsShowBesideTheOnlyVisibleOne) {
  EXPECT_TRUE(found({{.visible = 1, .present = 2, .uuid = "GPU-a"}, {.visible = 1, .present = 2, .uuid = "GPU-a"}}));
}

TEST(GpuBinding, FindsNothingWhereNothingIsHidden) {
  const GpuView all_of_them{.visible = 2, .present = 2, .uuid = "GPU-a"}, only{.visible = 1, .uuid = "GPU-a"};
  EXPECT_FALSE(found({all_of_them, all_of_them}));
  EXPECT_FALSE(found({only, only})) << "a machine with one GPU, which all share";
  EXPECT_FALSE(found({{.visible = 1, .present = 8, .uuid = "GPU-a"}})) << "a rank without peers";
  EXPECT_FALSE(found({{}, {}})) << "no GPU at all";
}

}  // namespace
}  // namespace octet
