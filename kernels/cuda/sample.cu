// Choosing tokens: one kernel finds the maxima of blocks of logits, a warp for each block; in the other a block of
// threads has a row. Where one token or a few dozen are likely, which is nearly always, most of the row is skipped by
// its maxima, and the time is that of reading it once; a whole row that is drawn from is read a few times, from the L2
// cache.
//
// The answer is worker/sampler.h's, to the bit. Sums of weights have its order (eight lanes in blocks of 1,024, then
// the blocks), but those of keep_heaviest(): there all terms have one exponent, so that in double no order rounds.
#include <algorithm>
#include <string>

#include "kernels/check.h"
#include "kernels/cuda/arithmetic.cuh"
#include "kernels/cuda/queue.h"
#include "kernels/cuda/sample.h"

namespace octet::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaximaThreads = 256;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

constexpr int kBlock = static_cast<int>(kMaximaBlock);
constexpr int kSumBlock = 1024, kSumLanes = 8;
constexpr int kMostSums = 1024;                            // blocks of a row that are summed
constexpr int kDigitBits = 10, kDigits = 1 << kDigitBits;  // of a weight
constexpr int kKeyDigits = 1 << 11;                        // of a logit's key
constexpr float kSmallestNormal = 1.17549435e-38f;
constexpr double kSmallestNormalDouble = 2.2250738585072014e-308;

struct Rows {
  const float* logits;
  const RowChoice* choices;
  char* scratch;
  ChosenRow* chosen;
  int64_t scratch_bytes;  // of a row
  int vocabulary, blocks;
};

// Weights, and their ids unless every token has one.
struct List {
  float* weights;
  int32_t* ids;
  int n;
};

// A row's share of the scratch memory.
struct RowScratch {
  uint32_t* maxima;  // keys
  List first, second;
};

__device__ RowScratch scratch_of(const Rows& a, int64_t row) {
  char* const memory = a.scratch + row * a.scratch_bytes;
  float* const numbers = reinterpret_cast<float*>(memory);
  const int64_t n = a.vocabulary;
  return {reinterpret_cast<uint32_t*>(numbers + 4 * n),
          {numbers, reinterpret_cast<int32_t*>(numbers + n), 0},
          {numbers + 2 * n, reinterpret_cast<int32_t*>(numbers + 3 * n), 0}};
}

// Unsigned numbers in the order of floats; denormals are zero, and both zeros equal.
__device__ uint32_t key_of(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7F800000) == 0) bits = 0;
  return bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFF : 0x80000000);
}
__device__ float value_of(uint32_t key) { return std::bit_cast<float>((key >> 31) != 0 ? key ^ 0x80000000 : ~key); }
constexpr uint32_t kMaskedKey = 0x007FFFFF;  // of -infinity

__device__ uint32_t largest_of_warp(uint32_t mine) {
  for (int width = kWarp / 2; width >= 1; width /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, mine, width);
    mine = other > mine ? other : mine;
  }
  return mine;
}

__global__ void maxima_kernel(Rows a) {
  const int64_t row = blockIdx.y;
  if (a.choices[row].kind == RowChoice::kNothing) return;
  const int block = static_cast<int>((blockIdx.x * kMaximaThreads + threadIdx.x) / kWarp);
  if (block >= a.blocks) return;
  const float* const logits = a.logits + row * a.vocabulary;
  uint32_t most = 0;
  for (int i = block * kBlock + static_cast<int>(threadIdx.x) % kWarp; i < lesser((block + 1) * kBlock, a.vocabulary);
       i += kWarp) {
    most = key_of(logits[i]) > most ? key_of(logits[i]) : most;
  }
  most = largest_of_warp(most);
  if (threadIdx.x % kWarp == 0) scratch_of(a, row).maxima[block] = most;
}

// ---- What the threads of a row share

struct Shared {
  union {
    unsigned counts[kKeyDigits];
    double lanes[kThreads];
    float block[kSumBlock];
  };
  double sums[kMostSums];
  unsigned of_warp[kWarps], ties_of_warp[kWarps];
  // What one thread found, for all of them.
  unsigned found, larger;
  double sum;
};

// ---- The largest

struct Largest {
  uint32_t key;  // of the last of them
  int larger;    // how many have a larger one
  bool all;      // there are fewer, and key means nothing
};

