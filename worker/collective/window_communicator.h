// WindowCommunicator: the collectives of the CPU, over a SharedWindow inside a node and a NodeLink between the nodes'
// first ranks. Threads and MPI only differ in where the window's memory comes from and in how the link moves bytes.
//
// Invariant: the bits of a sum depend on the slices alone: not on ranks, nodes, window size, or which path a message
// takes.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "worker/collective/communicator.h"
#include "worker/collective/shared_window.h"

namespace octet {

// Which slices (or other leaves of a sum) each rank owns and which node it is on; the same on every rank. Ranks of a
// node need not be neighbours.
struct RankMap {
  std::vector<SliceRun> runs;     // of rank r; together they are all slices, in rank order
  std::vector<int> node_of_rank;  // numbered 0..nodes-1

  int ranks() const { return static_cast<int>(runs.size()); }
  int nodes() const;
  // The ranks on a node, ascending. The first one leads it.
  std::vector<int> ranks_of(int node) const;
};

// How the leaders of nodes reach one another. Only leaders call it.
class NodeLink {
 public:
  struct Transfer {
    int node = 0;  // the other end
    void* data = nullptr;
    int64_t bytes = 0;
  };

  virtual ~NodeLink() = default;
  // Sends all of `sends`, receives all of `receives`. Transfers between two nodes meet in the order in which both list
  // them.
  virtual void exchange(std::span<const Transfer> sends, std::span<const Transfer> receives) = 0;
};

// Of one of a rank's two areas in the window. Longer messages are cut, so more only saves barriers; beyond a share of
// the second-level cache it gains nothing. 8 ranks take 16 MiB: Docker gives /dev/shm 64 MiB, and Open MPI wants some
// too.
constexpr int64_t kDefaultAreaBytes = int64_t{1} << 20;
// Smaller areas do not hold one cache line of results and pieces of every rank.
constexpr int64_t kMinAreaBytes = 2048;

class WindowCommunicator : public Communicator {
 public:
  // The window that the ranks of one node need.
  static SharedWindow::Layout window_layout(const RankMap& map, int node, int64_t area_bytes);

  // `window` has that layout; this rank's place in it is its place among ranks_of(its node). `link` is null except on
  // the leaders of several nodes.
  WindowCommunicator(RankMap map, int rank, std::unique_ptr<SharedWindow> window, std::unique_ptr<NodeLink> link);
  ~WindowCommunicator() override;

  int rank() const override { return rank_; }
  int size() const override { return map_.ranks(); }
  void all_gather(const void* mine, std::span<const int64_t> bytes_of_rank, void* all) override;
  void reduce_over_slices(Stream& stream, const Tensor& partials, const Tensor& residual) override;
  void barrier() override;

 private:
  // A run of the elements of a message; rows and columns play no part.
  struct Part {
    int64_t begin = 0;
    int64_t end = 0;
    int64_t size() const { return end - begin; }
  };
  struct Reduction;

  void make_tree_programs();
  int64_t pieces_of_node(int node) const { return static_cast<int64_t>(node_trees_[node].size()); }
  Part share_of(const Part& chunk, int local_rank) const;
  void publish(const Reduction& reduction, const Part& chunk) const;
  std::vector<Tensor> local_pieces(const Reduction& reduction, const Part& chunk, const Part& part) const;
  std::vector<Tensor> node_pieces(const Part& chunk, const Part& part) const;
  void combine_node(const Reduction& reduction, const Part& chunk);
  void exchange_nodes(const Part& chunk);
  void finish(const Reduction& reduction, const Part& chunk);
  void collect(const Reduction& reduction, const Part& chunk) const;
  void exchange_gathered(std::span<const int64_t> bytes_of_rank, int64_t begin, int64_t slot_bytes);

  const RankMap map_;
  const int rank_, node_, nodes_;
  const std::vector<int> local_ranks_;
  const std::unique_ptr<SharedWindow> window_;
  const std::unique_ptr<NodeLink> link_;

  std::vector<int> pieces_of_rank_;                 // maximal subtrees of each rank
  std::vector<std::vector<SliceNode>> node_trees_;  // [nodes] maximal subtrees of all slices of a node
  std::vector<std::vector<int>>
      combine_programs_;             // [subtrees of this node] over local pieces, when there are several nodes
  std::vector<int> finish_program_;  // over local pieces, or all node pieces when there are several nodes
  int64_t chunk_elements_ = 0;       // of a reduction that fits the window
};

}  // namespace octet
