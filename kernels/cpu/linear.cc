// Linear layers over packed panels: parallel over groups of panels; with few tokens bound by reading the weights once,
// with many by the dot instructions.
//
// K is cut into blocks, so small that a block's activations and expanded weights stay in L1. Activations are packed
// block by block, in tiles of a few rows. With one tile the dots read packed weights, of up to four panels at once;
// with more they read a panel's block that was expanded once for all tiles. Either way the block that comes next is
// fetched meanwhile. A row's accumulator visits its K pairs in order whatever the tile, the block or the group.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/packed.h"
#include "kernels/cpu/thread_pool.h"

namespace octet::cpu {
namespace {

constexpr int kMaxGroup = 4;          // panels of one work item
constexpr int64_t kTokenBlock = 504;  // tokens whose accumulators and activations stay in L2 beside a block of weights
constexpr int64_t kAheadBytes = 8 << 10;      // packed weights fetched ahead of the dots: more would leave L1 again
constexpr int64_t kExpandedBytes = 32 << 10;  // an expanded block stays in L1 while all tiles pass

int group_bytes(const Linear& weight) { return weight.weight.dtype() == DType::kBF16 ? kBf16Group : kFp8Group; }
int64_t panels_of(const Linear& weight) { return (weight.out_features + kPanel - 1) / kPanel; }

// One slice's columns, and what its finished leaf is merged with. A plain layer has a single leaf.
struct Leaf {
  int64_t first_pair = 0;
  int64_t pairs = 0;
  int64_t scale_group = 0;
  int merges = 0;    // nodes that this leaf completes: it is added to so many waiting results
  int slot = -1;     // where its result waits, or -1: it goes to the output
  int64_t node = 0;  // which output
};

struct Job {
  const Linear* weight;
  float* out;  // [nodes, tokens, out_features]
  int64_t node_stride;
};

// A group of neighbouring panels of one matrix.
struct Group {
  int job;
  int64_t panel;
  int count;
};

// Balanced tiles: 13 rows are 7 + 6, never 12 + 1, because a lone row waits for its own sums.
struct Tiling {
  int64_t tokens;
  int64_t tiles;
  int64_t first_row(int64_t tile) const { return tile * tokens / tiles; }
  int rows(int64_t tile) const { return static_cast<int>(first_row(tile + 1) - first_row(tile)); }
};

Tiling tile(int64_t tokens, int tile_rows) { return {tokens, (tokens + tile_rows - 1) / tile_rows}; }

class LinearPass {
 public:
  LinearPass(Stream& stream, const Activations& x, std::span<const Job> jobs, std::span<const Leaf> leaves, int slots)
      : stream_(stream),
        kernels_(stream.kernels()),
        x_(x),
        jobs_(jobs),
        leaves_(leaves),
        slots_(slots),
        pairs_(x.values.dim(1) / 2),
        groups_of_scales_(x.scales.empty() ? 0 : x.scales.dim(1)) {}

  void run() {
    const int64_t tokens = x_.values.dim(0);
    const int64_t blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
    for (int64_t block = 0; block < blocks; ++block) {
      first_token_ = block * tokens / blocks;
      run_block((block + 1) * tokens / blocks - first_token_);
    }
  }

 private:
  void run_block(int64_t tokens) {
    direct_ = tokens <= kernels_.direct_rows;
    tiling_ = tile(tokens, direct_ ? kernels_.direct_rows : kernels_.tile_rows);
    format_ = direct_ ? kernels_.direct_format(static_cast<int>(tokens)) : kernels_.expanded_format;
    block_pairs_ = direct_ ? direct_block_pairs() : kExpandedBytes / kernels_.expanded_group;
    pack_activations();
    make_groups();
    stream_.pool().parallel_for(static_cast<int64_t>(groups_.size()), weight_nanoseconds(),
                                [&](int64_t item, int worker) { run_group(item, worker); });
  }

