#include "launch/device.h"

#include "absl/strings/str_cat.h"
#include "kernels/calibrate.h"
#include "kernels/cuda/open_module.h"
#include "launch/gpu_binding.h"
#include "launch/gpu_spec.h"

namespace octet {

absl::StatusOr<OpenDevice> open_device(Device device, int local_rank, int local_size) {
  if (device == Device::kCpu) return OpenDevice();
  const absl::StatusOr<const cuda::ModuleTable*> module = cuda::open_module(cuda::module_path());
  if (!module.ok()) return module.status();
  const char* why = "";  // told by check_device()
  const int visible = (*module)->device_count(&why);
  const absl::StatusOr<int> index = choose_gpu(visible, local_rank, local_size);
  if (!index.ok()) return index.status();
  if (absl::Status status = cuda::check_device(**module, *index); !status.ok()) return status;
  return OpenDevice{.module = *module, .index = *index, .visible = visible, .gpu = (*module)->device_facts(*index)};
}

Arithmetic arithmetic_on(const OpenDevice& device, Arithmetic asked) {
  return device.gpu ? asked : Arithmetic::kReproducible;
}

std::string describe(const OpenDevice& device, Arithmetic arithmetic, Isa isa) {
  if (!device.gpu) return name_of(isa);
  return absl::StrCat(device.gpu->name, arithmetic == Arithmetic::kFast ? ", fast" : ", reproducible");
}

std::unique_ptr<Stream> open_stream(const OpenDevice& device, Arithmetic arithmetic, const Stream::CpuOptions& host) {
  if (device.module == nullptr) return std::make_unique<Stream>(host);
  return std::make_unique<Stream>(*device.module, device.index, arithmetic, host);
}

PeakFlops peak_flops(const OpenDevice& device, Stream& stream) {
  if (!device.gpu) {
    const double measured = dot_flops_per_second(stream);
    return {.bf16 = measured, .fp8 = measured, .source = "measured"};
  }
  const GpuSpec* const spec = datasheet_of(device.gpu->name);
  if (spec == nullptr) return {.source = "unknown: no datasheet of this GPU"};
  return {.bf16 = spec->bf16_flops,
          .fp8 = spec->fp8_flops > 0 ? spec->fp8_flops : spec->bf16_flops,
          .source = absl::StrCat("the datasheet of ", spec->name)};
}

}  // namespace octet