// The digit in which the `wanted`-th of the counted lies, from above, to shared.found, and how many lie above it, to
// shared.larger; kKeyDigits where fewer were counted. By the first warp.
__device__ void find_digit(Shared& shared, int digits, unsigned wanted) {
  const int lane = static_cast<int>(threadIdx.x), width = digits / kWarp, top = digits - 1 - lane * width;
  unsigned mine = 0;
  for (int i = 0; i < width; ++i) mine += shared.counts[top - i];
  shared.of_warp[lane] = mine;
  __syncwarp();
  unsigned above = 0;
  for (int i = 0; i < lane; ++i) above += shared.of_warp[i];
  if (lane == kWarp - 1 && above + mine < wanted) shared.found = kKeyDigits;
  if (above >= wanted || above + mine < wanted) return;
  for (int digit = top;; --digit) {
    if (above + shared.counts[digit] >= wanted) {
      shared.found = static_cast<unsigned>(digit);
      shared.larger = above;
      return;
    }
    above += shared.counts[digit];
  }
}

// The `count` largest of the keys that key(i) gives, i < n; 0: there is none. Digit by digit: nothing is sorted.
template <typename Key>
__device__ Largest find_largest(Shared& shared, int n, int count, const Key& key) {
  Largest result = {0, 0, false};
  int shift = 32;
  for (const int bits : {11, 11, 10}) {
    shift -= bits;
    const int digits = 1 << bits;
    for (int i = static_cast<int>(threadIdx.x); i < digits; i += kThreads) shared.counts[i] = 0;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
      const uint32_t k = key(i);
      const bool counts = k != 0 && (shift + bits == 32 || k >> (shift + bits) == result.key);
      if (counts) atomicAdd(&shared.counts[k >> shift & static_cast<uint32_t>(digits - 1)], 1u);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) find_digit(shared, digits, static_cast<unsigned>(count - result.larger));
    __syncthreads();
    if (shared.found == kKeyDigits) return {0, 0, true};
    result.key = result.key << bits | shared.found;
    result.larger += static_cast<int>(shared.larger);
    __syncthreads();
  }
  return result;
}

// ---- What is kept of a list

enum Keep { kDrop, kKeep, kTie };

__device__ unsigned below(int lane) { return (1u << lane) - 1; }
__device__ int ones(unsigned bits) { return __popc(bits); }

// Calls put(place, i) for the i < n that are kept, in their order: those that keep(i) wants, and of the ties the first
// `ties`. Returns how many. A warp has a run of them.
template <typename KeepIt, typename Put>
__device__ int compact(Shared& shared, int n, int ties, const KeepIt& keep, const Put& put) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int rounds = (n + kThreads - 1) / kThreads, first = warp * rounds * kWarp;
  int kept = 0, tied = 0;
  for (int i = first + lane, round = 0; round < rounds; ++round, i += kWarp) {
    const Keep mine = i < n ? keep(i) : kDrop;
    kept += ones(__ballot_sync(kAllLanes, mine == kKeep));
    tied += ones(__ballot_sync(kAllLanes, mine == kTie));
  }
  if (lane == 0) {
    shared.of_warp[warp] = static_cast<unsigned>(kept);
    shared.ties_of_warp[warp] = static_cast<unsigned>(tied);
  }
  __syncthreads();
  int place = 0, ties_before = 0, total = 0, all_ties = 0;
  for (int i = 0; i < kWarps; ++i) {
    const int theirs = static_cast<int>(shared.of_warp[i]);
    const int their_ties = static_cast<int>(shared.ties_of_warp[i]);
    if (i == warp) {
      place = total + lesser(all_ties, ties);
      ties_before = all_ties;
    }
    total += theirs;
    all_ties += their_ties;
  }
  total += lesser(all_ties, ties);
  for (int i = first + lane, round = 0; round < rounds; ++round, i += kWarp) {
    const Keep mine = i < n ? keep(i) : kDrop;
    const unsigned tie_votes = __ballot_sync(kAllLanes, mine == kTie);
    const bool stays = mine == kKeep || (mine == kTie && ties_before + ones(tie_votes & below(lane)) < ties);
    const unsigned votes = __ballot_sync(kAllLanes, stays);
    if (stays) put(place + ones(votes & below(lane)), i);
    place += ones(votes);
    ties_before += ones(tie_votes);
  }
  __syncthreads();
  return total;
}

