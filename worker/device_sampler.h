// DeviceSampler: chooses tokens where the logits are, on a CUDA device, with the Sampler's answers to the bit. What
// comes back of a row are the chosen token and its alternatives, with their logits. Only the worker thread calls these.
#pragma once

#include <cstdint>

#include "kernels/cuda/sample.h"
#include "kernels/memory.h"
#include "worker/sampler.h"

namespace octet {

class DeviceSampler {
 public:
  // Whether the device makes this choice; all others are the host's Sampler's. The one place that says so.
  static bool takes(const Choice& choice);
  // What it takes on the device.
  static int64_t bytes(int64_t max_rows, int64_t vocab_size);

  // `stream` outlives it. REQUIRES: it computes on a CUDA device.
  DeviceSampler(Stream& stream, int64_t max_rows, int64_t vocab_size);

  // From now on nothing is to be chosen. REQUIRES: the stream was synchronised after the last run().
  void clear();
  // What is to be chosen from row `row`. REQUIRES: takes(choice), whose logits are not looked at; clear() came first.
  void set(int64_t row, const Choice& choice);
  // Queues the choices that are set for rows of logits [rows, vocab_size] on the device. May be recorded: the choices
  // are those that are set when the work is done.
  void run(const Tensor& logits);
  // What was chosen from a row, as Sampler::sample() reports it. REQUIRES: the stream was synchronised after run().
  void report(int64_t row, float log_sum_exp, SampledToken* out) const;

 private:
  cuda::RowChoice* choices() const;
  const cuda::ChosenRow* chosen() const;

  Stream& stream_;
  Buffer host_memory_, device_memory_;
  Tensor host_choices_, host_chosen_;
  Tensor device_choices_, device_chosen_, scratch_;
};

}  // namespace octet
