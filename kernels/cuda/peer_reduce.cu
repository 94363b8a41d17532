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
// peer that is one reduction ahead satisfies a wait as well; further ahead nobody can be.
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
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "kernels/check.h"
#include "kernels/cuda/arithmetic.cuh"
#include "kernels/cuda/peer.h"
#include "kernels/cuda/queue.h"
#include "kernels/cuda/signals.cuh"

namespace octet::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxBlocks = 32;
constexpr int kMaxPeerPieces = 32;
constexpr int kLeastElements = 512;  // of a block: fewer save nothing
constexpr int kGrain = 32;           // elements; blocks begin at multiples of it
constexpr int kMaxRow = 16384;       // elements of a row that is normalised: 32 KiB of shared memory
constexpr int kLooks = 64;           // at a signal, between two looks at the clock

// Points at which ranks meet.
enum { kPublished, kFinished, kPoints };

struct Window {
  // By point, block and rank: the last reduction in which that rank's block came there. Written by the peers.
  uint32_t signals[kPoints][kMaxBlocks][kMaxPeers];
  // The ledger: the owner's alone.
  uint32_t reductions[kMaxBlocks];  // finished so far; one number, of which each block has a copy
  uint32_t lost;                    // not 0 after a missed deadline
  int arrived[kMaxBlocks];          // elements of a row that are summed, while it is not complete
};
constexpr int64_t kAreasAt = (sizeof(Window) + 255) / 256 * 256;

struct Piece {
  const float* data;
  int64_t other_area;  // elements from area 0's to area 1's; 0 for this rank's own partials
};

struct Add {
  uint8_t into, from;
};

struct Norm {
  const float* weight;
  uint16_t* normed;  // null where it is quantised
  uint8_t* codes;
  float* scales;
  int n;
  float eps;
  bool fast_order;  // of the sum of squares
  bool dynamic;
  float upper_bound, static_scale;
};

// What every kernel has that meets others.
struct Meeting {
  int rank, ranks;
  Window* windows[kMaxPeers];
  int64_t area_bytes;
  uint64_t deadline_ns;
  PeerWait* told;  // memory of the host
  int blocks;
};

struct Reduction : Meeting {
  int64_t results_at;  // bytes from an area's begin
  int capacity;        // elements that an area holds of each piece
  int own_pieces, pieces;
  Piece piece[kMaxPeerPieces];  // left to right in the tree
  Add adds[kMaxPeerPieces];     // after the last one piece 0 is the sum

  const float* partials;  // [own_pieces, stride]
  int64_t stride;
  uint16_t* residual;
  int elements, per_block;
  bool two_shot;
  Norm norm;
};

// Bytes of every rank, in rank order. In words of `all`, of which a rank's part begins anywhere.
struct Gathering : Meeting {
  const void* mine;
  void* all;
  int64_t begin[kMaxPeers];
  int count[kMaxPeers];
  int per_block;
};

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

__device__ char* area_of(const Meeting& a, int rank, uint32_t reduction) {
  return reinterpret_cast<char*>(a.windows[rank]) + kAreasAt + (reduction & 1) * a.area_bytes;
}

// ---- Meeting

__device__ void tell(const Meeting& a, int peer, uint32_t reduction) {
  store_release(&a.windows[a.rank]->lost, 1);
  a.told->waited_for = peer;
  __threadfence_system();
  a.told->reduction = reduction;
}

