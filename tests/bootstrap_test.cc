// What is read and refused before the ranks meet: the launcher's variables, pretended nodes, what the machine lends.
#include "launch/bootstrap.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "launch/machine.h"

namespace octet {
namespace {

std::map<std::string, std::string> variables;

const char* variable(const char* name) {
  const auto found = variables.find(name);
  return found == variables.end() ? nullptr : found->second.c_str();
}

absl::Status launch_of(int size, const std::map<std::string, std::string>& environment) {
  variables = environment;
  return check_launch(size, variable);
}

TEST(Launch, ALoneProcessThatWasMeantToBeOneOfSeveralIsRefused) {
  for (const char* name : {"SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"}) {
    const absl::Status status = launch_of(1, {{name, "8"}});
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_NE(status.message().find("srun --mpi=pmix"), absl::string_view::npos) << status;
    EXPECT_NE(status.message().find(name), absl::string_view::npos) << status;
  }
}

TEST(Launch, OneRankOnPurposeAndSeveralRanksAreFine) {
  EXPECT_TRUE(launch_of(1, {}).ok());
  EXPECT_TRUE(launch_of(1, {{"SLURM_NTASKS", "1"}}).ok());
  EXPECT_TRUE(launch_of(1, {{"OMPI_COMM_WORLD_SIZE", "1"}, {"SLURM_NTASKS", "8"}}).ok());
  EXPECT_TRUE(launch_of(8, {{"SLURM_NTASKS", "8"}}).ok());
}

TEST(PretendNodes, AreNumbersOfRanksJoinedByPlus) {
  EXPECT_EQ(*parse_pretend_nodes("2+1"), (std::vector<int>{2, 1}));
  EXPECT_EQ(*parse_pretend_nodes("8"), (std::vector<int>{8}));
  for (const char* text : {"", "+", "2+", "2+0", "2+-1", "2,1", "two", "99999999999+1"}) {
    const auto nodes = parse_pretend_nodes(text);
    EXPECT_EQ(nodes.status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

// A machine made of files in a folder of its own.
class Machine : public testing::Test {
 protected:
  Machine() : root_(std::filesystem::path(testing::TempDir()) / ("octet_machine_test_" + std::to_string(getpid()))) {
    std::filesystem::remove_all(root_);
    write("meminfo", "MemTotal:       1000000 kB\nMemFree:   1 kB\nMemAvailable:    800000 kB\n");
  }
  ~Machine() override { std::filesystem::remove_all(root_); }

  void write(const std::string& name, const std::string& text) {
    std::filesystem::create_directories((root_ / name).parent_path());
    std::ofstream(root_ / name) << text;
  }
  std::string path(const std::string& name) const { return (root_ / name).string(); }
  MachineFiles files() const {
    return {.meminfo = path("meminfo"), .cgroup = path("cgroup"), .mountinfo = path("mountinfo")};
  }
  // A cgroup v2 at /job/step, mounted whole.
  void mount_v2() {
    write("cgroup", "0::/job/step\n");
    write("mountinfo", "30 23 0:26 / " + path("v2") + " rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n");
  }
  // A container's view of v1: its own cgroup is the root of the mount, and its path is told from the host's root.
  void mount_v1() {
    write("cgroup", "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n");
    write("mountinfo", "31 23 0:26 /docker/abc " + path("v1m") +
                           " ro - cgroup cgroup rw,memory\n32 23 0:27 /docker/abc " + path("v1c") +
                           " ro - cgroup cgroup rw,cpu,cpuacct\n");
  }

  const std::filesystem::path root_;
};

TEST_F(Machine, WithoutCgroupsLendsAllItHas) {
  EXPECT_EQ(*available_memory(files()), int64_t{800000} * 1024);
  EXPECT_EQ(cores_within_quota(7, files()), 7);
}

TEST_F(Machine, LendsWhatTheTightestCgroupAboveLeaves) {
  mount_v2();
  write("v2/job/memory.max", "500000000\n");
  write("v2/job/memory.current", "300000000\n");
  write("v2/job/memory.stat", "anon 5\ninactive_file 50000000\nactive_file 10000000\n");
  write("v2/job/step/memory.max", "max\n");
  write("v2/job/step/memory.current", "1\n");
  EXPECT_EQ(*available_memory(files()), 260000000);
  write("v2/job/step/memory.max", "1000\n");
  EXPECT_EQ(*available_memory(files()), 999);
  write("v2/job/step/memory.current", "2000\n");
  EXPECT_EQ(*available_memory(files()), 0);
}

TEST_F(Machine, ReadsAContainersOldCgroups) {
  mount_v1();
  write("v1m/memory.limit_in_bytes", "400000000\n");
  write("v1m/memory.usage_in_bytes", "100000000\n");
  write("v1m/memory.stat", "cache 1\ntotal_inactive_file 30000000\ntotal_active_file 0\n");
  write("v1c/cpu.cfs_quota_us", "350000\n");
  write("v1c/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(*available_memory(files()), 330000000);
  EXPECT_EQ(cores_within_quota(16, files()), 3);
  write("v1m/memory.limit_in_bytes", "9223372036854771712\n");
  write("v1c/cpu.cfs_quota_us", "-1\n");
  EXPECT_EQ(*available_memory(files()), int64_t{800000} * 1024);
  EXPECT_EQ(cores_within_quota(16, files()), 16);
}

TEST_F(Machine, LendsTheCoresOfTheTightestQuotaButAtLeastOne) {
  mount_v2();
  write("v2/job/cpu.max", "600000 100000\n");
  write("v2/job/step/cpu.max", "max 100000\n");
  EXPECT_EQ(cores_within_quota(16, files()), 6);
  EXPECT_EQ(cores_within_quota(4, files()), 4);
  write("v2/job/step/cpu.max", "50000 100000\n");
  EXPECT_EQ(cores_within_quota(16, files()), 1);
}

TEST_F(Machine, ACgroupPathOutsideTheMountIsReadAtTheMount) {
  mount_v2();
  write("cgroup", "0::/../other\n");
  write("v2/memory.max", "5000\n");
  write("v2/memory.current", "0\n");
  EXPECT_EQ(*available_memory(files()), 5000);
}

TEST_F(Machine, WithoutMeminfoSaysWhichFileIsMissing) {
  std::filesystem::remove(path("meminfo"));
  const auto bytes = available_memory(files());
  EXPECT_EQ(bytes.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(bytes.status().message().find("meminfo"), absl::string_view::npos);
}

TEST(AllowedCpus, AreAscendingAndAtLeastOne) {
  const std::vector<int> cpus = allowed_cpus();
  ASSERT_FALSE(cpus.empty());
  for (size_t i = 1; i < cpus.size(); ++i) EXPECT_LT(cpus[i - 1], cpus[i]);
}

}  // namespace
}  // namespace octet
