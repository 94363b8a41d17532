// Attention in fast mode. A row is a query head of a token; the rows that read one KV head of one sequence are
// neighbours, token after token, so that whatever a block reads of the cache serves all of them.
//
// Decode (sequences with few rows): a block has 16 rows and a part of their context, and each of its warps every fourth
// chunk of it, through a pipeline of its own. Bound by reading the cache: a chunk's two products take a third of the
// time in which it arrives. The warps meet in shared memory, the parts of a context in a second kernel, in order.
//
// Prefill (the other sequences): a block has 128 rows and walks their context, a warp 32 of the rows. Bound by the
// tensor cores, and next by reading fragments from shared memory, which is why a warp has two tiles of rows for each.
// Keys arrive while values are used and values while keys are; two blocks of a multiprocessor hide each other's
// exponentials.
//
// Positions stand in the order that makes fragments cheap. Of a cache block, column g of the products' tile j is slot
// 2 g + j, so that a lane reads the keys of both tiles at once; then lane t of a row has the probabilities of slots
// 4 t .. 4 t + 3, which as they are make the operand a of the product with values, if k = 2 t, 2 t + 1 stand for the
// first two of them and k = 2 t + 8, 2 t + 9 for the last two.
#include "kernels/cuda/flash_attention.h"

#include <cmath>

#include "kernels/cuda/arithmetic.cuh"
#include "kernels/cuda/copy_async.cuh"
#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/load_matrix.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/queue.h"

namespace octet::cuda {
namespace {

constexpr int kBlock = static_cast<int>(kKvBlockTokens);
constexpr int kTileRows = 16;  // of a fragment
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// Sequences with at most so many rows, or with one token, are decoded.
constexpr int kFewRows = 4 * kTileRows;

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = kDecodeWarps * kWarp;
constexpr int kDecodeStages = 3;
constexpr int kBlocksOfProcessor = 2;                      // that run at once
constexpr int kThreadsOfRow = kDecodeThreads / kTileRows;  // when the warps' results meet
constexpr int kMergeThreads = 256;

constexpr int kPrefillWarps = 4;
constexpr int kPrefillThreads = kPrefillWarps * kWarp;
constexpr int kWarpTiles = 2;
constexpr int kWarpRows = kWarpTiles * kTileRows;
constexpr int kPrefillRows = kPrefillWarps * kWarpRows;
constexpr int kStepBlocks = 4;
constexpr int kStep = kStepBlocks * kBlock;  // positions

constexpr int kCopyBytes = 16;  // of an asynchronous copy

// What is read or written at once.
struct alignas(8) TwoWords {
  uint32_t first, second;
};
struct alignas(8) TwoFloats {
  float first, second;
};
struct alignas(16) FourFloats {
  float at[4];
};

struct Flash {
  const uint16_t* q;
  uint16_t* out;
  const char *keys, *values;
  const int32_t *positions, *sequence_ends, *block_tables;
  int64_t max_blocks;
  int sequences, heads, kv_heads;
  int group;          // query heads of a KV head
  float score_scale;  // from q k to the exponent of 2
  float value_scale;
};

// Of a row so far: weights are 2^(score - base), and sum is theirs.
struct alignas(8) Running {
  float base, sum;
};

__device__ Running nothing_seen() { return {-kInfinity, 0.0f}; }

// Decode's: where parts of contexts leave their results, [sequences, units, most, kTileRows, ...], a unit being a tile
// of rows and a KV head. Unnormalised sums of values, and their weights.
struct Parts {
  ContextParts rule;
  int units;  // of a sequence
  int most;   // parts of a context of this step
  float* sums;
  Running* weights;

  // Where the results of a part's rows begin.
  __device__ int64_t rows_at(int sequence, int unit, int part) const {
    return ((static_cast<int64_t>(sequence) * units + unit) * most + part) * kTileRows;
  }
};

__device__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }

// The same number, of which the compiler does not know where it comes from: what is computed from it in a loop is not
// computed before the loop, to take up registers all the while.
__device__ int afresh(int value) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// ---- Arithmetic

__device__ float exp2_fast(float x) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// Two floats rounded to BF16.
__device__ uint32_t bf16_pair(float low, float high) {
#if defined(__CUDACC__)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
#endif
}

// What to subtract from scores and bases that are at most `base`.
__device__ float shift_of(float base) { return base == -kInfinity ? 0.0f : base; }

// The scores of two rows become weights; factors are what the rows' earlier weights are to be multiplied by. Sums are
// of the lane's own columns. (The product with scale is rounded before the difference is taken: fused, the greatest
// score would differ from the base by the base's rounding, without bound.)
template <int kTiles>
__device__ void weigh(float (&scores)[kTiles][4], float scale, Running (&rows)[2], float (&factors)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = -kInfinity;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) most = fmaxf(most, scores[j][i] *= scale);
    }
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
    const float base = fmaxf(rows[half].base, most), shift = shift_of(base);
    factors[half] = exp2_fast(rows[half].base - shift);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[j][i] = exp2_fast(scores[j][i] - shift);
        sum += scores[j][i];
      }
    }
    rows[half] = {base, __fmaf_rn(rows[half].sum, factors[half], sum)};
  }
}

