// octet doctor: facts to findings, the driver's library through a stand-in, and the command under a real mpirun.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "launch/findings.h"
#include "launch/probe.h"
#include "tests/process.h"
#include "tests/random_model.h"

namespace octet {
namespace {

using nlohmann::json;

constexpr int64_t kGiB = int64_t{1} << 30;

// Ranks that nothing is wrong with, `of_node` of them on each node, each with four cores of its own.
JobFacts healthy_job(int ranks, int of_node) {
  JobFacts job;
  for (int r = 0; r < ranks; ++r) {
    RankFacts rank{.rank = r, .node = r / of_node, .host = absl::StrCat("node", r / of_node)};
    rank.versions = {{"octet", "0.1.0"}, {"Open MPI", "4.1.4"}, {"gRPC", "1.51.1"}};
    const int place = r % of_node;
    rank.cpus = {4 * place, 4 * place + 1, 4 * place + 2, 4 * place + 3};
    rank.online_cpus = rank.node_cores = 4 * of_node;
    rank.own_cores = 4;
    rank.numa_nodes = {{}, {}};
    for (int cpu = 0; cpu < 4 * of_node; ++cpu) rank.numa_nodes[cpu < 4 * (of_node / 2) ? 0 : 1].push_back(cpu);
    rank.core_for_each_thread = true;
    rank.memory_bytes = 64 * kGiB;
    rank.shm_free_bytes = kGiB;
    rank.shm_need_bytes = 16 << 20;
    rank.open_files = 65536;
    rank.locked_bytes = -1;
    rank.read_bytes_per_second = 20e9;
    job.ranks.push_back(rank);
  }
  job.all_reduces = {{.bytes = 32 << 10, .p50_seconds = 20e-6, .p99_seconds = 40e-6}};
  job.ephemeral_ports = "32768-60999";
  return job;
}

JobFacts with_gpus(JobFacts job, int gpus) {
  for (RankFacts& rank : job.ranks) {
    rank.nvidia_driver = true;
    rank.gpus.driver = "550.54.15";
    for (int i = 0; i < gpus; ++i) {
      rank.gpus.gpus.push_back(
          {.name = "H100", .uuid = absl::StrCat("GPU-", i), .memory_bytes = 80 * kGiB, .free_bytes = 79 * kGiB});
    }
  }
  return job;
}

JobFacts with_model(JobFacts job) {
  job.model = "/models/llama";
  for (RankFacts& rank : job.ranks) {
    rank.model = {.digest = "0123456789abcdef",
                  .filesystem = "lustre",
                  .weight_bytes = 487 * kGiB,
                  .read_bytes = kGiB / 4,
                  .read_seconds = 0.5};
  }
  return job;
}

// The findings that are not ok.
std::vector<Finding> complaints(const JobFacts& job) {
  std::vector<Finding> findings = judge(job);
  std::erase_if(findings, [](const Finding& finding) { return finding.level == FindingLevel::kOk; });
  return findings;
}

// Expects one complaint, with these ranks and with these words in it or in its remedy.
void expect_complaint(const JobFacts& job, FindingLevel level, const std::string& check, const std::vector<int>& ranks,
                      const std::vector<std::string>& words) {
  const std::vector<Finding> found = complaints(job);
  ASSERT_EQ(found.size(), 1u) << to_text(found);
  EXPECT_EQ(found[0].level, level);
  EXPECT_EQ(found[0].check, check);
  EXPECT_EQ(found[0].ranks, ranks);
  EXPECT_FALSE(found[0].remedy.empty());
  for (const std::string& word : words) EXPECT_TRUE(absl::StrContains(to_text(found), word)) << word << to_text(found);
}

TEST(Doctor, FindsNothingWrongWithHealthyJobs) {
  for (const JobFacts& job : {healthy_job(1, 1), healthy_job(8, 8), healthy_job(16, 8), with_gpus(healthy_job(8, 8), 8),
                              with_model(healthy_job(8, 4))}) {
    EXPECT_TRUE(complaints(job).empty()) << to_text(complaints(job));
    EXPECT_FALSE(any_failure(judge(job)));
  }
}

TEST(Doctor, SaysOnceWhatSeveralRanksHaveInCommon) {
  for (const Finding& finding : judge(healthy_job(8, 8))) {
    if (finding.check == "ports") continue;
    EXPECT_EQ(finding.ranks.size(), 8u) << finding.check;
  }
  EXPECT_EQ(name_ranks({3}), "rank 3");
  EXPECT_EQ(name_ranks({0, 1, 2, 5, 7, 8}), "ranks 0-2, 5, 7-8");
}

TEST(Doctor, WarnsOfBindingsThatOverlapInPart) {
  JobFacts job = healthy_job(4, 4);
  job.ranks[1].cpus = {3, 4, 5, 6};
  job.ranks[1].numa_nodes = job.ranks[0].numa_nodes = {};
  expect_complaint(job, FindingLevel::kWarning, "binding", {0, 1}, {"common to ranks 0-1", "--bind-to none"});
  for (RankFacts& rank : job.ranks) rank.cpus = {0, 1, 2, 3, 4, 5, 6, 7};
  for (RankFacts& rank : job.ranks) rank.numa_nodes = {};
  EXPECT_TRUE(complaints(job).empty()) << "all unbound: " << to_text(complaints(job));
}

TEST(Doctor, WarnsOfTooFewCores) {
  JobFacts job = healthy_job(4, 4);
  for (RankFacts& rank : job.ranks) {
    rank.cpus = {0, 1};
    rank.node_cores = 2;
  }
  expect_complaint(job, FindingLevel::kWarning, "binding", {0, 1, 2, 3}, {"4 ranks share 2 cores"});
}

TEST(Doctor, WarnsOfMpirunsOwnBindingToOneCore) {
  JobFacts job = healthy_job(2, 2);
  for (RankFacts& rank : job.ranks) {
    rank.cpus = {rank.rank};
    rank.environment.emplace("OMPI_COMM_WORLD_SIZE", "2");
  }
  expect_complaint(job, FindingLevel::kWarning, "binding", {0, 1}, {"1 of the machine's 8 CPUs", "--bind-to none"});
}

TEST(Doctor, WarnsOfThreadsThatMayLeaveTheirNumaNode) {
  JobFacts job = healthy_job(2, 2);
  job.ranks[1].numa_nodes = {{4, 5}, {6, 7}};
  expect_complaint(job, FindingLevel::kWarning, "NUMA", {1}, {"2 NUMA nodes", "--map-by numa"});
}

TEST(Doctor, WarnsWhenSlurmHidesPeersFromARank) {
  // CUDA_VISIBLE_DEVICES of one among several, and a cgroup that shows each rank another GPU.
  JobFacts visible = with_gpus(healthy_job(4, 4), 4);
  for (RankFacts& rank : visible.ranks) rank.environment["CUDA_VISIBLE_DEVICES"] = absl::StrCat(rank.rank);
  JobFacts cgroup = with_gpus(healthy_job(4, 4), 1);
  for (RankFacts& rank : cgroup.ranks) rank.gpus.gpus[0].uuid = absl::StrCat("GPU-", rank.rank);
  for (const JobFacts& job : {visible, cgroup}) {
    expect_complaint(job, FindingLevel::kWarning, "GPUs", {0, 1, 2, 3},
                     {"--gpus-per-task=1", "--gpus-per-node=4", "--gres"});
  }
}

TEST(Doctor, WarnsOfGpusThatAreFewOrApart) {
  expect_complaint(with_gpus(healthy_job(4, 4), 2), FindingLevel::kWarning, "GPUs", {0, 1, 2, 3}, {"fewer than the 4"});
  JobFacts apart = with_gpus(healthy_job(1, 1), 4);
  apart.ranks[0].gpus.pairs_without_peer_access = {{0, 3}, {1, 3}};
  expect_complaint(apart, FindingLevel::kWarning, "GPUs", {0}, {"2 pairs", "0 and 3"});
  JobFacts taken = with_gpus(healthy_job(4, 4), 4);
  for (RankFacts& rank : taken.ranks) rank.gpus.gpus[2].free_bytes = 10 * kGiB;
  expect_complaint(taken, FindingLevel::kWarning, "GPUs", {0, 1, 2, 3}, {"70.00 GiB of GPU 2", "nvidia-smi"});
  JobFacts broken = healthy_job(1, 1);
  broken.ranks[0].nvidia_driver = true;
  broken.ranks[0].gpu_error = "nvmlInit_v2: Driver Not Loaded";
  expect_complaint(broken, FindingLevel::kWarning, "GPUs", {0}, {"Driver Not Loaded", "nvidia-smi"});
}

TEST(Doctor, FailsWhereSharedMemoryIsTooSmall) {
  JobFacts job = healthy_job(8, 4);
  for (int r = 4; r < 8; ++r) job.ranks[r].shm_free_bytes = 1 << 20;
  expect_complaint(job, FindingLevel::kFailure, "shared memory", {4, 5, 6, 7}, {"--shm-size"});
  EXPECT_TRUE(any_failure(judge(job)));
}

TEST(Doctor, FailsWhenTheRanksCannotBeJoined) {
  JobFacts job = healthy_job(2, 2);
  job.communicator_error = "the 2 ranks of this node need 4.0 MiB in /dev/shm: enlarge it";
  const std::vector<Finding> found = complaints(job);
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].level, FindingLevel::kFailure);
  EXPECT_EQ(found[0].message, job.communicator_error);
}

