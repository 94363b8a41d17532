// Attention over the paged cache in fast mode: on tensor cores, every position read once for all query heads of its KV
// head. Not the arithmetic that promises bits: the parts in which a context is summed depend on the batch,
// probabilities are rounded to BF16 before they weigh values, and exponentials are the hardware's. Outputs are rounded
// once to BF16.
//
// NaN codes of a cache in e4m3 are read as +-480.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/ops.h"

namespace octet::cuda {

class Queue;

// Whether there are kernels for heads of this width.
constexpr bool has_flash_attention(int64_t head_dim) { return head_dim == 64 || head_dim == 128; }

// As ops.h says of attention(). Row i of block_tables is sequence i's, and every sequence has a token. What is launched
// depends on the numbers of tokens and sequences and on batch.context alone. REQUIRES: has_flash_attention(q.dim(2)).
void flash_attention(Queue& queue, const Tensor& q, const KvLayer& cache, const AttentionBatch& batch,
                     const Tensor& out);

// How contexts of sequences with few new tokens are cut into parts, a thread block each.
//
// Few sequences: enough parts to fill the device, but none shorter than kLeastPart, below which a block's fixed costs
// show. Many: none longer than kMostPart, so that one long context among short ones does not run alone at the end.
struct ContextParts {
  static constexpr int kLeastPart = 128;  // positions; parts are multiples of it
  static constexpr int kMostPart = 1024;

  int filling;  // parts of each context that fill the device
  int most;     // parts whose results may lie in memory

  // `units`: thread blocks that a step would have if no context were cut, `at_once`: those that the device runs. One
  // more part of every context has results of part_bytes.
  static constexpr ContextParts of(int64_t units, int64_t at_once, int64_t part_bytes) {
    constexpr int64_t kMostResultBytes = int64_t{64} << 20;  // of a step
    const int64_t filling = at_once / units, most = kMostResultBytes / part_bytes;
    return {static_cast<int>(std::max<int64_t>(filling, 1)), static_cast<int>(std::max<int64_t>(most, 1))};
  }

  // At most so many parts does a context of `length` > 0 positions have; rising with length.
  constexpr int bound(int length) const {
    const int longest = (length - 1) / kMostPart + 1, shortest = (length - 1) / kLeastPart + 1;
    return std::min({shortest, std::max(filling, longest), most});
  }
  // Positions of each part, but for the last one.
  constexpr int positions(int length) const { return ((length - 1) / bound(length) / kLeastPart + 1) * kLeastPart; }
  constexpr int count(int length) const { return (length - 1) / positions(length) + 1; }
};

}  // namespace octet::cuda
