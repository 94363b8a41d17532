// Matrix products on tensor cores: a block computes 32, 64 or 128 tokens of 128 outputs, each of its 8 warps half the
// tokens of 32 outputs, in BF16, to which e4m3 decodes exactly and in registers. Where such tiles are too few for the
// GPU, blocks also share out K, and a second kernel adds their parts in order. From some 200 tokens on it is bound by
// the tensor cores, below by reading the weights.
//
// K passes in stages of 64 columns through a ring in shared memory, which asynchronous copies fill two stages ahead. In
// each half of a stage lane 4 g + t of a warp takes columns [8 t, 8 t + 8) of its rows, of x and of the weights alike,
// and feeds them to the tensor core as the columns that its fragments ask for (see mma.cuh): one load for four words.
#include <algorithm>

#include "kernels/cuda/arithmetic.cuh"
#include "kernels/cuda/copy_async.cuh"
#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/module.h"
#include "kernels/cuda/queue.h"

namespace octet::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kCopyBytes = 16;    // of an asynchronous copy
constexpr int kOutputs = 128;     // of a tile
constexpr int kWarpOutputs = 32;  // of a warp
constexpr int kColumns = 64;      // of a stage
constexpr int kStages = 3;        // of the ring
constexpr int kTogether = 16;     // token tiles whose blocks run side by side and share weights in the cache
constexpr int kLeastStages = 8;   // that a block which shares out K should have
constexpr int kBlocksAtOnce = 2;  // that a multiprocessor should have
constexpr int kSumThreads = 256;

struct Tiles {
  Product product;
  float* parts;  // [gridDim.y, tokens, outputs], or null: one block makes the whole sum
  int token_tiles, output_tiles;
  int stages, stages_per_part;
  int64_t x_step, weight_step;  // bytes between the rows of which a thread brings chunks
};

template <typename T>
constexpr int kRowBytes = kColumns* static_cast<int>(sizeof(T));

// Where 16-byte chunk `chunk` of row `row` of a stage lies, in bytes. Lanes that load together must find what they load
// in different banks, of 128 bytes in all: those of two rows where a half of a row in BF16 has 64 bytes, of four where
// one in e4m3 has 32. So rows that would meet have their halves the other way round.
template <typename T>
__device__ int place_of(int row, int chunk) {
  const int swapped = sizeof(T) == 2 ? (row & 1) << 2 : row & 2;
  return row * kRowBytes<T> + (chunk ^ swapped) * kCopyBytes;
}

// How many rows' chunks a block's threads bring at once.
template <typename T>
constexpr int kRowsAtOnce = kThreads* kCopyBytes / kRowBytes<T>;

// What a thread brings of kRows rows of a matrix, stage after stage: a chunk each of one or several of them. Zeros
// beyond the matrix.
template <typename T, int kRows>
class Loader {
 public:
  // Stages begin with `first_column`.
  __device__ Loader(const void* matrix, int first_row, int64_t rows, int first_column, int64_t columns) {
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    const int column = first_column + chunk * kElements;
    next_ = static_cast<const T*>(matrix) + int64_t{first_row + row} * columns + column;
    rows_left_ = row < kRows ? lesser(kRows, rows - first_row) - row : 0;
    columns_left_ = static_cast<int>(columns - column);
    brings_ = row < kRows;
  }

  // Brings the next stage's, `step` being the bytes of kRowsAtOnce rows. Asynchronously where rows are aligned for it,
  // otherwise it is there on return.
  template <bool kAsync>
  __device__ void bring(char* stage, int64_t step) {
    const int place = place_of<T>(threadIdx.x / kChunks, threadIdx.x % kChunks);
    if (kRows % kRowsAtOnce<T> == 0 || brings_) {
#pragma unroll
      for (int i = 0; i < kTimes; ++i) {
        // kRowsAtOnce is a multiple of 4, so rows that far apart have their halves in the same order.
        char* const to = stage + place + i * kRowsAtOnce<T> * kRowBytes<T>;
        const T* const from = reinterpret_cast<const T*>(reinterpret_cast<const char*>(next_) + i * step);
        const int left = i * kRowsAtOnce<T> < rows_left_ ? columns_left_ : 0;
        if constexpr (kAsync) {
          copy_async(to, from, left > 0);
        } else {
          for (int e = 0; e < kElements; ++e) reinterpret_cast<T*>(to)[e] = e < left ? from[e] : T{0};
        }
      }
    }
    next_ += kColumns;
    columns_left_ -= kColumns;
  }

