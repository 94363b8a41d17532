// The AVX-512 kernel table, in two flavours with equal bits: dots by the BF16 dot instruction, or by FP32 fused
// multiply-adds. Which is faster differs by a factor of two either way between makers, so the machine is asked once.
#include "kernels/cpu/lanes_avx512.h"

namespace octet::cpu {
namespace {
constexpr int kValueRows = 6;  // 24 accumulators of attention values
constexpr int kValueVectors = 4;
}  // namespace
}  // namespace octet::cpu

#include "kernels/cpu/vector_kernels.h"

namespace octet::cpu {
namespace {

inline Fp8Tables load_fp8_tables() {
  return {{_mm512_load_si512(kE4m3Bytes.high), _mm512_load_si512(kE4m3Bytes.high + 64)},
          {_mm512_load_si512(kE4m3Bytes.low), _mm512_load_si512(kE4m3Bytes.low + 64)}};
}

// Dots of BF16 pairs by one instruction: the odd product is added first, denormals are flushed, MXCSR is ignored.
struct Bf16Dots {
  static constexpr PairFormat kFormat = PairFormat::kBf16;

  template <int R, int P, typename Source>
  static OCTET_INLINE void run(const Source& source, const void* packed, int64_t pairs, Lanes (&acc)[R][P]) {
    const int32_t* x = static_cast<const int32_t*>(packed);
    for (int64_t k = 0; k < pairs; ++k, x += R) {
      Pairs w[P];
      source.load(k, w);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(x[r]));
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          acc[r][p] = _mm512_dpbf16_ps(acc[r][p], pair, reinterpret_cast<__m512bh>(w[p]));
        }
      }
    }
  }
};

// With few rows the FP32 form would spend its time on widening weights.
constexpr int kFirstFp32Rows = 3;

template <bool kFp32, int R>
struct DotsFor {
  using Type = Bf16Dots;
};
template <int R>
requires(R >= kFirstFp32Rows) struct DotsFor<true, R> {
  using Type = Fp32Dots;
};

// 24 accumulators: panels of two vectors each.
constexpr int panels_at_once(int rows) { return rows <= 3 ? 4 : 12 / rows; }

template <bool kFp32, bool kFp8, int R, int N>
OCTET_INLINE void dot_panels(const DotTile& tile, int first) {
  using Dots = typename DotsFor<kFp32, R>::Type;
  if constexpr (kFp8) {
    dot_panels_fp8<Dots, R, N>(tile, first);
  } else {
    dot_panels_bf16<Dots, R, N>(tile, first);
  }
}

template <bool kFp32, bool kFp8, int R>
void dot_rows(const DotTile& tile) {
  constexpr int kMost = panels_at_once(R);
  int first = 0;
  for (; tile.panels - first >= kMost; first += kMost) dot_panels<kFp32, kFp8, R, kMost>(tile, first);
  const int rest = tile.panels - first;
  if constexpr (kMost > 3) {
    if (rest == 3) return dot_panels<kFp32, kFp8, R, 3>(tile, first);
  }
  if constexpr (kMost > 2) {
    if (rest == 2) return dot_panels<kFp32, kFp8, R, 2>(tile, first);
  }
  if (rest == 1) dot_panels<kFp32, kFp8, R, 1>(tile, first);
}

template <bool kFp32, bool kFp8>
void dot(const DotTile& tile) {
  switch (tile.rows) {
    case 1:
      return dot_rows<kFp32, kFp8, 1>(tile);
    case 2:
      return dot_rows<kFp32, kFp8, 2>(tile);
    case 3:
      return dot_rows<kFp32, kFp8, 3>(tile);
    case 4:
      return dot_rows<kFp32, kFp8, 4>(tile);
    case 5:
      return dot_rows<kFp32, kFp8, 5>(tile);
    case 6:
      return dot_rows<kFp32, kFp8, 6>(tile);
    case 7:
      return dot_rows<kFp32, kFp8, 7>(tile);
    case 8:
      return dot_rows<kFp32, kFp8, 8>(tile);
    case 9:
      return dot_rows<kFp32, kFp8, 9>(tile);
    case 10:
      return dot_rows<kFp32, kFp8, 10>(tile);
    case 11:
      return dot_rows<kFp32, kFp8, 11>(tile);
    case 12:
      return dot_rows<kFp32, kFp8, 12>(tile);
  }
}

