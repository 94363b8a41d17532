#include "kernels/random_values.h"

#include <algorithm>
#include <string>

#include "kernels/check.h"
#include "kernels/fp8.h"
#include "kernels/ops.h"

namespace octet {
namespace {

// Windows begin at multiples of so many elements: whole cache lines of BF16.
constexpr int64_t kGrain = 32;

// The sum of four uniform numbers, of variance 1: normal to within what four deviations show.
float normal_of(uint64_t bits) {
  constexpr float kDeviationOfSum = 37836.6f;  // sqrt(4 * 65536^2 / 12)
  const auto part = [&](int shift) { return static_cast<float>(bits >> shift & 0xFFFF); };
  return (part(0) + part(16) + part(32) + part(48) - 2 * 65535.0f) / kDeviationOfSum;
}

}  // namespace

RandomValues::RandomValues(uint64_t seed, int64_t most_elements) : state_(seed), most_elements_(most_elements) {
  const auto count = static_cast<size_t>(2 * most_elements + kGrain);
  values_.reserve(count);
  codes_.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const float value = normal_of(draw());
    values_.push_back(float_to_bf16(kDeviation * value));
    codes_.push_back(float_to_e4m3(kCodeDeviation * value));
  }
}

// SplitMix64.
uint64_t RandomValues::draw() {
  state_ += 0x9E3779B97F4A7C15;
  uint64_t bits = state_;
  bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9;
  bits = (bits ^ bits >> 27) * 0x94D049BB133111EB;
  return bits ^ bits >> 31;
}

Tensor RandomValues::next(DType dtype, Shape shape) {
  OCTET_CHECK(shape.elements() <= most_elements_,
              shape.to_string() + " values at once, " + std::to_string(most_elements_) + " were announced");
  const auto windows = static_cast<uint64_t>(most_elements_ / kGrain + 1);
  const int64_t begin = static_cast<int64_t>(draw() % windows) * kGrain;
  if (dtype == DType::kF8E4M3) return Tensor(codes_.data() + begin, dtype, shape);
  OCTET_CHECK(dtype == DType::kBF16, "random values are BF16 or F8_E4M3");
  return Tensor(values_.data() + begin, dtype, shape);
}

void RandomValues::fill(Stream& stream, const Tensor& out) {
  const DType dtype = out.dtype() == DType::kF8E4M3 ? DType::kF8E4M3 : DType::kBF16;
  const int64_t count = out.bytes() / size_of(dtype);
  const Tensor flat(out.data(), dtype, {count}, out.device());
  for (int64_t first = 0; first < count; first += most_elements_) {
    const int64_t end = std::min(first + most_elements_, count);
    copy(stream, next(dtype, {end - first}), flat.rows(first, end));
  }
}

std::vector<float> RandomValues::near_one(int64_t count, float spread) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = 1.0f + spread * (static_cast<float>(draw() >> 40) / (1 << 23) - 1.0f);
  return values;
}

}  // namespace octet