 private:
  static constexpr int kElements = kCopyBytes / sizeof(T);  // of a chunk
  static constexpr int kChunks = kColumns / kElements;      // of a row
  static constexpr int kTimes = kRows < kRowsAtOnce<T> ? 1 : kRows / kRowsAtOnce<T>;

  const T* next_;
  int rows_left_, columns_left_;  // from the thread's first on
  bool brings_;                   // where there are more threads than chunks
};

// A lane's eight columns of a row and half of a stage, in BF16: the words of two fragments.
struct alignas(16) Columns {
  uint32_t words[4];
};
struct alignas(8) Codes {
  uint32_t words[2];
};

__device__ inline Columns read_columns(const char* stage, int row, int half, int t, uint16_t) {
  return *reinterpret_cast<const Columns*>(stage + place_of<uint16_t>(row, 4 * half + t));
}

__device__ inline Columns read_columns(const char* stage, int row, int half, int t, uint8_t) {
  const char* const from = stage + place_of<uint8_t>(row, 2 * half + t / 2) + t % 2 * sizeof(Codes);
  const Codes codes = *reinterpret_cast<const Codes*>(from);
  Columns columns;
  decode_e4m3(codes.words[0], columns.words[0], columns.words[1]);
  decode_e4m3(codes.words[1], columns.words[2], columns.words[3]);
  return columns;
}

template <typename X, typename W, int kTokens>
struct Stage {
  alignas(kCopyBytes) char x[kTokens * kRowBytes<X>];
  alignas(kCopyBytes) char weight[kOutputs * kRowBytes<W>];
};

// A warp's sums: fragments of 8 tokens, their columns, by 16 outputs, their rows. So decoded weights become fragments
// where they are, and x is loaded as fragments.
constexpr int kOutputTiles = kWarpOutputs / 16;
template <int kTokenTiles>
struct Sums {
  float c[kTokenTiles][kOutputTiles][4];
};

template <typename X, typename W, int kTokens, int kTokenTiles>
__device__ void multiply_stage(const Stage<X, W, kTokens>& stage, int first_token, int first_output, int lane,
                               Sums<kTokenTiles>& sums) {
  const int g = lane / 4, t = lane % 4;
  const char* const weight_rows = stage.weight + first_output * kRowBytes<W>;
  const char* const x_rows = stage.x + first_token * kRowBytes<X>;
#pragma unroll 1  // more in flight would not fit into the registers of kBlocksAtOnce blocks
  for (int half = 0; half < 2; ++half) {
    Columns upper[kOutputTiles], lower[kOutputTiles];
#pragma unroll
    for (int j = 0; j < kOutputTiles; ++j) {
      upper[j] = read_columns(weight_rows + 16 * j * kRowBytes<W>, g, half, t, W{});
      lower[j] = read_columns(weight_rows + (16 * j + 8) * kRowBytes<W>, g, half, t, W{});
    }
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      const Columns x = read_columns(x_rows + 8 * i * kRowBytes<X>, g, half, t, X{});
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const uint32_t b[2] = {x.words[k], x.words[k + 1]};
#pragma unroll
        for (int j = 0; j < kOutputTiles; ++j) {
          const uint32_t a[4] = {upper[j].words[k], lower[j].words[k], upper[j].words[k + 1], lower[j].words[k + 1]};
          mma_bf16(sums.c[i][j], a, b);
        }
      }
    }
  }
}