template <int R>
void dot_expanded_rows(const DotTile& tile) {
  for (int panel = 0; panel < tile.panels; ++panel) dot_panel_expanded<R, 2>(tile, panel);
}

void dot_expanded_fp32(const DotTile& tile) {
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
    case 7:
      return dot_expanded_rows<7>(tile);
    case 8:
      return dot_expanded_rows<8>(tile);
    case 9:
      return dot_expanded_rows<9>(tile);
    case 10:
      return dot_expanded_rows<10>(tile);
    case 11:
      return dot_expanded_rows<11>(tile);
    case 12:
      return dot_expanded_rows<12>(tile);
  }
}

// The BF16 flavour expands FP8 groups to BF16 groups.
void expand_fp8_to_bf16(const uint8_t* weights, int64_t pairs, void* out) {
  const Fp8Tables tables = load_fp8_tables();
  uint8_t* const to = static_cast<uint8_t*>(out);
  for (int64_t k = 0; k < pairs; ++k) {
    Pairs first, second;
    load_fp8_group(tables, weights + k * kFp8Group, first, second);
    store_pairs(to + k * kBf16Group, first);
    store_pairs(to + k * kBf16Group + 64, second);
  }
}

PairFormat format_bf16(int) { return PairFormat::kBf16; }
PairFormat format_by_rows(int rows) { return rows >= kFirstFp32Rows ? PairFormat::kF32 : PairFormat::kBf16; }

constexpr int vectors_at_once(int rows) { return rows <= 3 ? 8 : rows <= 6 ? 4 : 2; }

template <bool kFp32, int R>
void attend_rows(const AttendChunk& chunk) {
  score_blocks<typename DotsFor<kFp32, R>::Type, R, vectors_at_once(R)>(chunk, 0, (chunk.valid[R - 1] + 15) / 16);
  finish_chunk(chunk);
}

template <bool kFp32>
void attend_chunk(const AttendChunk& chunk) {
  switch (chunk.rows) {
    case 1:
      return attend_rows<kFp32, 1>(chunk);
    case 2:
      return attend_rows<kFp32, 2>(chunk);
    case 3:
      return attend_rows<kFp32, 3>(chunk);
    case 4:
      return attend_rows<kFp32, 4>(chunk);
    case 5:
      return attend_rows<kFp32, 5>(chunk);
    case 6:
      return attend_rows<kFp32, 6>(chunk);
    case 7:
      return attend_rows<kFp32, 7>(chunk);
    case 8:
      return attend_rows<kFp32, 8>(chunk);
    case 9:
      return attend_rows<kFp32, 9>(chunk);
    case 10:
      return attend_rows<kFp32, 10>(chunk);
    case 11:
      return attend_rows<kFp32, 11>(chunk);
    case 12:
      return attend_rows<kFp32, 12>(chunk);
  }
}

// ---- Calibration

// Four streams side by side, each fetched 2 KiB ahead, as the dots of one row read four panels.
uint64_t read_all(const void* data, int64_t bytes) {
  const int64_t each = bytes / 4 / 64 * 64;
  const char* const from = static_cast<const char*>(data);
  __m512i sums[4];
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t at = 0; at < each; at += 64) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm_prefetch(from + i * each + at + 2048, _MM_HINT_T0);
      sums[i] = _mm512_xor_si512(sums[i], _mm512_loadu_si512(from + i * each + at));
    }
  }
  uint64_t words[8];
  _mm512_storeu_si512(words, _mm512_xor_si512(_mm512_xor_si512(sums[0], sums[1]), _mm512_xor_si512(sums[2], sums[3])));
  for (int i = 1; i < 8; ++i) words[0] ^= words[i];
  return words[0];
}

