#include "coordinator/block_pool.h"

#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace octet {
namespace {

TEST(BlockPool, GivesEachBlockToOneHand) {
  BlockPool pool(5);
  std::vector<int32_t> first, second;
  ASSERT_TRUE(pool.take(2, &first));
  ASSERT_TRUE(pool.take(3, &second));
  std::set<int32_t> all(first.begin(), first.end());
  all.insert(second.begin(), second.end());
  EXPECT_EQ(all, (std::set<int32_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(pool.free(), 0);
  EXPECT_EQ(pool.total(), 5);
}

TEST(BlockPool, TakesAllOrNothing) {
  BlockPool pool(3);
  std::vector<int32_t> blocks = {77};
  EXPECT_FALSE(pool.take(4, &blocks));
  EXPECT_EQ(blocks, std::vector<int32_t>{77});
  EXPECT_EQ(pool.free(), 3);
  EXPECT_TRUE(pool.take(3, &blocks));
  EXPECT_EQ(blocks.size(), 4u) << "blocks are appended";
  EXPECT_FALSE(pool.take(1, &blocks));
  EXPECT_TRUE(pool.take(0, &blocks));
}

TEST(BlockPool, TakesFirstWhatCameBackLast) {
  BlockPool pool(4);
  std::vector<int32_t> blocks;
  ASSERT_TRUE(pool.take(3, &blocks));
  pool.give_back({blocks[0], blocks[1]});
  EXPECT_EQ(pool.free(), 3);
  std::vector<int32_t> again;
  ASSERT_TRUE(pool.take(1, &again));
  EXPECT_EQ(again, std::vector<int32_t>{blocks[1]});
}

TEST(BlockPoolDeathTest, AssertsTheConservationLaw) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  BlockPool pool(2);
  std::vector<int32_t> blocks;
  ASSERT_TRUE(pool.take(1, &blocks));
  EXPECT_DEATH(pool.give_back({blocks[0], blocks[0]}), "nobody held");
  EXPECT_DEATH(pool.give_back({1 - blocks[0]}), "nobody held");
  EXPECT_DEATH(pool.give_back({2}), "does not exist");
  EXPECT_DEATH(pool.give_back({-1}), "does not exist");
}

}  // namespace
}  // namespace octet