__device__ bool wait_for(const Meeting& a, int peer, const uint32_t* signal, uint32_t reduction) {
  uint64_t begin = 0;
  for (int looks = 1; static_cast<int32_t>(load_acquire(signal) - reduction) < 0; ++looks) {
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
__device__ bool meet(const Meeting& a, int point, uint32_t reduction, bool lost) {
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
__device__ void enter_in_ledger(const Meeting& a, uint32_t reduction) {
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
__device__ void publish(const Reduction& a, const Range& run, const Range& own, uint32_t reduction) {
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
__device__ Floats<kWidth> sum_of_pieces(const Reduction& a, int i, uint32_t reduction) {
  constexpr int kMost = kLeaves > 0 ? kLeaves : kMaxPeerPieces;
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
__device__ void sum(const Reduction& a, const Range& range, uint32_t reduction, uint16_t* results) {
  for (int i = range.begin + kWidth * threadIdx.x; i < range.end; i += kWidth * kThreads) {
    const Floats<kWidth> sums = sum_of_pieces<kWidth, kLeaves>(a, i, reduction);
    auto values = load<Halves<kWidth>>(a.residual, i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) values.at[j] = float_to_bf16(bf16_to_float(values.at[j]) + sums.at[j]);
    store(a.residual, i, values);
    if (results != nullptr) store(results, i, values);
  }
}

__device__ uint16_t* results_of(const Reduction& a, int rank, uint32_t reduction) {
  return reinterpret_cast<uint16_t*>(area_of(a, rank, reduction) + a.results_at);
}

// What the other ranks summed of a block's run.
template <int kWidth>
__device__ void fetch(const Reduction& a, const Range& run, uint32_t reduction) {
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

// RMSNorm of a row of the residual, and its codes, operation for operation those of the separate ops.
template <int kWidth>
__device__ void finish_row(const Reduction& a, int row) {
  alignas(16) __shared__ uint16_t x[kMaxRow];
  __shared__ float factor;
  __shared__ unsigned largest;  // |x| as bits, of which a NaN's are the largest
  const Norm& norm = a.norm;
  const int64_t first = int64_t{row} * norm.n;
  if (threadIdx.x == 0) largest = 0;
#pragma unroll 4
  for (int i = kWidth * threadIdx.x; i < norm.n; i += kWidth * kThreads) {
    store(x, i, load<Halves<kWidth>>(a.residual, first + i));
  }
  __syncthreads();
  const float squares = norm.fast_order ? squares_in_fast_order(x, norm.n) : squares_in_lanes(x, norm.n);
  if (threadIdx.x == 0) factor = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(squares, static_cast<float>(norm.n)) + norm.eps));
  __syncthreads();
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
    if (norm.normed != nullptr) {
      store(norm.normed, first + i, values);
    } else {
      store(x, i, values);
    }
  }
  if (norm.normed == nullptr) {
    for (int width = kWarp / 2; width >= 1; width /= 2) {
      most = std::max(most, __shfl_xor_sync(0xFFFFFFFF, most, width));
    }
    if (threadIdx.x % kWarp == 0) atomicMax(&largest, most);
    __syncthreads();
    const float amax = std::bit_cast<float>(largest);
    float scale = norm.static_scale;
    if (norm.dynamic) {
      scale = __fdiv_rn(amax > norm.upper_bound ? norm.upper_bound : amax, 448.0f);
      if (scale < 1.0f / (448.0f * 512.0f)) scale = 1.0f / (448.0f * 512.0f);
    }
    const float inverse = __fdiv_rn(1.0f, scale);
#pragma unroll 4
    for (int i = kWidth * threadIdx.x; i < norm.n; i += kWidth * kThreads) {
      const auto values = load<Halves<kWidth>>(x, i);
      Codes<kWidth> codes;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) codes.at[j] = float_to_e4m3(bf16_to_float(values.at[j]) * inverse);
      store(norm.codes, first + i, codes);
    }
    if (threadIdx.x == 0) norm.scales[row] = amax == amax ? scale : amax;
  }
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
  const uint32_t reduction = own.reductions[blockIdx.x] + 1;
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
  const uint32_t reduction = own.reductions[blockIdx.x] + 1;
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

using Kernel = void (*)(Reduction);

template <int kWidth, int kLeaves>
Kernel kernel_of(bool norm) {
  return norm ? peer_reduce_kernel<kWidth, kLeaves, true> : peer_reduce_kernel<kWidth, kLeaves, false>;
}

// leaves: as kLeaves; only for vectors.
Kernel kernel_for(bool vectors, int leaves, bool norm) {
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

// ---- The host's side

constexpr int64_t kIpcGrain = int64_t{2} << 20;  // smaller allocations may share a block, and would be shown with it

int64_t align_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
bool is_aligned(const void* data, int64_t to) { return reinterpret_cast<uintptr_t>(data) % to == 0; }

// A window's memory on its device. Ranks of one process that look into it hold it too.
struct Memory {
  Memory(int device, void* data) : device(device), data(data) {}
  ~Memory() {
    if (shown) return;
    (void)cudaSetDevice(device);
    (void)cudaFree(data);
  }
  const int device;
  void* const data;
  bool shown = false;  // to other processes
};

// Windows of this process by their address on the device.
class Registry {
 public:
  void add(const std::shared_ptr<Memory>& memory) {
    const std::lock_guard lock(mutex_);
    windows_[address_of(*memory)] = memory;
  }
  std::shared_ptr<Memory> find(uint64_t address) {
    const std::lock_guard lock(mutex_);
    return windows_[address].lock();
  }
  static uint64_t address_of(const Memory& memory) { return reinterpret_cast<uintptr_t>(memory.data); }

 private:
  std::mutex mutex_;
  std::map<uint64_t, std::weak_ptr<Memory>> windows_;
};

Registry& registry() {
  static Registry& registry = *new Registry;
  return registry;
}

void name_process(unsigned char (&name)[16]) {
  static const uint64_t kRandom = std::uniform_int_distribution<uint64_t>()(*std::make_unique<std::random_device>());
  const uint64_t pid = static_cast<uint64_t>(getpid());  // asked each time: a forked process is another one
  std::memcpy(name, &kRandom, 8);
  std::memcpy(name + 8, &pid, 8);
}

// ---- The tree as additions in place

struct Tree {
  std::vector<int> owner;  // rank of each piece, left to right
  std::vector<Add> adds;
  int leaves = 0;  // as the kernel's kLeaves
};

void append_whole_tree(int first, int count, std::vector<int>& program) {
  if (count == 1) return program.push_back(first);
  append_whole_tree(first, count / 2, program);
  append_whole_tree(first + count / 2, count / 2, program);
  program.push_back(kAdd);
}

Tree tree_over(std::span<const SliceRun> runs) {
  Tree tree;
  std::vector<SliceNode> pieces;
  for (size_t rank = 0; rank < runs.size(); ++rank) {
    for (const SliceNode& node : maximal_subtrees(runs[rank])) {
      pieces.push_back(node);
      tree.owner.push_back(static_cast<int>(rank));
    }
  }
  const std::vector<int> program = sum_program(pieces, root_of(runs[0].total), runs[0].total);
  std::vector<int> stack;
  for (const int entry : program) {
    if (entry != kAdd) {
      stack.push_back(entry);
      continue;
    }
    tree.adds.push_back({static_cast<uint8_t>(stack.end()[-2]), static_cast<uint8_t>(stack.back())});
    stack.pop_back();
  }
  for (const int leaves : {2, 4, 8}) {
    std::vector<int> whole;
    append_whole_tree(0, leaves, whole);
    if (program == whole) tree.leaves = leaves;
  }
  return tree;
}

}  // namespace

class PeerWindow {
 public:
  PeerWindow(Queue* queue, const PeerOptions& options, Tree tree, std::shared_ptr<Memory> memory, int capacity);
  ~PeerWindow();
  PeerWindow(const PeerWindow&) = delete;

  PeerCard card() const;
  const char* look_into(int rank, const PeerCard& card);
  void limit_blocks(int blocks) { max_blocks_ = std::clamp(blocks, 1, kMaxBlocks); }
  bool fuses(int64_t tokens, int64_t n) const { return tokens <= max_blocks_ && n <= std::min(kMaxRow, capacity_); }
  void reduce(const PeerReduction& reduction);
  void gather(const Tensor& mine, std::span<const int64_t> bytes_of_rank, const Tensor& all);

 private:
  const char* look_into_neighbour(int rank, const PeerCard& card);
  const char* look_into_process(int rank, const PeerCard& card);
  const char* because(const std::string& what, cudaError_t error);
  void set_meeting(Meeting* a) const;
  Reduction prepared() const;
  void set_part(const PeerReduction& message, int64_t begin, int64_t count, Reduction* a) const;

  Queue* const queue_;
  const PeerOptions options_;  // without runs, which are the caller's
  const int ranks_;
  const Tree tree_;
  const std::shared_ptr<Memory> memory_;
  const int capacity_;
  int max_blocks_ = kMaxBlocks;
  void* windows_[kMaxPeers] = {};
  std::vector<std::shared_ptr<Memory>> neighbours_;
  std::string why_;
  PeerWait* told_ = nullptr;            // in memory of the host
  PeerWait* told_by_device_ = nullptr;  // the same, as the device sees it
};

namespace {

int most_pieces(const Tree& tree) {
  int most = 0;
  for (const int rank : tree.owner) {
    most = std::max(most, static_cast<int>(std::count(tree.owner.begin(), tree.owner.end(), rank)));
  }
  return most;
}

int64_t bytes_of_area(const Tree& tree, int64_t capacity) {
  return align_up(capacity * (most_pieces(tree) * int64_t{sizeof(float)} + int64_t{sizeof(uint16_t)}), 256);
}

bool quantises(const NormedInput& next) { return next.scheme.kind != ActivationScheme::Kind::kNone; }

// Whether everything can be read and written four elements at a time.
bool takes_vectors(const PeerReduction& message) {
  const NormedInput* const next = message.next;
  const int64_t unit = next == nullptr ? message.residual.elements() : message.residual.dim(1);
  if (unit % 4 != 0 || !is_aligned(message.partials.data(), 16) || !is_aligned(message.residual.data(), 8))
    return false;
  if (next == nullptr) return true;
  return is_aligned(next->weight.data(), 16) &&
         (quantises(*next) ? is_aligned(next->out.values.data(), 4) : is_aligned(next->normed.data(), 8));
}

// For the rows from `row` on.
Norm norm_of(const NormedInput& next, int64_t row, int64_t n, Arithmetic arithmetic) {
  const bool codes = quantises(next);
  return {.weight = next.weight.as<float>(),
          .normed = codes ? nullptr : next.normed.as<uint16_t>() + row * n,
          .codes = codes ? next.out.values.as<uint8_t>() + row * n : nullptr,
          .scales = codes ? next.out.scales.as<float>() + row : nullptr,
          .n = static_cast<int>(n),
          .eps = next.eps,
          .fast_order = arithmetic == Arithmetic::kFast && n % 8 == 0,
          .dynamic = next.scheme.kind == ActivationScheme::Kind::kDynamicPerToken,
          .upper_bound = next.scheme.upper_bound,
          .static_scale = next.scheme.scale};
}

PeerWindow* open_window(Queue* queue, const PeerOptions& options, const char** why) {
  if (options.runs.size() > kMaxPeers) {
    *why = "more than 8 ranks";
    return nullptr;
  }
  Tree tree = tree_over(options.runs);
  if (tree.owner.size() > kMaxPeerPieces) {
    *why = "the slices of the ranks have more than 32 subtrees";
    return nullptr;
  }
  const int64_t per_element = bytes_of_area(tree, 1 << 20) >> 20;
  const int capacity = static_cast<int>(
      std::clamp<int64_t>(options.area_bytes / per_element / kGrain * kGrain, kGrain, int64_t{1} << 28));
  const int64_t bytes = align_up(kAreasAt + 2 * bytes_of_area(tree, capacity), kIpcGrain);
  check(cudaSetDevice(queue->device()), "choosing the device");
  void* data = nullptr;
  if (cudaMalloc(&data, static_cast<size_t>(bytes)) != cudaSuccess) {
    (void)cudaGetLastError();  // the next call must not find it
    *why = "the GPU has no memory left for it";
    return nullptr;
  }
  auto memory = std::make_shared<Memory>(queue->device(), data);
  check(cudaMemsetAsync(data, 0, kAreasAt, queue->stream()), "clearing the window");
  queue->synchronize();
  registry().add(memory);
  return new PeerWindow(queue, options, std::move(tree), std::move(memory), capacity);
}

PeerCard card(const PeerWindow* window) { return window->card(); }
const char* look_into(PeerWindow* window, int rank, const PeerCard& card) { return window->look_into(rank, card); }
void limit_blocks(PeerWindow* window, int blocks) { window->limit_blocks(blocks); }
bool fuses(const PeerWindow* window, int64_t tokens, int64_t n) { return window->fuses(tokens, n); }
void reduce(PeerWindow* window, const PeerReduction& reduction) { window->reduce(reduction); }
void gather(PeerWindow* window, const Tensor& mine, std::span<const int64_t> bytes_of_rank, const Tensor& all) {
  window->gather(mine, bytes_of_rank, all);
}
void close_window(PeerWindow* window) { delete window; }

}  // namespace

const PeerTable kPeerTable = {.open = open_window,
                              .card = card,
                              .look_into = look_into,
                              .limit_blocks = limit_blocks,
                              .fuses = fuses,
                              .reduce = reduce,
                              .gather = gather,
                              .close = close_window};

PeerWindow::PeerWindow(Queue* queue, const PeerOptions& options, Tree tree, std::shared_ptr<Memory> memory,
                       int capacity)
    : queue_(queue),
      options_(options),
      ranks_(static_cast<int>(options.runs.size())),
      tree_(std::move(tree)),
      memory_(std::move(memory)),
      capacity_(capacity) {
  windows_[options_.rank] = memory_->data;
  void* told = nullptr;
  check(cudaHostAlloc(&told, sizeof(PeerWait), cudaHostAllocMapped), "allocating mapped memory of the host");
  told_ = new (told) PeerWait{};
  void* seen = nullptr;
  check(cudaHostGetDevicePointer(&seen, told, 0), "mapping memory of the host");
  told_by_device_ = static_cast<PeerWait*>(seen);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, peer_gather_kernel<Floats<4>>), "loading a kernel");
  check(cudaFuncGetAttributes(&attributes, peer_gather_kernel<uint8_t>), "loading a kernel");
  for (const bool norm : {false, true}) {
    for (const int leaves : {0, 2, 4, 8}) {
      check(cudaFuncGetAttributes(&attributes, kernel_for(true, leaves, norm)), "loading a kernel");
    }
    check(cudaFuncGetAttributes(&attributes, kernel_for(false, 0, norm)), "loading a kernel");
  }
  queue_->after_wait([this] {
    if (told_->reduction != 0) options_.lost(options_.context, *told_);
  });
}

PeerWindow::~PeerWindow() {
  queue_->synchronize();
  queue_->after_wait(nullptr);
  (void)cudaFreeHost(told_);
}

PeerCard PeerWindow::card() const {
  PeerCard card = {.address = Registry::address_of(*memory_), .ordinal = memory_->device};
  name_process(card.process);
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, memory_->device), "reading a device's properties");
  std::memcpy(card.device, &properties.uuid, sizeof(card.device));
  cudaIpcMemHandle_t handle = {};
  static_assert(sizeof(handle) == sizeof(card.handle));
  check(cudaSetDevice(memory_->device), "choosing the device");
  // Where that is refused a handle of zeros is what the others fail to open.
  if (cudaIpcGetMemHandle(&handle, memory_->data) == cudaSuccess) std::memcpy(card.handle, &handle, sizeof(handle));
  (void)cudaGetLastError();
  return card;
}