// put(place, id) for the `count` best logits, ascending ids; fewer where the others are -infinity.
template <typename Put>
__device__ int take_best(Shared& shared, const Rows& a, const float* logits, const uint32_t* maxima, int count,
                         const Put& put) {
  // As many blocks as tokens are wanted have a maximum at or above the least one, hence so many tokens do.
  uint32_t least = kMaskedKey + 1;
  if (count < a.blocks) {
    const Largest blocks = find_largest(shared, a.blocks, count, [&](int i) { return maxima[i]; });
    if (!blocks.all && blocks.key > least) least = blocks.key;
  }
  const auto key = [&](int i) {
    if (maxima[i / kBlock] < least) return uint32_t{0};
    const uint32_t k = key_of(logits[i]);
    return k >= least ? k : uint32_t{0};
  };
  const Largest best = find_largest(shared, a.vocabulary, count, key);
  const auto keep = [&](int i) {
    const uint32_t k = key(i);
    if (k == 0) return kDrop;
    return best.all || k > best.key ? kKeep : k == best.key ? kTie : kDrop;
  };
  return compact(shared, a.vocabulary, count - best.larger, keep, put);
}

// ---- Sums, in the order of worker/sampler.cc

// The whole sum; those of its blocks to shared.sums.
__device__ double total_of(Shared& shared, const List& list) {
  const int blocks = (list.n + kSumBlock - 1) / kSumBlock, lane = static_cast<int>(threadIdx.x) % kSumLanes;
  constexpr int kAtOnce = kThreads / kSumLanes;
  for (int first = 0; first < blocks; first += kAtOnce) {
    const int block = first + static_cast<int>(threadIdx.x) / kSumLanes;
    const float* const members = list.weights + static_cast<int64_t>(block) * kSumBlock;
    const int size = block < blocks ? lesser(kSumBlock, list.n - block * kSumBlock) : 0;
    const int even = size / kSumLanes * kSumLanes;
    double sum = 0.0;
    for (int i = lane; i < even; i += kSumLanes) sum += static_cast<double>(members[i]);
    for (int i = even; lane == 0 && i < size; ++i) sum += static_cast<double>(members[i]);
    shared.lanes[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < kAtOnce && first + static_cast<int>(threadIdx.x) < blocks) {
      double whole = 0.0;
      for (int i = 0; i < kSumLanes; ++i) whole += shared.lanes[threadIdx.x * kSumLanes + i];
      shared.sums[first + static_cast<int>(threadIdx.x)] = whole;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int block = 0; block < blocks; ++block) total += shared.sums[block];
    shared.sum = total;
  }
  __syncthreads();
  const double total = shared.sum;
  __syncthreads();
  return total;
}

// The first index whose running sum exceeds u times the whole; never one of weight 0.
__device__ int index_at(Shared& shared, const List& list, double u) {
  const double target = u * total_of(shared, list);
  const int blocks = (list.n + kSumBlock - 1) / kSumBlock;
  if (threadIdx.x == 0) {
    unsigned block = 0;
    double before = 0.0, sum = 0.0;
    for (int next = 0; next < blocks && target >= sum; ++next) {
      if (!(shared.sums[next] > 0.0)) continue;
      block = static_cast<unsigned>(next);
      before = sum;
      sum += shared.sums[next];
    }
    shared.found = block;
    shared.sum = before;
  }
  __syncthreads();
  const int begin = static_cast<int>(shared.found) * kSumBlock, size = lesser(kSumBlock, list.n - begin);
  if (static_cast<int>(threadIdx.x) < size) shared.block[threadIdx.x] = list.weights[begin + threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    double before = shared.sum;
    unsigned last = 0;
    for (int i = 0; i < size && target >= before; ++i) {
      if (shared.block[i] > 0.0f) last = static_cast<unsigned>(i);
      before += static_cast<double>(shared.block[i]);
    }
    shared.found = static_cast<unsigned>(begin) + last;
  }
  __syncthreads();
  const int index = static_cast<int>(shared.found);
  __syncthreads();
  return index;
}

// ---- Tails

template <typename KeepIt>
__device__ List kept_of(Shared& shared, const List& list, bool has_ids, List to, int ties, const KeepIt& keep) {
  to.n = compact(
      shared, list.n, ties, [&](int i) { return keep(list.weights[i]); },
      [&](int place, int i) {
        to.weights[place] = list.weights[i];
        to.ids[place] = has_ids ? list.ids[i] : i;
      });
  return to;
}

