// The fixed tree over slices: covers and programs, for every run of every total up to 40.
#include "kernels/slice_tree.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

namespace octet {
namespace {

int end_of(const SliceNode& node, int total) { return std::min((node.index + 1) << node.level, total); }
int first_of(const SliceNode& node) { return node.index << node.level; }

std::string sum_of(const std::string& left, const std::string& right) {
  std::string text = "(";
  return text.append(left).append("+").append(right).append(")");
}

// What the tree over named leaves looks like, straight from its definition.
std::string drawn(const SliceNode& node, int total) {
  if (node.level == 0) return std::to_string(node.index);
  const SliceNode left = {node.level - 1, 2 * node.index};
  const SliceNode right = {node.level - 1, 2 * node.index + 1};
  if (first_of(right) >= total) return drawn(left, total);
  return sum_of(drawn(left, total), drawn(right, total));
}

std::string evaluated(const std::vector<int>& program, const std::vector<std::string>& pieces) {
  std::vector<std::string> stack;
  for (const int entry : program) {
    if (entry != kAdd) {
      stack.push_back(pieces[entry]);
      continue;
    }
    const std::string right = stack.back();
    stack.pop_back();
    stack.back() = sum_of(stack.back(), right);
  }
  EXPECT_EQ(stack.size(), 1u);
  return stack.back();
}

TEST(SliceTree, NamesTheSubtreesOfTheFirstThreeOfEight) {
  EXPECT_EQ(maximal_subtrees({0, 3, 8}), (std::vector<SliceNode>{{1, 0}, {0, 2}}));
  EXPECT_EQ(maximal_subtrees({3, 3, 8}), (std::vector<SliceNode>{{0, 3}, {1, 2}}));
  EXPECT_EQ(maximal_subtrees({0, 8, 8}), (std::vector<SliceNode>{{3, 0}}));
  EXPECT_EQ(root_of(1), (SliceNode{0, 0}));
  EXPECT_EQ(root_of(3), (SliceNode{2, 0}));
}

TEST(SliceTree, CoversEveryRunExactlyWithFewNodes) {
  for (int total = 1; total <= 40; ++total) {
    for (int first = 0; first < total; ++first) {
      for (int count = 1; first + count <= total; ++count) {
        const auto nodes = maximal_subtrees({first, count, total});
        int next = first;
        for (const SliceNode& node : nodes) {
          EXPECT_EQ(first_of(node), next);
          next = end_of(node, total);
        }
        EXPECT_EQ(next, first + count);
        EXPECT_LE(nodes.size(), 2u * std::max(root_of(total).level, 1));
      }
    }
  }
}

TEST(SliceTree, ProgramsOfAnyCutIntoRanksDrawTheSameTree) {
  for (int total = 1; total <= 17; ++total) {
    const std::string whole = drawn(root_of(total), total);
    for (int ranks = 1; ranks <= total; ++ranks) {
      std::vector<SliceNode> pieces;
      std::vector<std::string> names;
      int first = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        const int count = total / ranks + (rank < total % ranks);
        for (const SliceNode& node : maximal_subtrees({first, count, total})) {
          pieces.push_back(node);
          names.push_back(drawn(node, total));
        }
        first += count;
      }
      // Ranks may publish in any order.
      std::rotate(pieces.begin(), pieces.begin() + pieces.size() / 2, pieces.end());
      std::rotate(names.begin(), names.begin() + names.size() / 2, names.end());
      EXPECT_EQ(evaluated(sum_program(pieces, root_of(total), total), names), whole) << total << " over " << ranks;
    }
  }
}

TEST(SliceTreeDeathTest, RefusesPiecesThatDoNotCoverTheRoot) {
  const std::vector<SliceNode> gap = {{1, 0}, {0, 3}};
  EXPECT_DEATH(sum_program(gap, root_of(4), 4), "no piece holds slice 2");
  const std::vector<SliceNode> twice = {{1, 0}, {1, 1}, {0, 3}};
  EXPECT_DEATH(sum_program(twice, root_of(4), 4), "overlap");
}

}  // namespace
}  // namespace octet
