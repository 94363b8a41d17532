// RandomValues: numbers that stand for a model's where only its speed is asked for. Close to normally distributed
// around zero, so that activations stay finite at any depth, and memory and multipliers see bits as varied as those of
// a real model: how fast they can be depends on the power that this takes. The same seed gives the same numbers.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/memory.h"
#include "kernels/tensor.h"

namespace octet {

class RandomValues {
 public:
  // That of BF16 values: what Llama's weights are initialised with.
  static constexpr float kDeviation = 0.02f;
  // That of e4m3 codes, which use their range to four deviations: a scale of kDeviation / kCodeDeviation makes weights
  // of them.
  static constexpr float kCodeDeviation = 112.0f;

  // next() will be asked for at most `most_elements` at once.
  RandomValues(uint64_t seed, int64_t most_elements);
  int64_t most_elements() const { return most_elements_; }

  // BF16 or F8_E4M3 on the host, never the same from call to call; to be read only, as long as this lives. They are a
  // window into one block of numbers: making each anew would take longer than writing it.
  Tensor next(DType dtype, Shape shape);
  // Fills `out`, BF16, F8_E4M3 or F32, where the stream computes. A pair of BF16 values is an F32 number of their size.
  void fill(Stream& stream, const Tensor& out);
  // count values in [1 - spread, 1 + spread).
  std::vector<float> near_one(int64_t count, float spread);

 private:
  uint64_t draw();

  uint64_t state_;
  const int64_t most_elements_;
  std::vector<uint16_t> values_;  // BF16
  std::vector<uint8_t> codes_;    // F8_E4M3
};

}  // namespace octet
