// SumOverRanks: the negative control of the one-answer tests. A test that does not notice these sums is blind.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/fp8.h"
#include "worker/collective/communicator.h"

namespace octet {

// Sums over ranks, in the order of ranks: what MPI_Allreduce or a library would do.
class SumOverRanks : public Communicator {
 public:
  explicit SumOverRanks(std::unique_ptr<Communicator> inner) : inner_(std::move(inner)) {}
  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  void barrier() override { inner_->barrier(); }
  void all_gather(const void* mine, std::span<const int64_t> bytes_of_rank, void* all) override {
    inner_->all_gather(mine, bytes_of_rank, all);
  }
  void reduce_over_slices(Stream&, const Tensor& partials, const Tensor& residual) override {
    const int64_t n = residual.elements();
    std::vector<float> total(n, 0.0f), all(n * size());
    for (int64_t i = 0; i < partials.elements(); ++i) total[i % n] += partials.as<float>()[i];
    all_gather(total.data(), std::vector<int64_t>(size(), n * int64_t{sizeof(float)}), all.data());
    for (int64_t i = 0; i < n; ++i) {
      float sum = 0.0f;
      for (int r = 0; r < size(); ++r) sum += all[r * n + i];
      uint16_t& value = residual.as<uint16_t>()[i];
      value = float_to_bf16(bf16_to_float(value) + sum);
    }
  }

 private:
  std::unique_ptr<Communicator> inner_;
};

}  // namespace octet
