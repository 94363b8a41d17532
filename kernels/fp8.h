// Scalar conversions between FP32 and the narrow float types, bit for bit: e4m3 (the "fn" kind: no infinity, NaN is
// 0x7F), bfloat16 and IEEE half. All round to nearest, ties to even, and give the same bits whatever the FTZ/DAZ mode.
#pragma once

#include <bit>
#include <cstdint>

namespace octet {

constexpr float kE4m3Max = 448.0f;

// Saturates: anything beyond 448, infinities included, becomes +-448. NaN becomes 0x7F.
inline uint8_t e4m3_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint8_t sign = static_cast<uint8_t>((bits >> 24) & 0x80);
  uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return 0x7F;
  if (magnitude >= 0x43E00000) return sign | 0x7E;  // 448
  if (magnitude < 0x3C800000) {                     // below 2^-6: subnormal, multiples of 2^-9
    // 16384 has an ulp of 2^-9, so the addition does the rounding, and a carry yields the smallest normal number.
    const float shifted = std::bit_cast<float>(magnitude) + 16384.0f;
    return sign | static_cast<uint8_t>(std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(16384.0f));
  }
  magnitude += 0x7FFFF + ((magnitude >> 20) & 1);
  return sign | static_cast<uint8_t>((magnitude >> 20) - (120 << 3));
}

inline float float_from_e4m3(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80) << 24;
  const uint32_t magnitude = code & 0x7F;
  if (magnitude == 0x7F) return std::bit_cast<float>(sign | 0x7FC00000);
  if (magnitude < 8) {
    const float value = static_cast<float>(magnitude) * 0.001953125f;  // 2^-9
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
  }
  return std::bit_cast<float>(sign | ((magnitude + (120 << 3)) << 20));
}

inline uint16_t bf16_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float float_from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline float float_from_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7FFF;
  if (magnitude >= 0x7C00) return std::bit_cast<float>(sign | 0x7F800000 | ((magnitude & 0x3FF) << 13));
  if (magnitude < 0x400) {
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
  }
  return std::bit_cast<float>(sign | ((magnitude + (112 << 10)) << 13));
}

}  // namespace octet
