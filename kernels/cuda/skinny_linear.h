// Linear layers of few tokens at the speed of memory, for Arithmetic::kFast.
#pragma once

#include <span>

#include "kernels/cuda/queue.h"
#include "kernels/cuda/skinny_split.h"
#include "kernels/ops.h"

namespace octet::cuda {

// Whether skinny_linear() takes this input and matrix: at most kSkinnyTokens tokens, rows of both in whole pieces of 16
// aligned bytes, and BF16 weights with BF16 inputs, on a device with the shared memory of an A100 or an H100.
bool fits_skinny_linear(const Queue& queue, const Activations& x, const Linear& weight);

// linear() of ops.h, with equal bits from run to run on one kind of device; an output is [tokens, rows] or, for a
// rank's leaf, [1, tokens, rows]. REQUIRES: each matrix fits. Weights are read ahead of the op that was queued before
// this one, so they were complete when that was queued.
void skinny_linear(Queue& queue, const Activations& x, std::span<const LinearOutput> outputs);

}  // namespace octet::cuda
