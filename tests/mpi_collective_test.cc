// The ranks of a real mpirun: every rank runs every case, in the same order. Not EXPECT but ASSERT would leave the
// other ranks waiting, so no case ends early. Usage: mpirun -np N mpi_collective_test [--pretend-nodes 2+1]
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "kernels/memory.h"
#include "launch/bootstrap.h"
#include "tests/collective_cases.h"
#include "worker/collective/mpi_communicator.h"

extern char** environ;

namespace octet {
namespace {

std::unique_ptr<Bootstrap> job;

// The ranks of this job with `slices` slices, on the nodes that the job has.
RankMap job_map(int slices) {
  RankMap map;
  const int ranks = job->size();
  for (int r = 0, first = 0; r < ranks; ++r) {
    map.runs.push_back({first, slices / ranks + (r < slices % ranks), slices});
    first += map.runs.back().count;
  }
  map.node_of_rank = job->node_of_rank();
  return map;
}

std::unique_ptr<Communicator> make_communicator(const RankMap& map, int64_t area_bytes, bool spin = false) {
  auto communicator = make_mpi_communicator({.map = map, .area_bytes = area_bytes, .wait = {.spin = spin}});
  EXPECT_TRUE(communicator.ok()) << communicator.status();
  return *std::move(communicator);
}

int64_t ranks_on_node(int node) { return std::count(job->node_of_rank().begin(), job->node_of_rank().end(), node); }
int64_t ranks_on_my_node() { return ranks_on_node(job->node_of_rank()[job->rank()]); }

TEST(MpiCollective, SumsAreTheTreesBits) {
  const bool owns_core = job->each_thread_has_a_core(1);
  for (int slices : {job->size(), 5, 8, 13}) {
    const RankMap map = job_map(slices);
    for (const int64_t area_bytes : {kMinAreaBytes, kDefaultAreaBytes}) {
      const auto communicator = make_communicator(map, area_bytes, slices == 8 && owns_core);
      Stream stream({.threads = 1, .spin = false});
      for (const int64_t tokens : {1, 7, 130}) {
        const SumCase c(slices, tokens, tokens == 130 ? 576 : 4999, static_cast<uint32_t>(tokens));
        EXPECT_TRUE(reduce(c, map.runs[job->rank()], *communicator, stream) == c.expected())
            << slices << " slices, " << tokens << " tokens, areas of " << area_bytes;
      }
    }
  }
}

TEST(MpiCollective, GathersUnevenAndEmptyContributions) {
  for (const int64_t area_bytes : {kMinAreaBytes, kDefaultAreaBytes}) {
    const auto communicator = make_communicator(job_map(8), area_bytes);
    for (int round = 0; round < 4; ++round) {
      std::vector<int64_t> bytes(job->size());
      for (int r = 0; r < job->size(); ++r) bytes[r] = (r + round) % 3 * 5000 + r;
      EXPECT_TRUE(gather(bytes, job->rank(), *communicator) == expected_gather(bytes)) << "round " << round;
      communicator->barrier();
    }
  }
}

TEST(MpiCollective, TheWindowHasNoNameOnceEveryRankHasIt) {
  const auto communicator = make_communicator(job_map(8), kDefaultAreaBytes);
  std::ifstream maps("/proc/self/maps");
  int windows = 0;
  for (std::string line; std::getline(maps, line);) {
    if (line.find("/dev/shm/octet-") == std::string::npos) continue;
    ++windows;
    EXPECT_NE(line.find("(deleted)"), std::string::npos) << line;
  }
  EXPECT_EQ(windows, ranks_on_my_node() > 1 ? 1 : 0);
  communicator->barrier();
}

TEST(MpiCollective, AWindowThatDoesNotFitIsRefusedOnEveryRank) {
  const std::vector<int>& nodes = job->node_of_rank();
  if (std::ranges::none_of(nodes, [](int node) { return ranks_on_node(node) > 1; }))
    GTEST_SKIP() << "nobody shares a node";
  const auto communicator = make_mpi_communicator({.map = job_map(8), .area_bytes = int64_t{1} << 40});
  EXPECT_EQ(communicator.status().code(), absl::StatusCode::kResourceExhausted) << communicator.status();
  EXPECT_NE(communicator.status().message().find("--shm-size"), absl::string_view::npos) << communicator.status();
}

TEST(Bootstrap, EveryRankLearnsTheLowestFailingRanksReason) {
  const int last = job->size() - 1;
  EXPECT_TRUE(job->agree(absl::OkStatus()).ok());
  const absl::Status one = job->agree(job->rank() == last ? absl::NotFoundError("no such file") : absl::OkStatus());
  EXPECT_EQ(one.code(), absl::StatusCode::kNotFound);
  const std::string whose =
      job->size() == 1 ? "" : "rank " + std::to_string(last) + " of " + std::to_string(job->size()) + ": ";
  EXPECT_EQ(one.message(), whose + "no such file");
  const absl::Status all = job->agree(absl::DataLossError("rank-specific " + std::to_string(job->rank())));
  EXPECT_EQ(all.code(), absl::StatusCode::kDataLoss);
  EXPECT_NE(all.message().find("rank-specific 0"), absl::string_view::npos) << all;
  if (job->size() > 1) {
    EXPECT_NE(all.message().find("(and " + std::to_string(last)), absl::string_view::npos) << all;
  }
}

TEST(Bootstrap, AgreeingTwiceChangesNothing) {
  const absl::Status once = job->agree(absl::AbortedError("rank-specific " + std::to_string(job->rank())));
  EXPECT_EQ(job->agree(once), once);
}

TEST(Bootstrap, ValuesTravelInRankOrder) {
  EXPECT_EQ(job->broadcast("from " + std::to_string(job->rank())), "from 0");
  const std::vector<uint64_t> numbers = job->all_gather(uint64_t{1} << (40 + job->rank()));
  const std::vector<std::string> words = job->all_gather(std::string_view(std::string(job->rank(), 'x')));
  for (int r = 0; r < job->size(); ++r) {
    EXPECT_EQ(numbers[r], uint64_t{1} << (40 + r));
    EXPECT_EQ(words[r], std::string(r, 'x'));
  }
}

TEST(Bootstrap, RanksThatDifferAreNamed) {
  EXPECT_TRUE(job->all_equal("model", "same").ok());
  const absl::Status status = job->all_equal("model", job->rank() == 0 ? "aa" : "bb");
  EXPECT_EQ(status.ok(), job->size() == 1);
  if (job->size() == 1) return;
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("another model than rank 0: bb instead of aa"), absl::string_view::npos) << status;
}

TEST(Bootstrap, TheJobSecretIsSharedAndNotInTheEnvironment) {
  EXPECT_EQ(job->job_secret().size(), 32u);
  EXPECT_TRUE(job->all_equal("secret", job->job_secret()).ok());
  EXPECT_GT(std::set<char>(job->job_secret().begin(), job->job_secret().end()).size(), 8u);
  for (char** entry = environ; *entry != nullptr; ++entry) {
    EXPECT_EQ(std::string(*entry).find(job->job_secret().substr(0, 4)), std::string::npos);
  }
}

TEST(Bootstrap, AMachinesCoresAndMemoryAreDivided) {
  EXPECT_GE(job->own_cores(), 1);
  EXPECT_GE(job->node_cores(), job->own_cores());
  EXPECT_TRUE(job->each_thread_has_a_core(0));
  EXPECT_FALSE(job->each_thread_has_a_core(job->node_cores() + 1));
  const auto memory = job->own_memory();
  EXPECT_TRUE(memory.ok()) << memory.status();
  EXPECT_GT(*memory, 0);
  EXPECT_LT(*memory * job->local_size(), int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE));
}

