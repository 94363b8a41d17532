#include "coordinator/block_pool.h"

#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace octet {
namespace {

// A pool, and the idle blocks whose contents it gave up.
struct House {
  explicit House(int32_t blocks) : pool(blocks, [this](int32_t block) { lost.push_back(block); }) {}
  std::vector<int32_t> take(int32_t count) {
    std::vector<int32_t> blocks;
    EXPECT_TRUE(pool.take(count, &blocks));
    pool.check();
    return blocks;
  }
  void give_back(const std::vector<int32_t>& blocks) {
    pool.give_back(blocks);
    pool.check();
  }
  std::vector<int32_t> lost;
  BlockPool pool;
};

using Blocks = std::vector<int32_t>;

TEST(BlockPool, GivesEachBlockToOneHand) {
  House house(5);
  const Blocks first = house.take(2), second = house.take(3);
  std::set<int32_t> all(first.begin(), first.end());
  all.insert(second.begin(), second.end());
  EXPECT_EQ(all, (std::set<int32_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(house.pool.free(), 0);
  EXPECT_EQ(house.pool.total(), 5);
}

TEST(BlockPool, TakesAllOrNothing) {
  House house(3);
  Blocks blocks = {77};
  EXPECT_FALSE(house.pool.take(4, &blocks));
  EXPECT_EQ(blocks, Blocks{77});
  EXPECT_EQ(house.pool.free(), 3);
  EXPECT_TRUE(house.pool.take(3, &blocks));
  EXPECT_EQ(blocks.size(), 4u) << "blocks are appended";
  EXPECT_FALSE(house.pool.take(1, &blocks));
  EXPECT_TRUE(house.pool.take(0, &blocks));
}

TEST(BlockPool, TakesFirstWhatCameBackLast) {
  House house(4);
  const Blocks blocks = house.take(3);
  house.give_back({blocks[0], blocks[1]});
  EXPECT_EQ(house.pool.free(), 3);
  EXPECT_EQ(house.take(1), Blocks{blocks[0]}) << "of a list the last comes back first";
}

TEST(BlockPool, ASharedBlockIsHeldUntilTheLastHandLetsGo) {
  House house(2);
  const Blocks blocks = house.take(1);
  house.pool.share(blocks[0]);
  EXPECT_EQ(house.pool.references(blocks[0]), 2);
  house.give_back(blocks);
  EXPECT_EQ(house.pool.free(), 1);
  house.give_back(blocks);
  EXPECT_EQ(house.pool.free(), 2);
}

TEST(BlockPool, KeepsIdleBlocksUntilNoEmptyOneIsLeft) {
  House house(4);
  const Blocks kept = house.take(2);
  for (const int32_t block : kept) house.pool.keep(block);
  house.give_back(kept);
  EXPECT_EQ(house.pool.free(), 4);
  EXPECT_EQ(house.pool.idle(), 2);
  house.take(2);
  EXPECT_TRUE(house.lost.empty());
  house.take(1);
  EXPECT_EQ(house.lost, Blocks{kept[1]}) << "the last one of the list is lost first";
  house.take(1);
  EXPECT_EQ(house.lost, (Blocks{kept[1], kept[0]}));
}

TEST(BlockPool, AnIdleBlockThatIsSharedAgainIsNotLost) {
  House house(3);
  const Blocks kept = house.take(3);
  for (const int32_t block : kept) house.pool.keep(block);
  house.give_back(kept);
  house.pool.share(kept[2]);  // the one that would go first
  house.pool.check();
  EXPECT_EQ(house.pool.idle(), 2);
  house.take(2);
  EXPECT_EQ(house.lost, (Blocks{kept[1], kept[0]}));
  house.give_back({kept[2]});
  EXPECT_EQ(house.pool.idle(), 1) << "it still has contents";
}

TEST(BlockPoolDeathTest, AssertsTheConservationLaw) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  House house(2);
  const Blocks blocks = house.take(1);
  EXPECT_DEATH(house.give_back({blocks[0], blocks[0]}), "nobody held");
  EXPECT_DEATH(house.give_back({1 - blocks[0]}), "nobody held");
  EXPECT_DEATH(house.give_back({2}), "does not exist");
  EXPECT_DEATH(house.give_back({-1}), "does not exist");
  EXPECT_DEATH(house.pool.share(1 - blocks[0]), "an empty block was shared");
}

}  // namespace
}  // namespace octet
