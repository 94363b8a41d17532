// How a launch of the skinny kernels shares its work out: the weights of all its matrices lie one after the other as
// tiles of rows, a tile is a number of equal steps along K, and each block takes one contiguous range of steps, so that
// every multiprocessor reads as much as the others to within one step whatever the shape is, and all are done at once:
// there is one wave, and it is full.
//
// A range may begin and end inside of tiles. A tile belongs to the range that has its first step; what others have of
// it they leave in a mailbox, and the owner adds it, in the order of K: which sums are made, and in which order,
// depends on the shape and the device alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace octet::cuda {

constexpr int64_t kSkinnyWarps = 8;          // of a block
constexpr int64_t kSkinnyWarpRows = 16;      // of a warp in a step: a tensor core's
constexpr int64_t kSkinnyWindowBytes = 128;  // of each of these rows: a line
// A step's weights. On an H100 (132 multiprocessors, 3.35 TB/s) one takes a multiprocessor 0.65 us.
constexpr int64_t kSkinnyStepBytes = kSkinnyWarps * kSkinnyWarpRows * kSkinnyWindowBytes;
// So that two blocks of two launches fit into an H100's multiprocessor at once: the later one's first weights are on
// their way before the earlier one ends.
constexpr int64_t kSkinnySharedBytes = int64_t{112} << 10;

// A block's shape for some tokens. The more tokens, the more of its warps have rows of their own and the fewer share a
// row's K, so that x, which every tile reads anew (from the L2 cache), stays small beside the weights: a quarter of
// their bytes at most, and half for BF16 inputs of 16 tokens beside e4m3 weights.
struct SkinnyShape {
  int row_warps;  // whose rows differ; the others have the same rows and other windows of K
  int tokens;     // at most

  constexpr int64_t rows() const { return row_warps * kSkinnyWarpRows; }
  // Of a row of weights, in one step.
  constexpr int64_t step_bytes() const { return kSkinnyWarps / row_warps * kSkinnyWindowBytes; }
  // Of shared memory for a step; x_ratio: bytes of an input beside those of a weight.
  constexpr int64_t stage_bytes(int64_t x_ratio) const { return kSkinnyStepBytes + tokens * step_bytes() * x_ratio; }
  // Steps that shared memory holds: one that is computed, the others on their way.
  constexpr int stages(int64_t x_ratio) const { return static_cast<int>(kSkinnySharedBytes / stage_bytes(x_ratio)); }
};
constexpr SkinnyShape kSkinnyShapes[] = {{1, 2}, {2, 4}, {4, 8}, {4, 16}};
constexpr int64_t kSkinnyTokens = 16;

// The index of the shape for some tokens: the first that takes them, unless rows are so short that tiles would be
// finished all the time; then one of more rows that takes them too.
constexpr size_t skinny_shape(int64_t tokens, int64_t row_bytes) {
  constexpr int64_t kLeastSteps = 4;  // of a tile
  size_t i = 0;
  while (kSkinnyShapes[i].tokens < tokens) ++i;
  while (kSkinnyShapes[i].row_warps < 4 && row_bytes < kLeastSteps * kSkinnyShapes[i].step_bytes()) ++i;
  return i;
}

struct SkinnySplit {
  int tile_steps;  // of a tile
  int ranges;
  int short_range;  // steps of the last ranges; the first long_ranges have one more
  int long_ranges;

  // The first step of a range; begin(ranges) is the end of the last.
  constexpr int begin(int range) const { return range * short_range + (range < long_ranges ? range : long_ranges); }
};

// REQUIRES: there are tiles, and fewer than 2^31 steps.
constexpr SkinnySplit skinny_split(const SkinnyShape& shape, int64_t tiles, int64_t row_bytes, int64_t processors) {
  const int64_t tile_steps = (row_bytes + shape.step_bytes() - 1) / shape.step_bytes(), steps = tiles * tile_steps;
  const int64_t ranges = std::min(processors, steps);
  return {static_cast<int>(tile_steps), static_cast<int>(ranges), static_cast<int>(steps / ranges),
          static_cast<int>(steps % ranges)};
}

}  // namespace octet::cuda
