// The BF16 values of all e4m3 codes, and tables of their bytes, made by the compiler. Internal linkage throughout.
#pragma once

#include <stdint.h>

namespace octet::cpu {
namespace {

// Every e4m3 value is a BF16 value: the mantissa grows from 3 to 7 bits, the exponent's bias from 7 to 127.
constexpr uint16_t bf16_of_e4m3(unsigned code) {
  const unsigned sign = (code & 0x80) << 8;
  unsigned magnitude = code & 0x7F;
  if (magnitude == 0) return static_cast<uint16_t>(sign);
  if (magnitude == 0x7F) return static_cast<uint16_t>(sign | 0x7FC0);
  if (magnitude >= 8) return static_cast<uint16_t>(sign | ((magnitude << 4) + (120 << 7)));
  unsigned exponent = 121;  // magnitude / 8 * 2^-6
  while (magnitude < 8) {
    magnitude <<= 1;
    --exponent;
  }
  return static_cast<uint16_t>(sign | exponent << 7 | (magnitude & 7) << 4);
}

struct Bf16OfE4m3 {
  uint16_t v[256];
};
constexpr Bf16OfE4m3 make_bf16_of_e4m3() {
  Bf16OfE4m3 table{};
  for (unsigned code = 0; code < 256; ++code) table.v[code] = bf16_of_e4m3(code);
  return table;
}
constexpr Bf16OfE4m3 kBf16OfE4m3 = make_bf16_of_e4m3();

// High and low bytes of the values of codes 0..127.
struct alignas(64) E4m3Bytes {
  uint8_t high[128];
  uint8_t low[128];
};
constexpr E4m3Bytes make_e4m3_bytes() {
  E4m3Bytes bytes{};
  for (unsigned code = 0; code < 128; ++code) {
    bytes.high[code] = static_cast<uint8_t>(bf16_of_e4m3(code) >> 8);
    bytes.low[code] = static_cast<uint8_t>(bf16_of_e4m3(code));
  }
  return bytes;
}
constexpr E4m3Bytes kE4m3Bytes = make_e4m3_bytes();

// The same in tables of sixteen: the high byte by sign and upper three bits as if no code were subnormal, and what the
// eight subnormal codes (indices 8..15) differ by. See lanes_avx2.h.
struct alignas(16) E4m3Nibbles {
  uint8_t high[16];
  uint8_t fix_high[16];
  uint8_t fix_low[16];
};
constexpr E4m3Nibbles make_e4m3_nibbles() {
  E4m3Nibbles table{};
  for (unsigned i = 0; i < 16; ++i) table.high[i] = static_cast<uint8_t>((i & 8) << 4 | (60 + (i & 7)));
  for (unsigned code = 0; code < 8; ++code) {
    table.fix_high[8 + code] = static_cast<uint8_t>(60 ^ bf16_of_e4m3(code) >> 8);
    table.fix_low[8 + code] = static_cast<uint8_t>((code << 4 ^ bf16_of_e4m3(code)) & 0xFF);
  }
  return table;
}
constexpr E4m3Nibbles kE4m3Nibbles = make_e4m3_nibbles();

}  // namespace
}  // namespace octet::cpu