const char* PeerWindow::look_into(int rank, const PeerCard& card) {
  check(cudaSetDevice(memory_->device), "choosing the device");
  unsigned char here[16];
  name_process(here);
  const bool neighbour = std::memcmp(here, card.process, sizeof(here)) == 0;
  return neighbour ? look_into_neighbour(rank, card) : look_into_process(rank, card);
}

const char* PeerWindow::because(const std::string& what, cudaError_t error) {
  (void)cudaGetLastError();  // the next call must not find it
  why_ = what + ": " + cudaGetErrorString(error);
  return why_.c_str();
}

// In the same process an address is enough, if the devices reach one another.
const char* PeerWindow::look_into_neighbour(int rank, const PeerCard& card) {
  std::shared_ptr<Memory> memory = registry().find(card.address);
  if (memory == nullptr) return "that rank has closed its window";
  if (memory->device != memory_->device) {
    int can = 0;
    check(cudaDeviceCanAccessPeer(&can, memory_->device, memory->device), "asking which devices reach one another");
    if (can == 0) return "the two GPUs do not reach one another's memory";
    const cudaError_t error = cudaDeviceEnablePeerAccess(memory->device, 0);
    if (error != cudaSuccess && error != cudaErrorPeerAccessAlreadyEnabled) return because("peer access", error);
    (void)cudaGetLastError();
  }
  windows_[rank] = memory->data;
  neighbours_.push_back(std::move(memory));
  return nullptr;
}

