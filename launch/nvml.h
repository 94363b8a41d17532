// Nvml: what the NVIDIA driver says about the GPUs of this machine. The driver's library is opened when asked for, so
// that the binary needs neither CUDA nor a GPU to start.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace octet {

struct GpuFacts {
  std::string name, uuid;
  int64_t memory_bytes = 0, free_bytes = 0;
};

struct GpuNodeFacts {
  std::string driver;
  std::vector<GpuFacts> gpus;  // in the driver's order, whatever CUDA_VISIBLE_DEVICES says
  // {i, j}, i < j: cannot read each other's memory directly.
  std::vector<std::pair<int, int>> pairs_without_peer_access;
};

class Nvml {
 public:
  // NOT_FOUND when there is no such library; UNAVAILABLE, with the driver's own words, when it does not work.
  static absl::StatusOr<std::unique_ptr<Nvml>> open(const std::string& library = "libnvidia-ml.so.1");
  ~Nvml();

  // UNAVAILABLE, naming the call, when the driver refuses one.
  absl::StatusOr<GpuNodeFacts> read() const;

 private:
  struct Functions;
  Nvml();
  std::unique_ptr<Functions> functions_;
};

}  // namespace octet
