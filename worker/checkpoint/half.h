// IEEE half precision to FP32, bit for bit. Files store it (weights, scales, GGUF blocks); nothing computes in it.
#pragma once

#include <bit>
#include <cstdint>

namespace octet {

inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7FFF;
  if (magnitude >= 0x7C00) return std::bit_cast<float>(sign | 0x7F800000 | ((magnitude & 0x3FF) << 13));
  if (magnitude >= 0x400) return std::bit_cast<float>(sign | ((magnitude + (112 << 10)) << 13));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(subnormal));
}

}  // namespace octet