// The sum over the four lanes of a row, in each of them.
__device__ float sum_of_row(float lane) {
  lane += __shfl_xor_sync(kAllLanes, lane, 1);
  return lane + __shfl_xor_sync(kAllLanes, lane, 2);
}

// The weights of a cache block, scores of two tiles, as an operand a.
__device__ void weights_as_operand(const float (&even)[4], const float (&odd)[4], uint32_t (&a)[4]) {
  a[0] = bf16_pair(even[0], odd[0]);
  a[1] = bf16_pair(even[2], odd[2]);
  a[2] = bf16_pair(even[1], odd[1]);
  a[3] = bf16_pair(even[3], odd[3]);
}

// The slot whose score is scores[j][i] of a cache block.
__device__ int slot_of(int lane, int j, int i) { return lane % 4 * 4 + i % 2 * 2 + j; }

// ---- Cache blocks in shared memory

// One KV head's keys or values of a cache block, in pieces of kCopyBytes. Pieces lie where the lanes that read together
// find them in different banks.
template <typename Element, int kDim>
struct CacheBlock {
  static constexpr bool kNarrow = sizeof(Element) == 1;
  static constexpr int kBytes = kBlock * kDim * static_cast<int>(sizeof(Element));
  static constexpr int kPieces = kBytes / kCopyBytes;
  static constexpr int kSlotPieces = kPieces / kBlock;  // of a position's values

  static __device__ int key_place(int piece) { return kNarrow ? piece : piece ^ piece / 8 % 2 * 2; }
  static __device__ int value_place(int slot, int piece) {
    return slot * kSlotPieces + (piece ^ (kNarrow ? slot / 4 * 2 % kSlotPieces : slot / 4 * 2 + slot % 2));
  }

  // A warp's lane begins its share of the copy; what is not there becomes 0.
  static __device__ void copy_keys(char* to, const char* from, int lane, bool there) {
#pragma unroll
    for (int piece = lane; piece < kPieces; piece += kWarp) {
      copy_async(to + key_place(piece) * kCopyBytes, from + piece * kCopyBytes, there);
    }
  }
  static __device__ void copy_values(char* to, const char* from, int lane, int slots) {
#pragma unroll
    for (int piece = lane; piece < kPieces; piece += kWarp) {
      const int slot = piece / kSlotPieces;
      copy_async(to + value_place(slot, piece % kSlotPieces) * kCopyBytes, from + piece * kCopyBytes, slot < slots);
    }
  }

  // The operands b of both tiles' step `k` over the head's elements.
  static __device__ void load_keys(const char* keys, int lane, int k, uint32_t (&b)[2][2]) {
    const int group = lane / 4, in_group = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pair = 8 * k + 4 * half + in_group;
      if constexpr (kNarrow) {
        decode_e4m3(*reinterpret_cast<const uint32_t*>(keys + pair * 2 * kBlock + group * 4), b[0][half], b[1][half]);
      } else {
        const char* const piece = keys + key_place(pair * 4 + group / 2) * kCopyBytes;
        const TwoWords words = *reinterpret_cast<const TwoWords*>(piece + group % 2 * 8);
        b[0][half] = words.first;
        b[1][half] = words.second;
      }
    }
  }

  // The operands b of tiles 4 m .. 4 m + 3 of the head's elements.
  static __device__ void load_values(const char* values, int lane, int m, uint32_t (&b)[4][2]) {
    if constexpr (kNarrow) {
      const int group = lane / 4, slot = lane % 4 * 4;
      uint32_t codes[4];  // element 32 m + 4 group + c of each slot
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const char* const piece = values + (value_place(slot + i, group / 4) ^ 2 * m) * kCopyBytes;
        codes[i] = *reinterpret_cast<const uint32_t*>(piece + group % 4 * 4);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        b[c][0] = decode_neighbours(codes[0], codes[1], c);
        b[c][1] = decode_neighbours(codes[2], codes[3], c);
      }
    } else {
      const int row = lane % 8, slot = row / 2 * 4 + row % 2 + lane / 8 % 2 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t words[4];
        load_transposed_matrices(words, values + (value_place(slot, lane / 16) ^ (4 * m + 2 * i)) * kCopyBytes);
        b[2 * i][0] = words[0];
        b[2 * i][1] = words[1];
        b[2 * i + 1][0] = words[2];
        b[2 * i + 1][1] = words[3];
      }
    }
  }

  // Calls visit(element, first, second) for the lane's pairs of neighbouring elements of row `half` of a tile.
  template <typename Visit>
  static __device__ void each_pair(const float (&sums)[kDim / 8][4], int half, const Visit& visit) {
    const int in_group = lane_of_thread() % 4;
    if constexpr (kNarrow) {
#pragma unroll
      for (int n = 0; n < kDim / 8; n += 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          visit(n / 4 * 32 + in_group * 8 + i * 4 + n % 4, sums[n][2 * half + i], sums[n + 1][2 * half + i]);
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) visit(8 * n + 2 * in_group, sums[n][2 * half], sums[n][2 * half + 1]);
    }
  }

 private:
  // Code c of two words as a pair of BF16 values.
  static __device__ uint32_t decode_neighbours(uint32_t low, uint32_t high, int c) {
    // Each half: the code, and its sign bit in all the bits above it.
    const auto selector = static_cast<uint32_t>(0xC480 + 0x1111 * c);
    return scale_up_bf16(select_bytes(low, high, selector) << 4 & 0x87F087F0u);
  }
};

