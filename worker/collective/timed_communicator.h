// TimedCommunicator: another communicator's collectives, with the seconds that they take, noted in the rank's flight.
#pragma once

#include <chrono>
#include <numeric>

#include "worker/collective/communicator.h"
#include "worker/flight_recorder.h"

namespace octet {

class TimedCommunicator final : public Communicator {
 public:
  // Both outlive it. recorder: null, nobody records.
  TimedCommunicator(Communicator& inner, FlightRecorder* recorder) : inner_(inner), recorder_(recorder) {}

  // Inside collectives since the beginning, waiting for other ranks included; of those that are on_device() only what
  // it takes to queue them.
  double seconds() const { return std::chrono::duration<double>(spent_).count(); }

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  void all_gather(const void* mine, std::span<const int64_t> bytes_of_rank, void* all) override {
    const int64_t bytes = std::accumulate(bytes_of_rank.begin(), bytes_of_rank.end(), int64_t{0});
    timed(FlightEvent::kAllGather, bytes, [&] { inner_.all_gather(mine, bytes_of_rank, all); });
  }
  void gather(Stream& stream, const Tensor& mine, std::span<const int64_t> bytes_of_rank, const Tensor& all) override {
    timed(FlightEvent::kAllGather, all.bytes(), [&] { inner_.gather(stream, mine, bytes_of_rank, all); });
  }
  void reduce_over_slices(Stream& stream, const Tensor& partials, const Tensor& residual) override {
    timed(FlightEvent::kReduce, residual.bytes(), [&] { inner_.reduce_over_slices(stream, partials, residual); });
  }
  // With the norm, which may be part of the same kernel.
  void reduce_and_norm(Stream& stream, const Tensor& partials, const Tensor& residual,
                       const NormedInput& next) override {
    timed(FlightEvent::kReduce, residual.bytes(), [&] { inner_.reduce_and_norm(stream, partials, residual, next); });
  }
  bool on_device() const override { return inner_.on_device(); }
  void barrier() override {
    timed(FlightEvent::kBarrier, 0, [&] { inner_.barrier(); });
  }

 private:
  using Clock = std::chrono::steady_clock;

  template <typename Collective>
  void timed(FlightEvent event, int64_t bytes, const Collective& collective) {
    const Clock::time_point begin = Clock::now();
    if (recorder_ != nullptr) recorder_->begin_collective(event, bytes, begin);
    collective();
    const Clock::time_point end = Clock::now();
    if (recorder_ != nullptr) recorder_->end_collective(end);
    spent_ += end - begin;
  }

  Communicator& inner_;
  FlightRecorder* const recorder_;
  Clock::duration spent_{};
};

}  // namespace octet