TEST(Doctor, NamesNodesAndTheirRanks) {
  const std::string text = to_text(judge(healthy_job(4, 2)));
  EXPECT_TRUE(absl::StrContains(text, "4 ranks on 2 nodes: node0 (ranks 0-1), node1 (ranks 2-3)")) << text;
}

TEST(Doctor, WarnsOfTightLimits) {
  JobFacts job = healthy_job(2, 1);
  job.ranks[1].open_files = 1024;
  job.ranks[1].locked_bytes = 64 << 10;
  expect_complaint(job, FindingLevel::kWarning, "limits", {1}, {"ulimit -n", "ulimit -l"});
}

TEST(Doctor, WarnsOfASlowRankAndSlowSums) {
  JobFacts slow = healthy_job(4, 2);
  slow.ranks[2].read_bytes_per_second = 8e9;
  expect_complaint(slow, FindingLevel::kWarning, "memory speed", {2}, {"8.0 GB/s"});
  JobFacts sums = healthy_job(4, 2);
  sums.all_reduces[0].p50_seconds = 5e-3;
  expect_complaint(sums, FindingLevel::kWarning, "all-reduce", {0, 1, 2, 3}, {"UCX_NET_DEVICES"});
}

TEST(Doctor, FailsOnOtherFilesAndOtherBinaries) {
  JobFacts files = with_model(healthy_job(4, 2));
  files.ranks[3].model.digest = "ffffffffffffffff";
  expect_complaint(files, FindingLevel::kFailure, "model files", {3}, {"ffffffffffffffff", "0123456789abcdef"});
  files.ranks[3].model.error = "cannot open model directory /models/llama";
  expect_complaint(files, FindingLevel::kFailure, "model files", {3}, {"cannot open"});
  JobFacts versions = healthy_job(4, 2);
  versions.ranks[2].versions["octet"] = "0.0.9";
  expect_complaint(versions, FindingLevel::kFailure, "versions", {2}, {"0.0.9"});
}

