// StagedCommunicator: ranks that compute on GPUs meet in the host's memory, through a communicator for the host. Two
// copies a sum are its price: it needs nothing of the machine, and every rank may share one GPU.
#pragma once

#include <memory>

#include "kernels/memory.h"
#include "worker/collective/communicator.h"

namespace octet {

class StagedCommunicator final : public Communicator {
 public:
  // `host`: what sums on the host.
  StagedCommunicator(std::unique_ptr<Communicator> inner, const Stream::CpuOptions& host)
      : inner_(std::move(inner)), host_(host) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  void all_gather(const void* mine, std::span<const int64_t> bytes_of_rank, void* all) override {
    inner_->all_gather(mine, bytes_of_rank, all);
  }
  void gather(Stream& stream, const Tensor& mine, std::span<const int64_t> bytes_of_rank, const Tensor& all) override;
  void reduce_over_slices(Stream& stream, const Tensor& partials, const Tensor& residual) override;
  void barrier() override { inner_->barrier(); }

 private:
  std::unique_ptr<Communicator> inner_;
  Stream host_;
  // On the host; as large as the largest of its kind so far.
  Buffer mine_, all_, partials_, residual_;
};

}  // namespace octet
