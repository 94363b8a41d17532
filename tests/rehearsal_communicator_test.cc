// One rank that stands for all: what it sums and gathers where the others are not there.
#include "worker/collective/rehearsal_communicator.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/fp8.h"
#include "kernels/ops.h"
#include "worker/collective/thread_communicator.h"

namespace octet {
namespace {

const std::vector<SliceRun> kThreeRanks = {{0, 3, 8}, {3, 3, 8}, {6, 2, 8}};

class RehearsalCommunicatorTest : public testing::Test {
 protected:
  // The residual that a rank ends with, having begun with zeros and brought `value` in each element of each piece.
  std::vector<float> reduced(const std::vector<SliceRun>& runs, int rank, int64_t tokens, int64_t n, float value) {
    RandomValues values(1, 1 << 16);
    RehearsalCommunicator communicator(stream_, runs, rank, tokens * n, values);
    const int64_t pieces = std::ssize(maximal_subtrees(runs[rank]));
    std::vector<float> partials(static_cast<size_t>(pieces * tokens * n), value);
    std::vector<uint16_t> residual(static_cast<size_t>(tokens * n), 0);
    communicator.reduce_over_slices(stream_, Tensor(partials.data(), DType::kF32, {pieces, tokens, n}),
                                    Tensor(residual.data(), DType::kBF16, {tokens, n}));
    std::vector<float> result;
    for (const uint16_t bits : residual) result.push_back(bf16_to_float(bits));
    return result;
  }

  Stream stream_{{.threads = 1, .isa = best_isa(), .spin = false}};
};

TEST_F(RehearsalCommunicatorTest, AloneItSumsWhatAnyCommunicatorDoes) {
  for (const float value : reduced({{0, 4, 4}}, 0, 3, 64, 1.5f)) EXPECT_EQ(value, 1.5f);
}

TEST_F(RehearsalCommunicatorTest, AddsItsPiecesToThoseThatStandForTheOthers) {
  for (int rank = 0; rank < 3; ++rank) {
    const std::vector<float> others = reduced(kThreeRanks, rank, 2, 96, 0.0f);
    const std::vector<float> all = reduced(kThreeRanks, rank, 2, 96, 1.0f);
    const auto pieces = static_cast<float>(maximal_subtrees(kThreeRanks[rank]).size());
    int zeros = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      zeros += others[i] == 0.0f;
      EXPECT_LT(std::abs(others[i]), 1.0f) << i;
      EXPECT_NEAR(all[i] - others[i], pieces, pieces / 64) << "rank " << rank << ", element " << i;  // rounded to BF16
    }
    EXPECT_LT(zeros, 20);
  }
}

TEST_F(RehearsalCommunicatorTest, FinishesOnlyItsShareOfALargeSum) {
  const int64_t tokens = 40, n = 8192, elements = tokens * n;
  ASSERT_GT(elements, RehearsalCommunicator::kOneShotElements);
  for (int rank = 0; rank < 3; ++rank) {
    const std::vector<float> others = reduced(kThreeRanks, rank, tokens, n, 0.0f);
    const std::vector<float> all = reduced(kThreeRanks, rank, tokens, n, 1.0f);
    int64_t changed = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      changed += all[i] != others[i];
      ASSERT_TRUE(std::isfinite(all[i]));
    }
    EXPECT_NEAR(static_cast<double>(changed), static_cast<double>(elements) / 3, 64) << "rank " << rank;
  }
}

TEST_F(RehearsalCommunicatorTest, HoldsNoMoreThanOneSumReads) {
  const std::vector<SliceRun> eight = [] {
    std::vector<SliceRun> runs;
    for (int rank = 0; rank < 8; ++rank) runs.push_back({rank, 1, 8});
    return runs;
  }();
  EXPECT_EQ(RehearsalCommunicator::bytes({{{0, 8, 8}}}, 0, 1 << 20), 0);
  EXPECT_EQ(RehearsalCommunicator::bytes(eight, 0, 16384), 7 * 16384 * 4) << "the pieces of seven ranks";
  const int64_t elements = int64_t{2048} * 16384;
  EXPECT_EQ(RehearsalCommunicator::bytes(eight, 0, elements), 7 * elements / 8 * 4) << "a share of them";
}

TEST_F(RehearsalCommunicatorTest, GathersCopiesOfItsOwnAndNumbersWhereItHasNothing) {
  RandomValues values(1, 64);
  RehearsalCommunicator communicator(stream_, kThreeRanks, 1, 64, values);
  const std::vector<uint16_t> mine = {1, 2, 3};
  std::vector<uint16_t> all(10, 0);
  communicator.all_gather(mine.data(), std::vector<int64_t>{8, 6, 6}, all.data());
  EXPECT_EQ(all, (std::vector<uint16_t>{1, 2, 3, 1, 1, 2, 3, 1, 2, 3}));

  std::vector<uint16_t> numbers(500, 0);
  communicator.all_gather(nullptr, std::vector<int64_t>{600, 0, 400}, numbers.data());
  int zeros = 0;
  for (const uint16_t bits : numbers) {
    zeros += bits == 0;
    EXPECT_LT(std::abs(bf16_to_float(bits)), 1.0f);
  }
  EXPECT_LT(zeros, 20);
}

}  // namespace
}  // namespace octet