TEST(Doctor, FailsWhenTheModelDoesNotFit) {
  JobFacts job = with_model(healthy_job(2, 2));
  job.plan_error = "rank 0 needs 300 GiB";
  expect_complaint(job, FindingLevel::kFailure, "memory", {0, 1}, {"300 GiB", "octet plan --model /models/llama"});
}

TEST(Doctor, TellsHowLongASlowDiskTakes) {
  JobFacts job = with_model(healthy_job(1, 1));
  job.ranks[0].model.read_seconds = 3.0;
  expect_complaint(job, FindingLevel::kWarning, "model files", {0}, {"lustre", "loading takes about"});
}

TEST(Doctor, WarnsOfPortsAndClocks) {
  JobFacts port = healthy_job(1, 1);
  port.port_in_use = "127.0.0.1:50051";
  expect_complaint(port, FindingLevel::kWarning, "ports", {0}, {"50051", "--address-file"});
  JobFacts clocks = healthy_job(2, 1);
  clocks.ranks[1].clock_seconds = 90;
  expect_complaint(clocks, FindingLevel::kWarning, "clocks", {1}, {"90.0 s", "chrony"});
}

TEST(Doctor, FactsSurviveTheirWayToRank0) {
  const RankFacts facts = with_gpus(with_model(healthy_job(2, 2)), 2).ranks[1];
  EXPECT_EQ(encode(decode(encode(facts))), encode(facts));
  EXPECT_EQ(decode(encode(facts)).gpus.gpus[1].uuid, "GPU-1");
}

