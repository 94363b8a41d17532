// Attention over the paged cache: a block has the query heads of one token that read one KV head, eight at most, and
// one chunk of positions or all of them. Decode is bound by reading the cache, and long contexts of few tokens are
// shared out over blocks by chunks; partial results meet in a second kernel, left to right as they do inside a block.
//
// Prefill computes the same way, reading the cache once for each token: the bits ask for it. Fast mode has kernels of
// its own (flash_attention.h).
#include <algorithm>
#include <cmath>

#include "kernels/cuda/arithmetic.cuh"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/flash_attention.h"
#include "kernels/cuda/queue.h"

namespace octet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = static_cast<int>(kAttentionChunk);
constexpr int kBlock = static_cast<int>(kKvBlockTokens);
constexpr int kRows = kThreads / kWarp;  // a warp turns the scores of a row into probabilities
constexpr int kMaxHeadDim = 256;
constexpr int kPerThread = kRows * kMaxHeadDim / kThreads;
static_assert(kChunk == kThreads, "a thread has one position of a chunk");

// Contexts are shared out by chunks where there are fewer blocks than would fill a GPU and the partial results are
// small.
constexpr int64_t kFewBlocks = 512;
constexpr int64_t kMostPartialBytes = int64_t{64} << 20;

// A step's batch and one layer's cache of BF16 or e4m3, as device code sees them.
template <typename Element>
struct Cache {
  Element* keys;
  Element* values;
  const int32_t* positions;
  const int32_t* sequence_of;
  const int32_t* block_tables;
  int64_t max_blocks;
  int kv_heads, head_dim;
  float key_scale, value_scale;

  // Where the elements of (block of `position`, KV head) begin, in keys and values alike.
  __device__ int64_t block_at(int64_t token, int position, int kv_head) const {
    const int64_t block = block_tables[sequence_of[token] * max_blocks + position / kBlock];
    return (block * kv_heads + kv_head) * kBlock * head_dim;
  }
};

template <typename Element>
Cache<Element> arguments(const KvLayer& cache, const AttentionBatch& batch) {
  return {.keys = cache.keys.as<Element>(),
          .values = cache.values.as<Element>(),
          .positions = batch.positions.as<int32_t>(),
          .sequence_of = batch.sequence_of.as<int32_t>(),
          .block_tables = batch.block_tables.as<int32_t>(),
          .max_blocks = batch.max_blocks(),
          .kv_heads = static_cast<int>(cache.values.dim(1)),
          .head_dim = static_cast<int>(cache.values.dim(3)),
          .key_scale = cache.key_scale,
          .value_scale = cache.value_scale};
}

__device__ void store(uint16_t* to, uint16_t bf16, float) { *to = bf16; }
__device__ void store(uint8_t* to, uint16_t bf16, float factor) { *to = float_to_e4m3(bf16_to_float(bf16) * factor); }

// ---- Rotation

__global__ void rope_angles_kernel(const int32_t* positions, const float* inv_freq, float* cos_sin, int64_t tokens,
                                   int64_t half) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= tokens * half) return;
  // The angle is an FP32 product, as references have it; its sine and cosine are then exact to FP32.
  const double angle = static_cast<float>(positions[i / half]) * inv_freq[i % half];
  cos_sin[2 * i] = static_cast<float>(cos(angle));
  cos_sin[2 * i + 1] = static_cast<float>(sin(angle));
}

struct Rotated {
  uint16_t first, second;
};

// Elements j and j + head_dim / 2 of a head.
__device__ Rotated rotate(const float* head, const float* cos_sin, int j, int half) {
  const float first = head[j], second = head[half + j], cosine = cos_sin[2 * j], sine = cos_sin[2 * j + 1];
  return {float_to_bf16(__fmaf_rn(first, cosine, 0.0f - second * sine)),
          float_to_bf16(__fmaf_rn(second, cosine, first * sine))};
}

template <typename Element>
struct Rope {
  const float *q, *k, *v, *cos_sin;
  uint16_t* q_out;
  Cache<Element> cache;
  int heads;
};