// ---- Rows

// Some rows of a sequence that read one KV head.
struct Rows {
  int sequence, kv_head;
  int first_token;   // the sequence's, in the step
  int first, count;  // among the sequence's rows of the KV head
};

__device__ int token_of(const Flash& a, const Rows& rows, int row) {
  return rows.first_token + (rows.first + row) / a.group;
}

// Where a row's elements begin in q and out.
__device__ int64_t row_at(const Flash& a, const Rows& rows, int row, int dim) {
  const int head = rows.kv_head * a.group + (rows.first + row) % a.group;
  return (static_cast<int64_t>(token_of(a, rows, row)) * a.heads + head) * dim;
}

__device__ int position_of(const Flash& a, const Rows& rows, int row) { return a.positions[token_of(a, rows, row)]; }

__device__ int first_token_of(const Flash& a, int sequence) {
  return sequence == 0 ? 0 : a.sequence_ends[sequence - 1];
}

__host__ __device__ constexpr bool few(int64_t tokens, int64_t heads_per_kv) {
  return tokens <= 1 || tokens * heads_per_kv <= kFewRows;
}

// What is to be decoded of a sequence: nothing of one with many rows.
struct Decoded {
  int first_token = 0, rows = 0;  // of each KV head
  int length = 0, parts = 0;      // of the context

  __device__ int units(const Flash& a) const { return (rows + kTileRows - 1) / kTileRows * a.kv_heads; }
  // The rows of one of them.
  __device__ Rows rows_of(const Flash& a, int sequence, int unit) const {
    const int first = unit / a.kv_heads * kTileRows;
    return {sequence, unit % a.kv_heads, first_token, first, lesser(kTileRows, rows - first)};
  }
};

__device__ Decoded decoded(const Flash& a, const ContextParts& rule, int sequence) {
  const int first_token = first_token_of(a, sequence), end = a.sequence_ends[sequence], tokens = end - first_token;
  if (!few(tokens, a.group)) return {};
  const int length = a.positions[end - 1] + 1;
  return {first_token, tokens * a.group, length, rule.count(length)};
}

// Tile `index` of the prefilled rows, counted from the end of the batch, as late tiles of a long prompt take longest;
// no rows if there are fewer tiles. The warp calls together.
__device__ Rows prefilled_rows(const Flash& a, int index, int kv_head) {
  const int lane = lane_of_thread();
  for (int end = a.sequences; end > 0; end -= kWarp) {
    const int sequence = end - 1 - lane;
    const int first_token = sequence < 0 ? 0 : first_token_of(a, sequence);
    const int tokens = sequence < 0 ? 0 : a.sequence_ends[sequence] - first_token;
    const int tiles = few(tokens, a.group) ? 0 : (tokens * a.group - 1) / kPrefillRows + 1;
    int up_to = tiles;  // of the sequences behind and this one
#pragma unroll
    for (int width = 1; width < kWarp; width *= 2) {
      const int others = __shfl_up_sync(kAllLanes, up_to, width);
      if (lane >= width) up_to += others;
    }
    const unsigned owners = __ballot_sync(kAllLanes, index < up_to);
    if (owners == 0) {
      index -= __shfl_sync(kAllLanes, up_to, kWarp - 1);
      continue;
    }
    const int owner = __ffs(owners) - 1;
    const int first = (__shfl_sync(kAllLanes, up_to, owner) - 1 - index) * kPrefillRows;
    const int rows = __shfl_sync(kAllLanes, tokens, owner) * a.group;
    return {end - 1 - owner, kv_head, __shfl_sync(kAllLanes, first_token, owner), first,
            lesser(kPrefillRows, rows - first)};
  }
  return {0, kv_head, 0, 0, 0};
}

// ---- Decode

// The cache blocks of a warp's chunks, their numbers read from the table for a whole warp at once.
template <typename Element, int kDim>
class Pipeline {
 public:
  using Cache = CacheBlock<Element, kDim>;
  static constexpr int kBlocks = 2 / static_cast<int>(sizeof(Element));  // of a chunk
  static constexpr int kPositions = kBlocks * kBlock;
  static constexpr int kStageBytes = kBlocks * 2 * Cache::kBytes;
  static constexpr int kBytes = kDecodeStages * kStageBytes;  // of a warp

  // For the warp's share of positions [begin, end) of a context of `length`.
  __device__ Pipeline(const Flash& a, const Rows& rows, char* memory, int begin, int end, int length)
      : a_(a),
        table_(a.block_tables + rows.sequence * a.max_blocks),
        kv_head_(rows.kv_head),
        memory_(memory),
        begin_(begin + warp_of_thread() * kPositions),
        length_(length),
        chunks_((end - begin_ + kDecodeWarps * kPositions - 1) / (kDecodeWarps * kPositions)) {}

