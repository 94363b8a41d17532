// Predicts how long a step takes from bytes, FLOPs and all-reduces (pure). A prediction is no measurement: it names its
// assumptions, and whatever prints it prints them too.
//
//   step = FP8 linears + BF16 linears + attention + all-reduces, one after the other
//   linears   = max(weight bytes / bandwidth, 2 * weights * tokens / FLOPs)
//   attention = max(KV bytes / bandwidth, 4 * head_dim * heads * attended positions / FLOPs)
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "worker/model/weight_formats.h"

namespace octet {

// Time of one all-reduce by the bytes of its result: between the points on a line, beyond the last at a rate.
struct AllReduceCost {
  std::vector<std::pair<double, double>> points;  // {bytes, seconds}, ascending; empty: it costs nothing
  double bytes_per_second = 0;                    // beyond the last point

  double seconds(double bytes) const;
};

// One rank's machine.
struct RankSpeed {
  double bytes_per_second = 0;
  double bf16_flops = 0;
  double fp8_flops = 0;  // 0: FP8 weights are widened and multiplied as BF16
  AllReduceCost all_reduce;
};

// What part of a RankSpeed kernels reach.
struct SpeedShares {
  double bandwidth = 1.0, bf16 = 1.0, fp8 = 1.0, attention = 1.0;
};

// Sequences of a step, all alike.
struct StepLoad {
  int64_t sequences = 1;
  int64_t new_tokens = 1;  // of each
  int64_t context = 1;     // positions of each when the step is done, the new ones included
  int kv_bytes_per_value = 2;
};

struct StepSeconds {
  double fp8_linears = 0, bf16_linears = 0, attention = 0, all_reduce = 0;
  double total() const { return fp8_linears + bf16_linears + attention + all_reduce; }
};

// Of the rank with the most slices, for which the others wait. REQUIRES: the model can be cut into `ranks`.
StepSeconds predict_step(const WeightFormats& formats, int ranks, const RankSpeed& speed, const SpeedShares& shares,
                         const StepLoad& load);

}  // namespace octet
