// Linear layers of 1 to 16 tokens. Parallel over steps of weights (skinny_split.h): a block per multiprocessor, a range
// of steps per block; in a step, 16 rows by 128 bytes per warp. Bound by the memory that the weights lie in, so that
// all else hides behind it: a step's weights are asked for several steps ahead, across the borders of tiles and
// matrices and, where the device can, before the kernel that makes x has ended.
//
// Tensor cores multiply, with rows of weights as the rows of a and tokens as the columns of b, of which a few are
// enough here. They take K in any order as long as both sides have the same: a lane's 16 neighbouring bytes of a row of
// weights, and those of x that belong to them, are what the fragments of several multiplications are made of.
#include "kernels/cuda/skinny_linear.h"

#include <algorithm>
#include <array>
#include <bit>
#include <iterator>
#include <utility>

#include "kernels/cuda/copy_async.cuh"
#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/mma.cuh"

namespace octet::cuda {
namespace {

constexpr int kThreads = 256;
static_assert(kThreads == 32 * kSkinnyWarps);
constexpr int kPiece = 16;                                     // bytes that a lane moves at once
constexpr int kWindowPieces = kSkinnyWindowBytes / kPiece;     // of a row
constexpr int kCopies = kSkinnyStepBytes / kThreads / kPiece;  // of weights, by a thread, in a step
constexpr int kCopyRows = kSkinnyWarpRows / kCopies;           // of a warp, at once
constexpr int kMaxMatrices = 4;
// On a multiprocessor: a launch has one, and where the next one may begin early it brings another.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocksAtOnce = 1;
#else
constexpr int kBlocksAtOnce = 2;
#endif
constexpr int kPartsAtOnce = 4;  // of a tile that other blocks made

struct alignas(kPiece) Piece {
  uint32_t words[4];
};

__device__ inline Piece piece_at(const char* at) { return *reinterpret_cast<const Piece*>(at); }

enum class Operands { kBF16, kCodesByBF16, kCodes };  // weights by inputs

// Bytes of an input beside those of a weight.
constexpr int x_ratio(Operands operands) { return operands == Operands::kCodesByBF16 ? 2 : 1; }

struct Matrix {
  const char* weight;
  const float* scale;         // of rows, or null
  float* out;                 // [tokens, rows]
  int64_t rows, stored_rows;  // the latter: whole panels
  int end_tile;               // of the launch's
};

struct Job {
  const char* x;
  const float* x_scales;  // [tokens], or null
  int tokens;
  int64_t row_bytes;  // of weights
  Matrix matrices[kMaxMatrices];
  SkinnySplit split;
  uint64_t* mail;  // [ranges, tokens of the shape, rows of a tile]: letters, none at the beginning and the end
};

// ---- A sum on its way from one block to another. The word that holds it says that it is there, so that neither side
// needs a fence; who reads it empties the box for the next launch. Blocks wait only for lower ones, which have started.

constexpr uint64_t kPosted = uint64_t{1} << 32;

__device__ inline void post(uint64_t* box, float sum) {
  const uint64_t letter = kPosted | std::bit_cast<uint32_t>(sum);
#if defined(__CUDA_ARCH__)
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(box), "l"(letter) : "memory");
#else
  *box = letter;
#endif
}

// 0 while there is nothing.
__device__ inline uint64_t look(const uint64_t* box) {
#if defined(__CUDA_ARCH__)
  uint64_t letter;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(letter) : "l"(box) : "memory");
  return letter;
#else
  return *box;
#endif
}

__device__ inline float take(uint64_t* box, uint64_t letter) {
  while (letter == 0) letter = look(box);
  *box = 0;
  return std::bit_cast<float>(static_cast<uint32_t>(letter));
}

// ---- A step's multiplications