  __device__ int chunks() const { return chunks_; }
  __device__ int position(int chunk) const { return begin_ + chunk * kDecodeWarps * kPositions; }
  // Keys of block `block` of a chunk; its values follow them.
  __device__ char* keys(int chunk, int block) const {
    return memory_ + chunk % kDecodeStages * kStageBytes + block * 2 * Cache::kBytes;
  }

  // Begins to fetch a chunk, in order. A chunk that there is not is an empty group of copies.
  __device__ void fetch(int chunk) {
    if (chunk < chunks_) {
      constexpr int kAtOnce = kWarp / kBlocks;
      const int lane = lane_of_thread();
      if (chunk % kAtOnce == 0) numbers_ = number_of(position(chunk + lane / kBlocks) / kBlock + lane % kBlocks);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const int number = __shfl_sync(kAllLanes, numbers_, chunk % kAtOnce * kBlocks + block);
        const int64_t from = (static_cast<int64_t>(number) * a_.kv_heads + kv_head_) * Cache::kBytes;
        const int slots = length_ - position(chunk) - block * kBlock;
        char* const to = keys(chunk, block);
        Cache::copy_keys(to, a_.keys + from, lane, slots > 0);
        Cache::copy_values(to + Cache::kBytes, a_.values + from, lane, slots);
      }
    }
    commit_copies();
  }

 private:
  __device__ int number_of(int block) const { return block * kBlock < length_ ? table_[block] : 0; }

  const Flash& a_;
  const int32_t* const table_;
  const int kv_head_;
  char* const memory_;
  const int begin_, length_, chunks_;
  int numbers_ = 0;  // a lane has one block's
};

// 16 rows in registers: operands a of the product with keys.
template <int kDim>
__device__ void load_rows(const Flash& a, const Rows& rows, uint32_t (&q)[kDim / 16][4]) {
  const int group = lane_of_thread() / 4, in_group = lane_of_thread() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = group + 8 * half;
    const auto* const words = reinterpret_cast<const uint32_t*>(a.q + row_at(a, rows, row, kDim));
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      q[k][half] = row < rows.count ? words[8 * k + in_group] : 0;
      q[k][half + 2] = row < rows.count ? words[8 * k + in_group + 4] : 0;
    }
  }
}

template <int kDim>
__device__ void scale_rows(float (&sums)[kDim / 8][4], const float (&factors)[2]) {
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] *= factors[i / 2];
  }
}

// Adds a chunk to the warp's rows.
template <typename Element, int kDim>
__device__ void attend(const Pipeline<Element, kDim>& pipeline, int chunk, const uint32_t (&q)[kDim / 16][4],
                       float scale, int whole, const int (&limits)[2], Running (&running)[2],
                       float (&sums)[kDim / 8][4]) {
  using Cache = CacheBlock<Element, kDim>;
  constexpr int kBlocks = Pipeline<Element, kDim>::kBlocks;
  const int lane = lane_of_thread();
  float scores[2 * kBlocks][4] = {};
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t b[2][2];
      Cache::load_keys(pipeline.keys(chunk, block), lane, k, b);
      mma_bf16(scores[2 * block], q[k], b[0]);
      mma_bf16(scores[2 * block + 1], q[k], b[1]);
    }
  }
  const int position = pipeline.position(chunk);
  if (position + Pipeline<Element, kDim>::kPositions > whole) {
#pragma unroll
    for (int j = 0; j < 2 * kBlocks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (position + j / 2 * kBlock + slot_of(lane, j % 2, i) > limits[i / 2]) scores[j][i] = -kInfinity;
      }
    }
  }
  float factors[2];
  weigh(scores, scale, running, factors);
  scale_rows<kDim>(sums, factors);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t weights[4];
    weights_as_operand(scores[2 * block], scores[2 * block + 1], weights);
#pragma unroll
    for (int m = 0; m < kDim / 32; ++m) {
      uint32_t b[4][2];
      Cache::load_values(pipeline.keys(chunk, block) + Cache::kBytes, lane, m, b);
#pragma unroll
      for (int n = 0; n < 4; ++n) mma_bf16(sums[4 * m + n], weights, b[n]);
    }
  }
}

// Four elements of a row.
__device__ void store(const Flash& a, int64_t at, const float (&sums)[4], float factor) {
  *reinterpret_cast<TwoWords*>(a.out + at) = {bf16_pair(sums[0] * factor, sums[1] * factor),
                                              bf16_pair(sums[2] * factor, sums[3] * factor)};
}