// ---- Probes

TEST(Probe, ReadsListsOfCpus) {
  EXPECT_EQ(parse_cpu_list("0-3,8,10-11\n"), (std::vector<int>{0, 1, 2, 3, 8, 10, 11}));
  EXPECT_EQ(parse_cpu_list("5"), (std::vector<int>{5}));
  EXPECT_TRUE(parse_cpu_list("").empty());
  EXPECT_TRUE(parse_cpu_list("none").empty());
}

TEST(Probe, ReadsTheMachinesNumaNodes) {
  const std::filesystem::path folder = absl::StrCat(testing::TempDir(), "octet_numa_", getpid());
  for (int node : {0, 1}) {
    std::filesystem::create_directories(folder / absl::StrCat("node", node));
    std::ofstream(folder / absl::StrCat("node", node) / "cpulist") << 4 * node << "-" << 4 * node + 3 << "\n";
  }
  EXPECT_EQ(probe_machine("no-such-library.so", folder).numa_nodes,
            (std::vector<std::vector<int>>{{0, 1, 2, 3}, {4, 5, 6, 7}}));
  std::filesystem::remove_all(folder);
}

TEST(Probe, ReadsEveryByteOfAModelOnce) {
  const std::string model = write_random_model({});
  const ModelFacts whole = probe_model(model, 0, 1, kGiB, 60);
  EXPECT_EQ(whole.error, "");
  EXPECT_EQ(whole.read_bytes, whole.weight_bytes);
  int64_t read = 0;
  for (int place = 0; place < 3; ++place) read += probe_model(model, place, 3, kGiB, 60).read_bytes;
  EXPECT_EQ(read, whole.weight_bytes);
  EXPECT_EQ(probe_model(model, 0, 1, 1000, 60).read_bytes, 1000);
  EXPECT_TRUE(absl::StrContains(probe_model("/no/such/model", 0, 1, 1, 1).error, "/no/such/model"));
}

// ---- The driver's library

class NvmlTest : public testing::Test {
 protected:
  void SetUp() override { clear(); }
  void TearDown() override { clear(); }
  static void clear() {
    for (const char* name : {"FAKE_NVML_GPUS", "FAKE_NVML_ISLAND", "FAKE_NVML_BROKEN"}) unsetenv(name);
  }
};

TEST_F(NvmlTest, NoLibraryIsNoFault) {
  EXPECT_TRUE(absl::IsNotFound(Nvml::open("no-such-library.so").status()));
  EXPECT_FALSE(probe_machine("no-such-library.so").nvidia_driver);
}

