#include "kernels/cuda/open_module.h"

#include <dlfcn.h>

#include <filesystem>

#include "absl/strings/str_cat.h"

namespace octet::cuda {
namespace {

constexpr const char* kOrCpu = ", or compute with --device cpu";
constexpr int kLeastMajor = 8;  // compute capability 8.0, the A100: what the module is built for at least

}  // namespace

std::string module_path() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).replace_filename("liboctet_cuda.so");
}

absl::StatusOr<const ModuleTable*> open_module(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    return absl::NotFoundError(absl::StrCat(path, " is not there: build with the CUDA toolkit (cmake -DOCTET_CUDA=ON) ",
                                            "and keep the module beside the octet binary", kOrCpu));
  }
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("the CUDA module does not load: ", dlerror(), ": build it on this system", kOrCpu));
  }
  auto* const entry = reinterpret_cast<ModuleEntry*>(dlsym(library, kModuleSymbol));
  if (entry == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat(path, " is not Octet's CUDA module: it has no ", kModuleSymbol,
                                                      "(): install the one of this build", kOrCpu));
  }
  const ModuleTable* const table = entry();
  if (table->abi != kModuleAbi) {
    return absl::FailedPreconditionError(absl::StrCat(path, " has interface ", table->abi, ", this binary ", kModuleAbi,
                                                      ": install the module and the binary of one build", kOrCpu));
  }
  return table;
}

absl::Status check_device(const ModuleTable& module, int device) {
  const char* why = "";
  const int count = module.device_count(&why);
  if (count == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("no GPU can be used: ", why,
                     ": start on a node with an NVIDIA GPU and its driver (nvidia-smi shows them)", kOrCpu));
  }
  if (device >= count) {
    return absl::FailedPreconditionError(
        absl::StrCat("GPU ", device, " was asked for, ", count,
                     " are visible: check CUDA_VISIBLE_DEVICES and start as many ranks on a node as it has GPUs"));
  }
  const DeviceFacts facts = module.device_facts(device);
  if (facts.major < kLeastMajor) {
    return absl::FailedPreconditionError(absl::StrCat("GPU ", device, ", ", facts.name, ", has compute capability ",
                                                      facts.major, ".", facts.minor, ", at least ", kLeastMajor,
                                                      ".0 is needed: use an A100 or newer", kOrCpu));
  }
  return absl::OkStatus();
}

}  // namespace octet::cuda