// The lightest digit of those present that is needed to make up `target`; what is heavier is added to *heavier. By one
// thread.
__device__ unsigned lightest_digit(const Shared& shared, double target, double* heavier) {
  unsigned chosen = kDigits;
  for (int word = kWarps - 1; word >= 0; --word) {
    for (unsigned present = shared.of_warp[word]; present != 0;) {
      const int bit = kWarp - 1 - __clz(static_cast<int>(present));
      present &= ~(1u << bit);
      if (chosen < kDigits) *heavier += shared.sums[chosen];
      chosen = static_cast<unsigned>(word * kWarp + bit);
      if (*heavier + shared.sums[chosen] >= target) return chosen;
    }
  }
  return chosen;
}

// The heaviest weights (ties: the first) until their sum is `target`; at least one.
__device__ List keep_heaviest(Shared& shared, const List& list, List to, double target) {
  static_assert(kMostSums >= kDigits && kDigits == kThreads);
  target = target > kSmallestNormalDouble ? target : kSmallestNormalDouble;
  double heavier = 0.0;
  uint32_t lightest = 0;
  for (const int shift : {2 * kDigitBits, kDigitBits, 0}) {
    shared.sums[threadIdx.x] = 0.0;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < list.n; i += kThreads) {
      const uint32_t digits = std::bit_cast<uint32_t>(list.weights[i]) >> shift;
      if (digits >> kDigitBits == lightest) {
        atomicAdd(&shared.sums[digits % kDigits], static_cast<double>(list.weights[i]));
      }
    }
    __syncthreads();
    const unsigned present = __ballot_sync(kAllLanes, shared.sums[threadIdx.x] != 0.0);
    if (threadIdx.x % kWarp == 0) shared.of_warp[threadIdx.x / kWarp] = present;
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.found = lightest_digit(shared, target, &heavier);
      shared.sum = heavier;
    }
    __syncthreads();
    heavier = shared.sum;
    lightest = lightest << kDigitBits | shared.found;
    __syncthreads();
  }
  if (threadIdx.x == 0) {  // how many of the lightest are needed
    unsigned needed = 0;
    for (; needed < static_cast<unsigned>(list.n) && heavier < target; ++needed) {
      heavier += static_cast<double>(std::bit_cast<float>(lightest));
    }
    shared.found = needed;
  }
  __syncthreads();
  const int needed = static_cast<int>(shared.found);
  __syncthreads();
  return kept_of(shared, list, true, to, needed, [&](float weight) {
    const uint32_t bits = std::bit_cast<uint32_t>(weight);
    return bits > lightest ? kKeep : bits == lightest ? kTie : kDrop;
  });
}

// Weights from min_p on, and of them the heaviest until they make up top_p of what there was.
__device__ List cut_tail(Shared& shared, const List& list, bool has_ids, List to, List spare, const RowChoice& choice) {
  const double top_p = static_cast<double>(choice.top_p), total = total_of(shared, list);
  // Weights under this, were all others of them, could not make up the 1 - top_p that may be missing.
  const float negligible = static_cast<float>(0.99 * (1.0 - top_p) * total / static_cast<double>(list.n));
  float least = negligible > choice.min_p ? negligible : choice.min_p;
  least = kSmallestNormal > least ? kSmallestNormal : least;
  const List kept =
      kept_of(shared, list, has_ids, to, 0, [&](float weight) { return weight >= least ? kKeep : kDrop; });
  return top_p < 1.0 ? keep_heaviest(shared, kept, spare, top_p * total) : kept;
}

// ---- A row

__device__ uint32_t largest_of_row(Shared& shared, const uint32_t* maxima, int blocks) {
  uint32_t most = 0;
  for (int i = static_cast<int>(threadIdx.x); i < blocks; i += kThreads) most = maxima[i] > most ? maxima[i] : most;
  most = largest_of_warp(most);
  if (threadIdx.x % kWarp == 0) shared.of_warp[threadIdx.x / kWarp] = most;
  __syncthreads();
  most = shared.of_warp[0];
  for (int i = 1; i < kWarps; ++i) most = shared.of_warp[i] > most ? shared.of_warp[i] : most;
  __syncthreads();
  return most;
}

