// All-reduce over peer memory: the sum over slices of numerics, the residual, and what follows it, in one kernel whose
// blocks meet the blocks of the same number on the other ranks. Parallel over elements: block b has one run of them on
// every rank. Bound by the trip of a signal between GPUs for small messages, by their links for large ones.
//
//   one-shot                                         two-shot (share r of a block's run is rank r's)
//   rank 0                 rank 1                    rank 0                        rank 1
//   own pieces -> window   own pieces -> window      pieces of share 1 -> window   pieces of share 0 -> window
//        \_____ published _____/                          \______ published ____________/
//   all pieces -> tree     all pieces -> tree        share 0: pieces -> tree       share 1: pieces -> tree
//   -> residual            -> residual               -> residual, window           -> residual, window
//                                                         \______ finished _____________/
//                                                    share 1 -> residual           share 0 -> residual
//   then, if asked: whoever completes a row of the residual normalises it (and quantises it)
//
// A window is [signals | ledger | area 0 | area 1]. Pieces are copied to it, not made there: partials of a long prefill
// are larger than any window, and a captured graph has one address for them, while areas take turns; the copy reads
// what has just been written and lies in L2.
//
// Signals are pushed: rank r stores the number of the reduction in every peer's memory, and polls its own. The number
// comes from the ledger, which the kernel itself keeps, so that a replayed graph goes on counting. It only grows, so a
// peer that is one reduction ahead satisfies a wait as well; further ahead nobody can be. It has 64 bits: a signal of a
// block that only long messages have may be billions behind, which 32 would take for ahead.
//
// Why two areas are enough. In reduction e a rank writes area e mod 2, last used in e - 2. Its kernel of e - 1 is over,
// so each of its blocks of e - 1 has seen every peer's signal e - 1; a peer gives that after its whole kernel of e - 2,
// with all its reads of others' areas, is over, as kernels of a stream follow one another (this needs that: no
// programmatic dependent launch before the ledger is read). It does not matter which blocks the elements had then.
//
// Why nobody waits for ever. A block waits only for the block of its number on other ranks, so all ranks' blocks must
// find room at once, even with all ranks on one GPU: at most 32 blocks of 512 threads, one block for each of the 132
// (A100: 108) multiprocessors where ranks have a GPU each; threads of one process that share one get fewer
// (limit_blocks()); processes that share one take turns in time. Kernels are loaded when the window is opened, as
// loading them later may wait for the device. A wait has a deadline: then the rank says for whom it waited, in memory
// of the host, and signals nothing any more, so that nobody takes what it has for a sum.
#include <algorithm>

#include "kernels/cuda/arithmetic.cuh"
#include "kernels/cuda/peer_message.h"
#include "kernels/cuda/queue.h"
#include "kernels/cuda/signals.cuh"

