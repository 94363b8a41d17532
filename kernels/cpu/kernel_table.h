// KernelTable: the inner loops of the CPU back end, one table per instruction family, all with equal bits.
//
// The kernels are single-threaded, know nothing of tensors or threads, and get plain pointers: their sources are built
// with flags of one instruction set, so nothing they include may define code that other sources could share. They run
// with denormals flushed (FlushDenormals). This file is part of that bargain: plain data only.
#pragma once

#include <stdint.h>

namespace octet {
enum class Isa : uint8_t;
}

namespace octet::cpu {

constexpr int kMaxTileRows = 12;
constexpr int kMaxTreeDepth = 16;  // operands on the stack of a sum program: enough for 2^15 slices

// An activation pair is one dword of two BF16 values (even, odd) or, where the kernel multiplies in FP32, two floats
// (odd, even). A tile of rows is packed as [pairs][rows].
enum class PairFormat : uint8_t { kBf16, kF32 };

// acc[panel][row][32] (+)= dots of packed rows with packed panels, over `pairs` K pairs.
struct DotTile {
  const void* x;                  // [pairs][rows]
  int rows;                       // 1..tile_rows
  int panels;                     // 1..4
  const uint8_t* const* weights;  // [panels] first group of each
  const uint8_t* const* next;     // [panels] what is needed after this tile: fetched ahead, a line or two per pair
  int64_t pairs;
  float* acc;  // [panels][acc_stride], of which [rows][32]
  int64_t acc_stride;
  bool accumulate;  // or start from zero
};

// leaf = acc * weight_scale[column] * x_scale[row]; out = lefts[n-1] + ... (lefts[0] + leaf): a slice's partial result
// and the tree nodes that it completes.
struct FinishTile {
  const float* acc;  // [rows][32]
  int rows;
  int columns;                // valid ones, 1..32
  const float* weight_scale;  // [columns], or null
  const float* x_scale;       // [rows] at x_scale_stride, or null
  int64_t x_scale_stride;
  const float* const* lefts;  // each [rows][32]
  int left_count;
  float* out;  // [rows] at out_stride
  int64_t out_stride;
};

// One KV head's part of one chunk of positions, for a tile of query rows.
struct AttendChunk {
  const void* q;                        // [head_dim / 2][rows], as the table's attend_format
  int rows;                             // 1..attend_rows
  const int32_t* valid;                 // [rows] positions of the chunk that a row reads, 0..256, never falling
  const uint16_t* const* key_blocks;    // [head_dim / 2][16][2] each
  const uint16_t* const* value_blocks;  // [16][head_dim] each
  int head_dim;
  float scale;
  float* scores;  // [rows][256] scratch
  float* max;     // [rows] results; rows with no valid position are left alone
  float* sum;     // [rows]
  float* acc;     // [rows][head_dim]
};

struct KernelTable {
  // ---- Dots
  int tile_rows;    // most rows of a tile
  int direct_rows;  // up to so many rows the dots read packed weights; beyond, expanded ones
  PairFormat (*direct_format)(int rows);
  int (*panels_at_once)(int rows);  // panels that the direct dots read side by side
  PairFormat expanded_format;
  void (*pack_pairs)(const uint16_t* const* rows, int count, int64_t pairs, PairFormat format, void* out);
  void (*decode_e4m3)(const uint8_t* codes, int64_t count, uint16_t* out);  // to BF16
  void (*dot_bf16)(const DotTile& tile);
  void (*dot_fp8)(const DotTile& tile);
  // Rewrites groups of one panel as FP32 (or, where dots are best in BF16, as BF16) for dot_expanded.
  int expanded_group;  // bytes
  void (*expand_bf16)(const uint8_t* weights, int64_t pairs, void* out);
  void (*expand_fp8)(const uint8_t* weights, int64_t pairs, void* out);
  void (*dot_expanded)(const DotTile& tile);
  void (*finish)(const FinishTile& tile);

  // ---- Rows
  void (*quantize_group)(const uint16_t* x, int64_t n, bool dynamic, float upper_bound, float static_scale,
                         uint8_t* codes, float* scale);
  void (*rms_norm_row)(const uint16_t* x, const float* weight, int64_t n, float eps, uint16_t* out);
  void (*silu_mul)(const float* gate, const float* up, int64_t n, uint16_t* out);
  void (*add_tree_sum)(const float* const* pieces, const int* program, int program_length, int64_t n,
                       uint16_t* residual);
  void (*softmax_part)(const float* x, int64_t n, float* max, float* sum);
  void (*rope_head)(const float* x, const float* cos_sin, int head_dim, uint16_t* out);
  void (*to_bf16)(const float* x, int64_t n, uint16_t* out);
  void (*exp)(const float* x, int64_t n, float* out);

  // ---- Attention
  int attend_rows;
  PairFormat (*attend_format)(int rows);
  void (*attend_chunk)(const AttendChunk& chunk);
  // Merges (max, sum, acc) of the next chunk into the running one.
  void (*merge_partials)(float* max, float* sum, float* acc, float next_max, float next_sum, const float* next_acc,
                         int head_dim);
  void (*finish_attention)(float sum, const float* acc, int head_dim, uint16_t* out);

  // ---- Calibration
  uint64_t (*read_all)(const void* data, int64_t bytes);  // a checksum, so that no read can be left out
  double (*peak_dots)(int64_t rounds);                    // runs the family's fastest dot; returns its FLOPs
};

// REQUIRES: runs_here(isa).
const KernelTable& kernels_for(Isa isa);

const KernelTable& portable_kernels();
#if defined(__x86_64__)
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
// Both of its flavours, for tests: which one avx512_kernels() is depends on the machine.
enum class Avx512Dots : uint8_t { kBf16, kFp32 };
const KernelTable& avx512_kernels(Avx512Dots dots);
#endif

}  // namespace octet::cpu