// The first of the largest logits.
__device__ int first_best(Shared& shared, const Rows& a, const float* logits, const uint32_t* maxima, uint32_t most) {
  if (threadIdx.x == 0) shared.found = static_cast<unsigned>(a.vocabulary) - 1;
  __syncthreads();
  for (int block = static_cast<int>(threadIdx.x); block < a.blocks; block += kThreads) {
    if (maxima[block] != most) continue;
    int id = block * kBlock;
    while (key_of(logits[id]) != most) ++id;
    atomicMin(&shared.found, static_cast<unsigned>(id));
    break;
  }
  __syncthreads();
  const int best = static_cast<int>(shared.found);
  __syncthreads();
  return best;
}

__device__ int drawn(Shared& shared, const Rows& a, const float* logits, const RowScratch& scratch, float max,
                     const RowChoice& choice) {
  List list = scratch.first;
  const auto weight = [&](int id) { return exponential((logits[id] - max) * choice.scale); };
  const bool has_ids = choice.top_k > 0 && choice.top_k < a.vocabulary;
  if (has_ids) {
    list.n = take_best(shared, a, logits, scratch.maxima, choice.top_k, [&](int place, int id) {
      list.weights[place] = weight(id);
      list.ids[place] = id;
    });
  } else {
    list.n = a.vocabulary;
    for (int id = static_cast<int>(threadIdx.x); id < list.n; id += kThreads) list.weights[id] = weight(id);
    __syncthreads();
  }
  const bool cuts = choice.top_p < 1.0f || choice.min_p > 0.0f;
  if (cuts) list = cut_tail(shared, list, has_ids, scratch.second, scratch.first, choice);
  const int index = index_at(shared, list, choice.uniform);
  return has_ids || cuts ? list.ids[index] : index;
}

__global__ void __launch_bounds__(kThreads) choose_kernel(Rows a) {
  __shared__ Shared shared;
  const int64_t row = blockIdx.x;
  const RowChoice choice = a.choices[row];
  if (choice.kind == RowChoice::kNothing) return;
  const float* const logits = a.logits + row * a.vocabulary;
  const RowScratch scratch = scratch_of(a, row);
  ChosenRow& out = a.chosen[row];
  const uint32_t most = largest_of_row(shared, scratch.maxima, a.blocks);
  const int token = choice.kind == RowChoice::kGreedy ? first_best(shared, a, logits, scratch.maxima, most)
                                                      : drawn(shared, a, logits, scratch, value_of(most), choice);
  if (threadIdx.x == 0) out.chosen = {token, logits[token]};
  if (choice.alternatives == 0) return;
  const int found = take_best(shared, a, logits, scratch.maxima, choice.alternatives, [&](int place, int id) {
    out.alternatives[place] = {id, logits[id]};
  });
  const int at = static_cast<int>(threadIdx.x);
  if (at >= found && at < choice.alternatives) out.alternatives[at] = {-1, 0.0f};
}

}  // namespace

void sample(Queue* queue, const SampleArguments& arguments) {
  const int64_t rows = arguments.logits.dim(0), vocabulary = arguments.logits.dim(1);
  OCTET_CHECK(vocabulary >= 1 && vocabulary <= int64_t{kMostSums} * kSumBlock,
              "a vocabulary of " + std::to_string(vocabulary) + " tokens");
  OCTET_CHECK(arguments.choices.bytes() == rows * static_cast<int64_t>(sizeof(RowChoice)) &&
                  arguments.chosen.bytes() == rows * static_cast<int64_t>(sizeof(ChosenRow)) &&
                  arguments.scratch.bytes() == rows * sample_scratch_bytes(vocabulary),
              "choices for " + std::to_string(rows) + " rows");
  if (rows == 0) return;
  queue->begin_op();
  const Rows a = {.logits = arguments.logits.as<float>(),
                  .choices = static_cast<const RowChoice*>(arguments.choices.data()),
                  .scratch = static_cast<char*>(arguments.scratch.data()),
                  .chosen = static_cast<ChosenRow*>(arguments.chosen.data()),
                  .scratch_bytes = sample_scratch_bytes(vocabulary),
                  .vocabulary = static_cast<int>(vocabulary),
                  .blocks = static_cast<int>((vocabulary + kMaximaBlock - 1) / kMaximaBlock)};
  queue->launch(maxima_kernel, dim3(blocks_for(a.blocks, kMaximaThreads / kWarp), static_cast<unsigned>(rows)),
                kMaximaThreads, a);
  queue->launch(choose_kernel, static_cast<unsigned>(rows), kThreads, a);
}

}  // namespace octet::cuda
