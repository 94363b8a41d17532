// The fixed binary tree over slices in which row-parallel results are summed (pure).
//
// Node (level l, index i) covers slices [i*2^l, (i+1)*2^l); slices beyond the last one are absent and skipped, so a node
// with only a left child has its child's value. The root's value never depends on which rank computed what. A rank
// publishes its maximal complete subtrees, never a total of its own choosing.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace octet {

struct SliceNode {
  int level = 0;
  int index = 0;
  bool operator==(const SliceNode&) const = default;
};

// A contiguous run of slices [first, first + count) out of `total`.
struct SliceRun {
  int first = 0;
  int count = 0;
  int total = 0;
  bool operator==(const SliceRun&) const = default;
};

// The maximal complete subtrees of a run, left to right: 3 of 8 slices from 0 are {(1,0), (0,2)}.
// At most 2*ceil(log2(total)) nodes.
std::vector<SliceNode> maximal_subtrees(const SliceRun& run);

// A postfix program that sums known nodes up to one node: entries >= 0 push that piece, kAdd pops right then left and
// pushes left + right.
constexpr int kAdd = -1;

// The program that yields `root` from `pieces` (any cover of root's present slices by disjoint nodes, in any order).
// REQUIRES: pieces cover root exactly.
std::vector<int> sum_program(std::span<const SliceNode> pieces, const SliceNode& root, int total);

// The node that covers all `total` slices.
SliceNode root_of(int total);

}  // namespace octet
