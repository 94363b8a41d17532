// What ranks that are threads sum and gather, bit for bit against the tree evaluated directly over its leaves.
#include <gtest/gtest.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/memory.h"
#include "kernels/slice_tree.h"
#include "tests/collective_cases.h"
#include "worker/collective/shared_window.h"
#include "worker/collective/thread_communicator.h"

namespace octet {
namespace {

// Runs body(rank, communicator) on a thread per rank.
template <typename Body>
void on_ranks(const RankMap& map, const ThreadCommunicatorOptions& options, const Body& body) {
  const auto communicators = make_thread_communicators(map, options);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < map.ranks(); ++rank) {
    threads.emplace_back([&, rank] { body(rank, *communicators[rank]); });
  }
  for (std::thread& thread : threads) thread.join();
}

// How many ranks end with other bits than the tree says.
int ranks_with_wrong_bits(const SumCase& c, const RankMap& map, const ThreadCommunicatorOptions& options) {
  std::atomic<int> wrong = 0;
  on_ranks(map, options, [&](int rank, Communicator& communicator) {
    Stream stream({.threads = 1, .spin = false});
    if (reduce(c, map.runs[rank], communicator, stream) != c.expected()) ++wrong;
  });
  return wrong;
}

std::vector<int> even_runs(int slices, int ranks) {
  std::vector<int> counts(ranks, slices / ranks);
  for (int r = 0; r < slices % ranks; ++r) ++counts[r];
  return counts;
}

TEST(Collective, SumsAreTheTreesBitsForAnyNumberOfRanks) {
  for (int slices = 1; slices <= 16; ++slices) {
    const SumCase c(slices, 3, 250, static_cast<uint32_t>(slices));
    for (int ranks = 1; ranks <= slices; ++ranks) {
      EXPECT_EQ(ranks_with_wrong_bits(c, one_node(even_runs(slices, ranks)), {}), 0)
          << slices << " slices on " << ranks << " ranks";
    }
  }
}

TEST(Collective, SumsOfAnySizeAndUnevenRunsAreTheTreesBits) {
  std::mt19937 random(7);
  const auto between = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  for (int trial = 0; trial < 40; ++trial) {
    std::vector<int> counts(between(1, 6));
    int slices = 0;
    for (int& count : counts) slices += count = between(1, 4);
    const int64_t tokens = trial % 4 == 0 ? between(100, 300) : between(1, 20);
    const int64_t n = trial % 4 == 0 ? between(2, 400) : between(2, 5000);
    const int64_t area = trial % 2 == 0 ? kMinAreaBytes + between(0, 8000) : kDefaultAreaBytes;
    EXPECT_EQ(ranks_with_wrong_bits(SumCase(slices, tokens, n, random()), one_node(counts), {.area_bytes = area}), 0)
        << "trial " << trial << ": " << counts.size() << " ranks, " << slices << " slices, [" << tokens << ", " << n
        << "], areas of " << area;
  }
}

TEST(Collective, SumsBetweenNodesAreTheTreesBits) {
  const std::vector<std::vector<int>> layouts = {
      {0, 1},       {0, 0, 1},       {0, 1, 1},       {0, 0, 0, 1},
      {0, 1, 2, 3}, {0, 1, 0, 1, 0}, {2, 1, 1, 0, 2}, {0, 0, 0, 1, 1, 1, 2, 2}};
  for (const std::vector<int>& nodes : layouts) {
    const int ranks = static_cast<int>(nodes.size());
    for (int slices : {ranks, ranks + 1, 2 * ranks + 1, 16}) {
      RankMap map = one_node(even_runs(slices, ranks));
      map.node_of_rank = nodes;
      const SumCase c(slices, 5, 1001, static_cast<uint32_t>(slices));
      EXPECT_EQ(ranks_with_wrong_bits(c, map, {}), 0) << ranks << " ranks, " << slices << " slices";
      EXPECT_EQ(ranks_with_wrong_bits(c, map, {.area_bytes = kMinAreaBytes}), 0)
          << ranks << " ranks, " << slices << " slices";
    }
  }
}

TEST(Collective, SummingInRankOrderWouldGiveOtherBits) {
  // The control: these cases can tell an order from another, so the tests above can fail.
  int differ = 0;
  for (uint32_t seed = 0; seed < 5; ++seed) {
    const SumCase c(8, 4, 500, seed);
    differ += c.summed_left_to_right() != c.expected();
  }
  EXPECT_GT(differ, 0);
}

TEST(Collective, SumsStayRightWhenManyKindsOfCallsFollowOneAnother) {
  // Spinning and sleeping ranks, small and large sums, gathers and barriers share the window's two areas.
  RankMap map = one_node({2, 1, 2});
  for (const std::vector<int>& nodes : {std::vector<int>{0, 0, 0}, std::vector<int>{0, 0, 1}}) {
    map.node_of_rank = nodes;
    const SumCase small(5, 1, 64, 1), large(5, 9, 3000, 2);
    std::atomic<int> wrong = 0;
    on_ranks(map, {.area_bytes = 8192}, [&](int rank, Communicator& communicator) {
      Stream stream({.threads = 1, .spin = false});
      for (int round = 0; round < 30; ++round) {
        const SumCase& c = round % 3 == 0 ? large : small;
        if (reduce(c, map.runs[rank], communicator, stream) != c.expected()) ++wrong;
        const std::vector<int64_t> bytes = {9000, 0, 40 + round};
        if (gather(bytes, rank, communicator) != expected_gather(bytes)) ++wrong;
        if (round % 5 == 0) communicator.barrier();
      }
    });
    EXPECT_EQ(wrong, 0);
  }
}

TEST(Collective, GathersUnevenAndEmptyContributionsOfAnyLength) {
  RankMap map = one_node({1, 1, 1, 1});
  for (const std::vector<int>& nodes :
       {std::vector<int>{0, 0, 0, 0}, std::vector<int>{0, 1, 1, 0}, std::vector<int>{0, 1, 2, 3}}) {
    map.node_of_rank = nodes;
    for (const std::vector<int64_t>& bytes :
         {std::vector<int64_t>{1, 2, 3, 4}, std::vector<int64_t>{0, 5, 0, 0}, std::vector<int64_t>{0, 0, 0, 0},
          std::vector<int64_t>{2048, 4096, 2047, 2049}, std::vector<int64_t>{100000, 0, 3, 70001}}) {
      std::atomic<int> wrong = 0;
      on_ranks(map, {.area_bytes = kMinAreaBytes}, [&](int rank, Communicator& communicator) {
        if (gather(bytes, rank, communicator) != expected_gather(bytes)) ++wrong;
      });
      EXPECT_EQ(wrong, 0) << "first contribution " << bytes[0] << " bytes";
    }
  }
}

TEST(Collective, NobodyPassesABarrierBeforeAllHaveComeToIt) {
  RankMap map = one_node({1, 1, 1, 1});
  // More ranks than cores: a spinning one holds its core for long, so few rounds of that.
  for (const auto& [spin, rounds] : {std::pair(false, 200), std::pair(true, 20)}) {
    for (const std::vector<int>& nodes : {std::vector<int>{0, 0, 0, 0}, std::vector<int>{0, 0, 0, 1}}) {
      map.node_of_rank = nodes;
      std::atomic<int> arrived = 0, early = 0;
      on_ranks(map, {.wait = {.spin = spin}}, [&](int, Communicator& communicator) {
        for (int round = 1; round <= rounds; ++round) {
          ++arrived;
          communicator.barrier();
          if (arrived < 4 * round) ++early;
        }
      });
      EXPECT_EQ(early, 0);
    }
  }
}

TEST(Collective, AWaitForARankThatNeverComesCanBeEnded) {
  const auto give_up = [](std::chrono::milliseconds) { throw std::runtime_error("a rank is gone"); };
  RankMap map = one_node({1, 1});
  for (const std::vector<int>& nodes : {std::vector<int>{0, 0}, std::vector<int>{0, 1}}) {
    map.node_of_rank = nodes;
    const auto communicators = make_thread_communicators(map, {.wait = {.spin = false, .on_wait = give_up}});
    EXPECT_THROW(communicators[0]->barrier(), std::runtime_error);
  }
}

}  // namespace
}  // namespace octet
