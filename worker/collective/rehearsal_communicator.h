// RehearsalCommunicator: one rank alone, which does what it would do beside the others. Memory of its own stands for
// theirs: it is read and summed as theirs would be, so that what is missing from a step is the way between ranks and
// the wait for them. What comes out is no model's answer.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/memory.h"
#include "kernels/random_values.h"
#include "worker/collective/communicator.h"

namespace octet {

class RehearsalCommunicator final : public Communicator {
 public:
  // Sums of up to so many elements are finished whole by every rank, which reads all pieces of all ranks. Of larger
  // ones a rank finishes its share, and reads the others' results: what all-reduces within a node do.
  static constexpr int64_t kOneShotElements = 256 << 10;

  // The memory that stands for the other ranks', where the rank computes. runs: the leaves of each rank, in their order
  // (ShardSpec::leaves_of()); max_elements: of a residual.
  static int64_t bytes(std::span<const SliceRun> runs, int rank, int64_t max_elements);
  // `stream` and `values`, which fill that memory and serve gatherings, outlive this.
  RehearsalCommunicator(Stream& stream, std::vector<SliceRun> runs, int rank, int64_t max_elements,
                        RandomValues& values);

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(runs_.size()); }
  // The others have copies of what this rank has; numbers where it has nothing.
  void all_gather(const void* mine, std::span<const int64_t> bytes_of_rank, void* all) override;
  void gather(Stream& stream, const Tensor& mine, std::span<const int64_t> bytes_of_rank, const Tensor& all) override;
  void reduce_over_slices(Stream& stream, const Tensor& partials, const Tensor& residual) override;
  bool on_device() const override { return true; }
  void barrier() override {}

 private:
  std::vector<Tensor> pieces(const Tensor& partials, int64_t begin, int64_t end) const;

  const std::vector<SliceRun> runs_;
  const int rank_;
  RandomValues& values_;
  std::vector<int64_t> pieces_of_rank_;
  std::vector<int> program_;  // over the pieces of all ranks
  Buffer peers_;              // their pieces F32, their results BF16: the same memory
};

}  // namespace octet