namespace octet::cuda::peer {
namespace {

constexpr unsigned kLooks = 64;  // at a signal, between two looks at the clock

struct Range {
  int begin, end;
};

template <int kWidth>
struct alignas(4 * kWidth) Floats {
  float at[kWidth];
};
template <int kWidth>
struct alignas(2 * kWidth) Halves {
  uint16_t at[kWidth];
};
template <int kWidth>
struct alignas(kWidth) Codes {
  uint8_t at[kWidth];
};

template <typename Vector>
__device__ Vector load(const void* begin, int64_t element) {
  return static_cast<const Vector*>(begin)[element / static_cast<int>(sizeof(Vector::at) / sizeof(Vector::at[0]))];
}
template <typename Vector>
__device__ void store(void* begin, int64_t element, const Vector& vector) {
  static_cast<Vector*>(begin)[element / static_cast<int>(sizeof(Vector::at) / sizeof(Vector::at[0]))] = vector;
}

__device__ int earlier(int a, int b) { return a < b ? a : b; }
__device__ int later(int a, int b) { return a > b ? a : b; }

__device__ char* area_of(const Meeting& a, int rank, uint64_t reduction) {
  return reinterpret_cast<char*>(a.windows[rank]) + kAreasAt + (reduction & 1) * a.area_bytes;
}

// ---- Meeting

__device__ void tell(const Meeting& a, int peer, uint64_t reduction) {
  store_release(&a.windows[a.rank]->lost, 1);
  a.told->waited_for = peer;
  __threadfence_system();
  a.told->reduction = reduction;
}

__device__ bool wait_for(const Meeting& a, int peer, const uint64_t* signal, uint64_t reduction) {
  uint64_t begin = 0;
  for (unsigned looks = 1; load_acquire(signal) < reduction; ++looks) {
    pause();
    if (looks % kLooks != 0) continue;
    if (load_acquire(&a.windows[a.rank]->lost) != 0) return false;
    const uint64_t now = clock_ns();
    if (begin == 0) begin = now;
    if (now - begin < a.deadline_ns) continue;
    tell(a, peer, reduction);
    return false;
  }
  return true;
}

// The blocks of this number have all come to `point`, and what they wrote before can be read. False: one did not come.
__device__ bool meet(const Meeting& a, int point, uint64_t reduction, bool lost) {
  __syncthreads();  // what the whole block wrote is before the signals of its first threads
  const int peer = static_cast<int>(threadIdx.x);
  bool met = !lost;
  if (met && peer < a.ranks) {
    store_release(&a.windows[peer]->signals[point][blockIdx.x][a.rank], reduction);
    met = wait_for(a, peer, &a.windows[a.rank]->signals[point][blockIdx.x][peer], reduction);
  }
  return __syncthreads_and(met) != 0;
}

// Counts the reduction that is over. One thread of each block calls it, as the last thing.
__device__ void enter_in_ledger(const Meeting& a, uint64_t reduction) {
  for (int block = static_cast<int>(blockIdx.x); block < kMaxBlocks; block += a.blocks) {
    a.windows[a.rank]->reductions[block] = reduction;  // which no other block of this kernel reads or writes
  }
}

// ---- Sums

// The part of a block's run that a rank sums in two shots.
__device__ Range share_of(const Reduction& a, const Range& run, int rank) {
  const int each = ((run.end - run.begin + a.ranks - 1) / a.ranks + 3) / 4 * 4;
  return {earlier(run.begin + rank * each, run.end), earlier(run.begin + (rank + 1) * each, run.end)};
}

template <int kWidth>
__device__ void publish(const Reduction& a, const Range& run, const Range& own, uint64_t reduction) {
  auto* const pieces = reinterpret_cast<float*>(area_of(a, a.rank, reduction));
  for (int p = 0; p < a.own_pieces; ++p) {
    for (int i = run.begin + kWidth * threadIdx.x; i < run.end; i += kWidth * kThreads) {
      if (i >= own.begin && i < own.end) continue;
      store(pieces, int64_t{p} * a.capacity + i, load<Floats<kWidth>>(a.partials, p * a.stride + i));
    }
  }
}

template <int kWidth>
__device__ void add(Floats<kWidth>& into, const Floats<kWidth>& from) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) into.at[j] += from.at[j];
}

// kLeaves: how many pieces there are where they are the leaves of a whole tree, which then stays in registers; 0: any
// cover.
template <int kWidth, int kLeaves>
__device__ Floats<kWidth> sum_of_pieces(const Reduction& a, int i, uint64_t reduction) {
  constexpr int kMost = kLeaves > 0 ? kLeaves : kMaxPieces;
  Floats<kWidth> values[kMost];
  const auto value = [&](int p) {
    return load<Floats<kWidth>>(a.piece[p].data + (reduction & 1) * a.piece[p].other_area, i);
  };
  if constexpr (kLeaves > 0) {
#pragma unroll
    for (int p = 0; p < kLeaves; ++p) values[p] = value(p);
#pragma unroll
    for (int width = 1; width < kLeaves; width *= 2) {
#pragma unroll
      for (int p = 0; p < kLeaves; p += 2 * width) add(values[p], values[p + width]);
    }
  } else {
#pragma unroll 4
    for (int p = 0; p < a.pieces; ++p) values[p] = value(p);
    for (int step = 0; step + 1 < a.pieces; ++step) add(values[a.adds[step].into], values[a.adds[step].from]);
  }
  return values[0];
}

// results: where the sums go too, or null.
template <int kWidth, int kLeaves>
__device__ void sum(const Reduction& a, const Range& range, uint64_t reduction, uint16_t* results) {
  for (int i = range.begin + kWidth * threadIdx.x; i < range.end; i += kWidth * kThreads) {
    const Floats<kWidth> sums = sum_of_pieces<kWidth, kLeaves>(a, i, reduction);
    auto values = load<Halves<kWidth>>(a.residual, i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) values.at[j] = float_to_bf16(bf16_to_float(values.at[j]) + sums.at[j]);
    store(a.residual, i, values);
    if (results != nullptr) store(results, i, values);
  }
}

__device__ uint16_t* results_of(const Reduction& a, int rank, uint64_t reduction) {
  return reinterpret_cast<uint16_t*>(area_of(a, rank, reduction) + a.results_at);
}

// What the other ranks summed of a block's run.
template <int kWidth>
__device__ void fetch(const Reduction& a, const Range& run, uint64_t reduction) {
  const Range first = share_of(a, run, 0);
  const int each = first.end - first.begin;
  for (int i = run.begin + kWidth * threadIdx.x; i < run.end; i += kWidth * kThreads) {
    const int owner = (i - run.begin) / each;
    if (owner == a.rank) continue;
    store(a.residual, i, load<Halves<kWidth>>(results_of(a, owner, reduction), i));
  }
}

