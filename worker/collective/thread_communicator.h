// Ranks as threads of one process: the same collectives as between processes, over ordinary memory. For tests, and for
// one rank alone.
#pragma once

#include <memory>
#include <vector>

#include "worker/collective/window_communicator.h"

namespace octet {

struct ThreadCommunicatorOptions {
  int64_t area_bytes = kDefaultAreaBytes;
  WaitPolicy wait = {};
};

// One communicator per rank of the map, each to be used by one thread. They share their memory and may outlive one
// another.
std::vector<std::unique_ptr<Communicator>> make_thread_communicators(const RankMap& map,
                                                                     const ThreadCommunicatorOptions& options = {});

// All ranks on one node, rank r with slices_of_rank[r] slices.
RankMap one_node(const std::vector<int>& slices_of_rank);

}  // namespace octet