// A block has a token.
template <typename Element>
__global__ void rope_and_cache_kernel(Rope<Element> a) {
  const Cache<Element>& cache = a.cache;
  const int64_t token = blockIdx.x;
  const int dim = cache.head_dim, half = dim / 2, position = cache.positions[token], slot = position % kBlock;
  const float* const angles = a.cos_sin + token * dim;
  const float key_factor = __fdiv_rn(1.0f, cache.key_scale), value_factor = __fdiv_rn(1.0f, cache.value_scale);
  for (int i = threadIdx.x; i < a.heads * half; i += blockDim.x) {
    const int64_t at = (token * a.heads + i / half) * dim;
    const int j = i % half;
    const Rotated rotated = rotate(a.q + at, angles, j, half);
    a.q_out[at + j] = rotated.first;
    a.q_out[at + half + j] = rotated.second;
  }
  for (int i = threadIdx.x; i < cache.kv_heads * half; i += blockDim.x) {
    const int head = i / half, j = i % half, k = half + j;
    const float* const from = a.k + (token * cache.kv_heads + head) * dim;
    Element* const to = cache.keys + cache.block_at(token, position, head) + slot * 2;
    const Rotated rotated = rotate(from, angles, j, half);
    store(to + j / 2 * kBlock * 2 + j % 2, rotated.first, key_factor);
    store(to + k / 2 * kBlock * 2 + k % 2, rotated.second, key_factor);
  }
  for (int i = threadIdx.x; i < cache.kv_heads * dim; i += blockDim.x) {
    const int head = i / dim, d = i % dim;
    store(cache.values + cache.block_at(token, position, head) + slot * dim + d,
          float_to_bf16(a.v[(token * cache.kv_heads + head) * dim + d]), value_factor);
  }
}

// ---- Softmax partials

// (max, sum) of one row so far, and the merging of the next chunk's.
struct Running {
  float max, sum;
};
struct Factors {
  float ours, theirs;
};

__device__ Factors merge(Running& running, const Running& next) {
  const float most = larger(running.max, next.max);
  const Factors factors = {exponential(running.max - most), exponential(next.max - most)};
  running.max = most;
  running.sum = __fmaf_rn(next.sum, factors.theirs, running.sum * factors.ours);
  return factors;
}

__device__ float merge(float ours, float theirs, const Factors& factors) {
  return __fmaf_rn(theirs, factors.theirs, ours * factors.ours);
}

// ---- Attention

template <typename Element>
struct Attend {
  const uint16_t* q;
  uint16_t* out;
  Cache<Element> cache;
  int heads, row_tiles;
  float scale;
  float* partials;  // [tokens, heads, chunks, 2 + head_dim]: max, sum, accumulator; null where a block has all chunks
  int64_t chunks;

  __device__ float* partial(int64_t token, int64_t head, int64_t chunk) const {
    return partials + ((token * heads + head) * chunks + chunk) * (2 + cache.head_dim);
  }
};

// The rows of a block: heads [first_head, first_head + rows) of a token.
struct Rows {
  int64_t token;
  int kv_head, first_head, count, position;
};

template <typename Element>
__device__ Rows rows_of_block(const Attend<Element>& a) {
  const int heads_per_kv = a.heads / a.cache.kv_heads;
  const int tile = static_cast<int>(blockIdx.x % a.row_tiles);
  const int kv_head = static_cast<int>(blockIdx.x / a.row_tiles % a.cache.kv_heads);
  const int64_t token = blockIdx.x / a.row_tiles / a.cache.kv_heads;
  return {token, kv_head, kv_head * heads_per_kv + tile * kRows, lesser(kRows, heads_per_kv - tile * kRows),
          a.cache.positions[token]};
}

// What a block computes of one chunk.
struct ChunkMemory {
  float q[kRows][kMaxHeadDim];
  float scores[kRows][kChunk];
  Running chunk[kRows];
  Running running[kRows];
  Factors factors[kRows];
};

// A thread's position against all rows.
template <typename Element>
__device__ void score(const Attend<Element>& a, const Rows& rows, int chunk, int valid, ChunkMemory& memory) {
  const int at = static_cast<int>(threadIdx.x);
  if (at >= valid) return;
  const int position = chunk * kChunk + at;
  const Element* key = a.cache.keys + a.cache.block_at(rows.token, position, rows.kv_head) + position % kBlock * 2;
  float sum[kRows] = {};
  for (int d = 0; d < a.cache.head_dim; d += 2, key += kBlock * 2) {
    const float even = decode(key[0]), odd = decode(key[1]);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= rows.count) break;
      sum[row] = __fmaf_rn(memory.q[row][d + 1], odd, sum[row]);
      sum[row] = __fmaf_rn(memory.q[row][d], even, sum[row]);
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (row < rows.count) memory.scores[row][at] = sum[row] * a.scale;
  }
}

// A warp's row: scores become exp(score - max).
__device__ void softmax(const Rows& rows, int valid, ChunkMemory& memory) {
  const int row = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  if (row >= rows.count) return;
  float* const scores = memory.scores[row];
  float max = -kInfinity;
  for (int i = lane; i < valid; i += kWarp) max = larger(max, scores[i]);
  for (int width = kWarp / 2; width >= 1; width /= 2) max = larger(max, __shfl_xor_sync(0xFFFFFFFF, max, width));
  for (int i = lane; i < valid; i += kWarp) scores[i] = exponential(scores[i] - max);
  __syncwarp();
  if (lane >= kLanes) return;
  float sum = 0;
  for (int i = lane; i < valid; i += kLanes) sum += scores[i];
  sum = sum_lanes(sum);
  if (lane == 0) memory.chunk[row] = {max, sum};
}

