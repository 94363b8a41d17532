// Sixteen FP32 lanes as an array, in plain C++: the meaning of every lane function, and the fallback of last resort.
// Only kernels_portable.cc includes this; everything has internal linkage.
#pragma once

#include <stdint.h>

#include "kernels/cpu/packed.h"

namespace octet::cpu {
namespace {

struct Lanes {
  float v[16];
};
// Sixteen dwords of two BF16 values, the even element in the low half.
struct Pairs {
  uint32_t v[16];
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline Lanes splat(float x) {
  Lanes out;
  for (float& lane : out.v) lane = x;
  return out;
}
inline Lanes zeros() { return splat(0.0f); }
// The first n lanes from memory, zero in the others.
inline Lanes load_first(const float* p, int n) {
  Lanes out = zeros();
  for (int i = 0; i < n; ++i) out.v[i] = p[i];
  return out;
}
inline Lanes load(const float* p) { return load_first(p, 16); }
inline void store_first(float* p, const Lanes& x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x.v[i];
}
inline void store(float* p, const Lanes& x) { store_first(p, x, 16); }

inline Lanes add(const Lanes& a, const Lanes& b) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] + b.v[i];
  return out;
}
inline Lanes sub(const Lanes& a, const Lanes& b) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] - b.v[i];
  return out;
}
inline Lanes mul(const Lanes& a, const Lanes& b) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] * b.v[i];
  return out;
}
inline Lanes div(const Lanes& a, const Lanes& b) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] / b.v[i];
  return out;
}
// a * b + c, rounded once.
inline Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return out;
}
// The second operand where either is NaN, as x86's instructions have it.
inline Lanes max_of(const Lanes& a, const Lanes& b) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return out;
}
inline Lanes min_of(const Lanes& a, const Lanes& b) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return out;
}
inline Lanes keep_first(const Lanes& x, int n, float fill) {
  Lanes out = splat(fill);
  for (int i = 0; i < n; ++i) out.v[i] = x.v[i];
  return out;
}
inline float root(float x) { return __builtin_sqrtf(x); }

// max(a, |b|), compared as bits: a NaN is larger than everything and stays.
inline Lanes larger_magnitude(const Lanes& a, const Lanes& b) {
  Lanes out;
  for (int i = 0; i < 16; ++i) {
    const uint32_t magnitude = bits_of(b.v[i]) & 0x7FFFFFFF;
    out.v[i] = float_of(bits_of(a.v[i]) > magnitude ? bits_of(a.v[i]) : magnitude);
  }
  return out;
}

// 2^n of whole numbers in [-126, 127]; anything for NaN.
inline Lanes power_of_two(const Lanes& n) {
  Lanes out;
  for (int i = 0; i < 16; ++i) {
    const float lane = n.v[i];
    const int32_t exponent = lane == lane ? static_cast<int32_t>(lane) : 0;
    out.v[i] = float_of(static_cast<uint32_t>(exponent + 127) << 23);
  }
  return out;
}

// 32 floats, alternating.
inline void load_interleaved(const float* p, Lanes& even, Lanes& odd) {
  for (int i = 0; i < 16; ++i) {
    even.v[i] = p[2 * i];
    odd.v[i] = p[2 * i + 1];
  }
}

inline Lanes load_bf16_first(const uint16_t* p, int n) {
  Lanes out = zeros();
  for (int i = 0; i < n; ++i) out.v[i] = float_of(static_cast<uint32_t>(p[i]) << 16);
  return out;
}
inline Lanes load_bf16(const uint16_t* p) { return load_bf16_first(p, 16); }

// To the nearest, ties to even; NaN made quiet.
inline void store_bf16_first(uint16_t* p, const Lanes& x, int n) {
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(x.v[i]);
    const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    p[i] = static_cast<uint16_t>(nan ? bits >> 16 | 0x40 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}
inline void store_bf16(uint16_t* p, const Lanes& x) { store_bf16_first(p, x, 16); }

// As float_to_e4m3() in kernels/fp8.h.
inline void store_e4m3_first(uint8_t* p, const Lanes& x, int n) {
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(x.v[i]);
    const uint32_t sign = bits >> 24 & 0x80;
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    uint32_t code;
    if (magnitude >= 0x43E00000) {
      code = 0x7E;
    } else if (magnitude >= 0x3C800000) {
      code = ((magnitude + 0x7FFFF + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    } else {
      code = bits_of(float_of(magnitude) + 16384.0f) - 0x46800000;
    }
    p[i] = static_cast<uint8_t>(magnitude > 0x7F800000 ? 0x7F : code | sign);
  }
}

inline Pairs load_pairs(const void* p) {
  Pairs out;
  __builtin_memcpy(out.v, p, sizeof(out.v));
  return out;
}
inline void store_pairs(void* p, const Pairs& x) { __builtin_memcpy(p, x.v, sizeof(x.v)); }
inline Lanes odd_of(const Pairs& x) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = float_of(x.v[i] & 0xFFFF0000);
  return out;
}
inline Lanes even_of(const Pairs& x) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = float_of(x.v[i] << 16);
  return out;
}

struct Fp8Tables {
  const uint16_t* bf16;  // of all 256 codes
};
inline Fp8Tables load_fp8_tables();

// One group of packed.h as the two 16-dword vectors of a BF16 group.
inline void load_fp8_group(const Fp8Tables& tables, const uint8_t* p, Pairs& first, Pairs& second) {
  for (int row = 0; row < kPanel; ++row) {
    const uint8_t* const codes = p + fp8_offset(row);
    const uint32_t pair = tables.bf16[codes[0]] | static_cast<uint32_t>(tables.bf16[codes[1]]) << 16;
    (row < 16 ? first : second).v[row % 16] = pair;
  }
}

}  // namespace
}  // namespace octet::cpu