// ---- What follows

// The order of rms_norm() and the CPU: sixteen lanes. The result is thread 0's.
__device__ float squares_in_lanes(const uint16_t* x, int n) {
  if (threadIdx.x >= kLanes) return 0;
  float squares = 0;
#pragma unroll 16
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kLanes) {
    const float value = bf16_to_float(x[i]);
    squares = __fmaf_rn(value, value, squares);
  }
  return sum_lanes(squares);
}

// The order of rms_norm_and_quantize() in fast arithmetic: 1024 threads that read eight elements at a time, twice as
// many as there are here. The result is everybody's.
__device__ float squares_in_fast_order(const uint16_t* x, int n) {
  constexpr int kVector = 8, kTheirThreads = kWarp * kWarp;
  __shared__ float of_warp[kWarp];
  for (int thread = static_cast<int>(threadIdx.x); thread < kTheirThreads; thread += kThreads) {
    float squares = 0;
    for (int at = thread * kVector; at < n; at += kTheirThreads * kVector) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float value = bf16_to_float(x[at + i]);
        squares = __fmaf_rn(value, value, squares);
      }
    }
    for (int width = kWarp / 2; width >= 1; width /= 2) squares += __shfl_xor_sync(0xFFFFFFFF, squares, width);
    if (thread % kWarp == 0) of_warp[thread / kWarp] = squares;
  }
  __syncthreads();
  float sum = of_warp[threadIdx.x % kWarp];
  for (int width = kWarp / 2; width >= 1; width /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, width);
  return sum;
}

// The codes of a normed row in shared memory. most: the greatest magnitude of this thread's elements, as bits, of which
// a NaN's are the largest.
template <int kWidth>
__device__ void quantize_row(const Norm& norm, const uint16_t* x, int row, unsigned most) {
  __shared__ unsigned largest;
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  for (int width = kWarp / 2; width >= 1; width /= 2) most = std::max(most, __shfl_xor_sync(0xFFFFFFFF, most, width));
  if (threadIdx.x % kWarp == 0) atomicMax(&largest, most);
  __syncthreads();
  const float amax = std::bit_cast<float>(largest);
  const float scale = norm.dynamic ? dynamic_scale(amax, norm.upper_bound) : norm.static_scale;
  const float inverse = __fdiv_rn(1.0f, scale);
#pragma unroll 4
  for (int i = kWidth * threadIdx.x; i < norm.n; i += kWidth * kThreads) {
    const auto values = load<Halves<kWidth>>(x, i);
    Codes<kWidth> codes;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) codes.at[j] = float_to_e4m3(bf16_to_float(values.at[j]) * inverse);
    store(norm.codes, int64_t{row} * norm.n + i, codes);
  }
  if (threadIdx.x == 0) norm.scales[row] = amax == amax ? scale : amax;
}

// RMSNorm of a row of the residual, and its codes, operation for operation those of the separate ops.
template <int kWidth>
__device__ void finish_row(const Reduction& a, int row) {
  alignas(16) __shared__ uint16_t x[kMaxRow];
  __shared__ float factor;
  const Norm& norm = a.norm;
  const int64_t first = int64_t{row} * norm.n;
#pragma unroll 4
  for (int i = kWidth * threadIdx.x; i < norm.n; i += kWidth * kThreads) {
    store(x, i, load<Halves<kWidth>>(a.residual, first + i));
  }
  __syncthreads();
  const float squares = norm.fast_order ? squares_in_fast_order(x, norm.n) : squares_in_lanes(x, norm.n);
  if (threadIdx.x == 0) factor = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(squares, static_cast<float>(norm.n)) + norm.eps));
  __syncthreads();
  const bool quantises = norm.normed == nullptr;
  unsigned most = 0;
#pragma unroll 4
  for (int i = kWidth * threadIdx.x; i < norm.n; i += kWidth * kThreads) {
    auto values = load<Halves<kWidth>>(x, i);
    const auto weights = load<Floats<kWidth>>(norm.weight, i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      values.at[j] = float_to_bf16(bf16_to_float(values.at[j]) * factor * weights.at[j]);
      most = std::max(most, static_cast<unsigned>(values.at[j] & 0x7FFF) << 16);
    }
    quantises ? store(x, i, values) : store(norm.normed, first + i, values);
  }
  if (quantises) quantize_row<kWidth>(norm, x, row, most);
  __syncthreads();  // the next row may have the shared memory
}

// Whether this block's `summed` elements complete a row; then all of it can be read. One thread calls it.
__device__ bool completes(const Reduction& a, int row, int summed) {
  if (summed == a.norm.n) return true;
  int* const arrived = &a.windows[a.rank]->arrived[row];
  __threadfence();
  const bool last = atomicAdd(arrived, summed) + summed == a.norm.n;
  __threadfence();
  if (last) *arrived = 0;
  return last;
}