// The sum of the warps' results, kThreadsOfRow threads a row: to `out` if the context has one part.
template <int kDim>
__device__ void join_warps(const Flash& a, const Parts& parts, const Rows& rows, int64_t rows_at, bool alone,
                           const char* memory, int warp_bytes, const Running (&running)[kDecodeWarps][kTileRows]) {
  const int row = static_cast<int>(threadIdx.x) / kThreadsOfRow, in_row = static_cast<int>(threadIdx.x) % kThreadsOfRow;
  if (row >= rows.count) return;
  float base = -kInfinity, sum = 0, factors[kDecodeWarps];
#pragma unroll
  for (int warp = 0; warp < kDecodeWarps; ++warp) base = fmaxf(base, running[warp][row].base);
#pragma unroll
  for (int warp = 0; warp < kDecodeWarps; ++warp) {
    factors[warp] = exp2_fast(running[warp][row].base - shift_of(base));
    sum = __fmaf_rn(running[warp][row].sum, factors[warp], sum);
  }
  if (!alone && in_row == 0) parts.weights[rows_at + row] = {base, sum};
#pragma unroll
  for (int d = in_row * 4; d < kDim; d += kThreadsOfRow * 4) {
    float total[4] = {};
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      const auto* const of_warp = reinterpret_cast<const float*>(memory + warp * warp_bytes);
      const FourFloats sums = *reinterpret_cast<const FourFloats*>(of_warp + row * (kDim + 8) + d);
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] = __fmaf_rn(sums.at[i], factors[warp], total[i]);
    }
    if (alone) {
      store(a, row_at(a, rows, row, kDim) + d, total, __fdiv_rn(a.value_scale, sum));
    } else {
      *reinterpret_cast<FourFloats*>(parts.sums + (rows_at + row) * kDim +
                                     d) = {{total[0], total[1], total[2], total[3]}};
    }
  }
}

// A block's share: a part of what a unit of a sequence sees.
template <typename Element, int kDim>
__device__ void decode_part(const Flash& a, const Parts& parts, int sequence, const Decoded& work, int unit, int part) {
  using Cache = CacheBlock<Element, kDim>;
  using Chunks = Pipeline<Element, kDim>;
  __shared__ Running running_of[kDecodeWarps][kTileRows];
  const Rows rows = work.rows_of(a, sequence, unit);
  const int positions = parts.rule.positions(work.length), begin = part * positions;
  char* const memory = dynamic_shared() + warp_of_thread() * Chunks::kBytes;
  Chunks chunks(a, rows, memory, begin, lesser(work.length, begin + positions), work.length);
#pragma unroll
  for (int chunk = 0; chunk < kDecodeStages - 1; ++chunk) chunks.fetch(chunk);

  const int lane = lane_of_thread(), group = lane / 4;
  uint32_t q[kDim / 16][4];
  load_rows<kDim>(a, rows, q);
  const int whole = position_of(a, rows, 0) + 1;  // positions that all rows see
  const int limits[2] = {position_of(a, rows, lesser(group, rows.count - 1)),
                         position_of(a, rows, lesser(group + 8, rows.count - 1))};
  Running running[2] = {nothing_seen(), nothing_seen()};
  float sums[kDim / 8][4] = {};
  for (int chunk = 0; chunk < chunks.chunks(); ++chunk) {
    chunks.fetch(chunk + kDecodeStages - 1);
    wait_for_copies<kDecodeStages - 1>();
    __syncwarp();  // all lanes' copies have come
    attend<Element, kDim>(chunks, chunk, q, a.score_scale, whole, limits, running, sums);
    __syncwarp();  // nobody reads what the next chunks overwrite
  }
  wait_for_copies<0>();
  __syncwarp();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    running[half].sum = sum_of_row(running[half].sum);
    if (lane % 4 == 0) running_of[warp_of_thread()][group + 8 * half] = running[half];
    float* const row = reinterpret_cast<float*>(memory) + (group + 8 * half) * (kDim + 8);  // apart by other banks
    Cache::each_pair(sums, half, [&](int d, float first, float second) {
      *reinterpret_cast<TwoFloats*>(row + d) = {first, second};
    });
  }
  __syncthreads();
  join_warps<kDim>(a, parts, rows, parts.rows_at(sequence, unit, part), work.parts == 1, dynamic_shared(),
                   Chunks::kBytes, running_of);
  __syncthreads();  // nobody reads what the block's next part overwrites
}

// The sum of the threads' numbers up to the calling one's, in up_to[threadIdx.x] for all to read.
__device__ void sum_up_to(int number, int (&up_to)[kDecodeThreads]) {
  __shared__ int of_warps[kDecodeWarps];
  const int lane = lane_of_thread(), warp = warp_of_thread();
#pragma unroll
  for (int width = 1; width < kWarp; width *= 2) {
    const int others = __shfl_up_sync(kAllLanes, number, width);
    if (lane >= width) number += others;
  }
  if (lane == kWarp - 1) of_warps[warp] = number;
  __syncthreads();
  for (int other = 0; other < warp; ++other) number += of_warps[other];
  up_to[threadIdx.x] = number;
  __syncthreads();
}

