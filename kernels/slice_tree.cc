// The fixed tree over slices: covers of runs, and postfix programs that sum a cover. Everything is a walk from the
// root.
#include "kernels/slice_tree.h"

#include <algorithm>
#include <string>

#include "kernels/check.h"

namespace octet {
namespace {

// The slices a node really has: [first, end), absent ones cut off.
struct Present {
  int first;
  int end;
  bool operator==(const Present&) const = default;
};

Present present(const SliceNode& node, int total) {
  const int64_t width = int64_t{1} << node.level;
  const int64_t first = std::min<int64_t>(node.index * width, total);
  return {static_cast<int>(first), static_cast<int>(std::min<int64_t>(first + width, total))};
}

SliceNode left_child(const SliceNode& node) { return {node.level - 1, 2 * node.index}; }
SliceNode right_child(const SliceNode& node) { return {node.level - 1, 2 * node.index + 1}; }

void cover(const SliceRun& run, const SliceNode& node, std::vector<SliceNode>& nodes) {
  const Present here = present(node, run.total);
  const int end = run.first + run.count;
  if (here.first >= here.end || here.end <= run.first || here.first >= end) return;
  if (run.first <= here.first && here.end <= end) {
    nodes.push_back(node);
    return;
  }
  cover(run, left_child(node), nodes);
  cover(run, right_child(node), nodes);
}

void append_sum(std::span<const SliceNode> pieces, const SliceNode& node, int total, std::vector<int>& program) {
  const Present here = present(node, total);
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (present(pieces[i], total) == here) {
      program.push_back(static_cast<int>(i));
      return;
    }
  }
  OCTET_CHECK(node.level > 0, "no piece holds slice " + std::to_string(node.index));
  append_sum(pieces, left_child(node), total, program);
  const Present right = present(right_child(node), total);
  if (right.first >= right.end) return;
  append_sum(pieces, right_child(node), total, program);
  program.push_back(kAdd);
}

}  // namespace

SliceNode root_of(int total) {
  OCTET_CHECK(total >= 1, "a model has at least one slice");
  int level = 0;
  while ((int64_t{1} << level) < total) ++level;
  return {level, 0};
}

std::vector<SliceNode> maximal_subtrees(const SliceRun& run) {
  OCTET_CHECK(
      run.first >= 0 && run.count >= 1 && run.first + run.count <= run.total,
      "slices [" + std::to_string(run.first) + ", +" + std::to_string(run.count) + ") of " + std::to_string(run.total));
  std::vector<SliceNode> nodes;
  cover(run, root_of(run.total), nodes);
  return nodes;
}

std::vector<int> sum_program(std::span<const SliceNode> pieces, const SliceNode& root, int total) {
  std::vector<int> program;
  append_sum(pieces, root, total, program);
  size_t pushes = 0;
  for (const int entry : program) pushes += entry != kAdd;
  OCTET_CHECK(pushes == pieces.size(), "the pieces overlap or reach beyond the root");
  return program;
}

}  // namespace octet