// Element d of a row's accumulator over the chunk.
template <typename Element>
__device__ float weigh(const Attend<Element>& a, const Rows& rows, int chunk, int valid, const float* probabilities,
                       int d) {
  float sum = 0;
  for (int at = 0; at < valid;) {
    const Element* value = a.cache.values + a.cache.block_at(rows.token, chunk * kChunk + at, rows.kv_head) + d;
    for (const int end = lesser(valid, at + kBlock); at < end; ++at, value += a.cache.head_dim) {
      sum = __fmaf_rn(probabilities[at], decode(*value), sum);
    }
  }
  return sum;
}

// Every gridDim.y-th chunk where blocks share a context (a block whose first chunk is beyond it has nothing to do, so
// the grid need not know how long contexts are), else all of them.
template <bool kShared, typename Element>
__global__ void attend_kernel(Attend<Element> a) {
  __shared__ ChunkMemory memory;
  const Rows rows = rows_of_block(a);
  const int dim = a.cache.head_dim, elements = rows.count * dim;
  const int last_chunk = rows.position / kChunk;
  const int first = kShared ? static_cast<int>(blockIdx.y) : 0;
  const int stride = kShared ? static_cast<int>(gridDim.y) : 1;
  if (first > last_chunk) return;
  for (int i = threadIdx.x; i < elements; i += blockDim.x) {
    memory.q[i / dim][i % dim] = bf16_to_float(a.q[(rows.token * a.heads + rows.first_head) * dim + i]);
  }
  __syncthreads();
  float total[kPerThread] = {};
  for (int chunk = first; chunk <= last_chunk; chunk += stride) {
    const int valid = lesser(kChunk, rows.position + 1 - chunk * kChunk);
    score(a, rows, chunk, valid, memory);
    __syncthreads();
    softmax(rows, valid, memory);
    __syncthreads();
    if (!kShared && static_cast<int>(threadIdx.x) < rows.count) {
      Running& running = memory.running[threadIdx.x];
      if (chunk == first) {
        running = memory.chunk[threadIdx.x];
      } else {
        memory.factors[threadIdx.x] = merge(running, memory.chunk[threadIdx.x]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int at = i * kThreads + static_cast<int>(threadIdx.x);
      if (at >= elements) break;
      const int row = at / dim, d = at % dim;
      const float weighed = weigh(a, rows, chunk, valid, memory.scores[row], d);
      if constexpr (kShared) {
        float* const to = a.partial(rows.token, rows.first_head + row, chunk);
        if (d == 0) {
          to[0] = memory.chunk[row].max;
          to[1] = memory.chunk[row].sum;
        }
        to[2 + d] = weighed;
      } else {
        total[i] = chunk == first ? weighed : merge(total[i], weighed, memory.factors[row]);
      }
    }
    __syncthreads();
  }
  if constexpr (!kShared) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int at = i * kThreads + static_cast<int>(threadIdx.x);
      if (at >= elements) break;
      const int row = at / dim, d = at % dim;
      a.out[(rows.token * a.heads + rows.first_head + row) * dim + d] =
          float_to_bf16(__fdiv_rn(total[i] * a.cache.value_scale, memory.running[row].sum));
    }
  }
}

// A block has a head of a token, a thread an element: chunks meet left to right.
template <typename Element>
__global__ void merge_kernel(Attend<Element> a) {
  const int64_t token = blockIdx.x / a.heads, head = blockIdx.x % a.heads;
  const int d = static_cast<int>(threadIdx.x), dim = a.cache.head_dim;
  if (d >= dim) return;
  const float* at = a.partial(token, head, 0);
  Running running = {at[0], at[1]};
  float total = at[2 + d];
  for (int chunk = 1; chunk <= a.cache.positions[token] / kChunk; ++chunk) {
    at = a.partial(token, head, chunk);
    const Factors factors = merge(running, {at[0], at[1]});
    total = merge(total, at[2 + d], factors);
  }
  a.out[(token * a.heads + head) * dim + d] = float_to_bf16(__fdiv_rn(total * a.cache.value_scale, running.sum));
}

// ---- Copies

struct BlockCopies {
  uint32_t *keys, *values;
  const int32_t *from, *to;
  int64_t count, words;  // of a block
};