// Blocks take turns with the parts of all units of all sequences, of which only the device knows how many there are. (A
// grid with a block for each that there might be would be mostly blocks that find nothing to do, and those take longer
// than they look: each occupies shared memory for the time of two reads.)
template <typename Element, int kDim>
__global__ void __launch_bounds__(kDecodeThreads, 2) decode_kernel(Flash a, Parts parts) {
  __shared__ int up_to[kDecodeThreads];  // parts of so many sequences at once
  int item = static_cast<int>(blockIdx.x);
  for (int first = 0; first < a.sequences; first += kDecodeThreads) {
    const int mine = first + static_cast<int>(threadIdx.x);
    const Decoded seen = mine < a.sequences ? decoded(a, parts.rule, mine) : Decoded();
    sum_up_to(seen.units(a) * seen.parts, up_to);
    if (first == 0) wait_for_previous_kernels();  // which write q and the cache, but not what was read so far
    const int all = up_to[kDecodeThreads - 1];
    for (; item < all; item += static_cast<int>(gridDim.x)) {
      int at = 0;  // sequences whose parts are all before it
      for (int width = kDecodeThreads / 2; width >= 1; width /= 2) {
        if (up_to[at + width - 1] <= item) at += width;
      }
      const Decoded work = decoded(a, parts.rule, first + at);
      const int of_sequence = item - (at == 0 ? 0 : up_to[at - 1]);
      decode_part<Element, kDim>(a, parts, first + at, work, of_sequence / work.parts, of_sequence % work.parts);
    }
    item -= all;
    __syncthreads();  // nobody reads up_to any more
  }
}

// A block has some rows of unit blockIdx.y of sequence blockIdx.z. Threads that have the same four elements take turns
// with the parts, and meet in order.
template <int kDim>
__global__ void __launch_bounds__(kMergeThreads) merge_parts_kernel(Flash a, Parts parts) {
  constexpr int kRowThreads = kDim / 4, kTurns = kMergeThreads / kRowThreads;
  __shared__ FourFloats sums_of[kTurns][kRowThreads];
  __shared__ Running running_of[kTurns];
  const int sequence = static_cast<int>(blockIdx.z), unit = static_cast<int>(blockIdx.y);
  const Decoded work = decoded(a, parts.rule, sequence);
  wait_for_previous_kernels();
  if (work.parts <= 1 || unit >= work.units(a)) return;
  const Rows rows = work.rows_of(a, sequence, unit);
  const int turn = static_cast<int>(threadIdx.x) / kRowThreads, in_row = static_cast<int>(threadIdx.x) % kRowThreads;
  for (int row = static_cast<int>(blockIdx.x); row < rows.count; row += static_cast<int>(gridDim.x)) {
    Running running = nothing_seen();
    FourFloats total = {};
    const auto add = [&](const Running& next, const FourFloats& sums) {
      const float base = fmaxf(running.base, next.base), shift = shift_of(base);
      const float ours = exp2_fast(running.base - shift), theirs = exp2_fast(next.base - shift);
      running = {base, __fmaf_rn(next.sum, theirs, running.sum * ours)};
#pragma unroll
      for (int i = 0; i < 4; ++i) total.at[i] = __fmaf_rn(sums.at[i], theirs, total.at[i] * ours);
    };
#pragma unroll 4
    for (int part = turn; part < work.parts; part += kTurns) {
      const int64_t at = parts.rows_at(sequence, unit, part) + row;
      add(parts.weights[at], *reinterpret_cast<const FourFloats*>(parts.sums + at * kDim + in_row * 4));
    }
    sums_of[turn][in_row] = total;
    if (in_row == 0) running_of[turn] = running;
    __syncthreads();
    if (turn == 0) {
      for (int other = 1; other < kTurns; ++other) add(running_of[other], sums_of[other][in_row]);
      store(a, row_at(a, rows, row, kDim) + in_row * 4, total.at, __fdiv_rn(a.value_scale, running.sum));
    }
    __syncthreads();  // before the next row's
  }
}

// ---- Prefill

// A block's shared memory: its rows, then the keys and the values of a step.
template <typename Element, int kDim>
struct PrefillMemory {
  using Cache = CacheBlock<Element, kDim>;
  static constexpr int kRowPieces = kDim * 2 / kCopyBytes;
  static constexpr int kRowBytes = kRowPieces * kCopyBytes, kRowsBytes = kPrefillRows * kRowBytes;
  static constexpr int kBytes = kRowsBytes + 2 * kStepBlocks * Cache::kBytes;

  char* memory;

  // Of a piece of a row, as in CacheBlock.
  static __device__ int place(int row, int piece) { return row * kRowPieces + (piece ^ row % 8); }
  __device__ char* keys(int block) const { return memory + kRowsBytes + block * Cache::kBytes; }
  __device__ char* values(int block) const { return keys(kStepBlocks + block); }

  __device__ void fetch_rows(const Flash& a, const Rows& rows) const {
    for (int i = threadIdx.x; i < kPrefillRows * kRowPieces; i += kPrefillThreads) {
      const int row = i / kRowPieces, piece = i % kRowPieces;
      const bool there = row < rows.count;
      copy_async(memory + place(row, piece) * kCopyBytes, a.q + row_at(a, rows, there ? row : 0, kDim) + piece * 8,
                 there);
    }
  }
  // A step's keys, or its values, of a context of `length`: a warp has a cache block.
  template <bool kKeys>
  __device__ void fetch_step(const Flash& a, const Rows& rows, int step, int length) const {
    static_assert(kPrefillWarps == kStepBlocks);
    const int lane = afresh(lane_of_thread()), block = warp_of_thread();
    const int position = step * kStep + block * kBlock, slots = length - position;
    const int64_t number = slots > 0 ? a.block_tables[rows.sequence * a.max_blocks + position / kBlock] : 0;
    const int64_t from = (number * a.kv_heads + rows.kv_head) * Cache::kBytes;
    if constexpr (kKeys) {
      Cache::copy_keys(keys(block), a.keys + from, lane, slots > 0);
    } else {
      Cache::copy_values(values(block), a.values + from, lane, slots);
    }
  }
};

