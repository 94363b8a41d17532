// The AVX2 kernel table: FP32 fused multiply-adds on 16 ymm registers.
#include "kernels/cpu/lanes_avx2.h"

namespace octet::cpu {
namespace {
constexpr int kValueRows = 3;  // 12 accumulators of attention values
constexpr int kValueVectors = 2;
}  // namespace
}  // namespace octet::cpu

#include "kernels/cpu/vector_kernels.h"

namespace octet::cpu {
namespace {

inline Fp8Tables load_fp8_tables() {
  const auto twice = [](const uint8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  };
  return {twice(kE4m3Nibbles.high), twice(kE4m3Nibbles.fix_high), twice(kE4m3Nibbles.fix_low)};
}

// 12 ymm accumulators at most, so up to 3 rows of a whole panel; one row takes two panels to hide the latency.
constexpr int panels_at_once(int rows) { return rows == 1 ? 2 : 1; }

template <bool kFp8, int R, int N>
OCTET_INLINE void dot_panels(const DotTile& tile, int first) {
  if constexpr (kFp8) {
    dot_panels_fp8<Fp32Dots, R, N>(tile, first);
  } else {
    dot_panels_bf16<Fp32Dots, R, N>(tile, first);
  }
}

template <bool kFp8, int R>
void dot_rows(const DotTile& tile) {
  constexpr int kMost = panels_at_once(R);
  int first = 0;
  for (; tile.panels - first >= kMost; first += kMost) dot_panels<kFp8, R, kMost>(tile, first);
  if (first < tile.panels) dot_panels<kFp8, R, 1>(tile, first);
}

template <bool kFp8>
void dot(const DotTile& tile) {
  switch (tile.rows) {
    case 1:
      return dot_rows<kFp8, 1>(tile);
    case 2:
      return dot_rows<kFp8, 2>(tile);
    case 3:
      return dot_rows<kFp8, 3>(tile);
  }
}

template <int R>
void dot_expanded_rows(const DotTile& tile) {
  for (int panel = 0; panel < tile.panels; ++panel) dot_panel_expanded<R, R <= 3 ? 2 : 1>(tile, panel);
}

void dot_expanded(const DotTile& tile) {
  switch (tile.rows) {
    case 1:
      return dot_expanded_rows<1>(tile);
    case 2:
      return dot_expanded_rows<2>(tile);
    case 3:
      return dot_expanded_rows<3>(tile);
    case 4:
      return dot_expanded_rows<4>(tile);
    case 5:
      return dot_expanded_rows<5>(tile);
    case 6:
      return dot_expanded_rows<6>(tile);
  }
}

PairFormat format_f32(int) { return PairFormat::kF32; }

template <int R>
void attend_rows(const AttendChunk& chunk) {
  score_blocks<Fp32Dots, R, R == 1 ? 4 : R <= 3 ? 2 : 1>(chunk, 0, (chunk.valid[R - 1] + 15) / 16);
  finish_chunk(chunk);
}

void attend_chunk(const AttendChunk& chunk) {
  switch (chunk.rows) {
    case 1:
      return attend_rows<1>(chunk);
    case 2:
      return attend_rows<2>(chunk);
    case 3:
      return attend_rows<3>(chunk);
    case 4:
      return attend_rows<4>(chunk);
    case 5:
      return attend_rows<5>(chunk);
    case 6:
      return attend_rows<6>(chunk);
  }
}

// ---- Calibration

// Four streams side by side, each fetched 2 KiB ahead.
uint64_t read_all(const void* data, int64_t bytes) {
  const int64_t each = bytes / 4 / 64 * 64;
  const char* const from = static_cast<const char*>(data);
  __m256i sums[4];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t at = 0; at < each; at += 64) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm_prefetch(from + i * each + at + 2048, _MM_HINT_T0);
      const __m256i* const line = reinterpret_cast<const __m256i*>(from + i * each + at);
      sums[i] = _mm256_xor_si256(sums[i], _mm256_xor_si256(_mm256_loadu_si256(line), _mm256_loadu_si256(line + 1)));
    }
  }
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
  return static_cast<uint64_t>(_mm256_extract_epi64(all, 0) ^ _mm256_extract_epi64(all, 1) ^
                               _mm256_extract_epi64(all, 2) ^ _mm256_extract_epi64(all, 3));
}

double peak_dots(int64_t rounds) {
  __m256 acc[12];
  for (__m256& a : acc) a = _mm256_setzero_ps();
  const __m256 x = _mm256_set1_ps(1.0f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (__m256& a : acc) {
      a = _mm256_fmadd_ps(x, x, a);
      asm volatile("" : "+x"(a));
    }
  }
  return static_cast<double>(rounds) * 12 * 16;
}

constexpr KernelTable kTable = {
    .tile_rows = 6,
    .direct_rows = 3,
    .direct_format = format_f32,
    .panels_at_once = panels_at_once,
    .expanded_format = PairFormat::kF32,
    .pack_pairs = pack_pairs,
    .decode_e4m3 = decode_e4m3,
    .dot_bf16 = dot<false>,
    .dot_fp8 = dot<true>,
    .expanded_group = kExpandedGroup,
    .expand_bf16 = expand_bf16,
    .expand_fp8 = expand_fp8,
    .dot_expanded = dot_expanded,
    .finish = finish_tile,
    .quantize_group = quantize_group,
    .rms_norm_row = rms_norm_row,
    .silu_mul = silu_mul_span,
    .add_tree_sum = add_tree_sum_span,
    .softmax_part = softmax_part,
    .rope_head = rope_head,
    .to_bf16 = to_bf16_span,
    .exp = exp_span,
    .attend_rows = 6,
    .attend_format = format_f32,
    .attend_chunk = attend_chunk,
    .merge_partials = merge_partials,
    .finish_attention = finish_attention,
    .read_all = read_all,
    .peak_dots = peak_dots,
};

}  // namespace

const KernelTable& avx2_kernels() { return kTable; }

}  // namespace octet::cpu
