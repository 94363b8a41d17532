// Bootstrap: how the ranks of a job start together: who they are, who shares a node, and the few words that they
// exchange before the first step. Invariant: what fails on one rank fails on all, so nobody is left waiting.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace octet {

// All members but the accessors are collective: every rank calls them in the same order, one thread at a time. Ranks
// that wait in them sleep. Nothing here may be called by a child process: MPI does not survive fork().
class Bootstrap {
 public:
  struct Options {
    // Ranks of each pretended node, in rank order: exercises the way between nodes on one machine. They must add up to
    // all ranks, and none may span two real nodes. Empty: the real nodes.
    std::vector<int> pretend_nodes;
  };

  // Initialises MPI, once in a process. Works without mpirun: one rank. FAILED_PRECONDITION when the process is alone
  // although the launcher meant several; INVALID_ARGUMENT when pretend_nodes does not fit. The same on every rank.
  static absl::StatusOr<std::unique_ptr<Bootstrap>> start(const Options& options);
  // Finalises MPI: collective. Communicators over MPI are destroyed before.
  ~Bootstrap();

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(node_of_rank_.size()); }
  // The node that each rank belongs to for collectives: pretended if asked for.
  const std::vector<int>& node_of_rank() const { return node_of_rank_; }

  // Whether rank 0 is on the same real node, within reach of a Unix socket.
  bool shares_node_with_rank_0() const { return real_node_of_rank_[rank_] == real_node_of_rank_[0]; }

  // This rank's place among the ranks of its real node, and how many they are: for dividing what a machine has.
  int local_rank() const { return local_rank_; }
  int local_size() const { return local_size_; }
  // Cores that the real node lends to its ranks together, and this rank's share: its own if ranks are bound to
  // different cores, else an equal part; at least 1.
  int node_cores() const { return node_cores_; }
  int own_cores() const { return own_cores_; }
  // Bytes of the real node's memory that can be had now, within its cgroups' limits, divided by its ranks. Collective.
  absl::StatusOr<int64_t> own_memory();
  // Whether all threads of the node's ranks have a core each when this rank runs `threads`: then waiting may spin. The
  // same on all ranks of a node. Collective.
  bool each_thread_has_a_core(int threads);

  // "Open MPI 4.1.4".
  static std::string mpi_version();

  // 32 random bytes of this job, the same on every rank. They travel over MPI only, never in arguments or environment.
  const std::string& job_secret() const { return job_secret_; }

  // Every rank brings its status; all get OK, or the lowest failing rank's status with its number before it.
  absl::Status agree(const absl::Status& mine);
  // Rank 0's value, on every rank.
  std::string broadcast(std::string value);
  // Every rank's value, in rank order.
  std::vector<uint64_t> all_gather(uint64_t mine);
  std::vector<std::string> all_gather(std::string_view mine);
  // FAILED_PRECONDITION, on every rank, when ranks bring different values; names the ranks that differ from rank 0.
  absl::Status all_equal(const std::string& name, const std::string& mine);

 private:
  Bootstrap() = default;
  void find_node();
  void count_cores();
  absl::Status pretend(const std::vector<int>& ranks_of_node);
  std::vector<uint64_t> on_my_node(const std::vector<uint64_t>& of_rank) const;

  int rank_ = 0;
  std::vector<int> node_of_rank_;       // for collectives
  std::vector<int> real_node_of_rank_;  // numbered by their first rank
  int local_rank_ = 0, local_size_ = 1;
  int node_cores_ = 1, own_cores_ = 1;
  std::string job_secret_;
};

// What the launcher's variables say about a process whose MPI counts `size` ranks: FAILED_PRECONDITION, with the
// remedy, when it is alone but was meant to be one of several. `variable` is getenv() or a test's.
absl::Status check_launch(int size, const char* (*variable)(const char* name));

// "2+1" -> {2, 1}, as --pretend-nodes gives it. INVALID_ARGUMENT for anything else.
absl::StatusOr<std::vector<int>> parse_pretend_nodes(const std::string& text);

}  // namespace octet
