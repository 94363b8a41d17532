// What ranks compute on, opened: the CPU, or a GPU through the CUDA module. And its peak, which speeds are stated
// against.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/cuda/module.h"
#include "kernels/memory.h"

namespace octet {

struct OpenDevice {
  const cuda::ModuleTable* module = nullptr;  // null: the CPU
  int index = 0, visible = 0;                 // the GPU of this process, and how many it sees
  std::optional<cuda::DeviceFacts> gpu;
};

// The CPU, or the GPU that choose_gpu() gives the rank with this place on its node. Errors name the remedy.
absl::StatusOr<OpenDevice> open_device(Device device, int local_rank, int local_size);

// How sums are made there where `asked` is wished for: on a CPU they are always reproducible.
Arithmetic arithmetic_on(const OpenDevice& device, Arithmetic asked);

// "NVIDIA H100 80GB HBM3, fast", or of CPUs "avx512".
std::string describe(const OpenDevice& device, Arithmetic arithmetic, Isa isa);

// A stream there. `host`: what does a step's work on the host. REQUIRES: arithmetic_on() has nothing against
// `arithmetic`.
std::unique_ptr<Stream> open_stream(const OpenDevice& device, Arithmetic arithmetic, const Stream::CpuOptions& host);

// Dense, with the inputs of matrices in BF16 and in FP8; 0: nobody knows.
struct PeakFlops {
  double bf16 = 0, fp8 = 0;
  std::string source;  // "measured", "the datasheet of H100-80GB"
};
// Measured on a CPU, in about 10 ms; by the datasheet of a GPU that has one in gpu_spec.h.
PeakFlops peak_flops(const OpenDevice& device, Stream& stream);

}  // namespace octet
