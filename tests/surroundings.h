// What tests find around them. Those for GPUs also run from an installation, where launch/gpu_check says what is where.
#pragma once

#include <cstdlib>
#include <string>

namespace octet {

// The variable's value, or what was known when the test was built.
inline std::string variable_or(const char* name, const char* built_in) {
  const char* const value = std::getenv(name);
  return value != nullptr ? value : built_in;
}

// Reference numbers: tests/golden.
inline std::string golden_directory() { return variable_or("OCTET_GOLDEN_DIR", OCTET_GOLDEN_DIR); }

#ifdef OCTET_EMULATED_CUDA
// The CUDA module to be tested: liboctet_cuda.so on a machine with a GPU, else the emulation that was built with the
// test.
inline std::string cuda_module_under_test() { return variable_or("OCTET_CUDA_MODULE", OCTET_EMULATED_CUDA); }
#endif

}  // namespace octet