__device__ inline float scale_at(const float* scales, int64_t i) { return scales == nullptr ? 1.0f : scales[i]; }

// Writes a warp's sums, scaled unless they are parts of sums. A warp writes whole sectors: 8 outputs of 4 tokens.
template <int kTokenTiles>
__device__ void store(const Tiles& a, const Sums<kTokenTiles>& sums, int first_token, int first_output, int lane) {
  const Product& product = a.product;
  const bool whole = a.parts == nullptr;
  float* const out = whole ? product.out : a.parts + blockIdx.y * product.tokens * product.outputs;
  const float* const weight_scales = whole ? product.weight_scales : nullptr;
  const float* const x_scales = whole ? product.x_scales : nullptr;
  const int tokens = lesser(8 * kTokenTiles, product.tokens - first_token);
  const int outputs = lesser(kWarpOutputs, product.outputs - first_output);
  float scales[2 * kOutputTiles];
#pragma unroll
  for (int j = 0; j < 2 * kOutputTiles; ++j) {
    const int output = 8 * j + lane / 4;
    scales[j] = output < outputs ? scale_at(weight_scales, first_output + output) : 1.0f;
  }
#pragma unroll
  for (int i = 0; i < 2 * kTokenTiles; ++i) {
    const int token = i / 2 * 8 + 2 * (lane % 4) + i % 2;
    if (token < tokens) {
      const float x_scale = scale_at(x_scales, first_token + token);
      float* const row = out + int64_t{first_token + token} * product.outputs + first_output;
#pragma unroll
      for (int j = 0; j < 2 * kOutputTiles; ++j) {
        const int output = 8 * j + lane / 4;
        if (output < outputs) row[output] = sums.c[i / 2][j / 2][j % 2 * 2 + i % 2] * scales[j] * x_scale;
      }
    }
  }
}

// kAsync: rows of x and weights are aligned for asynchronous copies.
template <typename X, typename W, int kTokens, bool kAsync>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) tiles_kernel(Tiles a) {
  constexpr int kTokenTiles = kTokens / 2 / 8;
  const Product& product = a.product;
  // Blocks that run side by side have kTogether token tiles, and as many output tiles as there are blocks for.
  const int whole_group = kTogether * a.output_tiles, block = static_cast<int>(blockIdx.x);
  const int group = block / whole_group, in_group = block % whole_group;
  const int together = lesser(kTogether, a.token_tiles - group * kTogether);
  const int first_token = (group * kTogether + in_group % together) * kTokens;
  const int first_output = in_group / together * kOutputs;
  const int first_stage = static_cast<int>(blockIdx.y) * a.stages_per_part;
  const int rest = a.stages - first_stage, stages = rest < a.stages_per_part ? rest : a.stages_per_part;

  const int first_column = first_stage * kColumns;
  Loader<X, kTokens> x(product.x, first_token, product.tokens, first_column, product.columns);
  Loader<W, kOutputs> weight(product.weight, first_output, product.outputs, first_column, product.columns);
  auto* const ring = reinterpret_cast<Stage<X, W, kTokens>*>(dynamic_shared());
  const auto bring = [&](int stage) {
    if (stage < stages) {
      x.template bring<kAsync>(ring[stage % kStages].x, a.x_step);
      weight.template bring<kAsync>(ring[stage % kStages].weight, a.weight_step);
    }
    commit_copies();  // a group for each stage, there or not, so that counting groups counts stages
  };

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_token = warp / 4 * kTokens / 2, warp_output = warp % 4 * kWarpOutputs;
  Sums<kTokenTiles> sums = {};
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) bring(stage);
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the stage is there for all, and all are done with the one before it, whose place is filled next
    bring(stage + kStages - 1);
    multiply_stage(ring[stage % kStages], warp_token, warp_output, lane, sums);
  }
  store(a, sums, first_token + warp_token, first_output + warp_output, lane);
}

