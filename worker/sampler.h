// Sampler: from a row of raw logits to a token (pure). Every rank calls it on the same bits and gets the same token.
//
// Order: temperature, top_k, top_p, min_p; ties go to the smaller id. Randomness is counter-based (Philox 4x32-10) with
// key (seed, output_index, position), so a token depends on nothing else that was ever sampled.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "worker/model/transformer.h"
#include "worker/step_plan.h"

namespace octet {

// A number in [0, 1) with 53 random bits.
double uniform_at(uint64_t seed, uint32_t output_index, int32_t position);

class Sampler {
 public:
  // `position` is that of the token to be chosen. chosen.logprob and top are of the raw distribution.
  // REQUIRES: row.log_sum_exp is finite.
  void sample(const LogitsRow& row, const SlotSampling& sampling, int32_t position, SampledToken* out);

 private:
  int32_t draw(std::span<const float> logits, const SlotSampling& sampling, int32_t position);
  // The `count` best ids, best first, to candidates_.
  void take_best(std::span<const float> logits, int64_t count);

  std::vector<int32_t> candidates_;
  std::vector<double> weights_;
};

}  // namespace octet
