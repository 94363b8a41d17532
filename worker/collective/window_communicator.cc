#include "worker/collective/window_communicator.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "kernels/check.h"
#include "kernels/ops.h"
#include "kernels/slice_tree.h"

namespace octet {
namespace {

// Parts begin at multiples of this many elements: whole cache lines, of FP32 and of BF16.
constexpr int64_t kGrain = 32;
// Up to so many elements, counted over the ranks of a node, each rank finishes the whole message itself: what it reads
// more costs less than the second barrier of dividing the work.
constexpr int64_t kOneShotElements = 4096;

constexpr int64_t align_down(int64_t value, int64_t to) { return value / to * to; }
constexpr int64_t align_up(int64_t value, int64_t to) { return align_down(value + to - 1, to); }

void copy_bytes(void* to, const void* from, int64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}

// The distance between pieces of a chunk in the window.
constexpr int64_t stride_of(int64_t chunk_elements) { return align_up(chunk_elements, kGrain); }
// An area holds a finished chunk in BF16, then the pieces of the next one.
constexpr int64_t result_bytes(int64_t chunk_elements) { return stride_of(chunk_elements) * 2; }

// The largest nodes under `node` all of whose slices are owned, left to right.
void append_maximal(const std::vector<bool>& owned, const SliceNode& node, std::vector<SliceNode>& out) {
  const int first = node.index << node.level;
  const int end = std::min<int>(static_cast<int>(owned.size()), (node.index + 1) << node.level);
  const auto count = std::count(owned.begin() + first, owned.begin() + end, true);
  if (count == 0) return;
  if (count == end - first) {
    out.push_back(node);
    return;
  }
  const int right = 2 * node.index + 1;
  append_maximal(owned, {node.level - 1, right - 1}, out);
  if (right << (node.level - 1) < end) append_maximal(owned, {node.level - 1, right}, out);
}

bool is_inside(const SliceNode& node, const SliceNode& tree) {
  return node.level <= tree.level && node.index >> (tree.level - node.level) == tree.index;
}

void check_map(const RankMap& map, int rank) {
  OCTET_CHECK(rank >= 0 && rank < map.ranks(), "a rank outside the map");
  OCTET_CHECK(map.node_of_rank.size() == map.runs.size(), "each rank has a run of slices and a node");
  int next = 0;
  for (const SliceRun& run : map.runs) {
    OCTET_CHECK(run.first == next && run.count > 0 && run.total == map.runs[0].total,
                "runs are all slices in rank order");
    next += run.count;
  }
  OCTET_CHECK(next == map.runs[0].total, "every slice has a rank");
}

// This rank's place among the ranks of its node.
int place_of(int rank, const std::vector<int>& ranks) {
  return static_cast<int>(std::find(ranks.begin(), ranks.end(), rank) - ranks.begin());
}

}  // namespace

int RankMap::nodes() const { return 1 + *std::max_element(node_of_rank.begin(), node_of_rank.end()); }

std::vector<int> RankMap::ranks_of(int node) const {
  std::vector<int> ranks;
  for (int r = 0; r < this->ranks(); ++r) {
    if (node_of_rank[r] == node) ranks.push_back(r);
  }
  return ranks;
}

struct WindowCommunicator::Reduction {
  Stream& stream;
  Device device;          // where this rank's tensors lie; with several ranks the host
  const float* partials;  // [pieces of this rank, elements]
  uint16_t* residual;     // [elements]
  int64_t elements;
  bool divided;  // each rank finishes a share of a chunk and collects the others', or each finishes all of it
};

SharedWindow::Layout WindowCommunicator::window_layout(const RankMap& map, int node, int64_t area_bytes) {
  OCTET_CHECK(area_bytes >= kMinAreaBytes, "the window's areas are too small");
  // The common part is for messages between nodes: the pieces of all nodes, or what the other nodes' ranks gather.
  return {.ranks = static_cast<int>(map.ranks_of(node).size()),
          .area_bytes = area_bytes,
          .common_bytes = map.nodes() > 1 ? map.ranks() * area_bytes : 0};
}

WindowCommunicator::WindowCommunicator(RankMap map, int rank, std::unique_ptr<SharedWindow> window,
                                       std::unique_ptr<NodeLink> link)
    : map_((check_map(map, rank), std::move(map))),
      rank_(rank),
      node_(map_.node_of_rank[rank]),
      nodes_(map_.nodes()),
      local_ranks_(map_.ranks_of(node_)),
      window_(std::move(window)),
      link_(std::move(link)) {
  OCTET_CHECK(window_->rank() == place_of(rank, local_ranks_), "the window places this rank elsewhere");
  OCTET_CHECK((link_ != nullptr) == (nodes_ > 1 && local_ranks_[0] == rank),
              "leaders of nodes have a link, others none");
  make_tree_programs();

  if (size() == 1) {
    chunk_elements_ = std::numeric_limits<int64_t>::max() / 2;
    return;
  }
  const int64_t most_pieces = *std::max_element(pieces_of_rank_.begin(), pieces_of_rank_.end());
  const SharedWindow::Layout& layout = window_->layout();
  chunk_elements_ = layout.area_bytes / (2 + 4 * most_pieces);
  if (nodes_ > 1) {
    int64_t all_pieces = 0;
    for (int node = 0; node < nodes_; ++node) all_pieces += pieces_of_node(node);
    chunk_elements_ = std::min(chunk_elements_, layout.common_bytes / (4 * all_pieces));
  }
  chunk_elements_ = align_down(chunk_elements_, kGrain);
  OCTET_CHECK(chunk_elements_ > 0, "the window is too small for one cache line of every piece");
}

WindowCommunicator::~WindowCommunicator() = default;

void WindowCommunicator::make_tree_programs() {
  const int total = map_.runs[0].total;
  std::vector<SliceNode> local;
  for (int r = 0; r < size(); ++r) {
    const std::vector<SliceNode> trees = maximal_subtrees(map_.runs[r]);
    pieces_of_rank_.push_back(static_cast<int>(trees.size()));
    if (map_.node_of_rank[r] == node_) local.insert(local.end(), trees.begin(), trees.end());
  }
  if (nodes_ == 1) {
    finish_program_ = sum_program(local, root_of(total), total);
    return;
  }

  std::vector<SliceNode> all;
  for (int node = 0; node < nodes_; ++node) {
    std::vector<bool> owned(total, false);
    for (int r : map_.ranks_of(node)) std::fill_n(owned.begin() + map_.runs[r].first, map_.runs[r].count, true);
    append_maximal(owned, root_of(total), node_trees_.emplace_back());
    all.insert(all.end(), node_trees_[node].begin(), node_trees_[node].end());
  }
  finish_program_ = sum_program(all, root_of(total), total);
  for (const SliceNode& tree : node_trees_[node_]) {
    std::vector<SliceNode> inside;
    std::vector<int> index;
    for (int i = 0; i < static_cast<int>(local.size()); ++i) {
      if (!is_inside(local[i], tree)) continue;
      inside.push_back(local[i]);
      index.push_back(i);
    }
    std::vector<int>& program = combine_programs_.emplace_back(sum_program(inside, tree, total));
    for (int& step : program) step = step == kAdd ? kAdd : index[step];
  }
}

void WindowCommunicator::barrier() {
  window_->barrier();
  if (nodes_ == 1) return;
  if (link_) {
    std::vector<NodeLink::Transfer> sends, receives;
    for (int node = 0; node < nodes_; ++node) {
      if (node == node_) continue;
      sends.push_back({node, window_->common() + node_, 1});
      receives.push_back({node, window_->common() + node, 1});
    }
    link_->exchange(sends, receives);
  }
  window_->barrier();
}

// ---- Sums

// The loop overlaps chunks: a chunk is published together with the results of the one before, so that dividing the work
// costs one barrier in all, not one per chunk.
void WindowCommunicator::reduce_over_slices(Stream& stream, const Tensor& partials, const Tensor& residual) {
  OCTET_CHECK(partials.shape().rank() == 3 && partials.dim(0) == pieces_of_rank_[rank_] &&
                  partials.dim(1) * partials.dim(2) == residual.elements(),
              "partials " + partials.shape().to_string() + " do not fit residual " + residual.shape().to_string());
  const int64_t local_ranks = std::ssize(local_ranks_);
  OCTET_CHECK(size() == 1 || stream.device() == Device::kCpu, "ranks meet in a window of the host's memory");
  const Reduction reduction{.stream = stream,
                            .device = stream.device(),
                            .partials = partials.as<float>(),
                            .residual = residual.as<uint16_t>(),
                            .elements = residual.elements(),
                            .divided = local_ranks > 1 && residual.elements() * local_ranks > kOneShotElements};
  Part before;
  for (int64_t begin = 0; begin < reduction.elements || before.size() > 0;) {
    const Part chunk{begin, std::min(begin + chunk_elements_, reduction.elements)};
    publish(reduction, chunk);
    if (size() > 1) window_->barrier();
    collect(reduction, before);
    if (nodes_ > 1 && chunk.size() > 0) {
      combine_node(reduction, chunk);
      exchange_nodes(chunk);
    }
    finish(reduction, chunk);
    before = reduction.divided ? chunk : Part{};
    begin = chunk.end;
  }
}

// The part of a chunk that a rank of this node finishes when the work is divided.
WindowCommunicator::Part WindowCommunicator::share_of(const Part& chunk, int local_rank) const {
  const int64_t ranks = static_cast<int64_t>(local_ranks_.size());
  const auto bound = [&](int64_t i) {
    return i == ranks ? chunk.size() : align_down(chunk.size() * i / ranks, kGrain);
  };
  return {chunk.begin + bound(local_rank), chunk.begin + bound(local_rank + 1)};
}

// What this rank finishes itself needs no copy: it reads its own partials where they are.
void WindowCommunicator::publish(const Reduction& reduction, const Part& chunk) const {
  if (local_ranks_.size() == 1) return;
  const bool skips_own = reduction.divided || nodes_ > 1;
  const Part own = skips_own ? share_of(chunk, window_->rank()) : Part{chunk.end, chunk.end};
  float* pieces = reinterpret_cast<float*>(window_->mine() + result_bytes(chunk_elements_));
  for (int piece = 0; piece < pieces_of_rank_[rank_]; ++piece) {
    const float* from = reduction.partials + piece * reduction.elements;
    float* to = pieces + piece * stride_of(chunk.size());
    std::copy(from + chunk.begin, from + own.begin, to);
    std::copy(from + own.end, from + chunk.end, to + (own.end - chunk.begin));
  }
}

namespace {
// The ops read their pieces; a Tensor has no const form.
Tensor piece_tensor(const float* data, int64_t elements, Device device = Device::kCpu) {
  return {const_cast<float*>(data), DType::kF32, {1, elements}, device};
}
}  // namespace

std::vector<Tensor> WindowCommunicator::local_pieces(const Reduction& reduction, const Part& chunk,
                                                     const Part& part) const {
  std::vector<Tensor> pieces;
  for (size_t local = 0; local < local_ranks_.size(); ++local) {
    const int r = local_ranks_[local];
    const float* data = reduction.partials + part.begin;
    int64_t stride = reduction.elements;
    if (r != rank_) {
      const std::byte* area = window_->of(static_cast<int>(local)) + result_bytes(chunk_elements_);
      data = reinterpret_cast<const float*>(area) + (part.begin - chunk.begin);
      stride = stride_of(chunk.size());
    }
    for (int piece = 0; piece < pieces_of_rank_[r]; ++piece) {
      pieces.push_back(piece_tensor(data + piece * stride, part.size(), reduction.device));
    }
  }
  return pieces;
}

std::vector<Tensor> WindowCommunicator::node_pieces(const Part& chunk, const Part& part) const {
  std::vector<Tensor> pieces;
  const float* data = reinterpret_cast<const float*>(window_->common()) + (part.begin - chunk.begin);
  for (int node = 0; node < nodes_; ++node) {
    for (int64_t tree = 0; tree < pieces_of_node(node); ++tree, data += stride_of(chunk.size())) {
      pieces.push_back(piece_tensor(data, part.size()));
    }
  }
  return pieces;
}

// Sums the local ranks' pieces as far as the tree allows, so that the wire carries as little as possible.
void WindowCommunicator::combine_node(const Reduction& reduction, const Part& chunk) {
  const Part share = share_of(chunk, window_->rank());
  if (share.size() > 0) {
    const std::vector<Tensor> pieces = local_pieces(reduction, chunk, share);
    const std::vector<Tensor> sums = node_pieces(chunk, share);
    int64_t first = 0;
    for (int node = 0; node < node_; ++node) first += pieces_of_node(node);
    for (size_t tree = 0; tree < combine_programs_.size(); ++tree) {
      tree_sum(reduction.stream, pieces, combine_programs_[tree], sums[first + tree]);
    }
  }
  window_->barrier();
}

void WindowCommunicator::exchange_nodes(const Part& chunk) {
  if (link_) {
    std::vector<NodeLink::Transfer> sends, receives;
    const int64_t piece_bytes = stride_of(chunk.size()) * size_of(DType::kF32);
    std::byte* data = window_->common();
    std::byte* mine = data;
    for (int node = 0; node < node_; ++node) mine += pieces_of_node(node) * piece_bytes;
    for (int node = 0; node < nodes_; ++node) {
      if (node != node_) {
        sends.push_back({node, mine, pieces_of_node(node_) * piece_bytes});
        receives.push_back({node, data, pieces_of_node(node) * piece_bytes});
      }
      data += pieces_of_node(node) * piece_bytes;
    }
    link_->exchange(sends, receives);
  }
  window_->barrier();
}

void WindowCommunicator::finish(const Reduction& reduction, const Part& chunk) {
  const Part part = reduction.divided ? share_of(chunk, window_->rank()) : chunk;
  if (part.size() == 0) return;
  const std::vector<Tensor> pieces = nodes_ > 1 ? node_pieces(chunk, part) : local_pieces(reduction, chunk, part);
  const Tensor sum(reduction.residual + part.begin, DType::kBF16, {1, part.size()}, reduction.device);
  add_tree_sum(reduction.stream, pieces, finish_program_, sum);
  if (reduction.divided) {
    copy_bytes(window_->mine() + (part.begin - chunk.begin) * 2, sum.data(), sum.bytes());
  }
}

void WindowCommunicator::collect(const Reduction& reduction, const Part& chunk) const {
  for (int local = 0; local < static_cast<int>(local_ranks_.size()); ++local) {
    const Part part = share_of(chunk, local);
    if (local == window_->rank()) continue;
    copy_bytes(reduction.residual + part.begin, window_->of(local) + (part.begin - chunk.begin) * 2, part.size() * 2);
  }
}

// ---- Gathering

void WindowCommunicator::all_gather(const void* mine, std::span<const int64_t> bytes_of_rank, void* all) {
  OCTET_CHECK(static_cast<int>(bytes_of_rank.size()) == size(), "all_gather needs the bytes of every rank");
  std::vector<int64_t> offsets(bytes_of_rank.size());
  std::exclusive_scan(bytes_of_rank.begin(), bytes_of_rank.end(), offsets.begin(), int64_t{0});
  std::byte* out = static_cast<std::byte*>(all);
  copy_bytes(out + offsets[rank_], mine, bytes_of_rank[rank_]);
  if (size() == 1) return;

  // Between nodes the common part has a slot for every rank.
  const int64_t slot = window_->layout().area_bytes;
  const int64_t longest = *std::max_element(bytes_of_rank.begin(), bytes_of_rank.end());
  for (int64_t begin = 0; begin < longest; begin += slot) {
    const auto bytes_now = [&](int r) { return std::clamp<int64_t>(bytes_of_rank[r] - begin, 0, slot); };
    copy_bytes(window_->mine(), static_cast<const std::byte*>(mine) + begin, bytes_now(rank_));
    window_->barrier();
    for (int local = 0; local < static_cast<int>(local_ranks_.size()); ++local) {
      const int r = local_ranks_[local];
      if (r != rank_) copy_bytes(out + offsets[r] + begin, window_->of(local), bytes_now(r));
    }
    if (nodes_ == 1) continue;
    exchange_gathered(bytes_of_rank, begin, slot);
    for (int r = 0; r < size(); ++r) {
      if (map_.node_of_rank[r] == node_) continue;
      copy_bytes(out + offsets[r] + begin, window_->common() + r * slot, bytes_now(r));
    }
  }
}

// Leaders send what their node's ranks have published, and receive what the others' have, into the slots of the common
// part.
void WindowCommunicator::exchange_gathered(std::span<const int64_t> bytes_of_rank, int64_t begin, int64_t slot_bytes) {
  if (link_) {
    std::vector<NodeLink::Transfer> sends, receives;
    for (int r = 0; r < size(); ++r) {
      const int64_t bytes = std::clamp<int64_t>(bytes_of_rank[r] - begin, 0, slot_bytes);
      const int from = map_.node_of_rank[r];
      if (bytes == 0) continue;
      if (from != node_) {
        receives.push_back({from, window_->common() + r * slot_bytes, bytes});
        continue;
      }
      // Sending only reads; a Transfer has no const form.
      std::byte* data = const_cast<std::byte*>(window_->of(place_of(r, local_ranks_)));
      for (int node = 0; node < nodes_; ++node) {
        if (node != node_) sends.push_back({node, data, bytes});
      }
    }
    link_->exchange(sends, receives);
  }
  window_->barrier();
}

}  // namespace octet