  // A block is what is fetched ahead, of as many panels as the dots read side by side.
  int64_t direct_block_pairs() const {
    int64_t widest = kFp8Group;
    for (const Job& job : jobs_) widest = std::max<int64_t>(widest, group_bytes(*job.weight));
    return std::max<int64_t>(kAheadBytes / (widest * kernels_.panels_at_once(tiling_.rows(0))), 16);
  }

  int64_t pair_bytes() const { return format_ == PairFormat::kBf16 ? 4 : 8; }
  // [blocks][tiles][pairs][rows]
  int64_t packed_offset(int64_t tile, int64_t pair) const {
    const int64_t block = pair / block_pairs_ * block_pairs_;
    const int64_t pairs = std::min(block_pairs_, pairs_ - block);
    const int64_t before =
        block * tiling_.tokens + tiling_.first_row(tile) * pairs + (pair - block) * tiling_.rows(tile);
    return before * pair_bytes();
  }
  // How many of the pairs [pair, end) lie in pair's block.
  int64_t pairs_in_block(int64_t pair, int64_t end) const {
    return std::min(end, (pair / block_pairs_ + 1) * block_pairs_) - pair;
  }

  // A very rough guess: 16 bytes or 64 multiply-adds a nanosecond.
  int64_t weight_nanoseconds() const {
    int64_t nanoseconds = 0;
    for (const Job& job : jobs_) {
      const int64_t panels = panels_of(*job.weight);
      nanoseconds += panels * pairs_ * (group_bytes(*job.weight) / 16 + tiling_.tokens);
    }
    return nanoseconds;
  }

  // A single BF16 row is a packed tile already. Otherwise tiles are packed, codes decoded on the way.
  void pack_activations() {
    const bool codes = x_.values.dtype() == DType::kF8E4M3;
    if (!codes && tiling_.tokens == 1 && format_ == PairFormat::kBf16) {
      packed_ = reinterpret_cast<const char*>(x_.values.as<uint16_t>() + first_token_ * pairs_ * 2);
      return;
    }
    char* const packed = static_cast<char*>(stream_.pool().shared_scratch(tiling_.tokens * pairs_ * pair_bytes()));
    packed_ = packed;
    const int64_t blocks = (pairs_ + block_pairs_ - 1) / block_pairs_;
    stream_.pool().parallel_for(blocks * tiling_.tiles, tiling_.tokens * pairs_, [&](int64_t item, int worker) {
      const int64_t tile = item % tiling_.tiles;
      const int64_t pair = item / tiling_.tiles * block_pairs_;
      const int64_t pairs = pairs_in_block(pair, pairs_);
      const int rows = tiling_.rows(tile);
      const uint16_t* from[kMaxTileRows];
      uint16_t* const decoded =
          codes ? static_cast<uint16_t*>(stream_.pool().scratch(worker, rows * pairs * 2 * sizeof(uint16_t))) : nullptr;
      for (int row = 0; row < rows; ++row) {
        const int64_t at = (first_token_ + tiling_.first_row(tile) + row) * pairs_ * 2 + pair * 2;
        if (codes) {
          kernels_.decode_e4m3(x_.values.as<uint8_t>() + at, pairs * 2, decoded + row * pairs * 2);
          from[row] = decoded + row * pairs * 2;
        } else {
          from[row] = x_.values.as<uint16_t>() + at;
        }
      }
      kernels_.pack_pairs(from, rows, pairs, format_, packed + packed_offset(tile, pair));
    });
  }

  // Groups of nearly equal size, as many as a multiple of the threads where there are few.
  void make_groups() {
    groups_.clear();
    const int threads = stream_.threads();
    for (size_t j = 0; j < jobs_.size(); ++j) {
      const int64_t panels = panels_of(*jobs_[j].weight);
      int64_t count = (panels + kMaxGroup - 1) / kMaxGroup;
      if (count < 8 * threads) count = std::min((count + threads - 1) / threads * threads, panels);
      for (int64_t g = 0; g < count; ++g) {
        const int64_t first = g * panels / count;
        groups_.push_back({static_cast<int>(j), first, static_cast<int>((g + 1) * panels / count - first)});
      }
    }
  }