// sums += 16 rows (two pieces of weights: of row g and of row g + 8) by 8 tokens.
template <Operands kOperands>
__device__ inline void multiply(float (&sums)[4], const Piece& upper, const Piece& lower,
                                const Piece (&x)[x_ratio(kOperands)]) {
#if defined(OCTET_MULTIPLIES_E4M3)
  constexpr bool kDecodes = kOperands == Operands::kCodesByBF16;
#else
  constexpr bool kDecodes = kOperands != Operands::kBF16;
#endif
  if constexpr (kDecodes) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4], b[2];
      decode_e4m3(upper.words[i], a[0], a[2]);
      decode_e4m3(lower.words[i], a[1], a[3]);
      if constexpr (kOperands == Operands::kCodes) {
        decode_e4m3(x[0].words[i], b[0], b[1]);
      } else {
        b[0] = x[i / 2].words[i % 2 * 2];
        b[1] = x[i / 2].words[i % 2 * 2 + 1];
      }
      mma_bf16(sums, a, b);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t a[4] = {upper.words[i], lower.words[i], upper.words[i + 1], lower.words[i + 1]};
      const uint32_t b[2] = {x[0].words[i], x[0].words[i + 1]};
      if constexpr (kOperands == Operands::kBF16) mma_bf16(sums, a, b);
#if defined(OCTET_MULTIPLIES_E4M3)
      if constexpr (kOperands == Operands::kCodes) mma_e4m3(sums, a, b);
#endif
    }
  }
}

// ---- A block

template <Operands kOperands, int kRowWarps, int kTokens>
struct Block {
  static constexpr SkinnyShape kShape = {kRowWarps, kTokens};
  static constexpr int kRatio = x_ratio(kOperands);
  static constexpr int kStages = kShape.stages(kRatio);
  static constexpr int kStageBytes = static_cast<int>(kShape.stage_bytes(kRatio));
  static constexpr int kRows = static_cast<int>(kShape.rows());
  static constexpr int kStepBytes = static_cast<int>(kShape.step_bytes());
  static constexpr int kWindows = static_cast<int>(kSkinnyWarps) / kRowWarps;
  static constexpr int kColumns = (kTokens + 7) / 8;   // fragments of tokens
  static constexpr int kXBytes = kStepBytes * kRatio;  // of a token, in a step
  static constexpr int kXPieces = kXBytes / kPiece;
  static constexpr int kXCopies = (kTokens * kXPieces + kThreads - 1) / kThreads;  // by a thread, in a step
  static constexpr int kOutputs = (kRows * kTokens + kThreads - 1) / kThreads;     // of a tile, by a thread
  static_assert(kStages >= 4 && kRows * kTokens <= Queue::kMailboxWords);

  using Sums = float[kColumns][4];
  // Of the outputs that this thread finishes.
  struct Scales {
    float row[kOutputs], token[kOutputs];
  };

  // A step: of the launch and of its tile, where its tile is, and the stage of shared memory that holds it.
  struct Place {
    int step, in_tile, stage;
    const Matrix* matrix;
    int64_t first_row;
  };

  const Job& job;
  const int range;
  char* const shared = dynamic_shared();
  const uint64_t policy = read_once();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row_warp = warp / kWindows, window = warp % kWindows;

  __device__ void find_tile(Place& place) const {
    const int tile = place.step / job.split.tile_steps;
    int first = 0;
    for (place.matrix = job.matrices; tile >= place.matrix->end_tile; ++place.matrix) first = place.matrix->end_tile;
    place.first_row = int64_t{tile - first} * kRows;
  }
  __device__ Place first_place() const {
    Place place = {.step = job.split.begin(range), .in_tile = 0, .stage = 0, .matrix = nullptr, .first_row = 0};
    place.in_tile = place.step % job.split.tile_steps;
    find_tile(place);
    return place;
  }
  // REQUIRES: the step after the place is one of the range, or the place is not used again.
  __device__ void advance(Place& place, int end) const {
    ++place.step;
    if (++place.stage == kStages) place.stage = 0;
    if (++place.in_tile < job.split.tile_steps) return;
    place.in_tile = 0;
    if (place.step < end) find_tile(place);
  }

  // Pieces lie where lanes that read one column of different rows, or write different columns of one row, meet
  // different banks.
  __device__ static int at_weight(int row, int piece) { return (row * kWindowPieces + (piece ^ row % 2 * 4)) * kPiece; }
  __device__ static int at_x(int token, int piece) {
    return (token * kXPieces + (piece ^ token % 2 * (kRatio == 1 ? 4 : 1))) * kPiece;
  }
  __device__ char* weights_of(const Place& place) const {
    return shared + place.stage * kStageBytes + warp * static_cast<int>(kSkinnyWarpRows * kSkinnyWindowBytes);
  }
  __device__ char* x_of(int stage) const { return shared + stage * kStageBytes + static_cast<int>(kSkinnyStepBytes); }