const char* PeerWindow::look_into_process(int rank, const PeerCard& card) {
  cudaIpcMemHandle_t handle;
  std::memcpy(&handle, card.handle, sizeof(handle));
  const cudaError_t error = cudaIpcOpenMemHandle(&windows_[rank], handle, cudaIpcMemLazyEnablePeerAccess);
  if (error != cudaSuccess) return because("CUDA IPC", error);
  memory_->shown = true;
  return nullptr;
}

void PeerWindow::set_meeting(Meeting* a) const {
  a->rank = options_.rank;
  a->ranks = ranks_;
  for (int rank = 0; rank < ranks_; ++rank) a->windows[rank] = static_cast<Window*>(windows_[rank]);
  a->area_bytes = bytes_of_area(tree_, capacity_);
  a->deadline_ns = static_cast<uint64_t>(options_.deadline_ms) * 1000000;
  a->told = told_by_device_;
}

// All but the message.
Reduction PeerWindow::prepared() const {
  Reduction a = {};
  set_meeting(&a);
  a.results_at = int64_t{capacity_} * most_pieces(tree_) * int64_t{sizeof(float)};
  a.capacity = capacity_;
  a.pieces = static_cast<int>(tree_.owner.size());
  std::copy(tree_.adds.begin(), tree_.adds.end(), a.adds);
  int of_rank[kMaxPeers] = {};
  for (int p = 0; p < a.pieces; ++p) {
    const int owner = tree_.owner[p];
    const auto* const area = reinterpret_cast<const float*>(static_cast<const char*>(windows_[owner]) + kAreasAt);
    a.piece[p] = {.data = area + int64_t{of_rank[owner]++} * capacity_,
                  .other_area = a.area_bytes / int64_t{sizeof(float)}};
  }
  a.own_pieces = of_rank[options_.rank];
  return a;
}