template <int kWidth>
__device__ void finish_rows(const Reduction& a, const Range& run) {
  __shared__ bool complete;
  const int n = a.norm.n;
  for (int row = run.begin / n; row * n < run.end; ++row) {
    __syncthreads();  // the block's part of it is written
    if (threadIdx.x == 0) complete = completes(a, row, earlier(run.end, (row + 1) * n) - later(run.begin, row * n));
    __syncthreads();
    if (complete) finish_row<kWidth>(a, row);
  }
}

// The norm's weights come from far and are needed last.
__device__ void prefetch_weights(const Norm& norm) {
  constexpr int kLine = 32;  // floats
  const int at = kLine * static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (at < norm.n) prefetch(norm.weight + at);
}

// ---- The kernel

template <int kWidth, int kLeaves, bool kNorm>
__global__ void __launch_bounds__(kThreads) peer_reduce_kernel(const __grid_constant__ Reduction a) {
  Window& own = *a.windows[a.rank];
  const uint64_t reduction = own.reductions[blockIdx.x] + 1;
  const bool lost = own.lost != 0;
  const int begin = static_cast<int>(blockIdx.x) * a.per_block;
  const Range run = {begin, earlier(begin + a.per_block, a.elements)};
  const Range share = share_of(a, run, a.rank);
  if constexpr (kNorm) prefetch_weights(a.norm);
  if (a.ranks > 1) publish<kWidth>(a, run, a.two_shot ? share : Range{run.end, run.end}, reduction);
  if (!meet(a, kPublished, reduction, lost)) return;
  if (a.two_shot) {
    sum<kWidth, kLeaves>(a, share, reduction, results_of(a, a.rank, reduction));
    if (!meet(a, kFinished, reduction, false)) return;
    fetch<kWidth>(a, run, reduction);
  } else {
    sum<kWidth, kLeaves>(a, run, reduction, nullptr);
  }
  if constexpr (kNorm) finish_rows<kWidth>(a, run);
  if (threadIdx.x == 0) enter_in_ledger(a, reduction);
}

// One-shot without the sum: counts as a reduction.
template <typename Word>
__global__ void __launch_bounds__(kThreads) peer_gather_kernel(const __grid_constant__ Gathering a) {
  const Window& own = *a.windows[a.rank];
  const uint64_t reduction = own.reductions[blockIdx.x] + 1;
  const bool lost = own.lost != 0;
  const int begin = static_cast<int>(blockIdx.x) * a.per_block, end = begin + a.per_block;
  const auto* const mine = static_cast<const Word*>(a.mine);
  auto* const shown = reinterpret_cast<Word*>(area_of(a, a.rank, reduction));
  for (int i = begin + static_cast<int>(threadIdx.x); i < earlier(end, a.count[a.rank]); i += kThreads) {
    shown[i] = mine[i];
  }
  if (!meet(a, kPublished, reduction, lost)) return;
  for (int rank = 0; rank < a.ranks; ++rank) {
    const auto* const from = reinterpret_cast<const Word*>(area_of(a, rank, reduction));
    auto* const to = static_cast<Word*>(a.all) + a.begin[rank];
    for (int i = begin + static_cast<int>(threadIdx.x); i < earlier(end, a.count[rank]); i += kThreads) to[i] = from[i];
  }
  if (threadIdx.x == 0) enter_in_ledger(a, reduction);
}

template <int kWidth, int kLeaves>
ReduceKernel kernel_of(bool norm) {
  return norm ? peer_reduce_kernel<kWidth, kLeaves, true> : peer_reduce_kernel<kWidth, kLeaves, false>;
}

}  // namespace

ReduceKernel reduce_kernel(bool vectors, int leaves, bool norm) {
  if (!vectors) return kernel_of<1, 0>(norm);
  switch (leaves) {
    case 2:
      return kernel_of<4, 2>(norm);
    case 4:
      return kernel_of<4, 4>(norm);
    case 8:
      return kernel_of<4, 8>(norm);
    default:
      return kernel_of<4, 0>(norm);
  }
}

GatherKernel gather_kernel(bool words) { return words ? peer_gather_kernel<Floats<4>> : peer_gather_kernel<uint8_t>; }

void load_kernels() {
  cudaFuncAttributes attributes;
  for (const bool norm : {false, true}) {
    for (const int leaves : {0, 2, 4, 8}) {
      check(cudaFuncGetAttributes(&attributes, reduce_kernel(true, leaves, norm)), "loading a kernel");
    }
    check(cudaFuncGetAttributes(&attributes, reduce_kernel(false, 0, norm)), "loading a kernel");
  }
  for (const bool words : {false, true}) {
    check(cudaFuncGetAttributes(&attributes, gather_kernel(words)), "loading a kernel");
  }
}

}  // namespace octet::cuda::peer