TEST(Bootstrap, RanksThatWaitForASlowOneSleep) {
  const auto cpu_seconds = [] {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    const auto seconds = [](const timeval& t) {
      return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
    };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
  };
  const auto begin = std::chrono::steady_clock::now();
  const double cpu_begin = cpu_seconds();
  if (job->rank() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(600));
  EXPECT_TRUE(job->agree(absl::OkStatus()).ok());
  const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - begin;
  EXPECT_LT(cpu_seconds() - cpu_begin, 0.5 * waited.count());
}

// Only rank 0 tells how the tests go; the others tell what failed.
class FailurePrinter : public testing::EmptyTestEventListener {
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    std::cerr << "rank " << job->rank() << ": " << result.file_name() << ":" << result.line_number() << "\n"
              << result.message() << "\n";
  }
};

int run(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  Bootstrap::Options options;
  if (argc == 3 && std::string(argv[1]) == "--pretend-nodes") {
    auto nodes = parse_pretend_nodes(argv[2]);
    if (!nodes.ok()) {
      std::cerr << nodes.status() << "\n";
      return 2;
    }
    options.pretend_nodes = *nodes;
  }
  auto started = Bootstrap::start(options);
  if (!started.ok()) {
    std::cerr << started.status() << "\n";
    return 2;
  }
  job = *std::move(started);
  if (job->rank() > 0) {
    auto& listeners = testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new FailurePrinter);
  }
  const int failed = RUN_ALL_TESTS();
  const absl::Status all = job->agree(failed ? absl::InternalError("tests failed") : absl::OkStatus());
  if (job->rank() == 0 && !all.ok()) std::cerr << all << "\n";
  job.reset();
  return all.ok() ? 0 : 1;
}

}  // namespace
}  // namespace octet

int main(int argc, char** argv) { return octet::run(argc, argv); }
