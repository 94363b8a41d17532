// Sums over peer memory, ranks as threads and as processes: the bits of ranks that meet in the host's memory, whichever
// way a message takes and whatever follows it. On the emulated CUDA module (see cuda_emulation/cuda_runtime.h), or, as
// threads only, on a GPU that they share.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/cuda/open_module.h"
#include "kernels/graph.h"
#include "tests/peer_cases.h"
#include "tests/process.h"
#include "tests/surroundings.h"
#include "worker/collective/peer_communicator.h"
#include "worker/collective/thread_communicator.h"

namespace octet {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr Stream::CpuOptions kHost = {.threads = 1, .isa = Isa::kPortable, .spin = false};
constexpr int64_t kArea = 512 << 10;  // some ten thousands of elements
constexpr int64_t kSmallArea = 4096;  // a few hundred

const cuda::ModuleTable& module() {
  static const cuda::ModuleTable* const kModule = [] {
    // On a GPU: all kernels are loaded before the first sum, and no rank's queue lies behind another's.
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    const auto opened = cuda::open_module(cuda_module_under_test());
    if (!opened.ok()) ADD_FAILURE() << opened.status();
    return *opened;
  }();
  return *kModule;
}

// Processes, and the end of one, are for the emulation: libexec/octet/peer_processes of an installation starts them on
// a GPU.
bool is_emulated() { return cuda_module_under_test() == OCTET_EMULATED_CUDA; }
int gpus() {
  const char* why = nullptr;
  return module().device_count(&why);
}

// Stands for a communicator that sums on the device: only sets the first element of the residual to 1.
class PretendedSums final : public Communicator {
 public:
  explicit PretendedSums(std::unique_ptr<Communicator> inner) : inner_(std::move(inner)) {}
  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  void all_gather(const void* mine, std::span<const int64_t> bytes_of_rank, void* all) override {
    inner_->all_gather(mine, bytes_of_rank, all);
  }
  void barrier() override { inner_->barrier(); }
  void reduce_over_slices(Stream& stream, const Tensor&, const Tensor& residual) override {
    uint16_t one = to_bf16(1.0f);
    copy(stream, Tensor(&one, DType::kBF16, {1}), Tensor(residual.data(), DType::kBF16, {1}, Device::kCuda));
  }