// Twelve independent accumulators hide the latency; the empty asm keeps each of them alive and in a register.
double peak_bf16(int64_t rounds) {
  Lanes acc[12];
  for (Lanes& a : acc) a = zeros();
  const __m512bh x = reinterpret_cast<__m512bh>(_mm512_setzero_si512());
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (Lanes& a : acc) {
      a = _mm512_dpbf16_ps(a, x, x);
      asm volatile("" : "+v"(a));
    }
  }
  return static_cast<double>(rounds) * 12 * 64;
}

double peak_fp32(int64_t rounds) {
  Lanes acc[12];
  for (Lanes& a : acc) a = zeros();
  const Lanes x = splat(1.0f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (Lanes& a : acc) {
      a = fma(x, x, a);
      asm volatile("" : "+v"(a));
    }
  }
  return static_cast<double>(rounds) * 12 * 32;
}

template <bool kFp32>
constexpr KernelTable make_table() {
  return {
      .tile_rows = 12,
      .direct_rows = 12,
      .direct_format = kFp32 ? format_by_rows : format_bf16,
      .panels_at_once = panels_at_once,
      .expanded_format = kFp32 ? PairFormat::kF32 : PairFormat::kBf16,
      .pack_pairs = pack_pairs,
      .decode_e4m3 = decode_e4m3,
      .dot_bf16 = dot<kFp32, false>,
      .dot_fp8 = dot<kFp32, true>,
      .expanded_group = kFp32 ? kExpandedGroup : kBf16Group,
      .expand_bf16 = kFp32 ? expand_bf16 : nullptr,
      .expand_fp8 = kFp32 ? expand_fp8 : expand_fp8_to_bf16,
      .dot_expanded = kFp32 ? dot_expanded_fp32 : dot<false, false>,
      .finish = finish_tile,
      .quantize_group = quantize_group,
      .rms_norm_row = rms_norm_row,
      .silu_mul = silu_mul_span,
      .add_tree_sum = add_tree_sum_span,
      .softmax_part = softmax_part,
      .rope_head = rope_head,
      .to_bf16 = to_bf16_span,
      .exp = exp_span,
      .attend_rows = 12,
      .attend_format = kFp32 ? format_by_rows : format_bf16,
      .attend_chunk = attend_chunk<kFp32>,
      .merge_partials = merge_partials,
      .finish_attention = finish_attention,
      .read_all = read_all,
      .peak_dots = kFp32 ? peak_fp32 : peak_bf16,
  };
}

constexpr KernelTable kBf16Table = make_table<false>();
constexpr KernelTable kFp32Table = make_table<true>();

// Time-stamp ticks for as many FLOPs with either flavour, the best of a few tries of some microseconds each.
bool fp32_is_faster() {
  constexpr int64_t kRounds = 1000;
  uint64_t best_bf16 = ~uint64_t{0};
  uint64_t best_fp32 = ~uint64_t{0};
  for (int attempt = 0; attempt < 8; ++attempt) {
    const uint64_t start = __rdtsc();
    peak_bf16(kRounds);
    const uint64_t middle = __rdtsc();
    peak_fp32(2 * kRounds);
    const uint64_t end = __rdtsc();
    if (middle - start < best_bf16) best_bf16 = middle - start;
    if (end - middle < best_fp32) best_fp32 = end - middle;
  }
  return best_fp32 < best_bf16;
}

}  // namespace

const KernelTable& avx512_kernels(Avx512Dots dots) { return dots == Avx512Dots::kBf16 ? kBf16Table : kFp32Table; }

const KernelTable& avx512_kernels() {
  static const bool fp32 = fp32_is_faster();
  return fp32 ? kFp32Table : kBf16Table;
}

}  // namespace octet::cpu
