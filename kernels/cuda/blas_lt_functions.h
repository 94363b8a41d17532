// The functions of cuBLASLt that products use, as a table: its header gives types and nothing is linked.
#pragma once

#include <cublasLt.h>

#include <optional>
#include <string>

namespace octet::cuda {

struct BlasLtFunctions {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtDestroy) destroy;
  decltype(&cublasLtMatmulDescCreate) create_matmul;
  decltype(&cublasLtMatmulDescDestroy) destroy_matmul;
  decltype(&cublasLtMatmulDescSetAttribute) set_matmul;
  decltype(&cublasLtMatrixLayoutCreate) create_layout;
  decltype(&cublasLtMatrixLayoutDestroy) destroy_layout;
  decltype(&cublasLtMatmulPreferenceCreate) create_preference;
  decltype(&cublasLtMatmulPreferenceDestroy) destroy_preference;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference;
  decltype(&cublasLtMatmulAlgoGetHeuristic) choose;
  decltype(&cublasLtMatmul) multiply;
};

// Opens the library, which stays open for the life of the process. Empty, with *why set, where it is not to be had.
std::optional<BlasLtFunctions> open_blas_lt_functions(std::string* why);

}  // namespace octet::cuda
