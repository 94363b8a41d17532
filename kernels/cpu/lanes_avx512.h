// Sixteen FP32 lanes as one zmm register (AVX-512 F, BW, DQ, VL, VBMI). See lanes_portable.h for what each function
// means. Only kernels_avx512.cc includes this; everything has internal linkage.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace octet::cpu {
namespace {

using Lanes = __m512;
using Pairs = __m512i;

inline __mmask16 first_mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }

inline Lanes zeros() { return _mm512_setzero_ps(); }
inline Lanes splat(float x) { return _mm512_set1_ps(x); }
inline Lanes load(const float* p) { return _mm512_loadu_ps(p); }
inline Lanes load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_mask(n), p); }
inline void store(float* p, Lanes x) { _mm512_storeu_ps(p, x); }
inline void store_first(float* p, Lanes x, int n) { _mm512_mask_storeu_ps(p, first_mask(n), x); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes sub(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
inline Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
inline Lanes div(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes max_of(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes min_of(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
inline Lanes keep_first(Lanes x, int n, float fill) { return _mm512_mask_mov_ps(splat(fill), first_mask(n), x); }
inline float root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

inline Lanes larger_magnitude(Lanes a, Lanes b) {
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(b), _mm512_set1_epi32(0x7FFFFFFF));
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), magnitude));
}

inline Lanes power_of_two(Lanes n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

inline void load_interleaved(const float* p, Lanes& even, Lanes& odd) {
  const __m512i first = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const Lanes low = load(p);
  const Lanes high = load(p + 16);
  even = _mm512_permutex2var_ps(low, first, high);
  odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(first, _mm512_set1_epi32(1)), high);
}

inline Lanes widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }
inline Lanes load_bf16(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Lanes load_bf16_first(const uint16_t* p, int n) { return widen(_mm256_maskz_loadu_epi16(first_mask(n), p)); }

inline __m256i round_to_bf16(Lanes x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i tie = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), tie), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}
inline void store_bf16(uint16_t* p, Lanes x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(x)); }
inline void store_bf16_first(uint16_t* p, Lanes x, int n) {
  _mm256_mask_storeu_epi16(p, first_mask(n), round_to_bf16(x));
}

inline void store_e4m3_first(uint8_t* p, Lanes x, int n) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
  const __m512i tie = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(magnitude, _mm512_set1_epi32(0x7FFFF)), tie);
  const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(rounded, 20), _mm512_set1_epi32(120 << 3));
  const __m512i shifted = _mm512_castps_si512(add(_mm512_castsi512_ps(magnitude), splat(16384.0f)));
  const __m512i subnormal = _mm512_sub_epi32(shifted, _mm512_set1_epi32(0x46800000));
  const __mmask16 small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x3C800000));
  const __mmask16 large = _mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(0x43E00000));
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
  __m512i code = _mm512_mask_mov_epi32(normal, small, subnormal);
  code = _mm512_mask_mov_epi32(code, large, _mm512_set1_epi32(0x7E));
  code = _mm512_or_si512(code, sign);
  code = _mm512_mask_mov_epi32(code, nan, _mm512_set1_epi32(0x7F));
  _mm_mask_storeu_epi8(p, first_mask(n), _mm512_cvtepi32_epi8(code));
}

inline Pairs load_pairs(const void* p) { return _mm512_loadu_si512(p); }
inline void store_pairs(void* p, Pairs x) { _mm512_storeu_si512(p, x); }
inline Lanes odd_of(Pairs x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
}
inline Lanes even_of(Pairs x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }

// High and low bytes of the BF16 values of the 128 codes without sign.
struct Fp8Tables {
  __m512i high[2];
  __m512i low[2];
};

inline Fp8Tables load_fp8_tables();

inline void load_fp8_group(const Fp8Tables& tables, const uint8_t* p, Pairs& first, Pairs& second) {
  const __m512i codes = _mm512_loadu_si512(p);
  const __m512i magnitude_high = _mm512_permutex2var_epi8(tables.high[0], codes, tables.high[1]);
  const __m512i low = _mm512_permutex2var_epi8(tables.low[0], codes, tables.low[1]);
  // magnitude_high | (codes & 0x80)
  const __m512i high =
      _mm512_ternarylogic_epi32(magnitude_high, codes, _mm512_set1_epi8(static_cast<char>(0x80)), 0xF8);
  first = _mm512_unpacklo_epi8(low, high);
  second = _mm512_unpackhi_epi8(low, high);
}

}  // namespace
}  // namespace octet::cpu
