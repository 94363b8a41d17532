// TimedCommunicator: another communicator's collectives, with the seconds that they take.
#pragma once

#include <chrono>

#include "worker/collective/communicator.h"

namespace octet {

class TimedCommunicator final : public Communicator {
 public:
  // `inner` outlives it.
  explicit TimedCommunicator(Communicator& inner) : inner_(inner) {}

  // Inside collectives since the beginning, waiting for other ranks included.
  double seconds() const { return std::chrono::duration<double>(spent_).count(); }

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  void all_gather(const void* mine, std::span<const int64_t> bytes_of_rank, void* all) override {
    timed([&] { inner_.all_gather(mine, bytes_of_rank, all); });
  }
  void reduce_over_slices(Stream& stream, const Tensor& partials, const Tensor& residual) override {
    timed([&] { inner_.reduce_over_slices(stream, partials, residual); });
  }
  void barrier() override {
    timed([&] { inner_.barrier(); });
  }

 private:
  using Clock = std::chrono::steady_clock;

  template <typename Collective>
  void timed(const Collective& collective) {
    const Clock::time_point begin = Clock::now();
    collective();
    spent_ += Clock::now() - begin;
  }

  Communicator& inner_;
  Clock::duration spent_{};
};

}  // namespace octet