  // Scratch of one worker: accumulators of the group, waiting results, an expanded block.
  struct Scratch {
    float* acc;
    float* slots;
    char* expanded;
  };

  Scratch scratch(int worker) {
    const int64_t acc = kMaxGroup * tiling_.tokens * kPanel;
    const int64_t bytes = acc * (1 + slots_) * sizeof(float) + block_pairs_ * kernels_.expanded_group;
    float* const memory = static_cast<float*>(stream_.pool().scratch(worker, bytes));
    return {memory, memory + acc, reinterpret_cast<char*>(memory + acc * (1 + slots_))};
  }

  int64_t panel_floats() const { return tiling_.tokens * kPanel; }

  // Where panel p of a group has pair `pair`.
  const uint8_t* weights_of(const Group& group, int p, int64_t pair) const {
    const Linear& weight = *jobs_[group.job].weight;
    const int64_t groups = (group.panel + p) * pairs_ + pair;
    return static_cast<const uint8_t*>(weight.weight.data()) + groups * group_bytes(weight);
  }

  void run_group(int64_t item, int worker) {
    const Group& group = groups_[item];
    // With threads taking turns, the group that this one will most likely have next.
    const int64_t after = item + stream_.threads();
    const Group& next = after < static_cast<int64_t>(groups_.size()) ? groups_[after] : group;
    const Scratch memory = scratch(worker);
    for (const Leaf& leaf : leaves_) {
      const int64_t end = leaf.first_pair + leaf.pairs;
      for (int64_t pair = leaf.first_pair; pair < end; pair += pairs_in_block(pair, end)) {
        const Step step = {pair, pairs_in_block(pair, end), pair > leaf.first_pair};
        if (direct_) {
          dot_direct(group, next, step, memory);
        } else {
          dot_expanded(group, next, step, memory);
        }
      }
      finish(group, leaf, memory);
    }
  }

  // One block, or the part of it that belongs to a leaf.
  struct Step {
    int64_t pair;
    int64_t pairs;
    bool accumulate;
  };

  void dot_direct(const Group& group, const Group& next_group, const Step& step, const Scratch& memory) {
    const uint8_t* at[kMaxGroup];
    const uint8_t* next[kMaxGroup];
    const int64_t after = step.pair + step.pairs;
    // The dots go through `side` panels at once, so those that come next are `side` panels or one block further.
    const int side = std::min(kernels_.panels_at_once(tiling_.rows(0)), group.count);
    for (int p = 0; p < group.count; ++p) {
      at[p] = weights_of(group, p, step.pair);
      const int q = (p + side) % group.count;
      next[p] = p + side < group.count ? weights_of(group, q, step.pair)
                : after < pairs_       ? weights_of(group, q, after)
                                       : weights_of(next_group, std::min(q, next_group.count - 1), 0);
    }
    const bool bf16 = jobs_[group.job].weight->weight.dtype() == DType::kBF16;
    (bf16 ? kernels_.dot_bf16 : kernels_.dot_fp8)({.x = packed_ + packed_offset(0, step.pair),
                                                   .rows = tiling_.rows(0),
                                                   .panels = group.count,
                                                   .weights = at,
                                                   .next = next,
                                                   .pairs = step.pairs,
                                                   .acc = memory.acc,
                                                   .acc_stride = panel_floats(),
                                                   .accumulate = step.accumulate});
  }

