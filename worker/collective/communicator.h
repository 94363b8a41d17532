// Communicator: how the ranks of one model meet inside a step. Only bytes move here; the arithmetic of the tree is
// kernels' add_tree_sum. Only the worker thread calls these, every rank in the same order with matching arguments.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/check.h"
#include "kernels/memory.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "worker/model/shard_spec.h"

namespace octet {

class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  // On host memory. Rank r contributes bytes_of_rank[r] bytes; `all` gets all of them in rank order. May be longer than
  // the window: the transfer is cut. mine may not overlap all.
  virtual void all_gather(const void* mine, std::span<const int64_t> bytes_of_rank, void* all) = 0;

  // all_gather() on the memory of the stream's device, in the stream's order.
  virtual void gather(Stream& stream, const Tensor& mine, std::span<const int64_t> bytes_of_rank, const Tensor& all) {
    OCTET_CHECK(stream.device() == Device::kCpu, "this communicator gathers in the host's memory");
    all_gather(mine.data(), bytes_of_rank, all.data());
  }

  // Finishes a row-parallel layer. partials [nodes, tokens, n] F32 are this rank's maximal subtrees
  // (linear_over_slices()); every rank ends with residual [tokens, n] BF16 = bf16(residual + the whole tree's sum),
  // equal bits everywhere. On the memory of the stream's device, which for several ranks is the host unless the
  // communicator says otherwise. What partials hold afterwards is undefined.
  virtual void reduce_over_slices(Stream& stream, const Tensor& partials, const Tensor& residual) = 0;

  // reduce_over_slices(), then rms_norm_and_quantize() of the residual stream: where ranks meet on the device, one
  // kernel.
  virtual void reduce_and_norm(Stream& stream, const Tensor& partials, const Tensor& residual,
                               const NormedInput& next) {
    reduce_over_slices(stream, partials, residual);
    rms_norm_and_quantize(stream, residual, next);
  }

  // Whether a collective is work of the stream alone, which needs nothing of the host: steps may then be recorded as
  // graphs. A rank that is alone meets nobody.
  virtual bool on_device() const { return size() == 1; }

  virtual void barrier() = 0;
};

}  // namespace octet
