// Where cuBLASLt is looked for. This is the only place that knows.
#if __has_include(<cublasLt.h>)

#include <dlfcn.h>

#include <cstdlib>
#include <vector>

#include "kernels/cuda/blas_lt_functions.h"

namespace octet::cuda {
namespace {

// The library's file, for those who keep it elsewhere.
constexpr const char* kVariable = "OCTET_CUBLASLT_LIBRARY";

// The library of the toolkit that the module was built with first: its driver is there.
std::vector<std::string> names() {
  if (CUDART_VERSION >= 13000) return {"libcublasLt.so.13", "libcublasLt.so.12"};
  return {"libcublasLt.so.12", "libcublasLt.so.13"};
}

std::vector<std::string> candidates() {
  if (const char* const path = std::getenv(kVariable); path != nullptr && *path != '\0') return {path};
  std::vector<std::string> found;
  for (const std::string& name : names()) {
    found.push_back(name);  // wherever the loader looks
    for (const char* const variable : {"CUDA_HOME", "CUDA_PATH"}) {
      const char* const toolkit = std::getenv(variable);
      if (toolkit != nullptr && *toolkit != '\0') found.push_back(std::string(toolkit) + "/lib64/" + name);
    }
    found.push_back("/usr/local/cuda/lib64/" + name);
  }
  return found;
}

// Sets *function to the library's; false if it has none of that name.
template <typename Function>
bool find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

bool find_all(void* library, BlasLtFunctions* functions) {
  return find(library, "cublasLtCreate", &functions->create) && find(library, "cublasLtDestroy", &functions->destroy) &&
         find(library, "cublasLtMatmulDescCreate", &functions->create_matmul) &&
         find(library, "cublasLtMatmulDescDestroy", &functions->destroy_matmul) &&
         find(library, "cublasLtMatmulDescSetAttribute", &functions->set_matmul) &&
         find(library, "cublasLtMatrixLayoutCreate", &functions->create_layout) &&
         find(library, "cublasLtMatrixLayoutDestroy", &functions->destroy_layout) &&
         find(library, "cublasLtMatmulPreferenceCreate", &functions->create_preference) &&
         find(library, "cublasLtMatmulPreferenceDestroy", &functions->destroy_preference) &&
         find(library, "cublasLtMatmulPreferenceSetAttribute", &functions->set_preference) &&
         find(library, "cublasLtMatmulAlgoGetHeuristic", &functions->choose) &&
         find(library, "cublasLtMatmul", &functions->multiply);
}

}  // namespace

std::optional<BlasLtFunctions> open_blas_lt_functions(std::string* why) {
  std::string errors;
  for (const std::string& path : candidates()) {
    BlasLtFunctions functions;
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr && find_all(library, &functions)) return functions;
    const char* const error = dlerror();
    errors += (errors.empty() ? "" : "; ") + (error == nullptr ? path : std::string(error));
  }
  *why = errors + ": install the CUDA toolkit's cuBLAS, or name the library's file in " + kVariable;
  return std::nullopt;
}

}  // namespace octet::cuda

#endif