  void dot_expanded(const Group& group, const Group& next_group, const Step& step, const Scratch& memory) {
    const bool bf16 = jobs_[group.job].weight->weight.dtype() == DType::kBF16;
    const auto expand = bf16 ? kernels_.expand_bf16 : kernels_.expand_fp8;
    const int64_t after = step.pair + step.pairs;
    for (int p = 0; p < group.count; ++p) {
      const uint8_t* const packed = weights_of(group, p, step.pair);
      const uint8_t* block = packed;
      if (expand != nullptr) {
        expand(packed, step.pairs, memory.expanded);
        block = reinterpret_cast<const uint8_t*>(memory.expanded);
      }
      const uint8_t* const ahead = p + 1 < group.count ? weights_of(group, p + 1, step.pair)
                                   : after < pairs_    ? weights_of(group, 0, after)
                                                       : weights_of(next_group, 0, 0);
      for (int64_t t = 0; t < tiling_.tiles; ++t) {
        // A tile fetches a line per pair: the first has all of an FP8 block, the first two have all of a BF16 one.
        const uint8_t* const next = t == 0 ? ahead : t == 1 && bf16 ? ahead + step.pairs * 64 : block;
        kernels_.dot_expanded({.x = packed_ + packed_offset(t, step.pair),
                               .rows = tiling_.rows(t),
                               .panels = 1,
                               .weights = &block,
                               .next = &next,
                               .pairs = step.pairs,
                               .acc = memory.acc + p * panel_floats() + tiling_.first_row(t) * kPanel,
                               .acc_stride = 0,
                               .accumulate = step.accumulate});
      }
    }
  }

  void finish(const Group& group, const Leaf& leaf, const Scratch& memory) {
    const Job& job = jobs_[group.job];
    const Linear& weight = *job.weight;
    const int64_t slot_floats = kMaxGroup * panel_floats();
    for (int p = 0; p < group.count; ++p) {
      const int64_t first_row = (group.panel + p) * kPanel;
      const float* lefts[kMaxTreeDepth];
      for (int m = 0; m < leaf.merges; ++m) {
        lefts[m] = memory.slots + (first_waiting(leaf) - m) * slot_floats + p * panel_floats();
      }
      FinishTile tile = {
          .acc = memory.acc + p * panel_floats(),
          .rows = static_cast<int>(tiling_.tokens),
          .columns = static_cast<int>(std::min<int64_t>(kPanel, weight.out_features - first_row)),
          .weight_scale = weight.weight_scale.empty() ? nullptr : weight.weight_scale.as<float>() + first_row,
          .x_scale = groups_of_scales_ == 0
                         ? nullptr
                         : x_.scales.as<float>() + first_token_ * groups_of_scales_ + leaf.scale_group,
          .x_scale_stride = groups_of_scales_,
          .lefts = lefts,
          .left_count = leaf.merges,
          .out = nullptr,
          .out_stride = 0};
      if (leaf.slot >= 0) {
        tile.out = memory.slots + leaf.slot * slot_floats + p * panel_floats();
        tile.out_stride = kPanel;
      } else {
        tile.out = job.out + leaf.node * job.node_stride + first_token_ * weight.out_features + first_row;
        tile.out_stride = weight.out_features;
      }
      kernels_.finish(tile);
    }
  }

  // The last waiting result: a leaf that merges k of them leaves its own in the first one's slot, or goes out.
  static int first_waiting(const Leaf& leaf) { return (leaf.slot >= 0 ? leaf.slot : 0) + leaf.merges - 1; }

  Stream& stream_;
  const KernelTable& kernels_;
  const Activations& x_;
  const std::span<const Job> jobs_;
  const std::span<const Leaf> leaves_;
  const int slots_;
  const int64_t pairs_;
  const int64_t groups_of_scales_;
  int64_t first_token_ = 0;
  bool direct_ = false;
  Tiling tiling_{};
  int64_t block_pairs_ = 0;
  PairFormat format_{};
  const char* packed_ = nullptr;
  std::vector<Group> groups_;
};

}  // namespace

namespace {

// Pairs [begin, end) of one row, each to its group; zeros for a row that pads a panel.
template <typename Pair>
void scatter(const uint8_t* row, uint8_t* at, int group, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    Pair pair = 0;
    if (row != nullptr) std::memcpy(&pair, row + k * sizeof(Pair), sizeof(Pair));
    std::memcpy(at + k * group, &pair, sizeof(Pair));
  }
}

}  // namespace