  // Begins to copy a step's weights: a warp its own rows and window, whole lines of a few rows at once.
  __device__ void copy_weights(const Place& place) const {
    const int64_t column =
        int64_t{place.in_tile} * kStepBytes + window * kSkinnyWindowBytes + lane % kWindowPieces * kPiece;
    const int64_t row = place.first_row + row_warp * kSkinnyWarpRows + lane / kWindowPieces;
    const bool there = row < place.matrix->stored_rows && column < job.row_bytes;
    const char* const from = place.matrix->weight + (there ? row * job.row_bytes + column : 0);
    const int64_t stride = there ? kCopyRows * job.row_bytes : 0;
    char* const to = weights_of(place);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      stream_async(to + at_weight(kCopyRows * i + lane / kWindowPieces, lane % kWindowPieces), from + i * stride, there,
                   policy);
    }
  }

  // Calls copy(i, to, from, there) for piece i of those of a step's x that are this thread's to copy.
  template <typename CopyPiece>
  __device__ void copy_x(int stage, int in_tile, const CopyPiece& copy) const {
    const int64_t row_bytes = job.row_bytes * kRatio, first = int64_t{in_tile} * kXBytes;
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      const int at = thread + i * kThreads, token = at / kXPieces, piece = at % kXPieces;
      if (token >= job.tokens) continue;
      const int64_t column = first + piece * kPiece;
      const bool there = column < row_bytes;
      copy(i, x_of(stage) + at_x(token, piece), job.x + token * row_bytes + (there ? column : 0), there);
    }
  }

  // Copies the first steps' x at once: behind the weights that are under way, the first step would wait for the last
  // one's. All is read before anything is stored, so that it takes one way to memory and back.
  __device__ void copy_first_x(const Place& place, int steps) const {
    Piece held[kStages - 1][kXCopies] = {};
#pragma unroll
    for (int s = 0, in_tile = place.in_tile; s < kStages - 1; ++s) {
      if (s < steps) {
        copy_x(s, in_tile, [&](int i, char*, const char* from, bool there) {
          if (there) held[s][i] = piece_at(from);
        });
      }
      if (++in_tile == job.split.tile_steps) in_tile = 0;
    }
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s >= steps) break;
      copy_x(s, 0, [&](int i, char* to, const char*, bool) { *reinterpret_cast<Piece*>(to) = held[s][i]; });
    }
  }

  // Adds this warp's share of a step, summed by itself first: tensor cores keep some 14 bits of sums of e4m3 products,
  // too few for the thousands that a row has, enough for the 128 of a window.
  __device__ void compute(const Place& place, Sums& sums) const {
    const char* const weights = weights_of(place);
    const char* const x = x_of(place.stage);
    const int group = lane / 4;
    Sums of_step = {};
#pragma unroll
    for (int i = 0; i < kWindowPieces; i += 4) {
      const int piece = i + lane % 4;
      const Piece upper = piece_at(weights + at_weight(group, piece));
      const Piece lower = piece_at(weights + at_weight(group + 8, piece));
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        // Columns beyond the last token repeat it; nobody looks at their sums.
        const int column = 8 * c + group, token = column < job.tokens ? column : job.tokens - 1;
        Piece inputs[kRatio];
#pragma unroll
        for (int r = 0; r < kRatio; ++r) {
          inputs[r] = piece_at(x + at_x(token, (window * kWindowPieces + piece) * kRatio + r));
        }
        multiply<kOperands>(of_step[c], upper, lower, inputs);
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[c][i] += of_step[c][i];
    }
  }

  // Adds up what the warps have of the tile that `place`, the last step of it or of the range, is of. Whoever has the
  // tile's first step adds the other blocks' parts and writes it; the others leave theirs to that block. All threads of
  // the block call this together, and meet at a barrier between two calls.
  __device__ void finish(const Place& place, const Sums& sums, const Scales& scales) const {
    __shared__ float board[kWindows][8 * kColumns][kRows];
    static_assert(kStages * kStageBytes + sizeof(board) <= kSkinnySharedBytes);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        board[window][8 * c + lane % 4 * 2 + i % 2][row_warp * kSkinnyWarpRows + lane / 4 + i / 2 * 8] = sums[c][i];
      }
    }
    __syncthreads();
    float totals[kOutputs] = {};
    for_outputs([&](int i, int token, int row) {
      totals[i] = board[0][token][row];
#pragma unroll
      for (int w = 1; w < kWindows; ++w) totals[i] += board[w][token][row];
    });
    const int tile_begin = place.step - place.in_tile;
    if (job.split.begin(range) > tile_begin) {
      for_outputs([&](int i, int token, int row) { post(box(range, token, row), totals[i]); });
      return;
    }
    add_parts(tile_begin + job.split.tile_steps, totals);
    const Matrix& matrix = *place.matrix;
    for_outputs([&](int i, int token, int row) {
      const int64_t output = place.first_row + row;
      if (output >= matrix.rows) return;
      matrix.out[token * matrix.rows + output] = totals[i] * scales.row[i] * scales.token[i];
    });
  }

  // REQUIRES: the place is of the tile that is finished next.
  __device__ void read_row_scales(const Place& place, Scales& scales) const {
    const Matrix& matrix = *place.matrix;
    for_outputs([&](int i, int, int row) {
      const int64_t output = place.first_row + row;
      scales.row[i] = matrix.scale != nullptr && output < matrix.rows ? matrix.scale[output] : 1.0f;
    });
  }
  __device__ void read_token_scales(Scales& scales) const {
    for_outputs([&](int i, int token, int) { scales.token[i] = job.x_scales != nullptr ? job.x_scales[token] : 1.0f; });
  }

  // Calls visit(i, token, row of the tile) for output i of a tile that this thread finishes.
  template <typename Visit>
  __device__ void for_outputs(const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const int output = thread + i * kThreads;
      if (output < job.tokens * kRows) visit(i, output / kRows, output % kRows);
    }
  }

  // Adds what ranges behind this one have of the tile that ends before step `tile_end`. Looks into the boxes of several
  // before it waits for one.
  __device__ void add_parts(int tile_end, float (&totals)[kOutputs]) const {
    int others = range + 1;
    while (others < job.split.ranges && job.split.begin(others) < tile_end) ++others;
    for (int first = range + 1; first < others; first += kPartsAtOnce) {
      uint64_t letters[kPartsAtOnce][kOutputs] = {};
#pragma unroll
      for (int part = 0; part < kPartsAtOnce; ++part) {
        if (first + part >= others) break;
        for_outputs([&](int i, int token, int row) { letters[part][i] = look(box(first + part, token, row)); });
      }
#pragma unroll
      for (int part = 0; part < kPartsAtOnce; ++part) {
        if (first + part >= others) break;
        for_outputs(
            [&](int i, int token, int row) { totals[i] += take(box(first + part, token, row), letters[part][i]); });
      }
    }
  }

  __device__ uint64_t* box(int of_range, int token, int row) const {
    return job.mail + (int64_t{of_range} * kTokens + token) * kRows + row;
  }
};