// Elements [begin, begin + count) of a message. This rank's own pieces are read where they are.
void PeerWindow::set_part(const PeerReduction& message, int64_t begin, int64_t count, Reduction* a) const {
  a->stride = message.residual.elements();
  a->partials = message.partials.as<float>() + begin;
  a->residual = message.residual.as<uint16_t>() + begin;
  int own = 0;
  for (int p = 0; p < a->pieces; ++p) {
    if (tree_.owner[p] == options_.rank) a->piece[p] = {.data = a->partials + own++ * a->stride, .other_area = 0};
  }
  const int64_t blocks = std::clamp<int64_t>(count / kLeastElements, 1, max_blocks_);
  a->elements = static_cast<int>(count);
  a->per_block = static_cast<int>(align_up((count + blocks - 1) / blocks, kGrain));
  a->blocks = static_cast<int>(blocks_for(count, a->per_block));
}

void PeerWindow::reduce(const PeerReduction& message) {
  queue_->begin_op();
  const NormedInput* const next = message.next;
  const int64_t n = message.residual.dim(1), elements = message.residual.elements();
  OCTET_CHECK(next == nullptr || fuses(message.residual.dim(0), n),
              "residual " + message.residual.shape().to_string() + " is normalised elsewhere");
  const int64_t most = next == nullptr ? capacity_ : capacity_ / n * n;
  Reduction a = prepared();
  OCTET_CHECK(message.partials.elements() == a.own_pieces * elements,
              "partials " + message.partials.shape().to_string() + " do not fit residual " +
                  message.residual.shape().to_string());
  a.two_shot = message.shots == Shots::kTwo;
  const Kernel kernel = kernel_for(takes_vectors(message), tree_.leaves, next != nullptr);
  for (int64_t begin = 0; begin < elements; begin += most) {
    set_part(message, begin, std::min(most, elements - begin), &a);
    if (next != nullptr) a.norm = norm_of(*next, begin / n, n, queue_->arithmetic());
    queue_->launch(kernel, static_cast<unsigned>(a.blocks), kThreads, a);
  }
}