void pack_rows(Stream& stream, const Tensor& raw, int64_t first_row, const Linear& weight) {
  const int64_t pairs = weight.in_features / 2;
  const int64_t rows = raw.dim(0);
  const bool bf16 = weight.weight.dtype() == DType::kBF16;
  const int group = group_bytes(weight);
  uint8_t* const packed = static_cast<uint8_t*>(weight.weight.data()) + first_row / kPanel * pairs * group;
  const uint8_t* const from = static_cast<const uint8_t*>(raw.data());
  const int64_t pair_bytes = 2 * size_of(weight.weight.dtype());
  // Rows are scattered over a panel's groups: a few groups at a time, so that they stay in L1 until all rows are in.
  constexpr int64_t kPackPairs = 64;
  stream.pool().parallel_for((rows + kPanel - 1) / kPanel, raw.bytes(), [&](int64_t panel, int) {
    uint8_t* const to = packed + panel * pairs * group;
    for (int64_t begin = 0; begin < pairs; begin += kPackPairs) {
      const int64_t end = std::min(begin + kPackPairs, pairs);
      for (int row = 0; row < kPanel; ++row) {
        uint8_t* const at = to + (bf16 ? row * 4 : fp8_offset(row));
        const int64_t source = panel * kPanel + row;
        const uint8_t* const values = source < rows ? from + source * pairs * pair_bytes : nullptr;
        if (bf16) {
          scatter<uint32_t>(values, at, group, begin, end);
        } else {
          scatter<uint16_t>(values, at, group, begin, end);
        }
      }
    }
  });
}

void linear(Stream& stream, const Activations& x, std::span<const LinearOutput> outputs) {
  std::vector<Job> jobs;
  for (const LinearOutput& output : outputs) jobs.push_back({output.weight, output.out.as<float>(), 0});
  const Leaf whole = {.pairs = x.values.dim(1) / 2};
  LinearPass(stream, x, jobs, std::span(&whole, 1), 0).run();
}

void linear_over_slices(Stream& stream, const Activations& x, const Linear& weight, const SliceRun& run,
                        std::span<const int64_t> column_ends, const Tensor& partials) {
  std::vector<SliceNode> slices;
  for (int i = 0; i < run.count; ++i) slices.push_back({0, run.first + i});
  std::vector<Leaf> leaves;
  int slots = 0;
  const std::vector<SliceNode> nodes = maximal_subtrees(run);
  size_t next = 0;  // slice of the run
  for (size_t node = 0; node < nodes.size(); ++node) {
    // The node's own slices, as pieces.
    const int64_t end = (int64_t{nodes[node].index} + 1) << nodes[node].level;
    size_t last = next;
    while (last < slices.size() && slices[last].index < end) ++last;
    const std::span<const SliceNode> pieces = std::span(slices).subspan(next, last - next);
    int waiting = 0;
    for (const int entry : sum_program(pieces, nodes[node], run.total)) {
      if (entry == kAdd) {
        --waiting;
        ++leaves.back().merges;
        leaves.back().slot = waiting - 1;
        continue;
      }
      const int64_t i = static_cast<int64_t>(next) + entry;
      const int64_t begin = i == 0 ? 0 : column_ends[i - 1];
      leaves.push_back({.first_pair = begin / 2,
                        .pairs = (column_ends[i] - begin) / 2,
                        .scale_group = i,
                        .slot = waiting++,
                        .node = static_cast<int64_t>(node)});
      slots = std::max(slots, waiting);
    }
    leaves.back().slot = -1;
    next = last;
  }
  const Job job = {&weight, partials.as<float>(), x.values.dim(0) * weight.out_features};
  LinearPass(stream, x, std::span(&job, 1), leaves, slots).run();
}

}  // namespace octet::cpu