template <Operands kOperands, int kRowWarps, int kTokens>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) skinny_kernel(const __grid_constant__ Job job) {
  using B = Block<kOperands, kRowWarps, kTokens>;
  // Blocks start in the order of their numbers, and one waits for parts of the ranges behind its own: those are lower.
  const B block = {.job = job, .range = job.split.ranges - 1 - static_cast<int>(blockIdx.x)};
  const int end = job.split.begin(block.range + 1);
  typename B::Place place = block.first_place(), ahead = place;  // of what is computed, and of what is copied
  for (int i = 0; i < B::kStages - 1; ++i) {
    if (ahead.step < end) block.copy_weights(ahead);
    commit_copies();
    block.advance(ahead, end);
  }
  wait_for_previous_kernels();  // weights were there before, x may come from the last of them
  let_next_kernel_begin();
  block.copy_first_x(place, end - place.step);
  typename B::Scales scales = {};
  block.read_token_scales(scales);
  typename B::Sums sums = {};
  while (place.step < end) {
    wait_for_copies<B::kStages - 2>();
    __syncthreads();  // this step's stage is complete, and all have left the one that is filled now
    if (ahead.step < end) {
      block.copy_weights(ahead);
      block.copy_x(ahead.stage, ahead.in_tile,
                   [](int, char* to, const char* from, bool there) { copy_async(to, from, there); });
    }
    commit_copies();
    block.advance(ahead, end);
    if (place.in_tile == 0) block.read_row_scales(place, scales);  // long before the tile is finished
    block.compute(place, sums);
    if (place.in_tile + 1 == job.split.tile_steps || place.step + 1 == end) {
      block.finish(place, sums, scales);
      for (auto& fragment : sums) {
        for (float& sum : fragment) sum = 0;
      }
    }
    block.advance(place, end);
  }
}