TEST_F(NvmlTest, ReadsGpusAndWhichOfThemArePeers) {
  setenv("FAKE_NVML_GPUS", "4", 1);
  RankFacts facts = probe_machine(OCTET_FAKE_NVML);
  EXPECT_TRUE(facts.nvidia_driver);
  EXPECT_EQ(facts.gpu_error, "");
  EXPECT_EQ(facts.gpus.driver, "550.54.15");
  ASSERT_EQ(facts.gpus.gpus.size(), 4u);
  EXPECT_EQ(facts.gpus.gpus[3].uuid, "GPU-3");
  EXPECT_EQ(facts.gpus.gpus[3].memory_bytes, int64_t{81559} << 20);
  EXPECT_TRUE(facts.gpus.pairs_without_peer_access.empty());
  setenv("FAKE_NVML_ISLAND", "1", 1);
  facts = probe_machine(OCTET_FAKE_NVML);
  EXPECT_EQ(facts.gpus.pairs_without_peer_access, (std::vector<std::pair<int, int>>{{0, 3}, {1, 3}, {2, 3}}));
}

TEST_F(NvmlTest, TellsWhatTheDriverSaysWhenItDoesNotStart) {
  setenv("FAKE_NVML_BROKEN", "1", 1);
  const RankFacts facts = probe_machine(OCTET_FAKE_NVML);
  EXPECT_TRUE(facts.nvidia_driver);
  EXPECT_EQ(facts.gpu_error, "nvmlInit_v2: Driver Not Loaded");
}

TEST_F(NvmlTest, ALibraryThatLacksAFunctionIsToldByName) {
  const absl::Status status = Nvml::open("libc.so.6").status();
  EXPECT_TRUE(absl::IsUnavailable(status));
  EXPECT_TRUE(absl::StrContains(status.message(), "nvml")) << status;
}

// ---- The command

TEST(DoctorCommand, ExaminesTwoRanksUnderMpirun) {
  const std::string model = write_random_model({});
  const Finished text = run_command(mpirun(2, {OCTET_BINARY, "doctor", "--model", model}), mpirun_environment());
  EXPECT_EQ(text.status, 0) << text.out << text.err;
  for (const char* words : {"2 ranks on 1 node", "32.00 KiB in ", "512.00 KiB in ", "8.00 MiB in ", "the model fits",
                            "digest", "GB/s read by each rank", "octet 0.", "Open MPI 4."}) {
    EXPECT_TRUE(absl::StrContains(text.out, words)) << words << "\n" << text.out;
  }
  const Finished machine =
      run_command(mpirun(2, {OCTET_BINARY, "doctor", "--json", "--model", model}), mpirun_environment());
  const json report = json::parse(machine.out);
  EXPECT_TRUE(report.at("ok"));
  EXPECT_EQ(report.at("ranks").size(), 2u);
  EXPECT_EQ(report.at("all_reduces").size(), 3u);
  EXPECT_GT(report.at("ranks")[1].at("read_bytes_per_second"), 0.0);
}

TEST(DoctorCommand, FailsOnEveryRankWhenTheModelIsNotThere) {
  const Finished run =
      run_command(mpirun(2, {OCTET_BINARY, "doctor", "--model", "/no/such/model"}), mpirun_environment());
  EXPECT_EQ(run.status, 1) << run.out << run.err;
  EXPECT_TRUE(absl::StrContains(run.out, "failure  model files")) << run.out;
  EXPECT_TRUE(absl::StrContains(run.out, "ranks 0-1")) << run.out;
}

TEST(DoctorCommand, SaysSoWhenTheRanksDoNotSeeOneAnother) {
  const Finished run = run_command({OCTET_BINARY, "doctor"}, {.environment = {{"SLURM_NTASKS", "8"}}});
  EXPECT_EQ(run.status, 1);
  EXPECT_TRUE(absl::StrContains(run.out, "srun --mpi=pmix")) << run.out;
}

}  // namespace
}  // namespace octet