// The warp's rows against a step's keys.
template <typename Element, int kDim>
__device__ void score(const PrefillMemory<Element, kDim>& memory, int lane,
                      float (&scores)[kWarpTiles][2 * kStepBlocks][4]) {
  using Memory = PrefillMemory<Element, kDim>;
  const int place = Memory::place(lane % kTileRows, lane / kTileRows);
  const char* const rows = memory.memory + warp_of_thread() * kWarpRows * Memory::kRowBytes;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t q[kWarpTiles][4];
#pragma unroll
    for (int tile = 0; tile < kWarpTiles; ++tile) {
      load_matrices(q[tile], rows + (place ^ 2 * k) * kCopyBytes + tile * kTileRows * Memory::kRowBytes);
    }
#pragma unroll
    for (int block = 0; block < kStepBlocks; ++block) {
      uint32_t b[2][2];
      CacheBlock<Element, kDim>::load_keys(memory.keys(block), lane, k, b);
#pragma unroll
      for (int tile = 0; tile < kWarpTiles; ++tile) {
        mma_bf16(scores[tile][2 * block], q[tile], b[0]);
        mma_bf16(scores[tile][2 * block + 1], q[tile], b[1]);
      }
    }
  }
}

// A block has tile blockIdx.x / kv_heads, counted from the last, of KV head blockIdx.x % kv_heads.
template <typename Element, int kDim>
__global__ void __launch_bounds__(kPrefillThreads, 2) prefill_kernel(Flash a) {
  using Cache = CacheBlock<Element, kDim>;
  const Rows rows =
      prefilled_rows(a, static_cast<int>(blockIdx.x) / a.kv_heads, static_cast<int>(blockIdx.x) % a.kv_heads);
  wait_for_previous_kernels();
  if (rows.count == 0) return;
  const PrefillMemory<Element, kDim> memory = {dynamic_shared()};
  const int length = position_of(a, rows, rows.count - 1) + 1, steps = (length - 1) / kStep + 1;
  memory.fetch_rows(a, rows);
  memory.template fetch_step<true>(a, rows, 0, length);
  commit_copies();

  const int group = lane_of_thread() / 4, first_row = warp_of_thread() * kWarpRows;
  // Positions that all of the warp's rows see, and that some of them see.
  const int whole = position_of(a, rows, lesser(first_row, rows.count - 1)) + 1;
  const int seen = first_row < rows.count ? position_of(a, rows, lesser(first_row + kWarpRows, rows.count) - 1) + 1 : 0;
  Running running[kWarpTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kWarpTiles; ++i) running[i / 2][i % 2] = nothing_seen();
  float sums[kWarpTiles][kDim / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    const bool seeing = step * kStep < seen;
    float scores[kWarpTiles][2 * kStepBlocks][4] = {};
    wait_for_copies<0>();
    __syncthreads();  // the keys have come, and nobody reads values
    memory.template fetch_step<false>(a, rows, step, length);
    commit_copies();
    if (seeing) score(memory, afresh(lane_of_thread()), scores);
    wait_for_copies<0>();
    __syncthreads();  // the values have come, and nobody reads keys
    if (step + 1 < steps) memory.template fetch_step<true>(a, rows, step + 1, length);
    commit_copies();
    if (!seeing) continue;
    const int lane = afresh(lane_of_thread());
    if ((step + 1) * kStep > whole) {
#pragma unroll
      for (int i = 0; i < 2 * kWarpTiles; ++i) {
        const int limit = position_of(a, rows, lesser(first_row + 8 * i + group, rows.count - 1)) - step * kStep;
#pragma unroll
        for (int j = 0; j < 4 * kStepBlocks; ++j) {
          if (j / 4 * kBlock + slot_of(lane, j / 2 % 2, j % 2) > limit)
            scores[i / 2][j / 2][i % 2 * 2 + j % 2] = -kInfinity;
        }
      }
    }
    uint32_t weights[kWarpTiles][kStepBlocks][4];
#pragma unroll
    for (int tile = 0; tile < kWarpTiles; ++tile) {
      float factors[2];
      weigh(scores[tile], a.score_scale, running[tile], factors);
#pragma unroll
      for (int block = 0; block < kStepBlocks; ++block) {
        weights_as_operand(scores[tile][2 * block], scores[tile][2 * block + 1], weights[tile][block]);
      }
      scale_rows<kDim>(sums[tile], factors);
    }
#pragma unroll
    for (int block = 0; block < kStepBlocks; ++block) {
#pragma unroll
      for (int m = 0; m < kDim / 32; ++m) {
        uint32_t b[4][2];
        Cache::load_values(memory.values(block), lane, m, b);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int tile = 0; tile < kWarpTiles; ++tile) mma_bf16(sums[tile][4 * m + n], weights[tile][block], b[n]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kWarpTiles; ++i) {
    const int tile = i / 2, half = i % 2, row = first_row + 8 * i + group;
    const float factor = __fdiv_rn(a.value_scale, sum_of_row(running[tile][half].sum));
    if (row >= rows.count) continue;
    auto* const out = reinterpret_cast<uint32_t*>(a.out + row_at(a, rows, row, kDim));
    Cache::each_pair(sums[tile], half, [&](int d, float first, float second) {
      out[d / 2] = bf16_pair(first * factor, second * factor);
    });
  }
}

// ---- The host's part

// Sequences with few rows, of which none has more than most_tokens.
template <typename Element, int kDim>
void decode(Queue& queue, const Flash& a, const AttentionBatch& batch, int64_t most_tokens) {
  const auto units_of = [&](int64_t rows) { return a.kv_heads * ((rows - 1) / kTileRows + 1); };
  const int64_t units = units_of(std::min<int64_t>(most_tokens * a.group, std::max(kFewRows, a.group)));
  constexpr int64_t kSumBytes = kTileRows * kDim * sizeof(float), kWeightBytes = kTileRows * sizeof(Running);
  const int64_t results = batch.sequences() * units;  // of a part
  // Most sequences that are decoded have one token.
  Parts parts = {
      .rule = ContextParts::of(batch.sequences() * units_of(a.group), kBlocksOfProcessor * queue.processors(),
                               results * (kSumBytes + kWeightBytes)),
      .units = static_cast<int>(units),
      .most = 1,
      .sums = nullptr,
      .weights = nullptr};
  parts.most = parts.rule.bound(static_cast<int>(batch.context));
  if (parts.most > 1) {
    auto* const memory = static_cast<char*>(queue.scratch(results * parts.most * (kSumBytes + kWeightBytes)));
    parts.sums = reinterpret_cast<float*>(memory);
    parts.weights = reinterpret_cast<Running*>(memory + results * parts.most * kSumBytes);
  }
  const int64_t at_once = kBlocksOfProcessor * queue.processors();
  queue.launch(decode_kernel<Element, kDim>,
               {.grid = static_cast<unsigned>(std::min(results * parts.most, at_once)),
                .block = kDecodeThreads,
                .shared_bytes = kDecodeWarps * Pipeline<Element, kDim>::kBytes,
                .early = true},
               a, parts);
  if (parts.most == 1) return;
  const auto shares = static_cast<unsigned>(std::clamp<int64_t>(at_once / results, 1, kTileRows));
  queue.launch(merge_parts_kernel<kDim>,
               {.grid = dim3(shares, static_cast<unsigned>(units), static_cast<unsigned>(batch.sequences())),
                .block = kMergeThreads,
                .early = true},
               a, parts);
}

template <typename Element, int kDim>
void prefill(Queue& queue, const Flash& a, const AttentionBatch& batch) {
  // A sequence's last tile may have any number of rows.
  const int64_t tiles = batch.tokens() * a.group / kPrefillRows + batch.sequences();
  queue.launch(prefill_kernel<Element, kDim>,
               {.grid = static_cast<unsigned>(tiles * a.kv_heads),
                .block = kPrefillThreads,
                .shared_bytes = PrefillMemory<Element, kDim>::kBytes,
                .early = true},
               a);
}

template <typename Element, int kDim>
void attend(Queue& queue, const Flash& a, const AttentionBatch& batch) {
  const int64_t most_tokens = batch.tokens() - batch.sequences() + 1;  // of one sequence, as the others have one
  if (batch.sequences() > 1 || few(most_tokens, a.group)) decode<Element, kDim>(queue, a, batch, most_tokens);
  if (!few(most_tokens, a.group)) prefill<Element, kDim>(queue, a, batch);
}

}  // namespace

void flash_attention(Queue& queue, const Tensor& q, const KvLayer& cache, const AttentionBatch& batch,
                     const Tensor& out) {
  const int64_t head_dim = q.dim(2);
  constexpr double kLog2E = 1.4426950408889634;
  const Flash a = {.q = q.as<uint16_t>(),
                   .out = out.as<uint16_t>(),
                   .keys = static_cast<const char*>(cache.keys.data()),
                   .values = static_cast<const char*>(cache.values.data()),
                   .positions = batch.positions.as<int32_t>(),
                   .sequence_ends = batch.sequence_ends.as<int32_t>(),
                   .block_tables = batch.block_tables.as<int32_t>(),
                   .max_blocks = batch.max_blocks(),
                   .sequences = static_cast<int>(batch.sequences()),
                   .heads = static_cast<int>(q.dim(1)),
                   .kv_heads = static_cast<int>(cache.values.dim(1)),
                   .group = static_cast<int>(q.dim(1) / cache.values.dim(1)),
                   .score_scale = static_cast<float>(kLog2E * cache.key_scale / std::sqrt(static_cast<double>(head_dim))),
                   .value_scale = cache.value_scale};
  if (cache.keys.dtype() == DType::kF8E4M3) {
    head_dim == 64 ? attend<uint8_t, 64>(queue, a, batch) : attend<uint8_t, 128>(queue, a, batch);
  } else {
    head_dim == 64 ? attend<uint16_t, 64>(queue, a, batch) : attend<uint16_t, 128>(queue, a, batch);
  }
}

}  // namespace octet::cuda