// One thread an output of a token; bound by reading the parts.
__global__ void add_parts_kernel(Product product, const float* parts, int count) {
  const int64_t token = blockIdx.x, output = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (output >= product.outputs) return;
  const int64_t size = product.tokens * product.outputs, at = token * product.outputs + output;
  float sum = parts[at];
  for (int part = 1; part < count; ++part) sum += parts[part * size + at];
  product.out[at] = sum * scale_at(product.weight_scales, output) * scale_at(product.x_scales, token);
}

bool rows_are_aligned(const void* matrix, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(matrix) % kCopyBytes == 0 && row_bytes % kCopyBytes == 0;
}

// Blocks that should share out the K of a tile, so that the GPU is full and their parts fit into the workspace.
int parts_of(const Queue& queue, const Product& product, int64_t tiles, int stages) {
  const int64_t fill = int64_t{kBlocksAtOnce} * queue.processors() / tiles;
  const int64_t fit = kWorkspaceBytes / (product.tokens * product.outputs * int64_t{sizeof(float)});
  return static_cast<int>(std::max<int64_t>(1, std::min({fill, fit, int64_t{stages / kLeastStages}})));
}

template <typename X, typename W, int kTokens, bool kAsync>
void run(Queue& queue, const Product& product) {
  Tiles tiles = {.product = product,
                 .parts = nullptr,
                 .token_tiles = static_cast<int>(blocks_for(product.tokens, kTokens)),
                 .output_tiles = static_cast<int>(blocks_for(product.outputs, kOutputs)),
                 .stages = static_cast<int>(blocks_for(product.columns, kColumns)),
                 .stages_per_part = 0,
                 .x_step = kRowsAtOnce<X> * product.columns * int64_t{sizeof(X)},
                 .weight_step = kRowsAtOnce<W> * product.columns * int64_t{sizeof(W)}};
  const int64_t count = int64_t{tiles.token_tiles} * tiles.output_tiles;
  tiles.stages_per_part = static_cast<int>(blocks_for(tiles.stages, parts_of(queue, product, count, tiles.stages)));
  const unsigned parts = blocks_for(tiles.stages, tiles.stages_per_part);
  if (parts > 1) tiles.parts = static_cast<float*>(queue.workspace());
  queue.launch(tiles_kernel<X, W, kTokens, kAsync>,
               {.grid = dim3(static_cast<unsigned>(count), parts),
                .block = kThreads,
                .shared_bytes = kStages * int64_t{sizeof(Stage<X, W, kTokens>)}},
               tiles);
  if (parts > 1) add_parts(queue, product, tiles.parts, static_cast<int>(parts));
}

template <typename X, typename W>
void run_for_tokens(Queue& queue, const Product& product) {
  const bool aligned = rows_are_aligned(product.x, product.columns * int64_t{sizeof(X)}) &&
                       rows_are_aligned(product.weight, product.columns * int64_t{sizeof(W)});
  if (!aligned) return run<X, W, 32, false>(queue, product);  // no model of any size has such rows
  if (product.tokens <= 32) return run<X, W, 32, true>(queue, product);
  if (product.tokens <= 64) return run<X, W, 64, true>(queue, product);
  run<X, W, 128, true>(queue, product);
}

}  // namespace

void multiply_in_tiles(Queue& queue, const Product& product) {
  const bool weight_codes = product.weight_type == DType::kF8E4M3;
  if (product.x_type == DType::kF8E4M3) return run_for_tokens<uint8_t, uint8_t>(queue, product);
  weight_codes ? run_for_tokens<uint16_t, uint8_t>(queue, product) : run_for_tokens<uint16_t, uint16_t>(queue, product);
}

void add_parts(Queue& queue, const Product& product, const float* parts, int count) {
  const dim3 blocks(static_cast<unsigned>(product.tokens), blocks_for(product.outputs, kSumThreads));
  queue.launch(add_parts_kernel, blocks, kSumThreads, product, parts, count);
}

}  // namespace octet::cuda