// Parts of all ranks' contributions, each from the same byte on.
void PeerWindow::gather(const Tensor& mine, std::span<const int64_t> bytes_of_rank, const Tensor& all) {
  queue_->begin_op();
  bool words = is_aligned(mine.data(), 16) && is_aligned(all.data(), 16);
  for (const int64_t bytes : bytes_of_rank) words = words && bytes % 16 == 0;
  const int64_t word = words ? 16 : 1;
  Gathering a = {};
  set_meeting(&a);
  const int64_t longest = *std::max_element(bytes_of_rank.begin(), bytes_of_rank.end());
  for (int64_t from = 0; from < longest; from += a.area_bytes) {
    a.mine = static_cast<const char*>(mine.data()) + from;
    a.all = all.data();
    int64_t before = 0, most = 0;
    for (int rank = 0; rank < ranks_; before += bytes_of_rank[rank++]) {
      const int64_t count = std::clamp<int64_t>(bytes_of_rank[rank] - from, 0, a.area_bytes) / word;
      a.begin[rank] = (before + from) / word;
      a.count[rank] = static_cast<int>(count);
      most = std::max(most, count);
    }
    const int64_t blocks = std::clamp<int64_t>(most / kThreads, 1, max_blocks_);
    a.per_block = static_cast<int>((most + blocks - 1) / blocks);
    a.blocks = static_cast<int>(blocks_for(most, a.per_block));
    queue_->launch(words ? peer_gather_kernel<Floats<4>> : peer_gather_kernel<uint8_t>, static_cast<unsigned>(a.blocks),
                   kThreads, a);
  }
}

}  // namespace octet::cuda