 private:
  const std::unique_ptr<Communicator> inner_;
};

enum class Gpus { kShared, kOwn };

// Runs body(rank, stream, communicator) on a thread per rank; the ranks' statuses where they cannot be joined.
template <typename Body>
std::vector<absl::Status> on_peers(const std::vector<int>& slices_of_rank, PeerCommunicatorOptions options, Gpus gpus,
                                   const Body& body, const cuda::ModuleTable& table = module(),
                                   Arithmetic arithmetic = Arithmetic::kReproducible) {
  options.map = one_node(slices_of_rank);
  auto hosts = make_thread_communicators(options.map);
  std::vector<absl::Status> statuses(hosts.size());
  std::vector<std::thread> threads;
  for (int rank = 0; rank < options.map.ranks(); ++rank) {
    threads.emplace_back([&, rank] {
      Stream stream(table, gpus == Gpus::kOwn ? rank : 0, arithmetic, kHost);
      if (options.inner_sums_on_device) hosts[rank] = std::make_unique<PretendedSums>(std::move(hosts[rank]));
      auto communicator = make_peer_communicator(stream, hosts[rank], options);
      statuses[rank] = communicator.status();
      if (communicator.ok()) body(rank, stream, **communicator);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return statuses;
}

// How many ranks end with other bits than the tree says.
int ranks_with_wrong_bits(const SumCase& c, const std::vector<int>& slices_of_rank,
                          const PeerCommunicatorOptions& options, Gpus gpus = Gpus::kShared) {
  const RankMap map = one_node(slices_of_rank);
  std::atomic<int> wrong = 0;
  const auto statuses = on_peers(slices_of_rank, options, gpus, [&](int rank, Stream& stream, Communicator& peers) {
    const DeviceCase mine(c, map.runs[rank], stream);
    meet_before_sums(peers);
    peers.reduce_over_slices(stream, mine.partials(), mine.residual());
    if (mine.result() != c.expected()) ++wrong;
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  return wrong;
}

const std::vector<std::vector<int>> kRuns = {{8},          {4, 4},          {3, 3, 2},
                                             {2, 2, 2, 2}, {2, 2, 2, 1, 1}, {1, 1, 1, 1, 1, 1, 1, 1}};

TEST(PeerCommunicator, SumsAreTheTreesBitsForAnyNumberOfRanks) {
  for (const std::vector<int>& runs : kRuns) {
    EXPECT_EQ(ranks_with_wrong_bits(SumCase(8, 3, 1000, 1), runs, {.area_bytes = kArea}), 0)
        << runs.size() << " ranks, one shot";
    EXPECT_EQ(ranks_with_wrong_bits(SumCase(8, 30, 1200, 2), runs, {.area_bytes = kArea}), 0)
        << runs.size() << " ranks, two shots";
  }
}

TEST(PeerCommunicator, SumsOfAnySizeAndUnevenRunsAreTheTreesBits) {
  std::mt19937 random(5);
  const auto between = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  for (int trial = 0; trial < 24; ++trial) {
    std::vector<int> runs(between(1, 6));
    int slices = 0;
    for (int& count : runs) slices += count = between(1, 4);
    const int64_t tokens = between(1, trial % 3 == 0 ? 120 : 9), n = between(1, 1100);
    EXPECT_EQ(ranks_with_wrong_bits(SumCase(slices, tokens, n, random()), runs, {.area_bytes = kArea}), 0)
        << "trial " << trial << ": " << runs.size() << " ranks, " << slices << " slices, [" << tokens << ", " << n
        << "]";
  }
}

TEST(PeerCommunicator, MessagesLongerThanTheWindowAreCut) {
  for (const std::vector<int>& runs : kRuns) {
    EXPECT_EQ(ranks_with_wrong_bits(SumCase(8, 5, 999, 3), runs, {.area_bytes = kSmallArea}), 0) << "one shot";
    EXPECT_EQ(ranks_with_wrong_bits(SumCase(8, 33, 1111, 4), runs, {.area_bytes = kSmallArea}), 0) << "two shots";
  }
}

TEST(PeerCommunicator, SumsStayRightWhenRanksComeAtAnyTime) {
  // Small and large sums in turn, so that blocks, areas and shots change from one to the next.
  const std::vector<int> runs = {3, 3, 2};
  const RankMap map = one_node(runs);
  const SumCase small(8, 1, 120, 1), medium(8, 2, 2000, 2), large(8, 9, 4096, 3);
  std::atomic<int> wrong = 0, sums = 0;
  on_peers(runs, {.area_bytes = kSmallArea * 16}, Gpus::kShared, [&](int rank, Stream& stream, Communicator& peers) {
    std::mt19937 random(rank);
    DeviceCase cases[] = {
        {small, map.runs[rank], stream}, {medium, map.runs[rank], stream}, {large, map.runs[rank], stream}};
    meet_before_sums(peers);
    const std::vector<uint16_t> expected[] = {small.expected(), medium.expected(), large.expected()};
    for (int round = 0; round < 400; ++round) {
      const int i = round % 50 == 0 ? 2 : round % 9 == 0 ? 1 : 0;
      if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 2000));
      cases[i].reset();
      peers.reduce_over_slices(stream, cases[i].partials(), cases[i].residual());
      if (cases[i].result() != expected[i]) ++wrong;
      ++sums;
    }
  });
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(sums, 1200);
}

// ---- What follows a sum

TEST(PeerCommunicator, NormsAndCodesInTheSameKernelHaveTheBitsOfTheSeparateOps) {
  using Kind = ActivationScheme::Kind;
  const std::vector<ActivationScheme> schemes = {{},
                                                 {.kind = Kind::kDynamicPerToken},
                                                 {.kind = Kind::kDynamicPerToken, .upper_bound = 1.5f},
                                                 {.kind = Kind::kStatic, .scale = 0.03f}};
  const struct {
    int64_t tokens, n;
  } shapes[] = {{1, 4096}, {1, 1004}, {1, 6}, {3, 997}, {5, 2048}, {8, 640}, {17, 4100}, {40, 64}};
  for (const std::vector<int>& runs : {std::vector<int>{5}, std::vector<int>{2, 2, 1}, std::vector<int>{1, 1, 1, 1}}) {
    const RankMap map = one_node(runs);
    for (const auto& [tokens, n] : shapes) {
      const SumCase c(map.runs[0].total, tokens, n, static_cast<uint32_t>(n));
      std::atomic<int> wrong = 0;
      on_peers(runs, {.area_bytes = tokens == 5 ? 40 << 10 : kArea}, Gpus::kShared,
               [&](int rank, Stream& stream, Communicator& peers) {
                 DeviceCase mine(c, map.runs[rank], stream);
                 for (const ActivationScheme& scheme : schemes) {
                   if (normed(mine, scheme, kFused, peers) != normed(mine, scheme, kSeparate, peers)) ++wrong;
                 }
               });
      EXPECT_EQ(wrong, 0) << runs.size() << " ranks, [" << tokens << ", " << n << "]";
    }
  }
}

TEST(PeerCommunicator, NormsInFastArithmeticHaveTheBitsOfTheirOwnOp) {
  using Kind = ActivationScheme::Kind;
  const std::vector<int> runs = {1, 1};
  const RankMap map = one_node(runs);
  for (const int64_t n : {4096, 1000, 10240, 996}) {
    const SumCase c(2, 3, n, static_cast<uint32_t>(n));
    std::atomic<int> wrong = 0;
    on_peers(
        runs, {.area_bytes = kArea}, Gpus::kShared,
        [&](int rank, Stream& stream, Communicator& peers) {
          DeviceCase mine(c, map.runs[rank], stream);
          for (const ActivationScheme& scheme :
               {ActivationScheme{}, ActivationScheme{.kind = Kind::kDynamicPerToken}}) {
            if (normed(mine, scheme, kFused, peers) != normed(mine, scheme, kOwnOp, peers)) ++wrong;
          }
        },
        module(), Arithmetic::kFast);
    EXPECT_EQ(wrong, 0) << "rows of " << n;
  }
}

TEST(PeerCommunicator, AReplayedGraphGoesOnCounting) {
  const std::vector<int> runs = {2, 1};
  const RankMap map = one_node(runs);
  const SumCase c(3, 2, 512, 1);
  std::atomic<int> wrong = 0;
  on_peers(runs, {.area_bytes = kArea}, Gpus::kShared, [&](int rank, Stream& stream, Communicator& peers) {
    EXPECT_TRUE(peers.on_device());
    DeviceCase mine(c, map.runs[rank], stream);
    const auto sum = [&] { peers.reduce_over_slices(stream, mine.partials(), mine.residual()); };
    const Graph graph(stream, sum);
    meet_before_sums(peers);
    for (int round = 0; round < 5; ++round) {
      mine.reset();
      if (round % 2 == 0) {
        graph.launch();
      } else {
        sum();
      }
      if (mine.result() != c.expected()) ++wrong;
    }
  });
  EXPECT_EQ(wrong, 0);
}

TEST(PeerCommunicator, GathersUnevenAndEmptyContributionsOfAnyLengthOnTheDevice) {
  for (const std::vector<int64_t>& bytes :
       {std::vector<int64_t>{16, 32, 48}, std::vector<int64_t>{1, 0, 33}, std::vector<int64_t>{0, 0, 0},
        std::vector<int64_t>{40000, 16, 4096}, std::vector<int64_t>{5001, 9999, 0}}) {
    const std::vector<uint8_t> expected = expected_gather(bytes);
    std::atomic<int> wrong = 0;
    on_peers({1, 1, 1}, {.area_bytes = kSmallArea}, Gpus::kShared, [&](int rank, Stream& stream, Communicator& peers) {
      const int64_t all_bytes = std::ssize(expected);
      std::vector<uint8_t> mine(bytes[rank]), all(all_bytes);
      for (int64_t i = 0; i < bytes[rank]; ++i) mine[i] = gathered_byte(rank, i);
      const Buffer mine_memory(bytes[rank] + 1, stream), all_memory(all_bytes + 1, stream);
      const Tensor mine_there = mine_memory.tensor(DType::kU8, {bytes[rank]}),
                   all_there = all_memory.tensor(DType::kU8, {all_bytes});
      copy(stream, Tensor(mine.data(), DType::kU8, {bytes[rank]}), mine_there);
      meet_before_sums(peers);
      for (int round = 0; round < 3; ++round) peers.gather(stream, mine_there, bytes, all_there);
      copy(stream, all_there, Tensor(all.data(), DType::kU8, {all_bytes}));
      if (all != expected) ++wrong;
    });
    EXPECT_EQ(wrong, 0) << "first contribution " << bytes[0] << " bytes";
  }
}

// ---- Which way

TEST(PeerCommunicator, TakesNoTimesWhereRanksShareAGpu) {
  on_peers({1, 1}, {.area_bytes = kArea}, Gpus::kShared, [&](int, Stream&, PeerCommunicator& peers) {
    EXPECT_THAT(peers.report(),
                AllOf(HasSubstr("one-shot up to 64 KiB, then two-shot"), HasSubstr("2 ranks share a GPU")));
  });
}

TEST(PeerCommunicator, MeasuresTheSameCrossoverOnEveryRank) {
  if (gpus() < 2) GTEST_SKIP() << "SKIPPED: there is one GPU";
  std::vector<std::string> reports(2);
  on_peers({1, 1}, {.area_bytes = kArea, .timed_bytes = {512, 2048}}, Gpus::kOwn,
           [&](int rank, Stream&, PeerCommunicator& peers) { reports[rank] = peers.report(); });
  EXPECT_THAT(reports[0], AllOf(HasSubstr("as measured:"), HasSubstr("\n      2048")));
  EXPECT_EQ(reports[0], reports[1]);
}

// A clock that shows, in turn, how long one shot, two shots and the inner communicator take for two sizes.
std::function<double()> scripted_clock() {
  const std::vector<double> seconds = {1, 2, 3, /* the larger */ 4, 3, 2};
  constexpr int kRepetitions = 9;
  return [seconds, looks = 0, now = 0.0]() mutable {
    const int measurement = looks / 2, size = measurement / (3 * kRepetitions);
    if (looks++ % 2 == 1) now += seconds[3 * size + measurement % 3];
    return now;
  };
}

TEST(PeerCommunicator, LeavesToTheInnerCommunicatorWhatThatIsFasterFor) {
  if (gpus() < 2) GTEST_SKIP() << "SKIPPED: there is one GPU";
  const std::vector<int> runs = {2, 1};
  const RankMap map = one_node(runs);
  const SumCase small(3, 1, 256, 1), large(3, 2, 1024, 2);
  on_peers(runs,
           {.area_bytes = kArea, .inner_sums_on_device = true, .timed_bytes = {512, 4096}, .seconds = scripted_clock()},
           Gpus::kOwn, [&](int rank, Stream& stream, PeerCommunicator& peers) {
             EXPECT_EQ(peers.crossover().one_shot_bytes, 512);
             EXPECT_EQ(peers.crossover().other_bytes, 4096);
             const DeviceCase by_peers(small, map.runs[rank], stream), by_inner(large, map.runs[rank], stream);
             peers.reduce_over_slices(stream, by_peers.partials(), by_peers.residual());
             EXPECT_EQ(by_peers.result(), small.expected());
             peers.reduce_over_slices(stream, by_inner.partials(), by_inner.residual());
             EXPECT_EQ(by_inner.result()[0], to_bf16(1.0f));
             EXPECT_EQ(by_inner.result()[1], large.residual()[1]);
           });
}

TEST(Crossover, IsTheLastSizeAtWhichOneShotWinsAndTheFirstFromWhichAnotherWayAlwaysDoes) {
  const AllReduceTimes times[] = {{.bytes = 16, .one_shot = 1, .two_shot = 2, .other = 9},
                                  {.bytes = 64, .one_shot = 2, .two_shot = 2, .other = 1.5},
                                  {.bytes = 256, .one_shot = 5, .two_shot = 3, .other = 4},
                                  {.bytes = 1024, .one_shot = 1, .two_shot = 9, .other = 0.5},
                                  {.bytes = 4096, .one_shot = 30, .two_shot = 20, .other = 10}};
  EXPECT_EQ(crossover_of(times).one_shot_bytes, 64);
  EXPECT_EQ(crossover_of(times).other_bytes, 1024);
  EXPECT_EQ(crossover_of(std::span(times).first(3)).other_bytes, Crossover().other_bytes);
  EXPECT_EQ(crossover_of({}).one_shot_bytes, 0);
  EXPECT_EQ(table_of(std::span(times).first(1)),
            "     bytes one-shot us  two-shot us     other us \n        16   1000000.0*   2000000.0    9000000.0 ");
}

// ---- What can go wrong

TEST(PeerCommunicator, RefusedByOneRankIsRefusedToAllWithTheCauseAndLeavesTheInnerCommunicator) {
  static const cuda::PeerTable* const kReal = module().peer;
  static thread_local int my_rank;
  cuda::PeerTable refusing = *kReal;
  refusing.open = [](cuda::Queue* queue, const cuda::PeerOptions& options, const char** why) {
    my_rank = options.rank;
    return kReal->open(queue, options, why);
  };
  refusing.look_into = [](cuda::PeerWindow* window, int rank, const cuda::PeerCard& card) -> const char* {
    return my_rank == 1 && rank == 2 ? "CUDA IPC: invalid device context" : kReal->look_into(window, rank, card);
  };
  cuda::ModuleTable table = module();
  table.peer = &refusing;
  const auto statuses = on_peers(
      {1, 1, 1}, {}, Gpus::kShared, [](int, Stream&, Communicator&) { FAIL(); }, table);
  for (const absl::Status& status : statuses) {
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr("rank 1 cannot read the GPU memory of rank 2 (CUDA IPC: invalid device context)"),
                      HasSubstr("--ipc=host"), HasSubstr("--allreduce host")));
  }
}

TEST(PeerCommunicator, AWindowThatOneRankCannotHaveIsRefusedToAll) {
  static const cuda::PeerTable* const kReal = module().peer;
  cuda::PeerTable full = *kReal;
  full.open = [](cuda::Queue* queue, const cuda::PeerOptions& options, const char** why) {
    if (options.rank != 1) return kReal->open(queue, options, why);
    *why = "the GPU has no memory left for it";
    return static_cast<cuda::PeerWindow*>(nullptr);
  };
  cuda::ModuleTable table = module();
  table.peer = &full;
  const auto statuses = on_peers(
      {1, 1}, {.area_bytes = kArea}, Gpus::kShared, [](int, Stream&, Communicator&) { FAIL(); }, table);
  for (const absl::Status& status : statuses) {
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("rank 1 has no window of peer memory: the GPU has no memory left for it"));
  }
}

TEST(PeerCommunicator, RanksOnSeveralNodesAreRefused) {
  Stream stream(module(), 0, Arithmetic::kReproducible, kHost);
  PeerCommunicatorOptions options = {.map = one_node({1, 1})};
  options.map.node_of_rank = {0, 1};
  auto hosts = make_thread_communicators(options.map);
  const auto status = make_peer_communicator(stream, hosts[0], options).status();
  EXPECT_THAT(std::string(status.message()), HasSubstr("within a node only"));
  EXPECT_NE(hosts[0], nullptr);
}

void wait_for_a_rank_that_never_comes() {
  const std::vector<int> runs = {1, 1, 1};
  const SumCase c(3, 1, 64, 1);
  on_peers(runs, {.wait_deadline = std::chrono::seconds(3), .place = [] { return "step 12"; }}, Gpus::kShared,
           [&](int rank, Stream& stream, Communicator& peers) {
             const DeviceCase mine(c, one_node(runs).runs[rank], stream);
             peers.reduce_over_slices(stream, mine.partials(), mine.residual());
             if (rank == 2) std::this_thread::sleep_for(std::chrono::minutes(10));
             peers.reduce_over_slices(stream, mine.partials(), mine.residual());
             stream.synchronize();
           });
}

TEST(PeerCommunicatorDeathTest, AWaitForARankThatNeverComesEndsWithItsName) {
  if (!is_emulated()) GTEST_SKIP() << "SKIPPED: for the emulation only";
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(
      wait_for_a_rank_that_never_comes(),
      "octet: rank [01] waited 3 s for rank 2 in sum 2 over peer memory \\(step 12\\): rank 2 has died or hangs");
}

// ---- Processes

TEST(PeerProcesses, SumOverIpcAsThreadsDo) {
  if (!is_emulated()) GTEST_SKIP() << "SKIPPED: for the emulation only";
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "with AddressSanitizer the emulated device's memory is the heap, which processes do not share";
#endif
  for (const char* ranks : {"2", "3"}) {
    const Finished finished = run_command({OCTET_PEER_PROCESSES, OCTET_EMULATED_CUDA, ranks, "1", "4"});
    EXPECT_EQ(finished.status, 0) << finished.out << finished.err;
    EXPECT_THAT(finished.out, HasSubstr(std::string(ranks) + " processes: all sums have the tree's bits"));
  }
}

}  // namespace
}  // namespace octet
