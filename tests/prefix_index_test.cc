#include "coordinator/prefix_index.h"

#include <vector>

#include "gtest/gtest.h"

namespace octet {
namespace {

constexpr PrefixSecret kSecret = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Enters `blocks` from the root on, and returns where that leads.
PrefixPoint enter(PrefixIndex* index, const std::vector<std::vector<int32_t>>& tokens,
                  const std::vector<int32_t>& blocks, std::string_view salt = "") {
  PrefixPoint point = index->root(salt);
  for (size_t i = 0; i < tokens.size(); ++i) index->add(tokens[i], blocks[i], &point);
  return point;
}

// The blocks found from the root on, up to the first miss.
std::vector<int32_t> lookup(const PrefixIndex& index, const std::vector<std::vector<int32_t>>& tokens,
                            std::string_view salt = "") {
  std::vector<int32_t> blocks;
  PrefixPoint point = index.root(salt);
  for (const std::vector<int32_t>& block : tokens) {
    blocks.push_back(index.find(block, &point));
    if (blocks.back() < 0) break;
  }
  return blocks;
}

using Blocks = std::vector<int32_t>;

TEST(PrefixIndex, FindsAPrefixBlockByBlock) {
  PrefixIndex index(8, 2, kSecret);
  enter(&index, {{1, 2}, {3, 4}, {5, 6}}, {7, 0, 3});
  EXPECT_EQ(lookup(index, {{1, 2}, {3, 4}, {5, 6}}), (Blocks{7, 0, 3}));
  EXPECT_EQ(lookup(index, {{1, 2}, {3, 5}}), (Blocks{7, -1}));
  EXPECT_EQ(lookup(index, {{3, 4}}), (Blocks{-1})) << "the same tokens elsewhere are other values";
  EXPECT_EQ(index.size(), 3);
}

TEST(PrefixIndex, KeepsTheFirstOfTwoEqualBlocks) {
  PrefixIndex index(8, 2, kSecret);
  enter(&index, {{1, 2}}, {0});
  PrefixPoint point = index.root("");
  EXPECT_EQ(index.add(std::vector<int32_t>{1, 2}, 5, &point), 0);
  EXPECT_EQ(index.add(std::vector<int32_t>{3, 4}, 6, &point), 6) << "what follows hangs at the one that stayed";
  EXPECT_EQ(lookup(index, {{1, 2}, {3, 4}}), (Blocks{0, 6}));
}

TEST(PrefixIndex, SaltsDoNotMeet) {
  PrefixIndex index(8, 2, kSecret);
  enter(&index, {{1, 2}}, {0}, "alice");
  EXPECT_EQ(lookup(index, {{1, 2}}, "bob"), (Blocks{-1}));
  EXPECT_EQ(lookup(index, {{1, 2}}), (Blocks{-1}));
  EXPECT_EQ(lookup(index, {{1, 2}}, "alice"), (Blocks{0}));
}

TEST(PrefixIndex, WhatHungAtALostBlockIsNotFoundAndMakesRoom) {
  PrefixIndex index(8, 2, kSecret);
  enter(&index, {{1, 2}, {3, 4}}, {0, 1});
  index.remove(0);
  EXPECT_EQ(lookup(index, {{1, 2}}), (Blocks{-1}));
  enter(&index, {{1, 2}}, {5});
  EXPECT_EQ(lookup(index, {{1, 2}, {3, 4}}), (Blocks{5, -1})) << "block 1 hangs at the lost one";
  enter(&index, {{1, 2}, {3, 4}}, {5, 6});
  EXPECT_EQ(lookup(index, {{1, 2}, {3, 4}}), (Blocks{5, 6}));
  index.remove(1);
  index.remove(1);
  EXPECT_EQ(lookup(index, {{1, 2}, {3, 4}}), (Blocks{5, 6}));
  EXPECT_EQ(index.size(), 2);
}

TEST(PrefixIndex, ABlockMovesToTheParentThatReplacedItsOwn) {
  PrefixIndex index(8, 2, kSecret);
  enter(&index, {{1, 2}, {3, 4}}, {0, 1});
  index.remove(0);
  enter(&index, {{1, 2}, {3, 4}}, {5, 1});
  EXPECT_EQ(lookup(index, {{1, 2}, {3, 4}}), (Blocks{5, 1}));
}

// Every key is the same: only the tokens and the parents can tell blocks apart.
PrefixKey colliding_hash(const PrefixSecret&, std::span<const unsigned char>) { return {42, 42}; }

TEST(PrefixIndex, ACollisionIsAMissAndNeverSomebodyElsesBlock) {
  PrefixIndex index(8, 2, kSecret, colliding_hash);
  enter(&index, {{1, 2}}, {0});
  EXPECT_EQ(lookup(index, {{1, 3}}), (Blocks{-1}));
  EXPECT_EQ(lookup(index, {{1, 2}}), (Blocks{0}));
  EXPECT_EQ(lookup(index, {{1, 2}, {1, 2}}), (Blocks{0, -1})) << "the same tokens, but another parent";
  enter(&index, {{9, 9}}, {4});
  EXPECT_EQ(lookup(index, {{9, 9}}), (Blocks{4}));
  EXPECT_EQ(lookup(index, {{1, 2}}), (Blocks{-1})) << "the later one has taken the place";
}

TEST(PrefixIndex, KeysDependOnTheSecret) {
  PrefixSecret other = kSecret;
  other[3] ^= 1;
  EXPECT_NE(PrefixIndex(1, 1, kSecret).root("").key, PrefixIndex(1, 1, other).root("").key);
}

TEST(PrefixIndex, HashesBlocksOfAnyLength) {
  PrefixIndex index(4, 150, kSecret);
  std::vector<int32_t> tokens(150);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i);
  enter(&index, {tokens}, {2});
  EXPECT_EQ(lookup(index, {tokens}), (Blocks{2}));
  tokens[149] = 0;
  EXPECT_EQ(lookup(index, {tokens}), (Blocks{-1}));
}

}  // namespace
}  // namespace octet
