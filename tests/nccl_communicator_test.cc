// Ranks on emulated GPUs that meet through a fake NCCL: the bits of the tree, and what becomes of every way to fail.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/cuda/open_module.h"
#include "kernels/ops.h"
#include "tests/collective_cases.h"
#include "tests/fake_nccl.h"
#include "worker/collective/device_communicator.h"
#include "worker/collective/nccl_api.h"
#include "worker/collective/nccl_communicator.h"
#include "worker/collective/thread_communicator.h"

namespace octet {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using Kind = NcclFault::Kind;

// What a test does instead of ending the process.
struct RankEnded {
  absl::Status cause;
};

const cuda::ModuleTable& module() {
  static const cuda::ModuleTable* const kModule = *cuda::open_module(OCTET_EMULATED_CUDA);
  return *kModule;
}

// What became of one rank.
struct Outcome {
  absl::Status joined;
  absl::Status recorded, ended;  // by a failure; OK: there was none
  std::vector<std::vector<uint16_t>> results;
};

// A sum on the device, as reduce() of collective_cases.h makes one on the host.
std::vector<uint16_t> reduce_on_device(const SumCase& c, const SliceRun& run, Communicator& communicator,
                                       Stream& stream) {
  const std::vector<SliceNode> nodes = maximal_subtrees(run);
  const int64_t pieces = std::ssize(nodes), elements = c.tokens() * c.n();
  std::vector<float> partials;
  for (const SliceNode& node : nodes) {
    for (int64_t j = 0; j < elements; ++j) partials.push_back(c.node_sum(node, j));
  }
  std::vector<uint16_t> residual = c.residual();
  const Buffer partials_there(4 * pieces * elements, stream), residual_there(2 * elements, stream);
  const Tensor partials_view = partials_there.tensor(DType::kF32, {pieces, c.tokens(), c.n()});
  const Tensor residual_view = residual_there.tensor(DType::kBF16, {c.tokens(), c.n()});
  const Tensor residual_here(residual.data(), DType::kBF16, residual_view.shape());
  copy(stream, Tensor(partials.data(), DType::kF32, partials_view.shape()), partials_view);
  copy(stream, residual_here, residual_view);
  communicator.reduce_over_slices(stream, partials_view, residual_view);
  copy(stream, residual_view, residual_here);
  return residual;
}

class NcclCommunicatorTest : public testing::Test {
 protected:
  // Every rank joins and then runs body(rank, communicator, stream, outcome), a fault being ordered in between.
  using Body = std::function<void(int rank, Communicator& communicator, Stream& stream, Outcome* outcome)>;

  std::vector<Outcome> on_ranks(const std::vector<int>& slices_of_rank, const Body& body) {
    const RankMap map = one_node(slices_of_rank);
    auto hosts = make_thread_communicators(map);
    std::vector<Outcome> outcomes(map.ranks());
    std::vector<std::thread> threads;
    for (int rank = 0; rank < map.ranks(); ++rank) {
      threads.emplace_back([&, rank] { live(rank, map, std::move(hosts[rank]), body, &outcomes[rank]); });
    }
    for (std::thread& thread : threads) thread.join();
    return outcomes;
  }

  // Two ranks that sum 64 elements three times.
  std::vector<Outcome> on_two_ranks() {
    const SumCase c(2, 1, 64, 1);
    return on_ranks({1, 1}, [&](int rank, Communicator& communicator, Stream& stream, Outcome* outcome) {
      for (int i = 0; i < 3; ++i) {
        outcome->results.push_back(reduce_on_device(c, {rank, 1, 2}, communicator, stream));
      }
    });
  }