// A thread has one word of a block and makes all copies of it, in order: a copy may read what the one before it wrote.
__global__ void copy_blocks_kernel(BlockCopies a) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (word >= a.words) return;
  for (int64_t i = 0; i < a.count; ++i) {
    a.keys[a.to[i] * a.words + word] = a.keys[a.from[i] * a.words + word];
    a.values[a.to[i] * a.words + word] = a.values[a.from[i] * a.words + word];
  }
}

// Calls body with an element of the cache's type.
template <typename Body>
void with_element_of(const KvLayer& cache, const Body& body) {
  cache.keys.dtype() == DType::kBF16 ? body(uint16_t{}) : body(uint8_t{});
}

template <typename Element>
void attend(Queue& queue, const Tensor& q, const KvLayer& cache, const AttentionBatch& batch, const Tensor& out) {
  const int64_t tokens = q.dim(0), heads = q.dim(1), head_dim = q.dim(2), kv_heads = cache.values.dim(1);
  const int64_t chunks = (batch.context + kAttentionChunk - 1) / kAttentionChunk;
  Attend<Element> a = {.q = q.as<uint16_t>(),
                       .out = out.as<uint16_t>(),
                       .cache = arguments<Element>(cache, batch),
                       .heads = static_cast<int>(heads),
                       .row_tiles = static_cast<int>((heads / kv_heads + kRows - 1) / kRows),
                       .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim))) * cache.key_scale,
                       .partials = nullptr,
                       .chunks = chunks};
  const int64_t blocks = tokens * kv_heads * a.row_tiles;
  const int64_t partial_bytes = tokens * heads * chunks * (2 + head_dim) * static_cast<int64_t>(sizeof(float));
  if (chunks == 1 || blocks >= kFewBlocks || partial_bytes > kMostPartialBytes) {
    queue.launch(attend_kernel<false, Element>, static_cast<unsigned>(blocks), kThreads, a);
    return;
  }
  a.partials = static_cast<float*>(queue.scratch(partial_bytes));
  const unsigned shares = static_cast<unsigned>(std::min(chunks, 2 * kFewBlocks / blocks));
  queue.launch(attend_kernel<true, Element>, dim3(static_cast<unsigned>(blocks), shares), kThreads, a);
  queue.launch(merge_kernel<Element>, static_cast<unsigned>(tokens * heads), kThreads, a);
}

}  // namespace

void rope_angles(Stream& stream, const Tensor& positions, const Tensor& inv_freq, const Tensor& cos_sin) {
  if (cos_sin.elements() == 0) return;
  Queue& queue = queue_of(stream);
  queue.launch(rope_angles_kernel, blocks_for(cos_sin.elements() / 2, kThreads), kThreads, positions.as<int32_t>(),
               inv_freq.as<float>(), cos_sin.as<float>(), cos_sin.dim(0), cos_sin.dim(1));
}

void rope_and_cache(Stream& stream, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin,
                    const AttentionBatch& batch, const Tensor& q_out, const KvLayer& cache) {
  if (q.dim(0) == 0) return;
  with_element_of(cache, [&]<typename Element>(Element) {
    queue_of(stream).launch(rope_and_cache_kernel<Element>, static_cast<unsigned>(q.dim(0)), kThreads,
                            Rope<Element>{.q = q.as<float>(),
                                          .k = k.as<float>(),
                                          .v = v.as<float>(),
                                          .cos_sin = cos_sin.as<float>(),
                                          .q_out = q_out.as<uint16_t>(),
                                          .cache = arguments<Element>(cache, batch),
                                          .heads = static_cast<int>(q.dim(1))});
  });
}

void attention(Stream& stream, const Tensor& q, const KvLayer& cache, const AttentionBatch& batch, const Tensor& out) {
  if (q.dim(0) == 0) return;
  Queue& queue = queue_of(stream);
  if (queue.arithmetic() == Arithmetic::kFast && has_flash_attention(q.dim(2))) {
    flash_attention(queue, q, cache, batch, out);
    return;
  }
  with_element_of(cache, [&]<typename Element>(Element) { attend<Element>(queue, q, cache, batch, out); });
}

void copy_blocks(Stream& stream, std::span<const int32_t> from, std::span<const int32_t> to, const KvLayer& cache) {
  if (from.empty()) return;
  Queue& queue = queue_of(stream);
  const int64_t words = cache.keys.bytes() / cache.keys.dim(0) / static_cast<int64_t>(sizeof(uint32_t));
  queue.launch(copy_blocks_kernel, blocks_for(words, kThreads), kThreads,
               BlockCopies{.keys = static_cast<uint32_t*>(cache.keys.data()),
                           .values = static_cast<uint32_t*>(cache.values.data()),
                           .from = queue.upload(from),
                           .to = queue.upload(to),
                           .count = static_cast<int64_t>(from.size()),
                           .words = words});
}

}  // namespace octet::cuda
