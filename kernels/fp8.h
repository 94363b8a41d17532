// Conversions between FP32 and the narrow formats on the host: e4m3fn (saturating) and BF16, to the nearest, ties to
// even. Kernels have vector forms of these; tests hold the two equal. Not included by files built for one instruction
// set. constexpr also lets CUDA's device code call them.
#pragma once

#include <bit>
#include <cstdint>

namespace octet {

constexpr float kE4m3Max = 448.0f;
constexpr uint8_t kE4m3Nan = 0x7F;

constexpr float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// NaN stays a (quiet) NaN, values beyond the largest BF16 become infinite.
constexpr uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Whether a code is one of the two NaNs, 0x7F and 0xFF. e4m3fn has no infinity.
constexpr bool is_e4m3_nan(uint8_t code) { return (code & 0x7F) == kE4m3Nan; }

// Every e4m3 value is exact in BF16 too, so this also decodes to BF16.
constexpr float e4m3_to_float(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80) << 24;
  const uint32_t magnitude = code & 0x7F;
  if (magnitude == kE4m3Nan) return std::bit_cast<float>(sign | 0x7FC00000);
  if (magnitude >= 8) return std::bit_cast<float>(sign | ((magnitude << 20) + (120u << 23)));
  const float subnormal = static_cast<float>(magnitude) * (1.0f / 512);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(subnormal));
}

// Values beyond +-448 and infinities become +-448; NaN becomes 0x7F.
constexpr uint8_t float_to_e4m3(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return kE4m3Nan;
  if (magnitude >= 0x43E00000) return sign | 0x7E;  // 448
  if (magnitude >= 0x3C800000) {                    // 2^-6, the smallest normal
    const uint32_t rounded = magnitude + 0x7FFFF + (magnitude >> 20 & 1);
    return static_cast<uint8_t>(sign | ((rounded >> 20) - (120u << 3)));
  }
  // Adding 2^14 leaves multiples of 2^-9 in the low bits, rounded to the nearest even by the addition itself.
  const float shifted = std::bit_cast<float>(magnitude) + 16384.0f;
  return static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x46800000));
}

}  // namespace octet
