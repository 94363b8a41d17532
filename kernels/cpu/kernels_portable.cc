// The portable kernel table: plain C++, for machines without AVX2 and as a witness in tests. Not tuned.
#include "kernels/cpu/lanes_portable.h"

namespace octet::cpu {
namespace {
constexpr int kValueRows = 1;
constexpr int kValueVectors = 1;
}  // namespace
}  // namespace octet::cpu

#include "kernels/cpu/vector_kernels.h"

namespace octet::cpu {
namespace {

inline Fp8Tables load_fp8_tables() { return {kBf16OfE4m3.v}; }

template <bool kFp8>
void dot(const DotTile& tile) {
  for (int panel = 0; panel < tile.panels; ++panel) {
    if constexpr (kFp8) {
      dot_panels_fp8<Fp32Dots, 1, 1>(tile, panel);
    } else {
      dot_panels_bf16<Fp32Dots, 1, 1>(tile, panel);
    }
  }
}

template <int R>
void dot_expanded_rows(const DotTile& tile) {
  for (int panel = 0; panel < tile.panels; ++panel) dot_panel_expanded<R, 2>(tile, panel);
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
  }
}

int panels_at_once(int) { return 1; }
PairFormat format_f32(int) { return PairFormat::kF32; }

template <int R>
void attend_rows(const AttendChunk& chunk) {
  score_blocks<Fp32Dots, R, 1>(chunk, 0, (chunk.valid[R - 1] + 15) / 16);
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
  }
}

uint64_t read_all(const void* data, int64_t bytes) {
  const uint64_t* const from = static_cast<const uint64_t*>(data);
  uint64_t sums[4] = {};
  for (int64_t i = 0; i + 4 <= bytes / 8; i += 4) {
    for (int j = 0; j < 4; ++j) sums[j] ^= from[i + j];
  }
  return sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
}

double peak_dots(int64_t rounds) {
  Lanes acc[2] = {zeros(), zeros()};
  const Lanes x = splat(1.0f);
  for (int64_t round = 0; round < rounds; ++round) {
    for (Lanes& a : acc) a = fma(x, x, a);
    asm volatile("" : : "r"(acc) : "memory");
  }
  return static_cast<double>(rounds) * 2 * 32;
}

constexpr KernelTable kTable = {
    .tile_rows = 4,
    .direct_rows = 1,
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
    .attend_rows = 4,
    .attend_format = format_f32,
    .attend_chunk = attend_chunk,
    .merge_partials = merge_partials,
    .finish_attention = finish_attention,
    .read_all = read_all,
    .peak_dots = peak_dots,
};

}  // namespace

const KernelTable& portable_kernels() { return kTable; }

}  // namespace octet::cpu
