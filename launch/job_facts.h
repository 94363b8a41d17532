// What octet doctor has seen of a job: plain data, gathered by every rank about itself and judged on rank 0.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "launch/nvml.h"

namespace octet {

// A model's directory as one rank sees it.
struct ModelFacts {
  std::string error;         // why it cannot be opened; empty: it can
  std::string digest;        // of its files
  std::string filesystem;    // "nfs", "ext4"
  int64_t weight_bytes = 0;  // of all its files
  int64_t read_bytes = 0;    // read for the measurement, past the page cache where the file system allows
  double read_seconds = 0;
};

struct RankFacts {
  int rank = 0;
  int node = 0;  // ranks with equal numbers share one
  std::string host;
  std::map<std::string, std::string> versions;     // "octet", "Open MPI", "gRPC", "Linux", "glibc"
  std::map<std::string, std::string> environment;  // the launcher's variables and CUDA_VISIBLE_DEVICES, if set

  std::vector<int> cpus;                     // that this rank may run on
  int online_cpus = 0;                       // of the machine
  int node_cores = 0, own_cores = 0;         // lent to the node's ranks together, and this rank's share
  std::vector<std::vector<int>> numa_nodes;  // CPUs of each
  bool core_for_each_thread = false;

  int64_t memory_bytes = 0;                        // available to this rank
  int64_t shm_free_bytes = 0, shm_need_bytes = 0;  // of /dev/shm, for the window of the node's ranks
  int64_t open_files = 0, locked_bytes = 0;        // limits; -1: none

  bool nvidia_driver = false;
  std::string gpu_error;  // the driver is there, but does not work
  GpuNodeFacts gpus;

  double read_bytes_per_second = 0;  // of memory, all threads, all ranks at once
  double clock_seconds = 0;          // since 1970, sampled by all ranks at once
  ModelFacts model;
};

struct AllReduceFacts {
  int64_t bytes = 0;  // of the result
  double p50_seconds = 0, p99_seconds = 0;
};

struct JobFacts {
  std::vector<RankFacts> ranks;
  std::string model;       // its directory; empty: none was named
  std::string plan_error;  // why it does not fit; empty: it does, or that is not known
  std::vector<AllReduceFacts> all_reduces;
  std::string communicator_error;  // why the ranks cannot be joined; empty: they can
  // Of rank 0.
  std::string port_in_use;  // serve's default address, when somebody has it
  std::string port_error;   // why no port can be had at all
  std::string ephemeral_ports;
};

// As text, for the way to rank 0. REQUIRES of decode: encode() made it.
std::string encode(const RankFacts& facts);
RankFacts decode(const std::string& text);

}  // namespace octet
