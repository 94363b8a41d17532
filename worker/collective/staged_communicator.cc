#include "worker/collective/staged_communicator.h"

#include "kernels/ops.h"

namespace octet {
namespace {

// `there`'s shape in host memory.
Tensor staging_of(const Tensor& there, Buffer* buffer) {
  if (buffer->bytes() < there.bytes()) *buffer = Buffer(there.bytes());
  return buffer->tensor(there.dtype(), there.shape());
}

}  // namespace

void StagedCommunicator::gather(Stream& stream, const Tensor& mine, std::span<const int64_t> bytes_of_rank,
                                const Tensor& all) {
  if (size() == 1) return copy(stream, mine, all);
  const Tensor my_mine = staging_of(mine, &mine_), my_all = staging_of(all, &all_);
  copy(stream, mine, my_mine);
  inner_->all_gather(my_mine.data(), bytes_of_rank, my_all.data());
  copy(stream, my_all, all);
}

void StagedCommunicator::reduce_over_slices(Stream& stream, const Tensor& partials, const Tensor& residual) {
  if (size() == 1) return inner_->reduce_over_slices(stream, partials, residual);
  const Tensor my_partials = staging_of(partials, &partials_), my_residual = staging_of(residual, &residual_);
  copy(stream, partials, my_partials);
  copy(stream, residual, my_residual);
  inner_->reduce_over_slices(host_, my_partials, my_residual);
  copy(stream, my_residual, residual);
}

}  // namespace octet
