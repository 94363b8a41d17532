// Opens the CUDA back end at run time, so that the binary itself needs no CUDA library and starts on any machine.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/module.h"

namespace octet::cuda {

// liboctet_cuda.so in the folder of this process's executable.
std::string module_path();

// The table of the module at `path`; it stays loaded until the process ends. NOT_FOUND: there is no such file.
// FAILED_PRECONDITION: it does not load, or belongs to another build. Every message names the remedy.
absl::StatusOr<const ModuleTable*> open_module(const std::string& path);

// Whether `device` is there and new enough for the module. FAILED_PRECONDITION, with the remedy, where it is not.
absl::Status check_device(const ModuleTable& module, int device);

}  // namespace octet::cuda
