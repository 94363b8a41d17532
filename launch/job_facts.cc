#include "launch/job_facts.h"

#include "nlohmann/json.hpp"

namespace octet {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(GpuFacts, name, uuid, memory_bytes, free_bytes)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(GpuNodeFacts, driver, gpus, pairs_without_peer_access)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(ModelFacts, error, digest, filesystem, weight_bytes, read_bytes, read_seconds)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(RankFacts, rank, node, host, versions, environment, cpus, online_cpus, node_cores,
                                   own_cores, numa_nodes, core_for_each_thread, memory_bytes, shm_free_bytes,
                                   shm_need_bytes, open_files, locked_bytes, nvidia_driver, gpu_error, gpus,
                                   read_bytes_per_second, clock_seconds, model)

std::string encode(const RankFacts& facts) {
  const nlohmann::json json = facts;
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

RankFacts decode(const std::string& text) { return nlohmann::json::parse(text).get<RankFacts>(); }

}  // namespace octet