  FakeNccl fake_{module()};
  NcclFault fault_at_join_, fault_;  // before the ranks join, and after
  NcclOptions options_{.scratch_bytes = 64 << 10,
                       .join_deadline = milliseconds(30'000),
                       .wait_deadline = milliseconds(30'000),
                       .abort_deadline = milliseconds(30'000)};
  Arithmetic arithmetic_ = Arithmetic::kReproducible;

 private:
  void live(int rank, const RankMap& map, std::unique_ptr<Communicator> host, const Body& body, Outcome* outcome) {
    Stream stream(module(), rank, arithmetic_, {.threads = 1, .spin = false});
    NcclOptions options = options_;
    options.map = map;
    options.place = [] { return "step 12, 0.41 s old"; };
    options.record = [&](const absl::Status& cause) { outcome->recorded = cause; };
    options.end = [](const absl::Status& cause) { throw RankEnded{cause}; };
    Communicator& meeting = *host;
    if (rank == 0) fake_.order(fault_at_join_);
    meeting.barrier();
    auto communicator = make_nccl_communicator(fake_.api(), stream, std::move(host), options);
    outcome->joined = communicator.status();
    if (!communicator.ok()) return;
    meeting.barrier();
    if (rank == 0) fake_.order(fault_);
    meeting.barrier();
    try {
      body(rank, **communicator, stream, outcome);
    } catch (const RankEnded& end) {
      outcome->ended = end.cause;
    }
  }
};

std::vector<int> even_runs(int slices, int ranks) {
  std::vector<int> counts(ranks, slices / ranks);
  for (int r = 0; r < slices % ranks; ++r) ++counts[r];
  return counts;
}

TEST_F(NcclCommunicatorTest, SumsAreTheTreesBitsOnAnyNumberOfRanksAndRunsOfSlices) {
  const std::vector<SumCase> cases = {SumCase(8, 1, 64, 1), SumCase(8, 3, 250, 2), SumCase(8, 1, 2, 3),
                                      SumCase(8, 9, 2000, 4)};
  for (const std::vector<int>& counts : {even_runs(8, 2), even_runs(8, 3), even_runs(8, 8), {1, 5, 2}}) {
    // One chunk that all ranks finish; chunks that they divide, the last one short.
    for (const int64_t scratch : {int64_t{1} << 20, int64_t{64} << 10}) {
      options_.scratch_bytes = scratch;
      const std::vector<Outcome> outcomes =
          on_ranks(counts, [&](int rank, Communicator& communicator, Stream& stream, Outcome* outcome) {
            const SliceRun run = one_node(counts).runs[rank];
            for (const SumCase& c : cases) {
              outcome->results.push_back(reduce_on_device(c, run, communicator, stream));
            }
          });
      for (size_t rank = 0; rank < outcomes.size(); ++rank) {
        ASSERT_TRUE(outcomes[rank].joined.ok()) << outcomes[rank].joined;
        ASSERT_TRUE(outcomes[rank].ended.ok()) << outcomes[rank].ended;
        for (size_t i = 0; i < cases.size(); ++i) {
          EXPECT_EQ(outcomes[rank].results[i] == cases[i].expected(), true)
              << counts.size() << " ranks, rank " << rank << ", case " << i << ", scratch of " << scratch;
        }
      }
    }
  }
}

TEST_F(NcclCommunicatorTest, LetsNcclSumInTheFastOrder) {
  arithmetic_ = Arithmetic::kFast;
  const SumCase c(3, 5, 100, 1);
  const std::vector<Outcome> outcomes =
      on_ranks({1, 1, 1}, [&](int rank, Communicator& communicator, Stream& stream, Outcome* outcome) {
        outcome->results.push_back(reduce_on_device(c, {rank, 1, 3}, communicator, stream));
      });
  for (const Outcome& outcome : outcomes) {
    ASSERT_TRUE(outcome.joined.ok() && outcome.ended.ok()) << outcome.joined << outcome.ended;
    EXPECT_EQ(outcome.results.at(0), c.summed_left_to_right());  // the fake's order
  }
}

TEST_F(NcclCommunicatorTest, GathersOnTheHost) {
  const std::vector<int64_t> bytes = {300, 0, 7};
  on_ranks({1, 1, 1}, [&](int rank, Communicator& communicator, Stream&, Outcome*) {
    EXPECT_EQ(gather(bytes, rank, communicator), expected_gather(bytes));
  });
}

TEST_F(NcclCommunicatorTest, GathersOnTheDevice) {
  for (const std::vector<int64_t>& bytes : {std::vector<int64_t>{300, 0, 7}, std::vector<int64_t>{0, 0, 0}}) {
    const std::vector<uint8_t> expected = expected_gather(bytes);
    const std::vector<Outcome> outcomes =
        on_ranks({1, 1, 1}, [&](int rank, Communicator& communicator, Stream& stream, Outcome*) {
          std::vector<uint8_t> mine(300), all(400);
          for (int64_t i = 0; i < bytes[rank]; ++i) mine[i] = gathered_byte(rank, i);
          const Buffer mine_there(300, stream), all_there(400, stream);
          const Tensor mine_view = mine_there.tensor(DType::kU8, {300}), all_view = all_there.tensor(DType::kU8, {400});
          copy(stream, Tensor(mine.data(), DType::kU8, {300}), mine_view);
          communicator.gather(stream, mine_view, bytes, all_view);
          copy(stream, all_view, Tensor(all.data(), DType::kU8, {400}));
          all.resize(expected.size());
          EXPECT_EQ(all, expected);
        });
    for (const Outcome& outcome : outcomes) EXPECT_TRUE(outcome.ended.ok()) << outcome.ended;
  }
}

TEST_F(NcclCommunicatorTest, IsAbortedAtItsEndSoThatNobodyWaitsForOthers) {
  on_two_ranks();
  EXPECT_EQ(fake_.aborts(), 2);
}

// ---- Failures

TEST_F(NcclCommunicatorTest, TellsEveryRankWhenThereIsNoUniqueId) {
  fault_at_join_ = {.kind = Kind::kNoUniqueId};
  for (const Outcome& outcome : on_two_ranks()) {
    EXPECT_THAT(std::string(outcome.joined.message()),
                AllOf(HasSubstr("the 2 ranks cannot be joined through NCCL 2.28.9"), HasSubstr("ncclGetUniqueId"),
                      HasSubstr("unhandled system error"), HasSubstr("--allreduce host")));
  }
}

TEST_F(NcclCommunicatorTest, ARankThatCannotJoinSaysWhyAndTheOthersStopWaitingForIt) {
  options_.join_deadline = milliseconds(300);
  fault_at_join_ = {.kind = Kind::kJoinFails, .rank = 1};
  const std::vector<Outcome> outcomes = on_two_ranks();
  EXPECT_EQ(outcomes[0].joined.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(outcomes[0].joined.message()), HasSubstr("still in progress after 0.3 s"));
  EXPECT_EQ(outcomes[1].joined.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(outcomes[1].joined.message()),
              AllOf(HasSubstr("ncclCommInitRankConfig: unhandled system error"), HasSubstr("NCCL_DEBUG=INFO")));
}

TEST_F(NcclCommunicatorTest, JoiningHasADeadline) {
  options_.join_deadline = milliseconds(300);
  fault_at_join_ = {.kind = Kind::kJoinNeverEnds, .rank = 0};
  const std::vector<Outcome> outcomes = on_two_ranks();
  for (const Outcome& outcome : outcomes) {
    EXPECT_EQ(outcome.joined.code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_THAT(std::string(outcome.joined.message()), HasSubstr("NCCL_SOCKET_IFNAME"));
  }
  EXPECT_EQ(fake_.aborts(), 2);
}

// The rank that a fault strikes in its second sum, and the one that waits for it.
struct Failure {
  Kind kind;
  absl::StatusCode code;
  std::string cause;
};

class NcclFailure : public NcclCommunicatorTest, public testing::WithParamInterface<Failure> {};

TEST_P(NcclFailure, EndsTheRankWithTheCauseAndWhereItWas) {
  options_.wait_deadline = milliseconds(4'000);
  fault_ = {.kind = GetParam().kind, .rank = 1, .collective = 2};
  const std::vector<Outcome> outcomes = on_two_ranks();
  const Outcome& struck = outcomes[1];
  ASSERT_TRUE(struck.joined.ok()) << struck.joined;
  EXPECT_EQ(struck.results.size(), 1u) << "nothing that was computed after the failure is used";
  EXPECT_EQ(struck.ended.code(), GetParam().code) << struck.ended;
  EXPECT_THAT(std::string(struck.ended.message()),
              AllOf(HasSubstr("step 12, 0.41 s old: "), HasSubstr("graphs aside: 2, sum over slices of 128 bytes: "),
                    HasSubstr(GetParam().cause), HasSubstr("octet doctor --last"), Not(HasSubstr("\n")),
                    Not(HasSubstr("ncclCommAbort"))));
  EXPECT_EQ(struck.recorded, struck.ended) << "the cause is on record";
  // The other rank has sent what it had; when the struck one is gone it waits in vain for the third sum.
  EXPECT_EQ(outcomes[0].ended.code(), absl::StatusCode::kDeadlineExceeded) << outcomes[0].ended;
  EXPECT_EQ(fake_.aborts(), 2);
}

INSTANTIATE_TEST_SUITE_P(OfEveryKind, NcclFailure,
                         testing::Values(Failure{Kind::kCallFails, absl::StatusCode::kInternal,
                                                 "ncclGroupEnd: invalid usage (socket closed by peer)"},
                                         Failure{Kind::kNeverStarts, absl::StatusCode::kDeadlineExceeded,
                                                 "ncclGroupEnd is still in progress after 4 s"},
                                         Failure{Kind::kNeverCompletes, absl::StatusCode::kDeadlineExceeded,
                                                 "the GPU is not done after 4 s"},
                                         Failure{Kind::kAsyncError, absl::StatusCode::kUnavailable,
                                                 "remote process exited or there was a network error"}),
                         [](const auto& parameter) {
                           switch (parameter.param.kind) {
                             case Kind::kCallFails:
                               return "CallFails";
                             case Kind::kNeverStarts:
                               return "NeverStarts";
                             case Kind::kNeverCompletes:
                               return "NeverCompletes";
                             default:
                               return "AsyncError";
                           }
                         });

TEST_F(NcclCommunicatorTest, PutsASumOnTheStreamAndLeavesWaitingToWhoeverWaitsForTheStream) {
  options_.wait_deadline = milliseconds(4'000);
  fault_ = {.kind = Kind::kNeverCompletes, .rank = 1, .collective = 1};
  const std::vector<Outcome> outcomes =
      on_ranks({1, 1}, [](int rank, Communicator& communicator, Stream& stream, Outcome*) {
        const Buffer partials(64 * 4, stream), residual(64 * 2, stream);
        communicator.reduce_over_slices(stream, partials.tensor(DType::kF32, {1, 1, 64}),
                                        residual.tensor(DType::kBF16, {1, 64}));
        EXPECT_EQ(stream.is_done(), rank == 0);
        stream.synchronize();
      });
  EXPECT_TRUE(outcomes[0].ended.ok()) << outcomes[0].ended;
  EXPECT_EQ(outcomes[1].ended.code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(NcclCommunicatorTest, ARankWhosePeerVanishesStopsWaitingForIt) {
  options_.wait_deadline = milliseconds(300);
  const SumCase c(2, 1, 64, 1);
  const std::vector<Outcome> outcomes =
      on_ranks({1, 1}, [&](int rank, Communicator& communicator, Stream& stream, Outcome* outcome) {
        if (rank == 0) outcome->results.push_back(reduce_on_device(c, {0, 1, 2}, communicator, stream));
      });
  EXPECT_EQ(outcomes[0].ended.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(outcomes[0].results.empty());
}

TEST_F(NcclCommunicatorTest, AnAbortThatHangsDoesNotKeepTheRank) {
  options_.wait_deadline = options_.abort_deadline = milliseconds(300);
  fault_ = {.kind = Kind::kNeverCompletes, .rank = 1, .collective = 1, .abort_hangs = true};
  const std::vector<Outcome> outcomes = on_two_ranks();
  EXPECT_THAT(std::string(outcomes[1].recorded.message()), Not(HasSubstr("ncclCommAbort")));
  EXPECT_THAT(std::string(outcomes[1].ended.message()), HasSubstr("; ncclCommAbort has not come back after 0.3 s"));
}

// ---- The library

void* any_function(const char*) {
  return reinterpret_cast<void*>(+[] {});
}

template <int kVersion>
NcclResult version(int* version) {
  *version = kVersion;
  return NcclResult::kSuccess;
}

TEST(NcclLibrary, ThatLacksAFunctionOrIsTooOldIsRefused) {
  const auto with_version = [](NcclResult (*function)(int*)) {
    return [function](const char* name) {
      return name == std::string("ncclGetVersion") ? reinterpret_cast<void*>(function) : any_function(name);
    };
  };
  EXPECT_TRUE(nccl_api_of("libnccl.so.2", with_version(version<22809>)).ok());
  EXPECT_THAT(std::string(nccl_api_of("libnccl.so.2", with_version(version<21403>)).status().message()),
              AllOf(HasSubstr("libnccl.so.2 is NCCL 2.14.3"), HasSubstr("2.18.0 or newer"), HasSubstr("--allreduce")));
  const auto without_config = [](const char* name) {
    return name == std::string("ncclCommInitRankConfig") ? nullptr : any_function(name);
  };
  EXPECT_THAT(std::string(nccl_api_of("libnccl.so.2", without_config).status().message()),
              AllOf(HasSubstr("has no ncclCommInitRankConfig()"), HasSubstr("2.18.0 or newer")));
}

TEST(NcclLibrary, ThatTheEnvironmentNamesIsTheOneThatIsOpened) {
  const auto named = [](const char* path) {
    static const char* the_path;
    the_path = path;
    return open_nccl([](const char* name) { return name == std::string(kNcclLibraryVariable) ? the_path : nullptr; });
  };
  EXPECT_THAT(std::string(named("/nowhere/libnccl.so.2").status().message()),
              AllOf(HasSubstr("was not found (/nowhere/libnccl.so.2)"), HasSubstr("OCTET_NCCL_LIBRARY")));
  EXPECT_THAT(std::string(named(OCTET_EMULATED_CUDA).status().message()), HasSubstr("has no ncclGetVersion()"));
#ifdef OCTET_NCCL_LIBRARY
  const absl::StatusOr<NcclApi> api = named(OCTET_NCCL_LIBRARY);
  ASSERT_TRUE(api.ok()) << api.status();
  EXPECT_EQ(nccl_version(*api).substr(0, 2), "2.");
#endif
}

// ---- The choice

DeviceFactsOfRank gpu(const std::string& uuid, const std::string& error = "") {
  return {.gpu = uuid, .nccl_version = error.empty() ? "2.28.9" : "", .nccl_error = error};
}

TEST(AllReduceChoice, IsNcclBetweenNodesWhereEveryRankHasAGpuAndTheSameLibrary) {
  const std::vector<DeviceFactsOfRank> ranks = {gpu("GPU-a"), gpu("GPU-b")};
  EXPECT_EQ(choose_all_reduce(AllReduce::kAuto, ranks, 2)->kind, AllReduce::kNccl);
  EXPECT_EQ(choose_all_reduce(AllReduce::kNccl, ranks, 2)->kind, AllReduce::kNccl);
  EXPECT_EQ(choose_all_reduce(AllReduce::kHost, ranks, 2)->kind, AllReduce::kHost);
  EXPECT_THAT(choose_all_reduce(AllReduce::kAuto, ranks, 2)->reason, HasSubstr("NCCL 2.28.9"));
}

TEST(AllReduceChoice, IsPeerMemoryInsideANodeWithTheLibraryBehindIt) {
  const std::vector<DeviceFactsOfRank> ranks = {gpu("GPU-a"), gpu("GPU-b")}, shared = {gpu("GPU-a"), gpu("GPU-a")};
  EXPECT_EQ(choose_all_reduce(AllReduce::kAuto, ranks, 1)->kind, AllReduce::kP2p);
  EXPECT_EQ(choose_all_reduce(AllReduce::kAuto, ranks, 1)->fallback, AllReduce::kNccl);
  EXPECT_EQ(choose_all_reduce(AllReduce::kAuto, shared, 1)->kind, AllReduce::kP2p);
  EXPECT_EQ(choose_all_reduce(AllReduce::kAuto, shared, 1)->fallback, AllReduce::kHost);
  EXPECT_EQ(choose_all_reduce(AllReduce::kNccl, ranks, 1)->kind, AllReduce::kNccl);
  EXPECT_EQ(choose_all_reduce(AllReduce::kP2p, ranks, 1)->fallback, AllReduce::kP2p) << "asked for by name";
  EXPECT_THAT(std::string(choose_all_reduce(AllReduce::kP2p, ranks, 2).status().message()),
              AllOf(HasSubstr("--allreduce p2p: the ranks are on 2 nodes"), HasSubstr("name nccl or host")));
}

TEST(AllReduceChoice, OtherwiseIsTheHostAndSaysWhyOrRefusesWhatWasAskedFor) {
  std::vector<DeviceFactsOfRank> other_version = {gpu("GPU-a"), gpu("GPU-b")};
  other_version[1].nccl_version = "2.20.5";
  const std::vector<std::pair<std::vector<DeviceFactsOfRank>, std::string>> cases = {
      {{gpu("GPU-a"), gpu("GPU-b"), gpu("GPU-a")}, "ranks 0 and 2 share GPU-a, which NCCL refuses"},
      {{gpu("GPU-a"), gpu("GPU-b", "NCCL was not found")}, "rank 1: NCCL was not found"},
      {other_version, "rank 1 has NCCL 2.20.5, rank 0 2.28.9"}};
  for (const auto& [ranks, reason] : cases) {
    const auto choice = choose_all_reduce(AllReduce::kAuto, ranks, 2);
    ASSERT_TRUE(choice.ok());
    EXPECT_EQ(choice->kind, AllReduce::kHost);
    EXPECT_THAT(choice->reason, HasSubstr(reason));
    EXPECT_THAT(std::string(choose_all_reduce(AllReduce::kNccl, ranks, 2).status().message()),
                AllOf(HasSubstr("--allreduce nccl: "), HasSubstr(reason)));
  }
}

TEST(AllReduceChoice, OfOneRankNeedsNothing) {
  const std::vector<DeviceFactsOfRank> alone = {gpu("GPU-a", "NCCL was not found")};
  for (const AllReduce wanted : {AllReduce::kAuto, AllReduce::kNccl, AllReduce::kP2p, AllReduce::kHost}) {
    EXPECT_EQ(choose_all_reduce(wanted, alone, 1)->kind, AllReduce::kHost);
  }
}

struct Made {
  AllReduce kind;
  std::string reason;
  bool on_device;
};

// Two ranks on GPUs of their own, whose NCCL is what `nccl` says.
std::vector<Made> made_with(AllReduce wanted, const std::vector<absl::StatusOr<NcclApi>>& nccl) {
  const RankMap map = one_node({1, 1});
  std::vector<Made> result(2);
  std::vector<std::thread> threads;
  auto hosts = make_thread_communicators(map);
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      Stream stream(module(), rank, Arithmetic::kReproducible, {.threads = 1, .spin = false});
      const auto made = make_device_communicator(stream, std::move(hosts[rank]), [&, rank] { return nccl[rank]; },
                                                 {.wanted = wanted,
                                                  .gpu = module().device_facts(rank).uuid,
                                                  .host = {},
                                                  .nccl = {.map = map},
                                                  .peer = {.map = map, .timed_bytes = {1 << 10}}});
      ASSERT_TRUE(made.ok()) << made.status();
      result[rank] = {made->choice.kind, made->choice.reason, made->communicator->on_device()};
      made->communicator->barrier();
    });
  }
  for (std::thread& thread : threads) thread.join();
  return result;
}

TEST(AllReduceChoice, IsMadeByAllRanksTogether) {
  FakeNccl fake(module());
  const absl::Status missing = absl::NotFoundError("NCCL was not found");
  for (const Made& made : made_with(AllReduce::kAuto, {fake.api(), missing})) {
    EXPECT_EQ(made.kind, AllReduce::kP2p);
    EXPECT_TRUE(made.on_device);
    EXPECT_THAT(made.reason, HasSubstr("all-reduce over peer memory"));
  }
  for (const Made& made : made_with(AllReduce::kNccl, {fake.api(), fake.api()})) {
    EXPECT_EQ(made.kind, AllReduce::kNccl);
    EXPECT_TRUE(made.on_device);
  }
  for (const Made& made : made_with(AllReduce::kAuto, {fake.api(), fake.api()})) {
    EXPECT_EQ(made.kind, AllReduce::kP2p);
    EXPECT_THAT(made.reason, HasSubstr("other us")) << "NCCL was timed beside it";
  }
  for (const Made& made : made_with(AllReduce::kHost, {missing, missing})) {
    EXPECT_EQ(made.kind, AllReduce::kHost);
    EXPECT_FALSE(made.on_device);
  }
}

}  // namespace
}  // namespace octet
