// Sixteen FP32 lanes as two ymm registers (AVX2, FMA). See lanes_portable.h for what each function means.
// Only kernels_avx2.cc includes this; everything has internal linkage.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace octet::cpu {
namespace {

struct Lanes {
  __m256 a, b;
};
struct Pairs {
  __m256i a, b;
};

inline Lanes zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes splat(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Lanes x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline Lanes load_first(const float* p, int n) {
  alignas(32) float all[16] = {};
  __builtin_memcpy(all, p, n * sizeof(float));
  return load(all);
}
inline void store_first(float* p, Lanes x, int n) {
  alignas(32) float all[16];
  store(all, x);
  __builtin_memcpy(p, all, n * sizeof(float));
}
inline Lanes add(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Lanes sub(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Lanes mul(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Lanes div(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Lanes fma(Lanes x, Lanes y, Lanes z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Lanes max_of(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Lanes min_of(Lanes x, Lanes y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Lanes keep_first(Lanes x, int n, float fill) {
  const __m256i index = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256 a = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), index));
  const __m256 b = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), index));
  const __m256 other = _mm256_set1_ps(fill);
  return {_mm256_blendv_ps(other, x.a, a), _mm256_blendv_ps(other, x.b, b)};
}
inline float root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

inline __m256 larger_magnitude(__m256 a, __m256 b) {
  const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(b), _mm256_set1_epi32(0x7FFFFFFF));
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), magnitude));
}
inline Lanes larger_magnitude(Lanes x, Lanes y) { return {larger_magnitude(x.a, y.a), larger_magnitude(x.b, y.b)}; }

inline __m256 power_of_two(__m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline Lanes power_of_two(Lanes n) { return {power_of_two(n.a), power_of_two(n.b)}; }

inline void load_interleaved(const float* p, __m256& even, __m256& odd) {
  const __m256 low = _mm256_loadu_ps(p);
  const __m256 high = _mm256_loadu_ps(p + 8);
  const __m256 evens = _mm256_shuffle_ps(low, high, 0x88);  // 0 2 8 10 | 4 6 12 14
  const __m256 odds = _mm256_shuffle_ps(low, high, 0xDD);
  even = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(evens), 0xD8));
  odd = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odds), 0xD8));
}
inline void load_interleaved(const float* p, Lanes& even, Lanes& odd) {
  load_interleaved(p, even.a, odd.a);
  load_interleaved(p + 16, even.b, odd.b);
}

inline __m256 widen(__m128i bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16)); }
inline Lanes load_bf16(const uint16_t* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline Lanes load_bf16_first(const uint16_t* p, int n) {
  alignas(32) uint16_t all[16] = {};
  __builtin_memcpy(all, p, n * sizeof(uint16_t));
  return load_bf16(all);
}

// The 16-bit results in the low halves of the dwords.
inline __m256i round_to_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i tie = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), tie), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
}
inline void store_bf16(uint16_t* p, Lanes x) {
  const __m256i packed = _mm256_packus_epi32(round_to_bf16(x.a), round_to_bf16(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
}
inline void store_bf16_first(uint16_t* p, Lanes x, int n) {
  alignas(32) uint16_t all[16];
  store_bf16(all, x);
  __builtin_memcpy(p, all, n * sizeof(uint16_t));
}

inline __m256i encode_e4m3(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
  const __m256i tie = _mm256_and_si256(_mm256_srli_epi32(magnitude, 20), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(magnitude, _mm256_set1_epi32(0x7FFFF)), tie);
  const __m256i normal = _mm256_sub_epi32(_mm256_srli_epi32(rounded, 20), _mm256_set1_epi32(120 << 3));
  const __m256i shifted = _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(16384.0f)));
  const __m256i subnormal = _mm256_sub_epi32(shifted, _mm256_set1_epi32(0x46800000));
  const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3C800000), magnitude);
  const __m256i large = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x43DFFFFF));
  const __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
  __m256i code = _mm256_blendv_epi8(normal, subnormal, small);
  code = _mm256_blendv_epi8(code, _mm256_set1_epi32(0x7E), large);
  code = _mm256_or_si256(code, sign);
  return _mm256_blendv_epi8(code, _mm256_set1_epi32(0x7F), nan);
}
inline void store_e4m3_first(uint8_t* p, Lanes x, int n) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(encode_e4m3(x.a), encode_e4m3(x.b)), 0xD8);
  const __m128i codes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  alignas(16) uint8_t all[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(all), codes);
  __builtin_memcpy(p, all, n);
}

inline Pairs load_pairs(const void* p) {
  const __m256i* v = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
}
inline void store_pairs(void* p, Pairs x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, x.b);
}
inline __m256 odd_of(__m256i x) {
  return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
}
inline __m256 even_of(__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline Lanes odd_of(Pairs x) { return {odd_of(x.a), odd_of(x.b)}; }
inline Lanes even_of(Pairs x) { return {even_of(x.a), even_of(x.b)}; }

// Sixteen-entry byte tables. A code's BF16 bytes are (code >> 4) + 60 (with the sign kept) and code << 4, except for
// the eight subnormal codes, whose bytes are corrected by an exclusive or. A byte shuffle gives 0 where the index has
// bit 7 set, which adding 0x78 does to every other code.
struct Fp8Tables {
  __m256i high;
  __m256i fix_high;
  __m256i fix_low;
};
inline Fp8Tables load_fp8_tables();

inline void decode_32(const Fp8Tables& tables, const uint8_t* p, __m256i& low_half, __m256i& high_half) {
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i nibble = _mm256_set1_epi8(0x0F);
  const __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi8(0x7F));
  const __m256i subnormal = _mm256_add_epi8(magnitude, _mm256_set1_epi8(0x78));
  __m256i high = _mm256_shuffle_epi8(tables.high, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble));
  high = _mm256_xor_si256(high, _mm256_shuffle_epi8(tables.fix_high, subnormal));
  __m256i low = _mm256_andnot_si256(nibble, _mm256_slli_epi16(codes, 4));
  low = _mm256_xor_si256(low, _mm256_shuffle_epi8(tables.fix_low, subnormal));
  low_half = _mm256_unpacklo_epi8(low, high);
  high_half = _mm256_unpackhi_epi8(low, high);
}

inline void load_fp8_group(const Fp8Tables& tables, const uint8_t* p, Pairs& first, Pairs& second) {
  decode_32(tables, p, first.a, second.a);
  decode_32(tables, p + 32, first.b, second.b);
}

}  // namespace
}  // namespace octet::cpu