// ---- The host's side

using Kernel = void (*)(Job);

// By the index of the shape.
template <Operands kOperands>
Kernel kernel_for(size_t shape) {
  static constexpr auto kKernels = []<size_t... kShape>(std::index_sequence<kShape...>) {
    return std::array<Kernel, sizeof...(kShape)>{
        skinny_kernel<kOperands, kSkinnyShapes[kShape].row_warps, kSkinnyShapes[kShape].tokens>...};
  }
  (std::make_index_sequence<std::size(kSkinnyShapes)>());
  return kKernels[shape];
}

int64_t row_bytes(const Linear& weight) { return weight.in_features * size_of(weight.weight.dtype()); }

// REQUIRES: matrices of one dtype, at most kMaxMatrices.
Job job_of(const Queue& queue, const Activations& x, std::span<const LinearOutput> outputs, const SkinnyShape& shape) {
  const Linear& first = *outputs[0].weight;
  Job job = {.x = static_cast<const char*>(x.values.data()),
             .x_scales = x.scales.empty() ? nullptr : x.scales.as<float>(),
             .tokens = static_cast<int>(x.values.dim(0)),
             .row_bytes = row_bytes(first),
             .matrices = {},
             .split = {},
             .mail = queue.mailboxes()};
  int64_t tiles = 0;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const Linear& weight = *outputs[i].weight;
    tiles += blocks_for(weight.out_features, shape.rows());
    job.matrices[i] = {.weight = static_cast<const char*>(weight.weight.data()),
                       .scale = weight.weight_scale.empty() ? nullptr : weight.weight_scale.as<float>(),
                       .out = outputs[i].out.as<float>(),
                       .rows = weight.out_features,
                       .stored_rows = blocks_for(weight.out_features, kPanelRows) * kPanelRows,
                       .end_tile = static_cast<int>(tiles)};
  }
  job.split = skinny_split(shape, tiles, job.row_bytes, queue.processors());
  return job;
}

template <Operands kOperands>
void launch(Queue& queue, const Activations& x, std::span<const LinearOutput> outputs) {
  const size_t i = skinny_shape(x.values.dim(0), row_bytes(*outputs[0].weight));
  const SkinnyShape& shape = kSkinnyShapes[i];
  const Job job = job_of(queue, x, outputs, shape);
  constexpr int64_t kRatio = x_ratio(kOperands);
  queue.launch(kernel_for<kOperands>(i),
               Queue::Launch{.grid = static_cast<unsigned>(job.split.ranges),
                             .block = kThreads,
                             .shared_bytes = shape.stages(kRatio) * shape.stage_bytes(kRatio),
                             .early = true},
               job);
}

bool whole_pieces(const void* data, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(data) % kPiece == 0 && row_bytes % kPiece == 0;
}

}  // namespace

bool fits_skinny_linear(const Queue& queue, const Activations& x, const Linear& weight) {
  return queue.most_shared_bytes() >= kSkinnySharedBytes && x.values.dim(0) <= kSkinnyTokens &&
         (weight.weight.dtype() == DType::kF8E4M3 || x.values.dtype() == DType::kBF16) &&
         whole_pieces(weight.weight.data(), row_bytes(weight)) &&
         whole_pieces(x.values.data(), weight.in_features * size_of(x.values.dtype()));
}

void skinny_linear(Queue& queue, const Activations& x, std::span<const LinearOutput> outputs) {
  while (!outputs.empty()) {  // as many matrices of one dtype as fit into a launch
    const DType dtype = outputs[0].weight->weight.dtype();
    size_t count = 1;
    while (count < outputs.size() && count < kMaxMatrices && outputs[count].weight->weight.dtype() == dtype) ++count;
    if (dtype == DType::kBF16) {
      launch<Operands::kBF16>(queue, x, outputs.first(count));
    } else if (x.values.dtype() == DType::kBF16) {
      launch<Operands::kCodesByBF16>(queue, x, outputs.first(count));
    } else {
      launch<Operands::kCodes>(queue, x, outputs.first(count));
    }
    outputs = outputs.subspan(count);
  }
}

}  // namespace octet::cuda
